"""Reading collectives out of a compiled program."""

import importlib.util

import pytest

from benchmarks import collectives

HLO = """
  %collective-permute.3 = f32[1,16,128,128]{3,2,1,0} collective-permute(%add.1), channel_id=1
  %collective-permute-start = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=2
  %collective-permute-done = f32[2,8]{1,0} collective-permute-done(%collective-permute-start)
  %all-gather.7 = bf16[1,65536,16,128]{3,2,1,0} all-gather(%q), dimensions={1}
  ROOT %all-reduce = f32[] all-reduce(%x), to_apply=%add
"""


def test_collectives_are_found_with_their_sizes():
    assert collectives.moved(HLO) == {
        "collective-permute": [16 * 128 * 128, 16],
        "all-gather": [65536 * 16 * 128],
        "all-reduce": [1],
    }


def test_what_is_missing_is_named(capsys):
    assert collectives.main(["--topologie", "v5e:4x4"]) == 2
    assert "--topology" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_libtpu_is_asked_for(capsys):
    assert collectives.main([]) == 2
    assert "pip install 'brain-zoo[aot]'" in capsys.readouterr().err
