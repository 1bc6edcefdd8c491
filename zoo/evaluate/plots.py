"""Figures of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.figures import BLUE, GREY, new_figure, save


def confusion(matrix: np.ndarray, classes: Sequence[str], out: Path, *, title: str = "") -> None:
    """Writes a confusion matrix [K, K] as a PNG: rows the true class, shares of it over counts."""
    k = len(classes)
    share = matrix / matrix.sum(1, keepdims=True)
    figure = new_figure(1.9 + 0.85 * k, 1.1 + 0.75 * k)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        axes.text(
            column,
            row,
            f"{value:.0%}\n{matrix[row, column]}",
            ha="center",
            va="center",
            color="white" if value > 0.6 else "black",
        )
    axes.set_xticks(range(k), classes)
    axes.set_yticks(range(k), classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize="medium")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, label="share of the true class", format="{x:.0%}")
    bar.outline.set_visible(False)
    save(figure, out)


def code_usage(counts: Sequence[np.ndarray], out: Path) -> None:
    """Writes how often each code occurs as a PNG: share of tokens against rank, a line a codebook.

    counts: for each codebook, tokens of each of its codes. Codes that do not occur have no point. The dashed line is
    where all codes of the largest codebook would lie if used evenly. Later codebooks are drawn paler.
    """
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for book, each in enumerate(counts):
        live = np.sort(each[each > 0])[::-1]
        axes.loglog(
            np.arange(1, len(live) + 1),
            live / max(each.sum(), 1),
            color=BLUE,
            alpha=1.0 - 0.75 * book / len(counts),
            linewidth=1.4,
            marker="." if len(live) < 30 else None,
            label=f"codebook {book}: {len(live)} of {len(each)} live",
        )
    most = max(len(each) for each in counts)
    axes.axhline(1 / most, color=GREY, linewidth=1, linestyle="--", label=f"{most} codes used evenly")
    axes.set(xlabel="code, by how often it occurs", ylabel="share of tokens")
    axes.spines[["top", "right"]].set_visible(False)
    if len(counts) <= 8:
        axes.legend(frameon=False, fontsize="small")
    save(figure, out)
