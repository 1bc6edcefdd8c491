"""Training steps and inference of our encoders beside braindecode's in PyTorch, on a CPU.

    pip install torch braindecode
    python benchmarks/encoders.py                          # every encoder that has a peer; a minute or two each
    python benchmarks/encoders.py --models eegnet_base --batch 16 --steps 3

Which has which peer stands in `benchmarks/encoder_peers.py`. Both sides classify the same windows with the same
weights, which our key maps carry over; no speed is shown where the logits differ. A training step is the forward pass
with dropout, cross entropy, the backward pass and one of AdamW, in PyTorch its fused form. Each side has a process of
its own on the same cores, and they take turns, step by step, so that a pair of steps meets the machine in the same
state.
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

from benchmarks.encoder_peers import CLASSES, PEERS, Peer
from zoo.errors import ZooError
from zoo.terminal import parse

LEARNING_RATE = 1e-4
TOLERANCE = 1e-4
"""Of logits, as a share of the largest."""
SIDES = ("theirs", "ours")
"""In the order they start: the peer draws the weights."""


@dataclass(frozen=True)
class Options:
    """Times training steps and inference of ours and of theirs in turn; prints ratios and each one's memory.

    Attributes:
        models: which encoders; all with a peer unless given
        batch: windows a step
        steps: timed pairs of steps, and of batches in inference
        threads: cores that both run on
        json: write the figures here, after every row
    """

    models: tuple[str, ...] = ()
    batch: int = 16
    steps: int = 9
    threads: int = 1
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """One encoder: medians of seconds, ratios theirs / ours, and MiB.

    memory is the most that a process held in training above what it held after its imports.
    """

    model: str
    peer: str
    batch: int
    error: float
    train_s: tuple[float, float]
    infer_s: tuple[float, float]
    memory_mib: tuple[float, float]
    train_ratio: float
    infer_ratio: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["side"]:
        serve(*arguments[1:])
        return 0
    try:
        options = parse(Options, arguments, prog="benchmarks/encoders.py")
        for name in options.models:
            if name not in PEERS:
                raise ZooError(f"--models: {name!r} is not among {', '.join(PEERS)}")
        if not importlib.util.find_spec("braindecode"):
            raise ZooError("the peer is not installed: pip install torch braindecode")
        rows: list[Row] = []
        for name in options.models or PEERS:
            rows.append(measured(name, options))
            if options.json:
                options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows, options)
    return 0


def measured(name: str, options: Options) -> Row:
    """One encoder after its check."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        sides: dict[str, Side] = {}
        for side in SIDES:
            sides[side] = Side(side, name, options, folder)
            stack.callback(sides[side].close)
            sides[side].ask("logits")
        logits = [np.load(folder / f"{side}.npy") for side in SIDES]
        error = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max())
        if not error < TOLERANCE:
            nothing = (float("nan"),) * 2
            return Row(name, PEERS[name].theirs, options.batch, error, nothing, nothing, nothing, *nothing)
        timed: dict[str, list[dict[str, float]]] = {}
        for what in ("infer", "train"):
            timed[what] = [{side: sides[side].ask(what) for side in SIDES} for _ in range(options.steps + 1)][1:]
        memory = (sides["ours"].ask("memory"), sides["theirs"].ask("memory"))
    ratios = {what: statistics.median(each["theirs"] / each["ours"] for each in pairs) for what, pairs in timed.items()}
    train, infer = (
        (
            statistics.median(each["ours"] for each in timed[what]),
            statistics.median(each["theirs"] for each in timed[what]),
        )
        for what in ("train", "infer")
    )
    return Row(name, PEERS[name].theirs, options.batch, error, train, infer, memory, ratios["train"], ratios["infer"])


class Side:
    """A process that does what it is asked."""

    def __init__(self, name: str, model: str, options: Options, folder: Path) -> None:
        given = (name, model, str(options.batch), str(options.threads), str(folder))
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "side", *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> float:
        """Seconds, or MiB."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(question, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            raise ZooError(f"the process of {self.name} stopped before it answered {question!r}")
        return float(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class Program:
    """What a side does: logits [batch, classes] of the windows, and a step that learns from them."""

    infer: Callable[[], Any]
    train: Callable[[], Any]


def serve(name: str, model: str, batch: str, threads: str, folder: str) -> None:
    """Answers what `Side` asks."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    # Whatever a library prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    peer, files = PEERS[model], Path(folder)
    random = np.random.default_rng(0)
    windows = random.normal(size=(int(batch), len(peer.channels), peer.samples)).astype(np.float32)
    windows /= np.quantile(np.abs(windows), 0.95, axis=-1, keepdims=True)  # braindecode's BIOT wants it done
    label = random.integers(CLASSES, size=int(batch))
    make = {"ours": ours, "theirs": theirs}[name]
    program, imported = make(model, windows, label, files / "weights.npz", int(threads))
    for question in map(str.strip, sys.stdin):
        if question == "memory":
            print(memory_mib("VmHWM") - imported, file=answers, flush=True)
            continue
        before = time.perf_counter()
        if question == "train":
            program.train()
        else:
            logits = program.infer()
        seconds = time.perf_counter() - before
        if question == "logits":
            np.save(files / f"{name}.npy", np.asarray(logits))
            program.train()
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, after compilation
        print(seconds, file=answers, flush=True)


def memory_mib(which: str) -> float:
    """VmRSS, what this process holds, or VmHWM, the most it held, as Linux tells it."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(found.split()[1]) / 2**10


def ours(model: str, windows: np.ndarray, label: np.ndarray, weights: Path, threads: int) -> tuple[Program, float]:
    """Our side; the device's cores are the process's."""
    import jax
    import jax.numpy as jnp
    import optax

    import zoo
    from zoo.encoders.encoder import blank
    from zoo.objectives.supervised import Classifier, cross_entropy
    from zoo.weights.keys import fill

    peer = PEERS[model]
    rules = peer.rules()
    jax.block_until_ready(jnp.zeros(1))
    imported = memory_mib("VmRSS")
    known = type(zoo.create(model)).__dataclass_fields__
    sizes = {"channels": peer.channels, "samples": peer.samples}
    encoder = zoo.create(model, **{field: size for field, size in sizes.items() if field in known}, **peer.options)
    net = Classifier(encoder, CLASSES)
    _, one = blank(peer.channels, peer.samples)
    one = dataclasses.replace(one, position=peer.positions[None].astype(np.float32))
    sensors = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), len(windows), axis=0), one)
    signal, wanted = jnp.asarray(windows), jnp.asarray(label)
    shapes = jax.eval_shape(lambda key: net.init({"params": key, "dropout": key}, signal, sensors), jax.random.key(0))
    with np.load(weights) as tensors:
        filled, _ = fill(rules, dict(tensors), shapes)
    filled = jax.tree.map(jnp.asarray, filled)
    tx = optax.adamw(LEARNING_RATE)
    params = filled.pop("params")
    state: list[Any] = [params, filled, tx.init(params), jax.random.key(0)]

    @jax.jit
    def infer(params: Any, rest: Any, signal: jax.Array, sensors: Any) -> Any:
        return net.apply({"params": params, **rest}, signal, sensors)

    def loss(params: Any, rest: Any, key: jax.Array, signal: jax.Array, sensors: Any, wanted: jax.Array) -> Any:
        logits, new = net.apply(
            {"params": params, **rest}, signal, sensors, train=True, mutable=list(rest), rngs={"dropout": key}
        )
        return cross_entropy(logits, wanted), new

    def update(params: Any, rest: Any, opt: Any, key: jax.Array, signal: Any, sensors: Any, wanted: Any) -> Any:
        key, dropout = jax.random.split(key)
        grads, new = jax.grad(loss, has_aux=True)(params, rest, dropout, signal, sensors, wanted)
        updates, opt = tx.update(grads, opt, params)
        return [optax.apply_updates(params, updates), {**rest, **new}, opt, key]

    compiled = jax.jit(update, donate_argnums=(0, 1, 2, 3))

    def train() -> None:
        state[:] = jax.block_until_ready(compiled(*state, signal, sensors, wanted))

    return Program(lambda: jax.block_until_ready(infer(*state[:2], signal, sensors)), train), imported


def theirs(model: str, windows: np.ndarray, label: np.ndarray, weights: Path, threads: int) -> tuple[Program, float]:
    """The peer; it leaves its weights in the file."""
    torch = importlib.import_module("torch")
    peer: Peer = PEERS[model]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    importlib.import_module("torch.optim")
    net = peer.build()
    imported = memory_mib("VmRSS") - sum(each.nbytes for each in net.state_dict().values()) / 2**20
    # Normalisations that have seen something, so that logits depend on their statistics.
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    np.savez(weights, **{name: tensor.numpy() for name, tensor in net.state_dict().items()})
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-4, fused=True)
    signal, wanted = torch.tensor(windows), torch.tensor(label)
    named = {"ch_names": list(peer.channels)} if "ch_names" in net.forward.__code__.co_varnames else {}

    def infer() -> Any:
        net.eval()
        with torch.inference_mode():
            return net(signal, **named)

    def train() -> None:
        net.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(signal, **named), wanted).backward()
        optimizer.step()

    return Program(infer, train), imported


def show(rows: list[Row], options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    cores = "one core" if options.threads == 1 else f"{options.threads} cores"
    table = Table(title=f"ours / theirs on {cores}, batches of {options.batch}, medians of {options.steps}")
    headings = (
        "encoder",
        "peer",
        "logits differ by",
        "training step",
        "ratio",
        "inference",
        "ratio",
        "memory, training",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        cells = ["—"] * 5
        if row.train_ratio == row.train_ratio:
            cells = [
                *(milliseconds(row.train_s), f"{row.train_ratio:.2f}"),
                *(milliseconds(row.infer_s), f"{row.infer_ratio:.2f}"),
                "{:.0f} / {:.0f} MiB".format(*row.memory_mib),
            ]
        table.add_row(row.model, row.peer, f"{row.error:.1e}", *cells)
    console = Console(width=130)
    console.print(table)
    ratios = {what: [value for row in rows if (value := getattr(row, what)) == value] for what in _RATIOS}
    if ratios["train_ratio"]:
        told = ", ".join(f"{name} {statistics.median(ratios[what]):.2f}" for what, name in _RATIOS.items())
        console.print(f"theirs / ours, median of {len(ratios['train_ratio'])} encoders: {told}")


_RATIOS: Mapping[str, str] = {"train_ratio": "training", "infer_ratio": "inference"}


def milliseconds(pair: tuple[float, float]) -> str:
    return " / ".join(f"{1e3 * each:.1f}" for each in pair) + " ms"


if __name__ == "__main__":
    sys.exit(main())
