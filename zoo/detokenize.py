"""`zoo tokenize --decode`: code shards to signals, and to a prepared dataset of them.

zoo tokenize --decode codes/faces_eeg prepared/faces_eeg_rebuilt
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.codes import CodeDataset, sensors_of
from zoo.data.manifests import index_of
from zoo.data.store import FORMAT, Dataset, claim, write_records, write_shards

PACKAGES = ("brain-zoo", "jax", "flax", "numpy", "array-record")


def rebuild(path: str | Path, out: str | Path, *, batch_size: int = 64) -> Dataset:
    """Decodes the code shards in folder `path` to a prepared dataset in the folder `out`, float32, in its units.

    Its records are the windows, in the parts of the split that they lay in; what filled no window is not there. Raises
    ZooError when the codes are missing or damaged, or `out` holds something else.
    """
    codes, out = CodeDataset.open(path), Path(out)
    about = {"name": codes.tokenizer["tokenizer"], "codes": codes.plain["index_sha256"]}
    claim(out, "rebuilt.json", about, "zoo tokenize --decode", "rebuilt from other codes")
    if (out / Dataset.FILE).exists():
        print(f"{out}: already rebuilt")
        return Dataset.open(out)
    for leftover in out.glob("**/*.tmp"):
        leftover.unlink()
    decode = decoder(codes)
    manifests: list[dict[str, Any]] = []
    for number, recording in enumerate(codes.recordings):
        records = codes.of_recording(number)
        crc: list[int] = []

        def signals(records: Sequence[int] = records, crc: list[int] = crc) -> Iterator[np.ndarray]:
            for first in range(0, len(records), batch_size):
                # The last batch is filled up with its first window, so that every batch has one shape.
                here = list(records[first : first + batch_size])
                for signal in decode(here + here[:1] * (batch_size - len(here)))[: len(here)]:
                    signal = np.ascontiguousarray(signal, np.float32)
                    crc.append(zlib.crc32(signal.data))
                    yield signal

        shards = [asdict(shard) for shard in write_shards(out, recording.id, signals())]
        columns: dict[str, list[int]] = {
            name: getattr(codes, name)[records.start : records.stop].tolist()
            for name in ("start", "length", "label", "split")
        }
        manifests.append({"shards": shards, "records": {**columns, "crc": crc}})
        print(f"rebuilt {recording.id} ({number + 1} of {len(codes.recordings)})")
    plain = {
        **{name: codes.plain[name] for name in ("rate_hz", "classes", "split", "montages", "recordings")},
        "format": FORMAT,
        "recipe": {**codes.recipe, "dtype": "float32"},
        "rebuilt": about,
        "versions": {package: version(package) for package in PACKAGES},
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
    }
    write_records(out, Dataset.FILE, plain, index_of(manifests))
    print(f"{out}: {sum(len(each['records']['crc']) for each in manifests)} windows rebuilt")
    return Dataset.open(out)


def decoder(codes: CodeDataset) -> Callable[[Sequence[int]], np.ndarray]:
    """A function from records of one recording to their signals [records, C, T], in the dataset's units.

    A tokenizer with a margin decodes a window with the codes before and behind it, where there are any.
    """
    import jax
    from flax.traverse_util import unflatten_dict

    from zoo.objectives.train_tokenizer import TrainTokenizer

    tokenizer = TrainTokenizer(**codes.tokenizer).module()
    trained = unflatten_dict(codes.variables(), sep="/")
    compute = jax.jit(lambda variables, *given: tokenizer.apply(variables, *given, method="decode"))

    def decode(records: Sequence[int]) -> np.ndarray:
        recording = int(codes.recording[records[0]])
        sensors = sensors_of(codes, recording, len(records))
        blank = jax.ShapeDtypeStruct((len(records), sensors.valid.shape[1], codes.window), np.float32)
        structure = jax.tree.structure(jax.eval_shape(tokenizer.scale, blank, sensors))
        leaves = [np.stack(leaf) for leaf in zip(*(codes.read(i)[1] for i in records), strict=True)]
        given = np.stack([_with_margin(codes, i) for i in records])
        signal = np.asarray(compute(trained, given, sensors, jax.tree.unflatten(structure, leaves)))
        return signal[..., codes.margin : codes.margin + codes.window]

    return decode


def _with_margin(codes: CodeDataset, i: int) -> np.ndarray:
    """Codes [N, Q] of record i, each row with the frames of its neighbours in the margins, −1 where there is none."""
    if not codes.margin:
        return codes[i]
    rows, frames = codes.grids[codes.recording[i]]
    width = round(codes.margin / codes.hop)

    def of(neighbour: int, there: bool) -> np.ndarray:
        return (codes[neighbour] if there else np.full_like(codes[i], -1)).reshape(rows, frames, -1)

    before = of(i - 1, codes.follows(i))[:, frames - width :]
    behind = of(i + 1, codes.follows(i + 1))[:, :width]
    whole = np.concatenate([before, codes[i].reshape(rows, frames, -1), behind], axis=1)
    return whole.reshape(-1, len(codes.code_sizes))
