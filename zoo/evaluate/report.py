"""One table for decoders that were scored in the same folds."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.evaluate.metrics import Scores
from zoo.evaluate.probe import ProbeResult, Trials

if TYPE_CHECKING:
    from rich.table import Table

NAMED_PEOPLE = 4


def print_table(results: Mapping[str, ProbeResult]) -> None:
    """Prints the table of `probe_table`: styled on a terminal, plain text elsewhere."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(probe_table(results))
    else:
        print(plain_text(results), end="")


def held_out_line(name: str, scores: Scores) -> str:
    """One line for one decoder on one set of trials."""
    value, low, high = map(_decimal, scores.balanced_accuracy)
    return f"{name}: balanced accuracy {value} [95 %: {low}, {high}] on {scores.trials} held-out windows"


def write_scores(scores: Mapping[str, Scores], out: Path) -> None:
    """Writes name → `Scores.to_json`, whole or not at all."""
    _write(scores, out)


def write_json(results: Mapping[str, ProbeResult], out: Path) -> None:
    """Writes every score of every person, whole or not at all: name → `ProbeResult.to_json`."""
    _write(results, out)


def _write(results: Mapping[str, Any], out: Path) -> None:
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(json.dumps({name: result.to_json() for name, result in results.items()}, indent=1))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def plain_text(results: Mapping[str, ProbeResult]) -> str:
    """The table of `probe_table` without styles, as wide as it needs to be."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(probe_table(results))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "".join(line.rstrip() + "\n" for line in lines)


def probe_table(results: Mapping[str, ProbeResult]) -> Table:
    """Chance and the named results, first within people, then across.

    Columns: balanced accuracy of each person (the range over people when they are more than four), its mean
    over people with the 95 % interval, and the means of Cohen's kappa, weighted F1 and AUROC.
    """
    from rich import box
    from rich.table import Table

    trials = next(iter(results.values())).trials
    people = trials.people
    named = people if len(people) <= NAMED_PEOPLE else (f"{len(people)} people",)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Balanced accuracy by person and mean [95 % interval over trials]; κ, weighted F1 and AUROC: "
        f"means. {len(trials.label)} trials of {', '.join(trials.classes)}.",
        caption_justify="left",
    )
    table.add_column("")
    for name in (*named, "mean [95 %]", "κ", "F1", "AUROC"):
        table.add_column(name, justify="left" if name.startswith("mean") else "right", no_wrap=True)
    parts = {"within a person": {name: result.within.scores for name, result in results.items()}}
    if len(people) > 1:
        parts["across people"] = {name: r.across.scores for name, r in results.items() if r.across}
    for title, rows in parts.items():
        table.add_section()
        table.add_row(title, style="bold")
        table.add_row("  chance", *_chance_cells(trials, len(named)))
        for name, scores in rows.items():
            table.add_row(f"  {name}", *_cells(scores, people))
    return table


def _cells(scores: Mapping[str, Scores], people: tuple[str, ...]) -> list[str]:
    each = [_decimal(scores[person].balanced_accuracy.value) for person in people]
    mean = scores["mean"]
    value, low, high = map(_decimal, mean.balanced_accuracy)
    return [
        *(each if len(each) <= NAMED_PEOPLE else [f"{min(each)}–{max(each)}"]),
        f"{value} [{low}, {high}]",
        *(_decimal(score.value) for score in (mean.kappa, mean.weighted_f1, mean.auroc)),
    ]


def _chance_cells(trials: Trials, named: int) -> list[str]:
    """A guesser that says each class equally often."""
    k = len(trials.classes)
    share = np.bincount(trials.label, minlength=k) / len(trials.label)
    weighted_f1 = float((share * 2 * share / (share * k + 1)).sum())
    return [_decimal(1 / k)] * (named + 1) + [_decimal(score) for score in (0.0, weighted_f1, 0.5)]


def _decimal(score: float) -> str:
    """Three decimals without the leading zero, as scores below one are usually printed."""
    return f"{score:.3f}".replace("0.", ".", 1)
