"""`zoo tokenize`: a dataset's signals to code shards; `zoo.detokenize` is the way back.

    zoo tokenize prepared/faces_eeg --tokenizer runs/tokenizer codes/faces_eeg

Each recording ends with its own manifest, written last: what is stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.code_report import measure, plot, report
from zoo.data.codes import CodeDataset, Cut, Window, cut, sensors_of, write_codes, write_variables
from zoo.data.manifests import index_of, kept_manifest
from zoo.data.store import FORMAT, Dataset, claim, write_json, write_records
from zoo.detokenize import decoder
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.objectives.train_tokenizer import TrainTokenizer
    from zoo.tokenizers.tokenizer import Tokenizer
    from zoo.types import Sensors, Variables

PACKAGES = ("brain-zoo", "jax", "flax", "numpy", "array-record")
CACHE_BYTES = 1 << 28
"""Of records kept in memory: windows cut each several times."""
FITTED_SAMPLES = 1 << 24
"""Most samples that levels are fitted to, of windows evenly through the training part."""


@dataclass(frozen=True)
class Chosen:
    """A tokenizer with its variables, where these are from, and its compiled `encode`."""

    task: TrainTokenizer
    tokenizer: Tokenizer
    variables: Variables
    run: str
    step: int | None
    encode: Callable[[Variables, np.ndarray, Sensors], Any]

    @classmethod
    def of(cls, task: TrainTokenizer, variables: Variables, run: str = "", step: int | None = None) -> Chosen:
        import jax

        tokenizer = task.module()
        encode = jax.jit(lambda variables, *given: tokenizer.apply(variables, *given, method="encode"))
        return cls(task, tokenizer, variables, run, step, encode)


def tokenize(
    path: str | Path,
    name: str,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
    window_seconds: float | None = None,
    batch_size: int = 64,
) -> CodeDataset:
    """Writes the codes of the prepared dataset in folder `path` to the folder `out`, and figures of them.

    name            a run's folder, or weights: published ones, an exported folder, hf:owner/repository; or a registered
                    tokenizer that is fitted and not trained, with its `options`: to the dataset's training part
    step            of the run; its newest checkpoint by default
    window_seconds  length of a record; the run's by default, or 1 s

    Raises ZooError: no such tokenizer or one that must be trained first; recordings that it does not take; windows too
    short for it, or longer than any stretch of signal; a folder that holds something else.
    """
    if batch_size < 1:
        raise ZooError(f"batch_size: got {batch_size}, wanted 1 or more")
    dataset, out = Dataset.open(path, CACHE_BYTES), Path(out)
    task, run, seconds = _find(name, options or {})
    seconds = window_seconds if window_seconds is not None else seconds
    window = round(seconds * dataset.rate_hz)
    tokenizer = task.module()
    margin: int = getattr(tokenizer, "margin", 0)
    _check(dataset, tokenizer, window, margin)
    cuts = [cut(dataset, recording, window, margin) for recording in range(len(dataset.recordings))]
    if not any(each.start for each in cuts):
        raise ZooError(f"{dataset.path}: no stretch of signal has the {window + 2 * margin} samples of a window")
    chosen = _trained(task, run, step) if run else _fitted(task, dataset, cuts, window)
    _try(dataset, chosen, window + 2 * margin)
    arrays = _flat(chosen.variables)
    request: dict[str, Any] = {
        "name": task.tokenizer,
        "options": json.loads(json.dumps(dict(task.options))),
        "run": chosen.run,
        "step": chosen.step,
        "variables": _fingerprint(arrays),
        "window": window,
        "margin": margin,
        "dataset": Dataset.read_json(dataset.path)["index_sha256"],
    }
    claim(out, "request.json", request, "zoo tokenize", "holds other codes")
    if (out / CodeDataset.FILE).exists():
        try:
            codes = CodeDataset.open(out)
        except ZooError as error:
            print(f"{error}: now")
        else:
            print(f"{out}: already tokenized")
            print(report(codes))
            return codes
    for leftover in out.glob("**/*.tmp"):
        leftover.unlink()
    manifests = [
        _of_recording(out, dataset, recording, each, chosen, request, batch_size) for recording, each in enumerate(cuts)
    ]
    left = sum(each.left_over for each in cuts)
    print(f"{left} samples ({left / dataset.rate_hz:g} s) at the ends of stretches fill no window: they have no codes")
    codes = _assemble(out, dataset, chosen, request, manifests, write_variables(out, arrays))
    print(report(codes))
    return codes


def _find(name: str, options: Mapping[str, Any]) -> tuple[TrainTokenizer, str, float]:
    """(the tokenizer as a task, its run's folder, its weights' name or "", seconds of a window)."""
    from zoo.objectives.train_tokenizer import TrainTokenizer
    from zoo.run import stored_config

    if published(name):
        return _of_weights(name, options)
    if Path(name).exists() or "/" in name:
        config = stored_config(Path(name))
        if not isinstance(config.task, TrainTokenizer):
            raise ZooError(f"{name}: a run of {type(config.task).__name__}, wanted one that trained a tokenizer")
        if options:
            raise ZooError(f"options {', '.join(options)}: the run in {name} has its own")
        return config.task, name, config.data.window_seconds
    task = TrainTokenizer(name, dict(options))
    if not hasattr(task.module(), "fit"):
        raise ZooError(
            f"{name} must be trained first: `zoo train` a configuration with task.tokenizer {name}, then give the "
            "run's folder, runs/NAME"
        )
    return task, "", 1.0


def published(name: str) -> bool:
    """Whether these are weights with a card, in an exported folder or on the hub, not a run's."""
    from zoo.weights.cards import PRETRAINED
    from zoo.weights.folder import CONFIG
    from zoo.weights.load import HUB

    folder = Path(name)
    exported = (folder / CONFIG).is_file() and not (folder / "config.py").is_file()
    return name in PRETRAINED or name.startswith(HUB) or exported


def _of_weights(name: str, options: Mapping[str, Any]) -> tuple[TrainTokenizer, str, float]:
    from zoo.objectives.train_tokenizer import TrainTokenizer
    from zoo.tokenizers.tokenizer import Tokenizer
    from zoo.weights.folder import described, restored
    from zoo.weights.load import load_weights

    if options:
        raise ZooError(f"options {', '.join(options)}: the weights {name} have their own")
    weights = load_weights(name)
    if not isinstance(weights.module, Tokenizer):
        raise ZooError(f"{name}: weights of a {type(weights.module).__name__}, wanted a tokenizer's")
    arch, own = described(weights.module)
    return TrainTokenizer(arch, restored(own)), name, weights.window_seconds or 1.0


def _check(dataset: Dataset, tokenizer: Tokenizer, window: int, margin: int) -> None:
    """Raises ZooError for recordings or windows that the tokenizer does not take."""
    from zoo.types import Sensors

    for montage in dataset.montages:
        tokenizer.check_recording(dataset.rate_hz, montage.kinds, montage.canonical)
        _, frames = tokenizer.grid(len(montage.names), window)
        if margin * frames % window:
            raise ZooError(f"a margin of {margin} samples is not made of frames of {window / frames:g} samples")
    tokenizer.check_positions(Sensors(**dataset.sensor_tables()[0]))


def _try(dataset: Dataset, chosen: Chosen, samples: int) -> None:
    """Traces `encode` for a recording of each montage, so that what its options forbid is said before any work."""
    import jax

    for number, montage in enumerate(dataset.montages):
        recording = next(i for i, each in enumerate(dataset.recordings) if each.montage == number)
        blank = jax.ShapeDtypeStruct((1, len(montage.names), samples), np.float32)
        jax.eval_shape(chosen.encode, chosen.variables, blank, sensors_of(dataset, recording, 1))


def _trained(task: TrainTokenizer, run: str, step: int | None) -> Chosen:
    if published(run):
        from zoo.weights.load import load_weights

        if step is not None:
            raise ZooError(f"step {step}: the weights {run} are of one step")
        return Chosen.of(task, load_weights(run).variables, run)
    from zoo.run import load
    from zoo.train.checkpoint import Checkpoints

    step = Checkpoints(Path(run) / "checkpoints").latest if step is None else step
    return Chosen.of(task, load(run, step)[1], run, step)


def _fitted(task: TrainTokenizer, dataset: Dataset, cuts: Sequence[Cut], window: int) -> Chosen:
    """The tokenizer fitted to the training part."""
    tokenizer: Any = task.module()
    if "train" not in dataset.splits:
        raise ZooError(f"{dataset.path}: its split has no part 'train' to fit {task.tokenizer} to")
    train = list(dataset.splits).index("train")
    places = [
        (recording, start)
        for recording, each in enumerate(cuts)
        for start, split in zip(each.start, each.split, strict=True)
        if split == train
    ]
    if not places:
        raise ZooError(f"{dataset.path}: no window lies in its training part, to which {task.tokenizer} is fitted")
    most = max(FITTED_SAMPLES // (window * dataset.n_channels), 1)
    if len(places) > most:
        print(f"fitted to {most} of the {len(places)} windows of the training part")
        places = [places[i] for i in np.linspace(0, len(places) - 1, most).astype(int)]
    signal = np.zeros((len(places), dataset.n_channels, window), np.float32)
    valid = np.zeros(signal.shape[:2], bool)
    for row, (recording, start) in enumerate(places):
        read = dataset.read(recording, start, start + window)
        signal[row, : len(read)] = read
        valid[row, : len(read)] = dataset.sensors(recording)["valid"]
    return Chosen.of(task, tokenizer.fit(signal, valid))


def _of_recording(
    out: Path, dataset: Dataset, recording: int, found: Cut, chosen: Chosen, request: Mapping[str, Any], batch_size: int
) -> dict[str, Any]:
    """The codes of one recording: its manifest, of an earlier run where that holds."""
    import jax

    stored = dataset.recordings[recording]
    file = out / "parts" / f"{stored.id}.json"
    key = sha256(json.dumps([FORMAT, request, stored.id]).encode()).hexdigest()
    kept = kept_manifest(file, key, out)
    if kept:
        print(f"was tokenized {stored.id} ({recording + 1} of {len(dataset.recordings)})")
        return kept
    tokenizer, window, margin = chosen.tokenizer, request["window"], request["margin"]
    channels = len(dataset.montages[stored.montage].names)
    rows, frames = tokenizer.grid(channels, window)
    shapes: list[list[int]] = []

    def windows() -> Iterator[Window]:
        for first in range(0, len(found.start), batch_size):
            # The last batch is filled up with its first window, so that every batch has one shape.
            here = np.arange(first, first + batch_size)
            here[here >= len(found.start)] = first
            parts = [dataset.read(recording, found.start[i] - margin, found.start[i] + window + margin) for i in here]
            signal, sensors = np.stack(parts), sensors_of(dataset, recording, batch_size)
            codes = np.asarray(chosen.encode(chosen.variables, signal, sensors))
            if margin:
                codes = _middle(codes, rows, frames)
            tokenizer.check_codes(codes)
            leaves = [
                np.asarray(leaf, np.float32)
                for leaf in jax.tree.leaves(tokenizer.scale(signal[..., margin : margin + window], sensors))
            ]
            shapes[:] = [list(leaf.shape[1:]) for leaf in leaves]
            for row in range(min(batch_size, len(found.start) - first)):
                yield codes[row], [leaf[row] for leaf in leaves]

    shards, crc = write_codes(out, stored.id, windows(), tokenizer.code_sizes)
    manifest = {
        "key": key,
        "recording": recording,
        "grid": [rows, frames],
        "scale": shapes,
        "left_over": found.left_over,
        "shards": shards,
        "records": {
            "start": found.start,
            "length": [window] * len(found.start),
            "label": found.label,
            "split": found.split,
            "crc": crc,
        },
    }
    write_json(file, manifest)
    print(f"tokenized {stored.id} ({recording + 1} of {len(dataset.recordings)})")
    return manifest


def _middle(codes: np.ndarray, rows: int, frames: int) -> np.ndarray:
    """[B, rows · more, Q] → [B, rows · frames, Q]: without the frames of the margins."""
    batch, _, books = codes.shape
    by_row = codes.reshape(batch, rows, -1, books)
    margin = (by_row.shape[2] - frames) // 2
    return by_row[:, :, margin : margin + frames].reshape(batch, rows * frames, books)


def _assemble(
    out: Path,
    dataset: Dataset,
    chosen: Chosen,
    request: Mapping[str, Any],
    manifests: Sequence[Mapping[str, Any]],
    tokenizer_sha256: str,
) -> CodeDataset:
    """Puts the manifests together, measures the codes, draws them, and finishes the folder."""
    source = Dataset.read_json(dataset.path)
    frames = manifests[0]["grid"][1]
    plain: dict[str, Any] = {
        **{name: source[name] for name in ("rate_hz", "recipe", "classes", "split", "montages", "recordings")},
        "format": FORMAT,
        "request": dict(request),
        "tokenizer": {
            "tokenizer": chosen.task.tokenizer,
            "options": dict(chosen.task.options),
            "dtype": chosen.task.dtype,
        },
        "tokenizer_sha256": tokenizer_sha256,
        "code_sizes": list(chosen.tokenizer.code_sizes),
        "hop": request["window"] / frames,
        "grids": [manifest["grid"] for manifest in manifests],
        "scales": [manifest["scale"] for manifest in manifests],
        "left_over": [manifest["left_over"] for manifest in manifests],
        "versions": {package: version(package) for package in PACKAGES},
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
    }
    index = index_of(manifests)
    codes = CodeDataset(out, plain, index)
    decode = decoder(codes)
    plain["measures"] = measure(codes, dataset, decode)
    plot(codes, dataset, decode, out / "plots")
    write_records(out, CodeDataset.FILE, plain, index)
    return CodeDataset.open(out)


def _flat(variables: Variables) -> dict[str, np.ndarray]:
    """Every variable by its path, on the host."""
    from flax.traverse_util import flatten_dict

    return {name: np.asarray(value) for name, value in flatten_dict(dict(variables), sep="/").items()}


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, shapes and values."""
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
