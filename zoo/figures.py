"""The look of every figure, and how one is written. Imports nothing until a figure is made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#6b6b6b"
"""Of Okabe and Ito's palette, told apart with any colour vision."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) outside pyplot's global state, so any thread may make one."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, out: Path) -> None:
    """Writes a PNG whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(part, format="png", dpi=130)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
