"""What code shards are measured by when they are written, and how it is told and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.codes import CodeDataset
from zoo.data.store import Dataset
from zoo.evaluate.codes import bits_per_second, entropy, reconstruction, usage_of

MEASURED_WINDOWS = 64
"""Most windows, evenly through the held-out part, whose reconstruction is measured."""
LABELLED_WINDOWS = 2000
"""Most windows, evenly through all, whose codes are compared between classes of events."""
SHOWN_SECONDS = 4.0

Decode = Callable[[Sequence[int]], np.ndarray]
"""See `zoo.detokenize.decoder`."""


def measure(codes: CodeDataset, dataset: Dataset, decode: Decode) -> dict[str, Any]:
    """Plain figures: tokens, bits/s, use of each codebook, R² of held-out windows, entropy by class of events.

    Bits are those of codes used evenly. A window's class is its label where windows are those of events, else its first
    event that is not marked bad; with fewer than two classes there are no figures by class.
    """
    counts = code_counts(codes)
    tokens = max(int(each.sum()) for each in counts)
    seconds = len(codes) * codes.window / codes.rate_hz
    valid = [codes.sensors(recording)["valid"].sum() for recording in range(len(codes.recordings))]
    channels = np.mean([valid[recording] for recording in codes.recording])
    whole = bits_per_second(codes.code_sizes, tokens, seconds)
    measures: dict[str, Any] = {
        "tokens": tokens,
        "bits_per_second": whole,
        "bits_per_second_of_a_channel": float(whole / channels),
        **usage_of(counts).to_json(),
        "r2": _r2(codes, dataset, decode),
    }
    label, names = window_classes(codes)
    labelled = _evenly(np.flatnonzero(label >= 0), LABELLED_WINDOWS)
    if len(np.unique(label[labelled])) > 1:
        padded = np.full((len(labelled), max(rows * frames for rows, frames in codes.grids), len(counts)), -1)
        for row, i in zip(padded, labelled, strict=True):
            each = codes[i]
            row[: len(each)] = each
        measures["classes"] = {"names": list(names), **entropy(padded, codes.code_sizes, label[labelled]).to_json()}
    return measures


def code_counts(codes: CodeDataset) -> list[np.ndarray]:
    """For each codebook, how often each of its codes occurs [size]."""
    counts = [np.zeros(size, np.int64) for size in codes.code_sizes]
    for i in range(len(codes)):
        for own, each in zip(counts, codes[i].T, strict=True):
            own += np.bincount(each[each >= 0], minlength=len(own))
    return counts


def window_classes(codes: CodeDataset) -> tuple[np.ndarray, tuple[str, ...]]:
    """(the class of each window, −1 for none; their names)."""
    if codes.classes:
        return codes.label, codes.classes
    names: dict[str, int] = {}
    label = np.full(len(codes), -1)
    for number, recording in enumerate(codes.recordings):
        records = codes.of_recording(number)
        starts = codes.start[records.start : records.stop]
        # From the last event to the first, so that the first in a window is what stays.
        for event in sorted(recording.events, key=lambda event: -event.onset):
            at = int(np.searchsorted(starts, event.onset, side="right")) - 1
            if at >= 0 and event.onset < starts[at] + codes.window and not event.label.lower().startswith("bad"):
                label[records.start + at] = names.setdefault(event.label, len(names))
    return label, tuple(names)


def report(codes: CodeDataset) -> str:
    """What was measured, as lines."""
    measures = codes.measures
    classes = measures.get("classes")
    head = f"{'codebook':>8}  {'codes':>6}  {'perplexity':>10}  {'live':>5}"
    if classes:
        head += f"  {'bits a token, classes alike':>27}  {'bits told of the class':>22}"
    lines = [
        f"{codes.path}: {len(codes)} windows of {codes.window / codes.rate_hz:g} s, {measures['tokens']:,} tokens, "
        f"{measures['bits_per_second']:,.0f} bits/s, {measures['bits_per_second_of_a_channel']:,.0f} a channel; "
        f"R² of held-out windows {measures['r2']:.3f}",
        head,
    ]
    for book, size in enumerate(codes.code_sizes):
        line = f"{book:>8}  {size:>6}  {measures['perplexity'][book]:>10.1f}  {measures['live'][book]:>5.0%}"
        if classes:
            told = classes["information"][book] - classes["chance"][book]
            line += f"  {classes['balanced'][book]:>27.2f}  {told:>22.4f}"
        lines.append(line)
    return "\n".join(lines)


def plot(codes: CodeDataset, dataset: Dataset, decode: Decode, folder: Path) -> None:
    """`reconstruction.png`, a held-out stretch in time and spectrum, and `usage.png`, how often each code occurs."""
    from zoo.evaluate.plots import code_usage
    from zoo.train.plots import reconstruction as draw

    held_out = _held_out(codes)
    shown = [int(held_out[len(held_out) // 2])]
    while len(shown) * codes.window < SHOWN_SECONDS * codes.rate_hz and codes.follows(shown[-1] + 1):
        shown.append(shown[-1] + 1)
    recording = int(codes.recording[shown[0]])
    valid = np.flatnonzero(codes.sensors(recording)["valid"])
    names = codes.montages[codes.recordings[recording].montage].names
    draw(
        np.concatenate([_original(codes, dataset, i) for i in shown], axis=-1)[valid],
        np.concatenate(list(decode(shown)), axis=-1)[valid],
        None,
        codes.rate_hz,
        [names[channel] for channel in valid],
        folder / "reconstruction.png",
        unit="stored units",
    )
    code_usage(code_counts(codes), folder / "usage.png")


def _r2(codes: CodeDataset, dataset: Dataset, decode: Decode) -> float:
    """Of windows evenly through the held-out part."""
    chosen = _evenly(_held_out(codes), MEASURED_WINDOWS)
    signal = np.zeros((len(chosen), codes.n_channels, codes.window), np.float32)
    rebuilt, valid = np.zeros_like(signal), np.zeros(signal.shape[:2], bool)
    for recording in np.unique(codes.recording[chosen]):
        rows = np.flatnonzero(codes.recording[chosen] == recording)
        own = codes.sensors(recording)["valid"]
        valid[rows, : len(own)] = own
        signal[rows, : len(own)] = [_original(codes, dataset, i) for i in chosen[rows]]
        rebuilt[rows, : len(own)] = decode(chosen[rows].tolist())
    return reconstruction(signal, rebuilt, codes.rate_hz, valid, bands={}).r2.value


def _original(codes: CodeDataset, dataset: Dataset, i: int) -> np.ndarray:
    start = int(codes.start[i])
    return dataset.read(int(codes.recording[i]), start, start + codes.window)


def _held_out(codes: CodeDataset) -> np.ndarray:
    """Records of the test part, else of the validation part, else all."""
    parts = [codes.splits.get(name, np.zeros(0, np.int64)) for name in ("test", "validation")]
    return next((part for part in parts if len(part)), np.arange(len(codes)))


def _evenly(values: np.ndarray, most: int) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(most, len(values))).astype(int)]
