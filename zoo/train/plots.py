"""Figures of a training run, drawn from what the run wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import ZooError
from zoo.figures import BLUE, GREY, ORANGE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {
    "loss": ("loss", "train", BLUE),
    "validation_loss": ("loss", "validation", ORANGE),
    "learning_rate": ("learning rate", "", BLUE),
    "gradient_norm": ("gradient norm", "", BLUE),
}
"""Key in a line of metrics.jsonl → panel, legend entry, colour."""

SHOWN_CHANNELS = 3


def curves(metrics: Path, out: Path) -> None:
    """Writes loss, learning rate and gradient norm against the step as a PNG.

    metrics: a JSON object a line with "step" and any of the keys of `CURVES`; of two lines of one step, which
    a resumed run may hold, the later one counts. Raises ZooError when the file cannot be read or holds none
    of these.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    series = _series(metrics)
    panels = dict.fromkeys(CURVES[key][0] for key in series)
    figure = new_figure(7, 1 + 1.8 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for key, points in series.items():
            title, name, colour = CURVES[key]
            if title != panel:
                continue
            steps, values = np.array(sorted(points.items())).T
            sparse = len(steps) < 30
            axes.plot(steps, values, color=colour, linewidth=1.4, label=name, marker="o" if sparse else None, ms=3)
        axes.set_ylabel(panel)
        if panel == "gradient norm":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        _plain(axes)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    axes.set_xlabel("step")
    save(figure, out)


def reconstruction(
    original: np.ndarray,
    rebuilt: np.ndarray,
    mask: np.ndarray | None,
    rate_hz: float,
    names: Sequence[str],
    out: Path,
    *,
    unit: str = "",
) -> None:
    """Writes original against reconstructed signal as a PNG: time course and power spectrum.

    original, rebuilt: [C, T] in `unit`. mask: [C, A] bool, True where a patch of T / A samples was hidden
    from the model (shaded); None where everything was rebuilt. names: C channel names. Shown are three
    channels with masked patches, evenly through the montage; r is the correlation over a channel's masked
    samples. The spectra reach six decades below the original's peak.
    """
    from scipy.signal import welch

    shaded = np.ones((len(original), 1), bool) if mask is None else mask
    hidden = np.repeat(shaded, original.shape[-1] // shaded.shape[-1], axis=-1)
    if not original.shape == rebuilt.shape == hidden.shape or not hidden.any():
        raise ZooError(
            f"reconstruction: original {original.shape}, rebuilt {rebuilt.shape}, mask {shaded.shape}; wanted "
            "[C, T], [C, T] and [C, A] with A a divisor of T and something masked"
        )
    candidates = np.flatnonzero(shaded.any(1))
    shown = candidates[np.linspace(0, len(candidates) - 1, min(SHOWN_CHANNELS, len(candidates)), dtype=int)]
    figure = new_figure(10, 0.9 + 1.7 * len(shown))
    rows = figure.subplots(len(shown), 2, sharex="col", squeeze=False, width_ratios=(3, 1))
    time = np.arange(original.shape[-1]) / rate_hz
    for (course, spectrum), c in zip(rows, shown, strict=True):
        r = np.corrcoef(original[c, hidden[c]], rebuilt[c, hidden[c]])[0, 1]
        if mask is not None:
            _shade(course, mask[c], len(time) / rate_hz)
        for name, signal, colour in (("original", original[c], GREY), ("reconstruction", rebuilt[c], ORANGE)):
            course.plot(time, signal, color=colour, linewidth=1.2, label=name)
            hertz, power = welch(signal, rate_hz, nperseg=min(len(time), max(round(rate_hz), len(time) // 4)))
            spectrum.semilogy(hertz, power, color=colour, linewidth=1.2)
            if name == "original":
                spectrum.set_ylim(1e-6 * power.max(), 3 * power.max())
        where = "" if mask is None else " where masked"
        course.set_title(f"{names[c]}   r = {r:.2f}{where}", loc="left", fontsize="medium")
        course.set_ylabel(f"amplitude ({unit})" if unit else "amplitude")
        spectrum.set_ylabel(f"power ({unit}²/Hz)" if unit else "power / Hz")
        course.margins(x=0)
        spectrum.set_xlim(0, rate_hz / 2)
        _plain(course)
        _plain(spectrum)
    rows[-1, 0].set_xlabel("time (s)")
    rows[-1, 1].set_xlabel("frequency (Hz)")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    save(figure, out)


def _series(metrics: Path) -> dict[str, dict[int, float]]:
    """For each key of CURVES that the file holds: step → value."""
    series: dict[str, dict[int, float]] = {}
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ZooError(f"{metrics}: not a metrics file: {error}") from error
    for line in lines:
        for key in CURVES.keys() & line.keys():
            series.setdefault(key, {})[line["step"]] = line[key]
    if not series:
        raise ZooError(f"{metrics}: holds none of {', '.join(CURVES)}")
    return {key: series[key] for key in CURVES if key in series}


def _shade(axes: Axes, masked: np.ndarray, seconds: float) -> None:
    """Shades the masked patches [A] of a channel; one legend entry for all."""
    edges = np.linspace(0, seconds, len(masked) + 1)
    for number, patch in enumerate(np.flatnonzero(masked)):
        label = None if number else "masked"
        axes.axvspan(edges[patch], edges[patch + 1], color=BLUE, alpha=0.13, linewidth=0, label=label)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
