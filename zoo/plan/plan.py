"""The plan of a run: memory, operations, bytes between devices, and how fast that could be at best.

    found = plan(Path("configs/quickstart.py"), target("v5e:4x4"), ["--data.batch-size", "64"])
    print(table(found))

It compiles the step that the training loop runs, for the chips of the target, and reads the compiled program. Times are
those of a roofline (Williams et al., 2009): arithmetic, memory and each wire at the speeds of the data sheet, every one
alone. Where they overlap perfectly a step takes the longest of them, `bound_seconds`, and `mfu` is the share of the
arithmetic that the model's operations are of it. No real step is faster; most are slower.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from zoo.errors import ZooError
from zoo.plan.activations import kept_bytes
from zoo.plan.chips import NVIDIA, Chip
from zoo.plan.collectives import Collective, collectives
from zoo.plan.count import operations
from zoo.plan.hlo import Hlo
from zoo.plan.target import Target
from zoo.sensors import KINDS

if TYPE_CHECKING:
    from zoo.train.config import Config
    from zoo.train.state import Program
    from zoo.types import Batch


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. state: parameters, optimiser, averages and collections; activations: about how much of the
    temporaries the forward pass keeps for the backward pass; peak: what must fit at once."""

    parameters: int
    optimizer: int
    others: int
    batch: int
    activations: float
    temporaries: int
    code: int
    peak: int
    limit: float | None


@dataclass(frozen=True)
class Wire:
    """All collectives of a kind along the same axes in a step: whether they cross the network between slices or nodes,
    how many, bytes a device sends, and the time that takes."""

    kind: str
    axes: tuple[str, ...]
    network: bool
    calls: int
    sent: float
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What was compiled, and what it says. Times are None for a machine whose speeds are not in the table (the CPU).

    model_operations     of one step on all devices: three forward passes, counted by the task
    program_operations   those that the program does, recomputation included, counted from its jaxpr
    traffic              bytes a device reads and writes in its main memory
    """

    config: str
    target: str
    devices: int
    mesh: Mapping[str, int]
    memory: Memory
    model_operations: float
    program_operations: float
    traffic: float
    wires: tuple[Wire, ...]
    compute_seconds: float | None
    memory_seconds: float | None
    wire_seconds: float | None
    bound_seconds: float | None
    bound_by: str
    mfu: float | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the chip's memory."""
        return self.memory.limit is None or self.memory.peak <= self.memory.limit


class DoesNotFit(ZooError):
    """The compiler found no place for the program. `buffers`: the largest, with the source line that made each."""

    def __init__(self, message: str, buffers: Sequence[str]) -> None:
        super().__init__(message)
        self.buffers = tuple(buffers)


def plan(config: Config, target: Target, channels: int = 0) -> tuple[Plan, Any]:
    """The plan, and the compiled step. channels: of an example, where no prepared dataset tells.

    Raises ZooError where mesh, model and batch do not go together, and DoesNotFit where the compiler says so.
    """
    from zoo.train.mesh import BatchPlacer, divided
    from zoo.train.plan import step_flops
    from zoo.train.state import Program

    mesh = target.mesh(config.mesh)
    config = divided(config, mesh)
    place = BatchPlacer(mesh, config.rules, config.data.batch_size, config.train.accumulate)
    # A task that needs what another run has trained may know how to do with its shapes.
    task = config.task.planned() if hasattr(config.task, "planned") else config.task
    program = Program(config, task, mesh, place.abstract(example(config, channels)))
    started = time.perf_counter()
    compiled = _compile(program, target)
    seconds = time.perf_counter() - started
    hlo = Hlo(compiled.as_text())
    with jax.set_mesh(mesh), program.context():
        done = operations(program.step, program.abstract(), program.batch)
        kept = kept_bytes(program)
    memory = _memory(program, compiled, target.chip, kept)
    wires = _wires(collectives(hlo, mesh.shape), target.chip)
    model, traffic = step_flops(program), hlo.traffic()
    times: dict[str, float] = {}
    if target.chip is not None:
        times = {
            "compute": done / len(target.devices) / target.chip.flops,
            "memory": traffic / target.chip.bandwidth,
            "wires": _longest(wires),
        }
    bound = max(times, key=lambda name: times[name], default="")
    best = times.get(bound)
    made = Plan(
        config=config.name,
        target=target.name if target.slices == 1 else f"{target.slices} × {target.name}",
        devices=len(target.devices),
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        memory=memory,
        model_operations=model,
        program_operations=done,
        traffic=traffic,
        wires=wires,
        compute_seconds=times.get("compute"),
        memory_seconds=times.get("memory"),
        wire_seconds=times.get("wires"),
        bound_seconds=best,
        bound_by=bound,
        mfu=None if target.chip is None or not best else model / len(target.devices) / target.chip.flops / best,
        compile_seconds=seconds,
    )
    return made, compiled


def example(config: Config, channels: int = 0) -> Batch:
    """A batch of one example of zeros, as the loader gives them (`zoo.data.loader`, `zoo.data.paired`).

    Its channels are `channels`, else `data.channels`, else those of the prepared dataset; its rate that of the recipe,
    else the dataset's. Modalities have their own. Raises ZooError where nothing tells.
    """
    data = config.data
    fields = {name: np.zeros(1, np.int32) for name in ("record", "start", "label", "subject")}
    if data.paired:
        from zoo.data.paired import flat

        batch: Batch = {**fields, "stimulus": np.zeros(1, np.int32)}
        for name, each in data.paired.items():
            told = f"--data.paired.{name}.channels", f"--data.paired.{name}.rate-hz"
            count, rate = _size(each.prepared, each.channels, each.rate_hz, *told)
            batch[name] = _window(count, round(each.window_seconds * rate), 0) | {"subject": np.zeros(1, np.int32)}
        return flat(batch)
    told = "--channels", "--data.recipe.rate-hz"
    datasets = [each.prepared for each in data.mix.values()] or [data.prepared]
    sizes = [_size(each, channels or data.channels, data.recipe.rate_hz, *told) for each in datasets]
    count, rate = max(sizes)
    if data.mix:
        fields["dataset"] = np.zeros(1, np.int32)
    samples = round(data.window_seconds * rate)
    batch = {**_window(count, samples, KINDS.index(data.recipe.kinds[0])), **fields}
    if data.mask_patch:
        batch["mask"] = np.zeros((1, count, samples // data.mask_patch), bool)
    return batch


def _size(prepared: str | Path, channels: int, rate: float | None, *options: str) -> tuple[int, float]:
    """Channels and rate as given, else those of the prepared dataset."""
    if not channels or not rate:
        from zoo.data.remote import locate
        from zoo.data.store import Dataset

        place = locate(prepared)
        if isinstance(place, Path) and not (place / "dataset.json").is_file():
            lacking = "channels: give " + options[0] if not channels else "rate: give " + options[1]
            raise ZooError(f"{prepared} is not prepared yet and nothing tells its {lacking}")
        dataset = Dataset.open(place)
        channels, rate = channels or dataset.n_channels, rate or dataset.rate_hz
    return channels, rate


def _window(channels: int, samples: int, kind: int) -> dict[str, Any]:
    """Signal and sensors of one example."""
    from zoo.types import Sensors

    where, index = np.zeros((1, channels, 3), np.float32), np.zeros((1, channels), np.int32)
    sensors = Sensors(where, where, np.full_like(index, kind), index, np.ones((1, channels), bool))
    return {"signal": np.zeros((1, channels, samples), np.float32), "sensors": sensors}


def table(made: Plan) -> str:
    """The plan as text."""
    memory = made.memory
    limit = "" if memory.limit is None else f" of {_bytes(memory.limit)}{'' if made.fits else ': DOES NOT FIT'}"
    laid = " × ".join(f"{axis} {size}" for axis, size in made.mesh.items()) or "one device"
    lines = [
        f"{made.config} on {made.target}: {made.devices} devices, {laid}; compiled in {made.compile_seconds:.0f} s",
        f"  memory a device    {_bytes(memory.peak)}{limit}",
        f"    parameters {_bytes(memory.parameters)}, optimiser {_bytes(memory.optimizer)}, other state "
        f"{_bytes(memory.others)}, batch {_bytes(memory.batch)}, code {_bytes(memory.code)}, "
        f"temporaries {_bytes(memory.temporaries)}",
        f"    of the temporaries about {_bytes(memory.activations)} are activations kept for the backward pass",
        f"  operations a step  {made.model_operations:.3e} of the model, {made.program_operations:.3e} done",
    ]
    for name, seconds, what in (
        ("compute", made.compute_seconds, f"{made.program_operations / made.devices:.3e} operations a device"),
        ("memory", made.memory_seconds, f"{_bytes(made.traffic)} a device"),
    ):
        lines.append(f"  {name:<18} {_time(seconds)}  {what}")
    for wire in made.wires:
        sent = f"{wire.kind} × {wire.calls}, {_bytes(wire.sent)} sent{' over the network' if wire.network else ''}"
        lines.append(f"  {'+'.join(wire.axes):<18} {_time(wire.seconds)}  {sent}")
    if made.bound_seconds is not None and made.mfu is not None:
        lines.append(
            f"  a step at best     {_time(made.bound_seconds)}  bound by {made.bound_by}; MFU ≤ {made.mfu:.1%}"
        )
    return "\n".join(lines)


def to_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {**dataclasses.asdict(made), "mesh": dict(made.mesh), "fits": made.fits}


def _compile(program: Program, target: Target) -> Any:
    with jax.set_mesh(program.mesh), program.context():
        lowered = program.train_step.lower(program.abstract(), program.batch)
        try:
            return lowered.compile(compiler_options=dict(target.compiler_options))
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text:
                raise ZooError(f"{target.name}: the compiler does not take the step: {text.splitlines()[0]}") from error
            used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", text)
            told = f": used {used[1]} of {used[2]}" if used else ""
            raise DoesNotFit(f"{target.name}: the step does not fit{told}", _buffers(text)) from None


def _buffers(text: str) -> list[str]:
    """The largest allocations in the compiler's complaint: size, operation, source line."""
    found = []
    for block in re.split(r"\n\s*\d+\. Size: ", text)[1:]:
        size = block.split("\n", 1)[0].strip()
        operation = re.search(r'op_name="([^"]*)"', block)
        source = re.search(r'source_file="?([^" ]*)"? source_line=(\d+)', block)
        where = f"{source[1].rsplit('/', 1)[-1]}:{source[2]}" if source else ""
        found.append(f"{size}  {operation[1] if operation else 'unnamed'}  {where}".rstrip())
    return found


def _memory(program: Program, compiled: Any, chip: Chip | None, activations: float) -> Memory:
    state, analysis = program.abstract(), compiled.memory_analysis()

    def held(tree: Any) -> int:
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    arguments, out, alias = (getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "alias"))
    temporaries, code = analysis.temp_size_in_bytes, analysis.generated_code_size_in_bytes
    return Memory(
        parameters=held(state.params),
        optimizer=held(state.optimizer),
        others=held((state.step, state.collections, state.ema)),
        batch=held(program.batch),
        activations=activations,
        temporaries=temporaries,
        code=code,
        peak=arguments + out - alias + temporaries + code,
        limit=chip.memory if chip else None,
    )


def _wires(found: Sequence[Collective], chip: Chip | None) -> tuple[Wire, ...]:
    """Sums by kind, axes and whether they leave the wires for the network, the most bytes first."""
    sent: dict[tuple[str, tuple[str, ...], bool], float] = {}
    calls: Counter[tuple[str, tuple[str, ...], bool]] = Counter()
    for each in found:
        key = each.kind, each.axes, chip is not None and _far(each, chip)
        sent[key] = sent.get(key, 0.0) + each.sent
        calls[key] += each.times
    return tuple(
        Wire(*key, calls[key], total, None if chip is None else total / (chip.network if key[2] else chip.wires))
        for key, total in sorted(sent.items(), key=lambda item: -item[1])
    )


def _far(found: Collective, chip: Chip) -> bool:
    """Between slices of TPUs, and between nodes of NVIDIA's chips, a network carries the data."""
    if chip.name in NVIDIA:
        return len({device // chip.node for device in found.devices}) > 1
    return "slice" in found.axes


def _longest(wires: Sequence[Wire]) -> float:
    """Network and wires work side by side; collectives on the same of them do not."""
    return max(sum(wire.seconds or 0.0 for wire in wires if wire.network == far) for far in (False, True))


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return f"{'unknown':>10}"
    return f"{seconds * 1e3:>7.3g} ms"
