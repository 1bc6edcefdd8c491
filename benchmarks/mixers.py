"""What each causal mixer can remember: four tasks, equal sizes, equal steps.

    python benchmarks/mixers.py                                  # all mixers and tasks, over an hour of one CPU core
    python benchmarks/mixers.py --mixers softmax kda --tasks recall --share 0.5

Every model is a convolution of width 4 (so that a token knows its neighbours whatever the mixer), two blocks of the
mixer and an MLP that is as wide as gives all blocks the same number of parameters, and a read-out. One learning rate
for all. Speeds are of training steps without compilation, beside those of softmax attention on the same task in one
run. A model whose loss is not finite shows no speed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

# Before this file's own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mixer_tasks import Batch, Task, tasks
from zoo.encoders.sequence import SequenceModel
from zoo.errors import ZooError
from zoo.layers.mixer import create_mixer
from zoo.terminal import parse

DIM, LAYERS = 64, 2
BLOCK = 12 * DIM**2
"""Parameters of a block: square projections of queries, keys, values and outputs, and an MLP four times as wide."""
LEARNING_RATE = 3e-3
STEPS_A_CALL = 20
TEST_BATCHES = 8
"""Of four times the training batch."""

HEADS = {"heads": 2}
CHOSEN = {"heads": 2, "kv_heads": 1, "block_size": 16}
CONTENDERS: dict[str, tuple[tuple[str, ...], Mapping[str, Mapping[str, Any]]]] = {
    "softmax": (("softmax",), {"softmax": HEADS}),
    "gated": (("gated",), {"gated": HEADS}),
    "relu": (("relu",), {"relu": HEADS}),
    "sliding_window": (("sliding_window",), {"sliding_window": {**HEADS, "window": 32}}),
    "native_sparse": (
        ("native_sparse",),
        {
            "native_sparse": {
                **CHOSEN,
                "stride": 8,
                "compression_block": 16,
                "selected_blocks": 4,
                "window": 32,
                "compress": "pool",
            }
        },
    ),
    "moba": (("moba",), {"moba": {**HEADS, "block_size": 16, "top_k": 4}}),
    "asa": (
        ("asa_local", "asa_global"),
        {
            "asa_local": {**HEADS, "window": 32},
            "asa_global": {
                **HEADS,
                "block_size": 16,
                "stride": 8,
                "compression_block": 16,
                "selected_blocks": 4,
                "compress": "pool",
            },
        },
    ),
    "pointer": (("pointer",), {}),
    "duplex": (("duplex",), {"duplex": {**HEADS, "modalities": (32,)}}),
    "linear": (("linear",), {"linear": HEADS}),
    "retention": (("retention",), {"retention": {**HEADS, "expand_value": 1.0}}),
    "gla": (("gla",), {"gla": {**HEADS, "expand_value": 1.0}}),
    "lightnet": (("lightnet",), {"lightnet": HEADS}),
    "mamba2": (("mamba2",), {"mamba2": {"states": 32, "expand": 1, **HEADS}}),
    "deltanet": (("deltanet",), {"deltanet": HEADS}),
    "gated_deltanet": (("gated_deltanet",), {"gated_deltanet": {**HEADS, "expand_value": 1.0}}),
    "kda": (("kda",), {"kda": HEADS}),
    "titans": (("titans",), {"titans": {**HEADS, "wiring": "lmm", "expansion": 1}}),
    "titans_mag": (("titans",), {"titans": {**HEADS, "wiring": "mag", "expansion": 1, "window": 32}}),
    "mamba": (("mamba",), {"mamba": {"expand": 1}}),
    "s4d": (("s4d",), {}),
    "s5": (("s5",), {}),
    "rg_lru": (("rg_lru",), {"rg_lru": {"heads": 4}}),
    "elm": (("elm",), {"elm": {"memory": 64}}),
    "grassmann": (("grassmann",), {"grassmann": {"width": 16}}),
    "spiking": (("spiking",), {"spiking": {**HEADS, "feedback": True}}),
}
"""Name → pattern of mixers and their options."""


@dataclass(frozen=True)
class Options:
    """Trains each causal mixer on each task and prints what it learned, and how fast.

    Attributes:
        mixers: which; all unless given
        tasks: which; all unless given
        share: of the steps of each task
        seed: of parameters and data
        json: write the figures here, after every row
    """

    mixers: tuple[str, ...] = ()
    tasks: tuple[Literal["recall", "flip_flop", "copy", "adding"], ...] = ()
    share: float = 1.0
    seed: int = 0
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """One model after one task. `wrong` and `answers` count places, by distribution of the test."""

    mixer: str
    task: str
    parameters: int
    loss: float
    accuracy: float
    wrong: dict[str, int]
    answers: dict[str, int]
    tokens_a_second: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    try:
        options = parse(Options, list(sys.argv[1:] if arguments is None else arguments), prog="benchmarks/mixers.py")
        for name in options.mixers:
            if name not in CONTENDERS:
                raise ZooError(f"--mixers: {name!r} is not among {', '.join(CONTENDERS)}")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = tasks(options.share)
    rows: list[Row] = []
    for task in options.tasks or chosen:
        for mixer in options.mixers or CONTENDERS:
            rows.append(trained(mixer, chosen[task], options.seed))
            print(line(rows[-1]), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
        show(chosen[task], [row for row in rows if row.task == task])
    return 0


def model(mixer: str, task: Task) -> SequenceModel:
    """The model of a contender; its MLP takes the parameters that the mixer leaves of a block's."""
    pattern, options = CONTENDERS[mixer]
    mixers = (pattern * LAYERS)[: max(LAYERS, len(pattern))]
    x = jax.ShapeDtypeStruct((1, task.length, DIM), jnp.float32)
    used = 0
    for name in pattern:
        module = create_mixer(name, DIM, **options.get(name, {}))
        made = jax.eval_shape(module.init, jax.random.key(0), x)
        used += sum(leaf.size for leaf in jax.tree.leaves(made["params"]))
    hidden = max(8, round((BLOCK - used / len(pattern)) / (2 * DIM)))
    return SequenceModel(
        DIM,
        mixers,
        convolution=4,
        mixer_options=options,
        mlp="gelu",
        mlp_options={"hidden": hidden},
        **task.ends,
    )


def trained(mixer: str, task: Task, seed: int) -> Row:
    """The model after `task.steps` steps of AdamW (warm-up over a tenth, then a cosine to a tenth)."""
    began = time.perf_counter()
    made = model(mixer, task)
    calls = max(1, task.steps // STEPS_A_CALL)
    steps = min(task.steps, STEPS_A_CALL)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, calls * steps // 10, calls * steps, LEARNING_RATE / 10
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    def loss(params: Any, others: Any, batch: Batch) -> tuple[jax.Array, Any]:
        inputs, targets, weights = batch
        out, changed = made.apply({"params": params, **others}, inputs, train=True, mutable=list(others))
        return task.loss(out, targets, weights), changed

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, others, state = carry
        (value, others), gradient = jax.value_and_grad(loss, has_aux=True)(params, others, task.draw(key, task.batch))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), others, state), value

    @jax.jit
    def many(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(step, carry, jax.random.split(key, steps))

    @jax.jit
    def start(key: jax.Array) -> Any:
        variables = made.init(key, task.draw(key, 1)[0])
        params = jax.tree.map(lambda leaf: leaf.value, variables.pop("params"), is_leaf=lambda x: hasattr(x, "value"))
        others = {name: part for name, part in variables.items() if name == "batch_stats"}
        return params, others, optimizer.init(params)

    key = jax.random.key(seed)
    carry = start(key)
    times, value = [], math.nan
    for n in range(calls):
        before = time.perf_counter()
        carry, values = many(carry, jax.random.fold_in(key, n))
        value = float(values.mean())
        times.append(time.perf_counter() - before)
    wrong, answers = tested(made, {"params": carry[0], **carry[1]}, task, jax.random.fold_in(key, calls))
    speed = steps * task.batch * task.length / statistics.median(times[1:] or times)
    return Row(
        mixer,
        task.name,
        sum(leaf.size for leaf in jax.tree.leaves(carry[0])),
        value,
        1 - wrong["same"] / answers["same"],
        wrong,
        answers,
        speed if math.isfinite(value) else math.nan,
        time.perf_counter() - began,
    )


def tested(made: SequenceModel, variables: Any, task: Task, key: jax.Array) -> tuple[dict[str, int], dict[str, int]]:
    """(wrong answers, answers) by distribution: that of training, `same`, and the task's others."""

    draws = {"same": task.draw, **task.others}

    @jax.jit
    def count(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            each = [draw(key, 4 * task.batch) for draw in draws.values()]
            inputs, targets, weights = (jnp.concatenate(parts) for parts in zip(*each, strict=True))
            predictions: Any = made.apply(variables, inputs)
            wrong = (weights * ~task.right(predictions, targets)).reshape(len(draws), -1)
            return wrong.sum(1), weights.reshape(len(draws), -1).sum(1)

        wrong, answers = jax.lax.map(one, jax.random.split(key, TEST_BATCHES))
        return wrong.sum(0), answers.sum(0)

    wrong, answers = (dict(zip(draws, map(int, counts), strict=True)) for counts in count(key))
    return wrong, answers


def line(row: Row) -> str:
    return f"{row.task} {row.mixer}: {row.accuracy:.3f} right, {row.tokens_a_second:,.0f} tokens/s, {row.seconds:.0f} s"


def show(task: Task, rows: list[Row]) -> None:
    """A task's table; speeds beside softmax's where it took part."""
    table = Table(title=f"{task.name}: {task.source}; T {task.length}, {task.steps} steps of {task.batch}")
    others = list(task.others)
    for heading in ("mixer", "parameters", "right", *(f"wrong, {name}" for name in others), "tokens/s", "× softmax"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    base = next((row.tokens_a_second for row in rows if row.mixer == "softmax"), math.nan)
    for row in rows:
        glitches = [f"{row.wrong[name]} of {row.answers[name]:,}" for name in others]
        speed = (f"{row.tokens_a_second:,.0f}", f"{row.tokens_a_second / base:.2f}")
        shown = speed if math.isfinite(row.tokens_a_second) else ("—", "—")
        table.add_row(row.mixer, f"{row.parameters:,}", f"{row.accuracy:.3f}", *glitches, *shown)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
