"""Figures of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.figures import new_figure, save


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
