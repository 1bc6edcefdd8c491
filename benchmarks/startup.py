"""How long `zoo train` takes from the start of its process to the end of its first step.

    python benchmarks/startup.py [--config configs/quickstart.py] [--runs 5] [--json startup.json]

The data are prepared and the programs compiled into the cache by a first run, which is timed too. Every run is stopped
after its first step, in a folder that is removed. Refuses to print a time for a run whose first loss is another one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WANTED = 15.0
"""Seconds that a warm start may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.py"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    first, loss = start(arguments.config)
    warm = []
    for _ in range(arguments.runs):
        seconds, again = start(arguments.config)
        if again != loss:
            raise SystemExit(f"the first loss is {again} and was {loss}: no time is shown")
        warm.append(seconds)
    median = statistics.median(warm)
    print(f"to the first step: {first:.2f} s, then {median:.2f} s (median of {len(warm)}, at most {max(warm):.2f} s)")
    print(f"wanted is under {WANTED:g} s with a warm cache")
    if arguments.json:
        arguments.json.write_text(json.dumps({"first": first, "warm": warm}, indent=1) + "\n")


def start(config: Path) -> tuple[float, str]:
    """Seconds to the first step's line, and the loss in it."""
    with tempfile.TemporaryDirectory() as folder:
        zoo = [sys.executable, "-c", "import sys; from zoo.cli import main; sys.exit(main())"]
        options = ["--runs", folder, "--train.log-every", "1"]
        began = time.perf_counter()
        run = subprocess.Popen(
            [*zoo, "train", str(config), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if found := re.match(r"step 1/\d+ +loss (\S+)", line):
                seconds = time.perf_counter() - began
                run.kill()
                run.wait()
                return seconds, found[1]
        raise SystemExit("".join(said[-5:]) + "zoo train ended before its first step")


if __name__ == "__main__":
    main()
