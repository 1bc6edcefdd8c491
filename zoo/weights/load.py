"""Trained weights by name, by folder or from the hub: `zoo.load` and all that it knows.

Published files lie in $BRAIN_ZOO_WEIGHTS or in `weights/` of the cache ($BRAIN_ZOO_CACHE, or ~/.cache/brain-zoo), where
they are put the first time; each must have the sha256 of its card.
"""

from __future__ import annotations

import os
import shutil
import urllib.request
from pathlib import Path

import flax.linen as nn

from zoo.data.fetch import cache_folder, fetch
from zoo.data.recipes import RECIPES
from zoo.data.store import disk_errors, file_sha256
from zoo.errors import ZooError
from zoo.registry import create
from zoo.types import Variables
from zoo.weights.cards import PRETRAINED, Download, Hub, InSample, Pretrained, pretrained
from zoo.weights.convert import carried
from zoo.weights.files import read
from zoo.weights.folder import CONFIG, TENSORS, Weights, part_of, read_folder
from zoo.weights.keys import Row

HUB = "hf:"
SECONDS = 60


def load(name: str | Path, *, source: str | Path = "") -> tuple[nn.Module, Variables]:
    """A module and its trained variables; `zoo.load`.

    name    published weights (`arch_size.tag`, see `zoo list`), a run's folder (`runs/NAME`), an exported folder, or
            one of the Hugging Face hub (`hf:owner/repository`, `hf:owner/repository@revision`)
    source  of published weights: their file, or the folder it is in, wherever you have it

    Use: `module, variables = zoo.load("runs/quickstart")`, then `module.apply(variables, signal, sensors)`. Raises
    ZooError when there is nothing of that name, no way to get it, or not what it should be.
    """
    found = load_weights(name, source=source)
    return found.module, found.variables


def load_head(name: str | Path, *, source: str | Path = "") -> tuple[nn.Module, Variables]:
    """The classifier that was published or exported beside an encoder, and its variables: pooled [B, D] → [B, K]."""
    found = load_weights(name, source=source)
    if not found.classes:
        raise ZooError(f"{name}: no classifier came with these weights")
    module: nn.Module = found.module.head(found.classes)
    return module, found.head


def load_weights(name: str | Path, *, source: str | Path = "") -> Weights:
    """The same with all that is known of it: classifier, recipe, window, licence."""
    text, path = str(name), Path(name)
    if source and text not in PRETRAINED:
        raise ZooError(f"{text}: a source is for published weights only")
    if text.startswith(HUB):
        return read_folder(_hub_folder(text.removeprefix(HUB)))
    if (path / "config.py").is_file():
        return _from_run(path)
    if (path / CONFIG).is_file():
        return read_folder(path)
    if text not in PRETRAINED and (path.exists() or "/" in text):
        raise ZooError(f"{text}: not a run's folder (no config.py in it), nor an exported one (no {CONFIG})")
    return from_card(pretrained(text), source)[0]


def from_card(card: Pretrained, source: str | Path = "") -> tuple[Weights, tuple[Row, ...]]:
    """Published weights, and the ledger of their tensors."""
    file = _located(card, source)
    module = create(card.arch, **card.options)
    tensors = read(file, unwrap=card.unwrap, sha256=card.sha256)
    found = carried(card.arch, module, tensors, card.classes, card.keys)
    about = {"about": card.about, "licence": card.licence, "paper": card.paper}
    about |= {"source": where(card), "source_sha256": card.sha256}
    recipe = RECIPES[card.recipe] if card.recipe else None
    window = card.window_seconds
    weights = Weights(
        card.name, module, found.variables, card.classes, found.head, recipe, window, found.lacks, about=about
    )
    return weights, found.rows


def where(card: Pretrained) -> str:
    """The place of a card's file, for people."""
    source = card.source
    if isinstance(source, InSample):
        return f"sample {source.sample}, {source.path}"
    if isinstance(source, Hub):
        return f"huggingface.co/{source.repository}/{source.path} at {source.revision}"
    return source.url


def _located(card: Pretrained, source: str | Path) -> Path:
    """The file of a card on this machine, fetched where it must be."""
    if source:
        given = Path(source)
        return given / card.source.file if given.is_dir() else given
    own = os.environ.get("BRAIN_ZOO_WEIGHTS")
    if own and (Path(own) / card.source.file).is_file():
        return Path(own) / card.source.file
    if isinstance(card.source, InSample):
        return fetch(card.source.sample) / card.source.path
    if isinstance(card.source, Hub):
        return _hub_file(card.source)
    return _download(card, card.source)


def _download(card: Pretrained, source: Download) -> Path:
    """The file in the cache, from its address the first time; kept only with the right hash."""
    file = cache_folder() / "weights" / source.file
    if file.is_file():
        return file
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(source.url, timeout=SECONDS) as stream, temporary.open("wb") as sink:
            shutil.copyfileobj(stream, sink)
        if (found := file_sha256(temporary)) != card.sha256:
            raise ZooError(f"{card.name}: {source.url} has sha256 {found}, wanted {card.sha256}")
        os.replace(temporary, file)
    except (OSError, ValueError) as error:
        raise ZooError(
            f"{card.name}: cannot be had from {source.url} ({error}); get it another way and put it into "
            f"{file.parent}, or name its folder in BRAIN_ZOO_WEIGHTS"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _hub_file(source: Hub) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                source.repository, source.path, revision=source.revision, cache_dir=cache_folder() / "hub"
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ZooError(_offline(source.repository, error)) from error


def _hub_folder(name: str) -> Path:
    """A snapshot of what an exported folder has, and nothing else of the repository."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[CONFIG, TENSORS],
                cache_dir=cache_folder() / "hub",
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ZooError(_offline(repository, error)) from error


def _offline(repository: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"huggingface.co/{repository}: cannot be had from the hub: {reason}"


def _from_run(folder: Path) -> Weights:
    from zoo.objectives.supervised import Supervised
    from zoo.run import load as load_run
    from zoo.run import trained_parameters

    module, variables = load_run(folder)
    config, params, collections = trained_parameters(folder)
    classes, head = 0, {}
    if isinstance(config.task, Supervised):
        classes = config.task.classes
        head = part_of({"params": params, **collections}, "head")
    return Weights(
        folder.name,
        module,
        variables,
        classes,
        head,
        config.data.recipe,
        config.data.window_seconds,
        about={"about": f"run {folder.name}"},
    )
