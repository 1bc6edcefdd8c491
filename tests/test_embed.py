"""`zoo embed`: a recording in, features of its windows out, each with its time."""

from __future__ import annotations

import importlib
import json

import edfio
import flax.linen as nn
import jax
import numpy as np
import pytest

import zoo
from zoo.cli import main
from zoo.data.readers import discover, read
from zoo.data.recipes import RECIPES
from zoo.data.signals import process
from zoo.embed import embed
from zoo.encoders.encoder import blank
from zoo.errors import ZooError
from zoo.weights.load import load_weights

RATE, SECONDS = 256, 11
CAP = ("FP1", "FP2", "C3", "CZ", "C4", "O1", "O2", "PZ")
EEGNET = {"channels": CAP, "samples": 200}


def recording(path, rows, names=CAP):
    signals = [
        edfio.EdfSignal(row, RATE, label=name, physical_dimension="uV", physical_range=(-200, 200))
        for row, name in zip(rows, names, strict=True)
    ]
    edfio.Edf(signals).write(path)
    return path


def noise(channels: int = len(CAP)) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 20, (channels, SECONDS * RATE)).clip(-199, 199)


def drawn(module) -> dict:
    """Variables of a module at random, large enough that its features vary."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *module.example()))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape) ** 2).astype(leaf.dtype), dict(shapes))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with weights of two encoders, one that takes any electrodes and one that wants a cap, and recordings."""
    place = tmp_path_factory.mktemp("embed")
    recording(place / "rest.edf", noise())
    recording(place / "turned.edf", noise()[::-1], CAP[::-1])
    recording(place / "short.edf", noise()[:, :RATE])
    recording(place / "more.edf", noise(10), (*CAP, "F3", "F4"))
    options = {"recipe": RECIPES["labram"], "window_seconds": 1.0}
    for name, model in (
        ("labram", zoo.create("labram_tiny", depth=1)),
        ("eegnet", zoo.create("eegnet_tiny", **EEGNET)),
    ):
        zoo.export(model, drawn(model), place / name, **options)
    zoo.export(model, drawn(model), place / "bare")
    return place


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def by_hand(file, name, starts) -> np.ndarray:
    """Features of one window of 200 samples at a time."""
    encoder, variables = zoo.load(name)
    (source,) = discover(file)
    signal = process(read(source), RECIPES["labram"], "file").signal
    _, sensors = blank(CAP, 200)
    encode = jax.jit(lambda window: encoder.apply(variables, window, sensors).pooled[0])
    return np.stack([encode(signal[None, :, start : start + 200]) for start in starts])


def test_features_are_those_of_each_window_and_come_with_their_times(there, capsys):
    command = ["embed", "rest.edf", "--model", "labram", "--hop", "0.4", "--batch-size", "10", "--tokens"]
    assert main([*command, "--out", "some.npz"]) == 0
    assert "some.npz: 26 windows of 1 s of 8 channels, 100 features each" in capsys.readouterr().out
    with np.load("some.npz", allow_pickle=False) as file:
        found = dict(file)
    starts = 80 * np.arange(26)
    np.testing.assert_array_equal(found["start_seconds"], starts / 200)
    np.testing.assert_array_equal(found["stop_seconds"], (starts + 200) / 200)
    np.testing.assert_allclose(found["features"], by_hand("rest.edf", "labram", starts), rtol=0, atol=1e-5)
    assert found["features"].dtype == np.float32
    assert found["tokens"].shape == (26, 8, 100)
    assert found["valid"].all()
    assert found["channels"].tolist() == list(CAP)
    assert set(found["recording"]) == {"rest"}
    assert (str(found["model"]), float(found["rate_hz"])) == ("labram", 200)
    assert json.loads(str(found["recipe"])) == RECIPES["labram"].to_json()
    assert len(str(found["weights_sha256"])) == 64
    assert main([*command, "--out", "some.npz"]) == 2
    assert "some.npz: exists" in capsys.readouterr().err


def test_a_table_has_a_row_a_window(there):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes .parquet")
    assert main(["embed", "rest.edf", "--model", "eegnet", "--out", "some.parquet"]) == 0
    table, (encoder, _) = parquet.read_table("some.parquet"), zoo.load("eegnet")
    names = [f"feature_{column:03d}" for column in range(encoder.features)]
    assert table.column_names == ["recording", "start_seconds", "stop_seconds", *names]
    assert table["start_seconds"].to_pylist() == list(range(SECONDS))
    found = np.stack([table[name].to_numpy() for name in names], axis=1)
    wanted = by_hand("rest.edf", "eegnet", 200 * np.arange(SECONDS))
    close = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=close)
    assert np.abs(found[:, ::-1] - wanted).max() > 100 * close
    assert json.loads(table.schema.metadata[b"channels"]) == list(CAP)
    assert len(table.schema.metadata[b"weights_sha256"]) == 64


def test_channels_in_another_order_are_refused_or_led_there(there):
    with pytest.raises(ZooError, match=r"wanted channels FP1, .* has them in another order: PZ, O2"):
        embed("turned.edf", "eegnet")
    with pytest.raises(ZooError, match="the recording has also F3, F4"):
        embed("more.edf", "eegnet")
    straight = embed("rest.edf", "eegnet").features
    led = embed("turned.edf", "eegnet", channels="interpolate").features
    # A spline with MNE's regulariser gives back to about one in a thousand what it is put through.
    np.testing.assert_allclose(led, straight, rtol=0, atol=1e-2 * np.abs(straight).max())


def test_several_recordings_of_the_same_channels(there, tmp_path):
    for name in ("a", "b"):
        recording(tmp_path / f"{name}.edf", noise())
    found = embed(tmp_path, load_weights("eegnet"), hop=2.0)
    assert found.recording.tolist() == ["a"] * 6 + ["b"] * 6
    np.testing.assert_array_equal(found.features[:6], found.features[6:])
    recording(tmp_path / "c.edf", noise()[:2], CAP[:2])
    with pytest.raises(ZooError, match=r"c\.edf: its channels are not those of a"):
        embed(tmp_path, load_weights("eegnet"))


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["rest.edf"], "wanted --model NAME"),
        (["rest.edf", "--model", "absent"], "no weights are called 'absent'"),
        (["absent.edf", "--model", "labram"], "absent.edf: no such file"),
        (["short.edf", "--model", "labram", "--window", "2"], "short.edf: 1 s are too short for a window of 2 s"),
        (["rest.edf", "--model", "labram", "--recipe", "neurovq"], "the nearest is 'neurorvq'"),
        (["rest.edf", "--model", "labram", "--recipe", "eegpt"], "got a signal at 256 Hz, wanted 200 Hz"),
        (["rest.edf", "--model", "labram", "--recipe", "meg_gpt"], "its channels are eeg, wanted roi"),
        (["rest.edf", "--model", "labram", "--window", "0.3"], "patches of 200 samples, got 60 samples"),
        (["rest.edf", "--model", "labram", "--hop", "0"], "wanted more than none"),
        (["rest.edf", "--model", "labram", "--subject", "1"], "it has no layer for each"),
        (["rest.edf", "--model", "labram", "--tokenizer", "x"], "it lacks no tokenizer"),
        (["rest.edf", "--model", "labram", "--channels", "nearest"], "wanted one of identity, interpolate"),
        (["rest.edf", "--model", "labram", "--channels", "interpolate"], "it wants no channels by name"),
        (["rest.edf", "--model", "labram", "--out", "x.csv"], "x.csv: wanted a file that ends in .npz or .parquet"),
        (["rest.edf", "--model", "labram", "--out", "x.parquet", "--tokens"], "no place for tokens"),
        (["rest.edf", "--model", "labram", "--hopp", "1"], "unknown option --hopp; the nearest is --hop"),
        (["rest.edf", "--model", "labram", "--recipe.notch-hz", "300"], "notch_hz 300 of recipe 'labram' is not below"),
        (["rest.edf", "--model=labram", "--recipe=eegpt"], "got a signal at 256 Hz, wanted 200 Hz"),
        (["rest.edf", "--model", "bare"], "bare: no recipe is known"),
        (["rest.edf", "--model", "bare", "--recipe", "labram"], "bare: no window is known"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, cause, there, capsys):
    before = {each.name for each in there.iterdir()}
    assert main(["embed", *arguments]) == 2
    said = capsys.readouterr().err
    assert cause in said
    assert said.count("\n") == 1
    assert {each.name for each in there.iterdir()} == before


def test_no_pyarrow_one_line(there, monkeypatch, capsys):
    real = importlib.import_module

    def without(name):
        if name == "pyarrow":
            raise ImportError
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["embed", "rest.edf", "--model", "labram", "--out", "x.parquet"]) == 2
    assert "pip install 'brain-zoo[parquet]'" in capsys.readouterr().err


def test_what_is_no_encoder(there, tmp_path):
    tokenizer = zoo.create("ephys_tokenizer_tiny", units=8, wave=4)
    zoo.export(tokenizer, drawn(tokenizer), tmp_path / "tokenizer", recipe=RECIPES["meg_gpt"])
    with pytest.raises(ZooError, match="a tokenizer gives codes"):
        embed("rest.edf", tmp_path / "tokenizer")


def test_load_embed_probe(tmp_path):
    """What a neuroscientist does: eyes closed or open, from ten seconds of each, with whatever encoder there is."""
    rng = np.random.default_rng(1)
    time = np.arange(20 * RATE) / RATE
    closed = time < 10
    alpha = 60 * np.sin(2 * np.pi * 10 * time) * closed
    file = recording(tmp_path / "eyes.edf", (alpha + rng.normal(0, 10, (8, len(time)))).clip(-199, 199))
    encoder = zoo.create("labram_tiny", depth=1)
    zoo.export(encoder, drawn(encoder), tmp_path / "mine", recipe=RECIPES["labram"], window_seconds=1.0)

    found = embed(file, tmp_path / "mine")

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    is_closed = found.stop_seconds <= 10
    scores = cross_val_score(LogisticRegression(max_iter=1000), found.features, is_closed, cv=5)
    assert scores.mean() > 0.9
