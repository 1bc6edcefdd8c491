"""A training step of our quantizers beside vector-quantize-pytorch's, on a CPU.

    pip install torch vector-quantize-pytorch
    python benchmarks/quantizers.py                         # ten minutes of one core, 2 GB
    python benchmarks/quantizers.py --cases ema --shapes 512x16x128 --steps 3

A step is the quantizer's forward pass in training, the backward pass of its losses and of a sum of its output to the
inputs and to what is learned, and the update: of moving averages, or one of gradient descent. Both begin with the same
codebook and inputs, and each has a process of its own on the same cores. These take turns, step by step, so that a pair
of steps meets the machine in the same state. No speed is shown where the quantised vectors of the first step differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Before this file's own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.errors import ZooError
from zoo.terminal import parse

CASES: Mapping[str, int] = {"ema": 1, "gradient": 1, "cosine": 1, "rvq4": 4, "rvq8": 8}
"""Name → levels."""
PEER = "vector_quantize_pytorch"
LEARNING_RATE = 0.1
AGREEING = 0.999
"""Share of vectors that must be equal: codes may differ where two are equally near but for rounding."""


@dataclass(frozen=True)
class Options:
    """Times a training step of ours and of theirs in turn, and prints the median ratio and each one's memory.

    Attributes:
        cases: which quantizers; all unless given
        shapes: vectors x width x codes
        steps: timed pairs of steps
        threads: cores that both run on
        json: write the figures here, after every row
    """

    cases: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ("4096x64x1024", "8192x128x8192")
    steps: int = 9
    threads: int = 1
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """Medians of seconds a step and of their ratio; the most memory that each process held while steps were timed."""

    case: str
    shape: str
    agreeing: float
    ours_s: float
    theirs_s: float
    ratio: float
    ours_mib: float
    theirs_mib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["side"]:
        serve(*arguments[1:])
        return 0
    try:
        options = parse(Options, arguments, prog="benchmarks/quantizers.py")
        for case in options.cases:
            if case not in CASES:
                raise ZooError(f"--cases: {case!r} is not among {', '.join(CASES)}")
        for shape in options.shapes:
            sizes(shape)
        if not importlib.util.find_spec(PEER):
            raise ZooError("the peer is not installed: pip install torch vector-quantize-pytorch")
        rows: list[Row] = []
        for shape in options.shapes:
            for case in options.cases or CASES:
                rows.append(measured(case, shape, options))
                if options.json:
                    options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows, options)
    return 0


def sizes(shape: str) -> tuple[int, int, int]:
    """ "512x16x128" → vectors, width, codes."""
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ZooError(f"--shapes: got {shape!r}, wanted vectors x width x codes, such as 4096x64x1024")
    rows, width, codes = map(int, parts)
    return rows, width, codes


def measured(case: str, shape: str, options: Options) -> Row:
    """One case after its check."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(name, case, shape, options.threads, Path(folder)) for name in ("ours", "theirs")}
        try:
            first = {name: np.load(side.first()) for name, side in sides.items()}
            agreeing = float(np.isclose(first["ours"], first["theirs"], rtol=1e-4, atol=1e-5).all(-1).mean())
            times = [{name: side.step() for name, side in sides.items()} for _ in range(options.steps + 1)][1:]
            memory = {name: side.memory() for name, side in sides.items()}
        finally:
            for side in sides.values():
                side.close()
    if agreeing < AGREEING:
        return Row(case, shape, agreeing, *[float("nan")] * 5)
    ours, theirs = ([pair[name] for pair in times] for name in ("ours", "theirs"))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    medians = (statistics.median(ours), statistics.median(theirs))
    return Row(case, shape, agreeing, *medians, ratio, memory["ours"], memory["theirs"])


class Side:
    """A process that does steps when it is told to."""

    def __init__(self, name: str, case: str, shape: str, threads: int, folder: Path) -> None:
        self.values = folder / f"{name}.npy"
        command = [sys.executable, str(Path(__file__)), "side", name, case, shape, str(threads), str(self.values)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(question, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            raise ZooError(f"the process of {self.name} stopped before it answered {question!r}")
        return float(answer)

    def first(self) -> Path:
        """The file with the quantised vectors of the first step."""
        self.ask("first")
        return self.values

    def step(self) -> float:
        return self.ask("step")

    def memory(self) -> float:
        return self.ask("memory")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(name: str, case: str, shape: str, threads: str, values: str) -> None:
    """Answers what `Side` asks: a step's seconds, or MiB."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    rows, width, codes = sizes(shape)
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, width), np.float32)
    books = random.standard_normal((CASES[case], codes, width), np.float32)
    books *= 0.7 ** np.arange(CASES[case], dtype=np.float32)[:, None, None]  # residuals become smaller
    if case == "cosine":
        books /= np.linalg.norm(books, axis=-1, keepdims=True)
    step = {"ours": ours, "theirs": theirs}[name](case, x, books, int(threads))
    for question in map(str.strip, sys.stdin):
        if question == "memory":
            print(peak_mib(), flush=True)
            continue
        before = time.perf_counter()
        quantized = step()
        seconds = time.perf_counter() - before
        if question == "first":
            np.save(values, np.asarray(quantized))
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        print(seconds, flush=True)


def peak_mib() -> float:
    """The most memory that this process held, as Linux tells it."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**10


def ours(case: str, x: np.ndarray, books: np.ndarray, threads: int) -> Callable[[], Any]:
    """A function that does a training step and gives its quantised vectors; the device's cores are the process's."""
    import jax
    import jax.numpy as jnp

    from zoo.layers.quantizers import Quantizer, ResidualQuantizer, VectorQuantizer

    levels, codes, width = books.shape
    learning = "gradient" if case == "gradient" else "ema"
    metric = "cosine" if case == "cosine" else "l2"
    book = VectorQuantizer(codes, width, metric=metric, learning=learning, commitment=1.0, kmeans=0)
    quantizer: Quantizer = book if levels == 1 else ResidualQuantizer(book, levels, gradient="each")
    made = {"embedding": books, "usage": np.ones(books.shape[:2], np.float32), "ready": np.ones(levels, bool)}
    if learning == "ema" and metric == "l2":
        made["sums"] = books
    collection: Any = {"book": made} if levels > 1 else {key: value[0] for key, value in made.items()}
    params = {"embedding": jnp.zeros((codes, width))} if learning == "gradient" else {}

    def loss(params: Any, collection: Any, x: jax.Array) -> Any:
        rngs = {"codes": jax.random.key(0)}
        variables = {"params": params, "codebooks": collection}
        out, new = quantizer.apply(variables, x, train=True, mutable=["codebooks"], rngs=rngs)
        return out.quantized.sum() + sum(out.losses.values()), (out.quantized, new["codebooks"])

    @jax.jit
    def update(params: Any, collection: Any, x: jax.Array) -> Any:
        (to_params, to_x), (quantized, collection) = jax.grad(loss, (0, 2), has_aux=True)(params, collection, x)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, to_params), collection, quantized, to_x

    state = [params, jax.tree.map(jnp.asarray, collection)]
    inputs = jnp.asarray(x)

    def step() -> Any:
        *state[:], quantized, gradient = update(*state, inputs)
        jax.block_until_ready((state, gradient))
        return quantized

    return step


def theirs(case: str, x: np.ndarray, books: np.ndarray, threads: int) -> Callable[[], Any]:
    """The same with the peer."""
    torch = importlib.import_module("torch")
    peer = importlib.import_module(PEER)
    torch.set_num_threads(threads)
    levels, codes, width = books.shape
    common = {"dim": width, "codebook_size": codes, "decay": 0.99, "rotation_trick": False}
    if levels > 1:
        quantizer = peer.ResidualVQ(num_quantizers=levels, **common)
        layers = [layer._codebook for layer in quantizer.layers]
    else:
        gradient = case == "gradient"
        options = {"learnable_codebook": gradient, "ema_update": not gradient, "use_cosine_sim": case == "cosine"}
        quantizer = peer.VectorQuantize(**common, **options)
        layers = [quantizer._codebook]
    for layer, book in zip(layers, books, strict=True):
        layer.embed.data.copy_(torch.tensor(book)[None])
        layer.embed_avg.data.copy_(torch.tensor(book)[None])
    inputs = torch.tensor(x[None], requires_grad=True)
    learned = list(quantizer.train().parameters())

    def step() -> Any:
        for each in (inputs, *learned):
            each.grad = None
        quantized, _, loss = quantizer(inputs)
        (quantized.sum() + loss.mean()).backward()
        with torch.no_grad():
            for each in learned:
                each -= LEARNING_RATE * each.grad
        return quantized[0].detach()

    return step


def show(rows: list[Row], options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    cores = "one core" if options.threads == 1 else f"{options.threads} cores"
    table = Table(title=f"A training step on {cores}, medians of {options.steps}")
    for heading in (
        "quantizer",
        "vectors x width x codes",
        "equal",
        "ours",
        "theirs",
        "× theirs",
        "memory, ours/theirs",
    ):
        table.add_column(heading, justify="left" if heading == "quantizer" else "right")
    for row in rows:
        shown = ("—",) * 4
        if row.ratio == row.ratio:
            times = (f"{1e3 * row.ours_s:.1f} ms", f"{1e3 * row.theirs_s:.1f} ms", f"{row.ratio:.1f}")
            shown = (*times, f"{row.ours_mib:.0f} / {row.theirs_mib:.0f} MiB")
        table.add_row(row.case, row.shape, f"{row.agreeing:.2%}", *shown)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
