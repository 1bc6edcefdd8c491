"""`zoo convert`: a file of another framework becomes a folder of ours, whole, or nothing does."""

from __future__ import annotations

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from published import drawn, written

import zoo
from zoo.cli import main
from zoo.encoders import tfm
from zoo.encoders.encoder import LinearHead
from zoo.errors import ZooError
from zoo.weights.convert import Options, key_map, literal
from zoo.weights.files import read, write
from zoo.weights.load import load_weights

OPTIONS = {"tokenizer_options": {"codes": 16}, "codes": 16, "depth": 1, "channels": ("C3", "C4")}
ARGUMENTS = [word for name, value in OPTIONS.items() for word in (name, str(value))]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(variables of a small TFM encoder, of its classifier of 3, the file that PyTorch would have written)."""
    encoder = zoo.create("tfm_encoder_tiny", **OPTIONS)
    params = {"params": drawn(encoder)["params"]}
    head = drawn(LinearHead(3), np.zeros((1, 64), np.float32))
    file = written(tfm.KEYS, params) | written(tfm.HEAD_KEYS, head) | {"index": np.arange(16)}
    path = tmp_path_factory.mktemp("published") / "encoder.safetensors"
    write(path, {**file, "temporal_pos_embed.pe": np.zeros((1, 10, 64))})
    return params, head, path


def run(source, out, *more) -> int:
    return main(["convert", str(source), str(out), "--arch", "tfm_encoder_tiny", "--option", *ARGUMENTS, *more])


def same(found, wanted):
    jax.tree.map(
        lambda *pair: np.testing.assert_array_equal(*pair, strict=True), jax.tree.map(np.asarray, found), wanted
    )


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """(the folder made of that file, what the command said)."""
    out = tmp_path_factory.mktemp("converted") / "deep/out"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert (
            run(published[2], out, "--head", "3", "--recipe", "tfm", "--window-seconds", "5", "--licence", "MIT") == 0
        )
    return out, said.getvalue()


def test_a_file_becomes_a_folder_that_loads(published, converted):
    params, head, _ = published
    out, said = converted
    assert "20 tensors in the file: 18 taken" in said
    assert "18 leaves in the model: 18 filled, 0 as made" in said
    assert "the model needs variables of its tokenizer as well" in said
    names = {"config.json", "model.safetensors", "README.md", "ledger.json", "ledger.txt"}
    assert {each.name for each in out.iterdir()} == names
    assert {each.name for each in out.parent.iterdir()} == {"out"}

    found = load_weights(out)
    assert found.module == zoo.create("tfm_encoder_tiny", **OPTIONS)
    same(found.variables, params)
    same(found.head, head)
    assert found.module.head(found.classes) == LinearHead(3)

    config = json.loads((out / "config.json").read_text())
    assert (config["arch"], config["classes"], config["lacks"]) == ("tfm_encoder_tiny", 3, ["tokenizer"])
    assert config["input"]["channels"] == ["C3", "C4"]
    assert config["input"]["recipe"]["name"] == "tfm"
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "| Classifier | 3 classes |" in card


def test_the_ledger_has_a_line_for_every_tensor_and_every_leaf(published, converted):
    path, out = published[2], converted[0]
    rows = json.loads((out / "ledger.json").read_text())
    assert {row["source"] for row in rows} == set(read(path))
    ours = {row["target"].partition("[")[0] for row in rows} - {""}
    assert ours == set(read(out / "model.safetensors"))
    row = next(each for each in rows if each["source"] == "classification_head.weight")
    assert (row["source_shape"], row["target"], row["done"]) == ([3, 64], "head/params/linear/kernel", "o i -> i o")
    assert row["norm"] == pytest.approx(np.linalg.norm(read(path)["classification_head.weight"]))
    lines = (out / "ledger.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("LAT.layers.layers.0.")]) == 13
    assert any(line.startswith("index") and line.endswith("left out: the numbers 0 to 15") for line in lines)


def test_what_does_not_fit_is_all_listed_and_nothing_is_written(published, tmp_path, capsys):
    _, _, path = published
    broken = read(path)
    broken["cls_token"] = broken["cls_token"][..., :-1]
    del broken["channel_embed.weight"]
    broken["LAT.layers.layers.1.0.norm.weight"] = np.ones(64)
    write(tmp_path / "broken.safetensors", broken)
    assert run(tmp_path / "broken.safetensors", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "zoo: weights do not fit, 6 mismatches:"
    for cause in (
        "missing tensor channel_embed.weight (for params/model/embed_channel)",
        "cls_token [1, 1, 63], moved as '1 1 d -> d': wanted params/model/embed_cls [64]",
        "attention_norm/scale has 1 layers, got one more, number 1",
        "extra tensor classification_head.weight [3, 64]: nothing here takes it",
        "extra tensor classification_head.bias [3]: nothing here takes it",
        "params/model/embed_channel [16, 64]: no tensor fills it",
    ):
        assert sum(cause in line for line in said) == 1, cause
    assert {each.name for each in tmp_path.iterdir()} == {"broken.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["absent.npz", "out", "--arch", "tfm_encoder_tiny"], "absent.npz: no such file"),
        (["absent.npz", "out"], "wanted --arch NAME"),
        (["absent.npz", "out", "--arch", "tfm_encoder_tiny", "--option", "dept", "3"], "the nearest is 'depth'"),
        (["absent.npz", "out", "--arch", "tfm_encoder_tiny", "--recipe", "tmf"], "the nearest is 'tfm'"),
        (["absent.npz", "out", "--arch", "labrum_base"], "the nearest name is 'labram_base'"),
        (["absent.npz"], "usage: zoo convert SOURCE OUT"),
        (["absent.npz", "out", "--arhc", "x"], "unknown option --arhc; the nearest is --arch"),
        (["tfm_encoder.tuev", "out", "--head", "3"], "published weights have options of their own"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(arguments, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert cause in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_map_and_a_folder_that_is_taken(published, tmp_path, capsys):
    _, _, path = published
    assert main(["convert", str(path), str(tmp_path / "out"), "--arch", "mamba_130m"]) == 2
    assert "mamba_130m: no key map KEYS in zoo.encoders.sequence" in capsys.readouterr().err
    (tmp_path / "mine").write_text("mine")
    assert run(path, tmp_path, "--head", "3") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_a_model_may_have_several_maps():
    ours, theirs = key_map("labram_tiny", 2), key_map("labram_tiny", 2, "braindecode")
    assert {rule.target for rule in ours} == {rule.target for rule in theirs}
    assert "params/head/linear/bias" in {rule.target for rule in theirs}
    assert {rule.source for rule in ours} != {rule.source for rule in theirs}
    # PRETRAINED_KEYS have no head of their own: that of KEYS.
    assert key_map("labram_tiny", 2, "pretrained")[-2:] == ours[-2:]
    with pytest.raises(ZooError, match=r"no key map TIMM_KEYS in zoo\.encoders\.labram; it has KEYS, HEAD_KEYS, "):
        key_map("labram_tiny", 2, "timm")


def test_options_are_python_values_where_they_can_be():
    assert [literal(text) for text in ("3", "1e-3", "True", "('C3', 'C4')", "gelu")] == [
        3,
        1e-3,
        True,
        ("C3", "C4"),
        "gelu",
    ]
    assert Options() == Options(option={})
