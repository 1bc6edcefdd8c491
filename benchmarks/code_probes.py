"""What masked-code pretraining adds to each tokenizer: linear probes of faces, houses and checkerboards.

    python benchmarks/code_probes.py                          # all tokenizers
    python benchmarks/code_probes.py --tokenizers neurorvq_tiny --steps 200

For each tokenizer: `zoo train configs/tokenizer.py` with it, then `zoo train configs/masked_codes.py` on its codes, and
that run's own probe of the frozen encoder, with random and with pretrained weights (of the encoder; the tokenizer is
the trained one in both). Balanced accuracy with 95 % intervals, within a person and from one person to the other.
Windows begin 0.2 s before the picture and last a second, or as long as a tokenizer's shortest window.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Before this file's own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.errors import ZooError
from zoo.terminal import parse

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONTENDERS: dict[str, tuple[float, float, int]] = {
    "labram_vqnsp_tiny": (200.0, 1.0, 32),
    "neurorvq_tiny": (200.0, 1.0, 32),
    "tfm_tiny": (200.0, 1.0, 32),
    "braintokenizer_tiny": (256.0, 2.0, 8),
}
"""Registered tokenizer → Hz of its recordings, seconds of a window, windows a step.

Those of a token a sample are not among them: 32,000 tokens a second of 128 channels are no input for attention.
"""
BEFORE = 0.2
"""Seconds of a window before the picture."""


@dataclass(frozen=True)
class Options:
    """Trains every tokenizer, then an encoder on its codes, and prints what probes find.

    Attributes:
        tokenizers: which; all unless given
        steps: of each of the two trainings
        folder: of the runs and prepared recordings
        json: write the figures here, after every row
    """

    tokenizers: tuple[str, ...] = ()
    steps: int = 400
    folder: Path = Path("runs/code_probes")
    json: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = parse(Options, given, prog="benchmarks/code_probes.py")
        for name in options.tokenizers:
            if name not in CONTENDERS:
                raise ZooError(f"--tokenizers: {name!r} is not among {', '.join(CONTENDERS)}")
        rows: dict[str, Any] = {}
        for name in options.tokenizers or CONTENDERS:
            rows[name] = probed(name, options)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows)
    return 0


def probed(name: str, options: Options) -> dict[str, Any]:
    """What the run of `configs/masked_codes.py` wrote of its probes."""
    rate_hz, seconds, batch = CONTENDERS[name]
    shared = (
        f"--runs={options.folder}",
        f"--data.prepared={options.folder / f'prepared_{rate_hz:g}'}",
        f"--data.recipe.rate-hz={rate_hz}",
        f"--data.window-seconds={seconds}",
        f"--data.batch-size={batch}",
        f"--train.steps={options.steps}",
    )
    train("tokenizer.py", f"--name={name}", f"--task.tokenizer={name}", *shared)
    codes = f"{name}_codes"
    windows = (f"--probe.tmin={-BEFORE}", f"--probe.tmax={seconds - BEFORE}")
    train("masked_codes.py", f"--name={codes}", f"--task.tokenizer={options.folder / name}", *windows, *shared)
    return json.loads((options.folder / codes / "evaluation.json").read_text())


def train(config: str, *options: str) -> None:
    """`zoo train` as a process of its own, which goes on where it was stopped. Raises ZooError where it fails."""
    command = "import sys; from zoo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", command, "train", str(CONFIGS / config), *options])
    if done.returncode:
        raise ZooError(f"zoo train configs/{config} {' '.join(options)}: ended with {done.returncode}")


def show(rows: Mapping[str, Any]) -> None:
    """A row a tokenizer, and the baseline that reads the windows themselves."""
    table = Table(title="probes of codes_tiny; balanced accuracy, chance .333")
    for heading in ("tokenizer", "features", "within a person", "across people"):
        table.add_column(heading)
    for name, results in rows.items():
        for features, scores in results.items():
            cells = (scores[where]["mean"]["balanced_accuracy"] for where in ("within", "across"))
            table.add_row(name, features, *(f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
