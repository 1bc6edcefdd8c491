"""Published weights: found, checked against their cards, and what they do."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from published import drawn, written

import zoo
import zoo.run
from zoo.cli import main
from zoo.data.recipes import RECIPES
from zoo.data.samples import SAMPLES
from zoo.encoders.encoder import LinearHead
from zoo.errors import ZooError
from zoo.objectives.supervised import Supervised
from zoo.registry import entry
from zoo.tokenizers import meg_gpt
from zoo.types import Sensors
from zoo.weights import cards, load
from zoo.weights.cards import PRETRAINED, Download, Hub, InSample, Pretrained
from zoo.weights.convert import key_map
from zoo.weights.files import write

OPTIONS = {"units": 8, "wave": 4, "vocabulary": 6}
TOKENIZER = zoo.create("ephys_tokenizer", **OPTIONS)
SHARED = Path(os.environ.get("BRAIN_ZOO_WEIGHTS") or Path(__file__).parents[3] / "shared/weights")


@pytest.mark.parametrize("card", PRETRAINED.values(), ids=PRETRAINED)
def test_every_card_is_whole(card):
    assert card.name.startswith(card.arch + ".")
    assert all((card.about, card.licence, card.paper, card.source.file))
    assert len(bytes.fromhex(card.sha256)) == 32
    assert not card.recipe or card.recipe in RECIPES
    assert set(card.options) <= set(entry(card.arch).constructor.__dataclass_fields__)
    assert key_map(card.arch, card.classes, card.keys)
    if isinstance(card.source, InSample):
        assert card.source.sample in SAMPLES


@pytest.fixture
def published(tmp_path, monkeypatch) -> tuple[Pretrained, Path]:
    """A card of small weights of a file that lies somewhere, and an empty cache."""
    monkeypatch.setenv("BRAIN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BRAIN_ZOO_WEIGHTS", raising=False)
    file = tmp_path / "far/tokenizer.safetensors"
    tensors = written(meg_gpt.KEYS, drawn(TOKENIZER)) | {"token_weights_layer._temperature": np.array(0.001)}
    write(file, tensors)
    card = Pretrained(
        "ephys_tokenizer.small",
        "nothing",
        "ephys_tokenizer",
        Download(file.as_uri(), file.name),
        sha256(file.read_bytes()).hexdigest(),
        "MIT",
        "none",
        OPTIONS,
    )
    monkeypatch.setitem(cards.PRETRAINED, card.name, card)
    return card, file


def right(found) -> bool:
    module, variables = found
    wanted = drawn(TOKENIZER)["params"]
    same = jax.tree.map(lambda *pair: np.array_equal(*map(np.asarray, pair)), variables["params"], wanted)
    return module == TOKENIZER and all(jax.tree.leaves(same)) and variables["schedule"]["step"] == 0


def test_a_file_is_downloaded_once_and_kept(published):
    card, file = published
    assert right(zoo.load(card.name))
    file.unlink()
    assert right(zoo.load(card.name))
    kept = load.cache_folder() / "weights"
    assert [each.name for each in kept.iterdir()] == [file.name]


def test_a_file_of_ones_own_is_taken_from_its_place(published, monkeypatch, tmp_path):
    card, file = published
    assert right(zoo.load(card.name, source=file))
    assert right(zoo.load(card.name, source=file.parent))
    monkeypatch.setenv("BRAIN_ZOO_WEIGHTS", str(file.parent))
    assert right(zoo.load(card.name))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ZooError, match="a source is for published weights only"):
        zoo.load("runs/small", source=file)


def test_another_file_of_that_name_is_refused_and_not_kept(published):
    card, file = published
    write(file, {"a": np.zeros(3)})
    with pytest.raises(ZooError, match=f"wanted {card.sha256}"):
        zoo.load(card.name, source=file)
    with pytest.raises(ZooError, match=f"wanted {card.sha256}"):
        zoo.load(card.name)
    assert not list((load.cache_folder() / "weights").iterdir())


def test_without_a_network_one_line_says_what_to_do(published):
    card, file = published
    file.unlink()
    with pytest.raises(ZooError, match="get it another way and put it into ") as caught:
        zoo.load(card.name)
    assert "\n" not in str(caught.value)


def test_a_sample_and_the_hub_give_files_too(published, monkeypatch):
    card, file = published
    asked = []
    monkeypatch.setattr(load, "fetch", lambda name: asked.append(name) or file.parent)
    monkeypatch.setitem(cards.PRETRAINED, card.name, replace(card, source=InSample("some", file.name)))
    assert right(zoo.load(card.name))

    def from_hub(*given, **options):
        asked.append((*given, options["revision"]))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_hub)
    hub = Hub("someone/tokenizers", "deep/tokenizer.safetensors", "abc")
    monkeypatch.setitem(cards.PRETRAINED, card.name, replace(card, source=hub))
    assert right(zoo.load(card.name))
    assert asked == ["some", ("someone/tokenizers", "deep/tokenizer.safetensors", "abc")]


def test_an_exported_folder_on_the_hub(published, monkeypatch, tmp_path):
    card, _ = published
    folder = zoo.export(*zoo.load(card.name), tmp_path / "snapshot")
    asked = []

    def snapshot(*given, **options):
        asked.append((*given, options["revision"], options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert right(zoo.load("hf:someone/tokenizer@v2"))
    assert asked == [("someone/tokenizer", "v2", ["config.json", "model.safetensors"])]


@pytest.mark.parametrize("name", ["hf:someone/tokenizer", "hf:not/a/repository"])
def test_no_hub_one_line(name, monkeypatch, tmp_path):
    def offline(repository, **options):
        huggingface_hub.utils.validate_repo_id(repository)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network,\nand not in the cache")

    monkeypatch.setenv("BRAIN_ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ZooError, match="cannot be had from the hub: ") as caught:
        zoo.load(name)
    assert "\n" not in str(caught.value)


def test_a_run_from_labels_gives_its_classifier_too(monkeypatch, tmp_path):
    task = Supervised("labram_tiny", {"depth": 1}, classes=3)
    encoder, head = drawn(task.encoder()), drawn(LinearHead(3), np.zeros((1, 100), np.float32))
    data = SimpleNamespace(recipe=RECIPES["labram"], window_seconds=2.0)
    trained = SimpleNamespace(task=task, data=data), {"encoder": encoder["params"], "head": head["params"]}, {}
    monkeypatch.setattr(zoo.run, "trained_parameters", lambda folder, step=None: trained)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.py").touch()
    found = load.load_weights(tmp_path / "run")
    assert (found.name, found.classes, found.recipe.name, found.window_seconds) == ("run", 3, "labram", 2.0)
    classifier, variables = zoo.load_head(tmp_path / "run")
    assert classifier == task.encoder().head(3)
    jax.tree.map(np.testing.assert_array_equal, variables, head)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("tfm_encoder.tuve", "no weights are called 'tfm_encoder.tuve'; the nearest are 'tfm_encoder.tuev'"),
        ("runs/absent", r"runs/absent: not a run's folder \(no config.py in it\), nor an exported one"),
    ],
)
def test_what_is_not_there(name, cause):
    with pytest.raises(ZooError, match=cause):
        zoo.load(name)


def test_the_command_line_tells_of_weights(capsys):
    assert main(["list", "tuev"]) == 0
    assert "weights:\n  tfm_encoder.tuev       trained on EEG events of TUEV" in capsys.readouterr().out
    assert main(["info", "tfm_encoder.tuev"]) == 0
    said = capsys.readouterr().out
    assert all(
        line in said for line in ("classifier 6 classes\n", "licence    MIT\n", PRETRAINED["tfm_encoder.tuev"].sha256)
    )


def shared(name: str) -> Path:
    """The file of a card where others share it, or a skip that says why not."""
    pytest.importorskip("torch", reason="PyTorch reads these weights")
    file = SHARED / PRETRAINED[name].source.file
    if not file.is_file():
        pytest.skip(f"no {file.name} in {SHARED} (BRAIN_ZOO_WEIGHTS names another folder)")
    return file


def test_the_released_tokenizer_of_meg_gpt_explains_a_signal_that_it_never_saw():
    tokenizer, variables = zoo.load("ephys_tokenizer.pretrained", source=shared("ephys_tokenizer.pretrained"))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 231_040
    rng = np.random.default_rng(0)
    waves = np.sin(rng.uniform(0.1, 0.6, (2, 3, 1)) * np.arange(200)) + 0.4 * rng.normal(size=(2, 3, 200))
    signal = ((waves - waves.mean(-1, keepdims=True)) / waves.std(-1, keepdims=True)).astype(np.float32)
    blank, zero = np.zeros((2, 3, 3), np.float32), np.zeros((2, 3), np.int32)
    sensors = Sensors(blank, blank, zero, zero, np.ones((2, 3), bool))
    rebuilt = tokenizer.apply(variables, signal, sensors).reconstruction
    assert 1 - np.square(rebuilt - signal).sum() / np.square(signal).sum() > 0.9


def test_the_released_encoder_of_tfm_reads_codes_into_the_six_classes():
    """That its numbers are the authors' is in tests/parity/test_tfm_encoder_official.py."""
    file = shared("tfm_encoder.tuev")
    found = load.load_weights("tfm_encoder.tuev", source=file)
    assert found.lacks == ("tokenizer",)
    codes = np.random.default_rng(0).integers(0, 8192, (2, 16, 9)).astype(np.int32)
    pooled = found.module.apply(found.variables, codes, method="read").pooled
    head, variables = zoo.load_head("tfm_encoder.tuev", source=file)
    assert head.apply(variables, pooled).shape == (2, 6)
