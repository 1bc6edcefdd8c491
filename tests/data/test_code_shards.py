"""Code shards: what is cut, what is written, what is read back, and the whole way from signals to codes to signals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from matplotlib.image import imread
from patch_tokenizer import ENTRY, NAME
from synthetic import PLAIN

import zoo.tokenize
from zoo import registry
from zoo.cli import main
from zoo.data.codes import CodeDataset, cut, sensors_of, stored_dtype
from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.store import Dataset
from zoo.detokenize import rebuild
from zoo.errors import ZooError
from zoo.objectives.train_tokenizer import TrainTokenizer
from zoo.tokenize import Chosen, tokenize


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._ENTRIES, NAME, ENTRY)
        yield


@pytest.fixture(scope="module")
def source(prepared: Path) -> Dataset:
    return Dataset.open(prepared)


@pytest.fixture(scope="module")
def levels(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of `quantile` with 1000 levels, of windows of 0.5 s; not to be changed."""
    out = tmp_path_factory.mktemp("codes") / "levels"
    tokenize(prepared, "quantile", out, options={"vocabulary": 1000}, window_seconds=0.5)
    return out


# How recordings are cut


def test_windows_lie_side_by_side_in_one_part_of_the_split(source):
    for recording in range(len(source.recordings)):
        found = cut(source, recording, 30)
        assert found.start
        assert found.left_over == source.recordings[recording].n_samples - 30 * len(found.start)
        assert (np.diff(found.start) >= 30).all()
        for start, split in zip(found.start, found.split, strict=True):
            inside = (source.recording == recording) & (source.start < start + 30)
            inside &= source.start + source.length > start
            assert set(source.split[inside]) == {split}


def test_a_margin_is_kept_at_both_ends_of_a_stretch(source):
    wide = cut(source, 0, 30, margin=10)
    assert wide.start[0] == 10
    assert len(wide.start) < len(cut(source, 0, 30).start)
    assert all(source.read(0, start - 10, start + 40).shape[1] == 50 for start in wide.start)


def test_windows_of_events_are_not_joined(recordings, tmp_path):
    recipe = replace(PLAIN, window=Window(("left", "right"), 0.0, 1.0))
    prepare(recordings, tmp_path / "events", recipe)
    dataset = Dataset.open(tmp_path / "events")
    found = cut(dataset, 0, 40)
    assert found.left_over == 20 * len(found.start) // 2
    assert set(found.label) == {0, 1}


# What is written and read


@pytest.mark.parametrize("kind", ["levels", pytest.param("patches", marks=pytest.mark.slow)])
def test_codes_at_an_address_are_those_in_the_folder(kind, request):
    folder = request.getfixturevalue(kind)
    codes, far = CodeDataset.open(folder), CodeDataset.open(f"file://{folder}")
    for i in range(0, len(codes), 5):
        for here, there in zip(jax.tree.leaves(codes.read(i)), jax.tree.leaves(far.read(i)), strict=True):
            np.testing.assert_array_equal(here, there)
    assert far.variables().keys() == codes.variables().keys()


def test_codes_are_those_of_the_tokenizer_and_where_the_index_says(levels, source):
    codes = CodeDataset.open(levels)
    assert stored_dtype(codes.code_sizes) == np.uint16
    assert (codes.window, codes.hop, codes.margin, codes.run) == (50, 1.0, 0, "")
    tokenizer = TrainTokenizer(**codes.tokenizer).module()
    variables = unflatten_dict(codes.variables(), sep="/")
    for i in np.random.default_rng(0).permutation(len(codes))[:6]:
        recording, start = int(codes.recording[i]), int(codes.start[i])
        signal = source.read(recording, start, start + 50)[None]
        wanted = tokenizer.apply(variables, signal, sensors_of(source, recording, 1), method="encode")
        np.testing.assert_array_equal(codes[i], wanted[0])
        assert codes.grids[recording] == (signal.shape[1], 50)
    bad = next(n for n, each in enumerate(codes.recordings) if each.bads)
    missing = codes[codes.of_recording(bad)[0]].reshape(6, 50)
    assert (missing == -1).all(1).tolist() == [False, False, True, False, False, False]


def test_splits_subjects_and_montages_are_those_of_the_dataset(levels, source):
    codes = CodeDataset.open(levels)
    assert codes.recordings == source.recordings
    assert codes.montages[0].names == source.montages[0].names
    assert list(codes.splits) == list(source.splits)
    assert all(len(records) for records in codes.splits.values())


def test_the_report_counts_tokens_bits_and_codes(levels):
    codes = CodeDataset.open(levels)
    measures = codes.measures
    every = np.concatenate([codes[i].ravel() for i in range(len(codes))])
    every = every[every >= 0]
    assert measures["tokens"] == len(every)
    np.testing.assert_allclose(measures["bits_per_second"], len(every) * np.log2(1000) / (len(codes) * 0.5))
    np.testing.assert_allclose(measures["bits_per_second_of_a_channel"], 100 * np.log2(1000))
    share = np.bincount(every) / len(every)
    np.testing.assert_allclose(
        np.log2(measures["perplexity"][0]), -(share[share > 0] * np.log2(share[share > 0])).sum()
    )
    assert measures["live"] == [np.mean(np.bincount(every, minlength=1000) > 0)]
    assert measures["r2"] > 0.99
    assert set(measures["classes"]["names"]) == {"left", "right"}
    assert {each.name for each in (levels / "plots").iterdir()} == {"reconstruction.png", "usage.png"}
    assert imread(levels / "plots/usage.png").std() > 0.02


def test_what_was_tokenized_is_not_tokenized_again(levels, prepared, capsys, monkeypatch):
    monkeypatch.setattr(zoo.tokenize, "_of_recording", None)
    tokenize(prepared, "quantile", levels, options={"vocabulary": 1000}, window_seconds=0.5)
    out = capsys.readouterr().out
    assert "already tokenized" in out
    assert "codebook   codes  perplexity   live" in out


def test_what_is_stopped_goes_on_where_it_was(prepared, levels, tmp_path, monkeypatch, capsys):
    whole, stopped = zoo.tokenize._of_recording, []

    def stops(*arguments: Any) -> Any:
        if len(stopped) == 3:
            raise KeyboardInterrupt
        stopped.append(arguments[2])
        return whole(*arguments)

    monkeypatch.setattr(zoo.tokenize, "_of_recording", stops)
    command = (prepared, "quantile", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        tokenize(*command, options={"vocabulary": 1000}, window_seconds=0.5)
    assert not (tmp_path / "out/codes.json").exists()
    monkeypatch.undo()
    registry._ENTRIES[NAME] = ENTRY
    kept = sorted((tmp_path / "out/shards").iterdir())[0]
    kept.write_bytes(b"damaged")
    tokenize(*command, options={"vocabulary": 1000}, window_seconds=0.5)
    assert capsys.readouterr().out.count("was tokenized") == 2
    found, wanted = (json.loads((each / "codes.json").read_text()) for each in (tmp_path / "out", levels))
    assert found == wanted


# A tokenizer with a scale, and back to signals


@pytest.fixture(scope="module")
def trained(source) -> Chosen:
    """The patch tokenizer with codebooks set by one batch, as if a run had trained it."""
    task = TrainTokenizer(NAME, {"codes": 300, "levels": 3})
    signal = np.stack([source.read(0, start, start + 40) for start in range(0, 800, 40)])
    batch = {"signal": signal, "sensors": sensors_of(source, 0, len(signal))}
    variables = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    new = jax.jit(task.loss, static_argnums=3)(variables, batch, jax.random.key(1), True)[2]
    return Chosen.of(task, {**variables, **new}, "runs/patches", 7)


@pytest.fixture(scope="module")
def patches(prepared: Path, trained: Chosen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "patches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo.tokenize, "_find", lambda name, options: (trained.task, name, 0.4))
        patch.setattr(zoo.tokenize, "_trained", lambda *_: trained)
        tokenize(prepared, "runs/patches", out, batch_size=16)
    return out


@pytest.mark.slow
def test_rebuilt_signals_are_the_tokenizers_in_the_units_of_the_dataset(patches, source, trained, tmp_path, capsys):
    codes = CodeDataset.open(patches)
    assert (codes.run, codes.step, codes.hop, codes.code_sizes) == ("runs/patches", 7, 10.0, (300,) * 3)
    again = rebuild(patches, tmp_path / "again", batch_size=16)
    assert len(again) == len(codes)
    for recording in (0, 3, 5):
        start = int(codes.start[codes.of_recording(recording)[2]])
        signal, sensors = source.read(recording, start, start + 40)[None], sensors_of(source, recording, 1)
        wanted = trained.tokenizer.apply(trained.variables, signal, sensors).reconstruction[0]
        assert np.abs(wanted).max() > 5
        np.testing.assert_allclose(again.read(recording, start, start + 40), wanted, rtol=1e-4, atol=1e-4)
    for name in again.splits:
        np.testing.assert_array_equal(again.splits[name], codes.splits[name])
    assert again.recordings == source.recordings
    rebuild(patches, tmp_path / "again")
    assert "already rebuilt" in capsys.readouterr().out


@pytest.mark.slow
def test_a_margin_gives_the_codes_and_signals_of_a_whole_recording(prepared, source, trained, tmp_path, monkeypatch):
    """With frames that see no neighbours, cut with a margin or not, codes of a sample are the same."""
    tokenizer = trained.tokenizer.clone()
    object.__setattr__(tokenizer, "margin", 10)
    task = TrainTokenizer("with_margin")
    monkeypatch.setattr(TrainTokenizer, "module", lambda self: tokenizer)
    chosen = Chosen.of(task, trained.variables, "runs/margin", 1)
    monkeypatch.setattr(zoo.tokenize, "_find", lambda name, options: (task, name, 0.4))
    monkeypatch.setattr(zoo.tokenize, "_trained", lambda *_: chosen)
    codes = tokenize(prepared, "runs/margin", tmp_path / "margin")
    i = int(codes.of_recording(0)[1])
    start = int(codes.start[i])
    signal = source.read(0, start - 10, start + 50)[None]
    wanted = tokenizer.apply(trained.variables, signal, sensors_of(source, 0, 1), method="encode")
    np.testing.assert_array_equal(codes[i].reshape(6, 4, 3), np.asarray(wanted).reshape(6, 6, 3)[:, 1:-1])


def test_exported_weights_tokenize_with_their_own_options_and_window(source, tmp_path):
    tokenizer = zoo.create("ephys_tokenizer_tiny", units=4, vocabulary=7, wave=4, margin=2, rate_hz=None)
    shapes = nn.meta.unbox(jax.eval_shape(tokenizer.init, jax.random.key(0), *tokenizer.example()))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    zoo.export(tokenizer, variables, tmp_path / "weights", window_seconds=0.3)
    arguments = [source.path, "--tokenizer", tmp_path / "weights", tmp_path / "codes"]
    assert main(["tokenize", *map(str, arguments)]) == 0
    codes = CodeDataset.open(tmp_path / "codes")
    assert (codes.window, codes.margin, codes.run, codes.step) == (30, 2, str(tmp_path / "weights"), None)
    assert TrainTokenizer(**codes.tokenizer).module() == tokenizer
    recording, start = int(codes.recording[3]), int(codes.start[3])
    signal = source.read(recording, start - 2, start + 32)[None]
    wanted = tokenizer.apply(jax.tree.map(jnp.asarray, variables), signal, sensors_of(source, recording, 1)).codes[0]
    np.testing.assert_array_equal(codes[3], wanted.reshape(len(signal[0]), 34)[:, 2:32].reshape(-1, 1))


# What is refused


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(each) for each in arguments]) == 2
        said = capfd.readouterr().err
        assert re.fullmatch(r"zoo: [^\n]+\n", said), said
        return said

    return run


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--tokenizer", "mu_lwa"], "no model is called 'mu_lwa'; the nearest name is 'mu_law'"),
        (["--tokenizer", "labram_tiny"], "labram_tiny is not a tokenizer"),
        (["--tokenizer", NAME], "patch_tokenizer must be trained first: `zoo train` a configuration"),
        (["--tokenizer", "runs/absent"], "runs/absent: not a run's folder"),
        (["--tokenizer", "iclabel_base.pretrained", "--options", "units", "3"], "have their own"),
        (["--tokenizer"], "--tokenizer wants a name"),
        ([], "usage: zoo tokenize DATASET --tokenizer NAME OUT"),
        (["--tokenizer", "mu_law", "--window-seconds", "0"], "got a window of 0 samples"),
        (["--tokenizer", "mu_law", "--window-seconds", "60"], "no stretch of signal has the 6000 samples of a window"),
        (["--tokenizer", "mu_law", "--batch-size", "0"], "batch_size: got 0, wanted 1 or more"),
        (["--tokenizer", "mu_law", "--window", "1"], "unknown option --window; the nearest is --window-seconds"),
        (["--tokenizer", "mu_law", "--options", "vocabluary", "16"], "no option 'vocabluary'; the nearest is 'vocab"),
        (["--tokenizer", "mu_law", "--options", "vocabulary", "2"], "vocabulary: got 2, wanted at least 4"),
    ],
)
def test_what_cannot_be_tokenized_gets_one_line(options, cause, refused, prepared, tmp_path):
    assert cause in refused("tokenize", prepared, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else(refused, prepared, levels, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "full: exists and is not a folder of zoo tokenize" in refused(
        "tokenize", prepared, "--tokenizer", "mu_law", tmp_path / "full"
    )
    said = refused("tokenize", prepared, "--tokenizer", "mu_law", levels)
    assert "levels: holds other codes ('quantile'; they differ in name, options, variables, window)" in said
    assert "absent: no such folder; wanted a dataset made by zoo prepare" in refused(
        "tokenize", tmp_path / "absent", "--tokenizer", "mu_law", tmp_path / "out"
    )
    assert "no codes.json in it" in refused("tokenize", "--decode", prepared, tmp_path / "out")


def test_recordings_that_the_tokenizer_does_not_take(prepared, trained, tmp_path, monkeypatch):
    for options, cause in (({"rate": 250.0}, "got a signal at 100 Hz, wanted 250 Hz"), ({"patch": 7}, "multiple of 7")):
        task = TrainTokenizer(NAME, options)
        monkeypatch.setattr(zoo.tokenize, "_find", lambda name, _, task=task: (task, name, 0.4))
        with pytest.raises(ZooError, match=cause):
            tokenize(prepared, "runs/other", tmp_path / "out")


def test_damaged_codes_are_named(levels, tmp_path):
    shutil.copytree(levels, tmp_path / "copy")
    shard = sorted((tmp_path / "copy/shards").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[9000] ^= 0xFF
    shard.write_bytes(content)
    codes = CodeDataset.open(tmp_path / "copy")
    with pytest.raises(ZooError, match=rf"{shard.name}: record \d+ "):
        [codes[i] for i in codes.of_recording(0)]
    (tmp_path / "copy/tokenizer.npz").write_bytes(b"no")
    with pytest.raises(ZooError, match=r"tokenizer\.npz: its checksum is not the one in codes\.json"):
        codes.variables()


# Through the real command


def test_the_command_tells_what_it_did(prepared, tmp_path, capsys):
    out, back = tmp_path / "codes", tmp_path / "back"
    command = ["tokenize", str(prepared), "--tokenizer", "mu_law", str(out), "--options", "vocabulary", "64"]
    assert main([*command, "--window-seconds", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "tokenized sub-s1_task-noise_run-1_eeg (1 of 6)" in said
    assert re.search(r"\d+ samples \([\d.]+ s\) at the ends of stretches fill no window", said)
    assert "windows of 0.3 s" in said
    assert "bits told of the class" in said
    assert main(["tokenize", "--decode", str(out), str(back)]) == 0
    assert len(Dataset.open(back)) == len(CodeDataset.open(out))
    assert Dataset.open(back).rate_hz == 100.0
