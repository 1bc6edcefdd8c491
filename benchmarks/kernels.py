"""How fast the kernels are, how much memory they take, and what they compile to for a TPU.

    python benchmarks/kernels.py --op linear_attention --gate channel --implementation xla reference
    python benchmarks/kernels.py --op linear_attention --shape B1,T1024,H4,K64,V64 \\
        --against dot_product_attention --sweep-t 512,1024,2048,4096,8192,16384
    python benchmarks/kernels.py --op delta_rule --gate channel --target v5e
    python benchmarks/kernels.py --op native_sparse_attention --shape B1,T16384,H4,K64,V64 \\
        --against dot_product_attention
    python benchmarks/kernels.py --op sparse_attention --mask window --window 512 --against pieces
    python benchmarks/kernels.py --op nearest_code --against argmin

Every contender is first compared with the float64 definition at a cut-down size, in values and gradients; one that
fails shows its errors, no speed, and the exit code is 1. The rest take turns in one run, so that their ratios mean
something on a noisy machine. Rates are the work counted (`kernel_cases.counts`: of the chunked form of a recurrence, of
the keys that are seen in attention) over the time.
With --target nothing is timed: the programs are compiled ahead for that TPU.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

# Before this file's own folder, in which `kernels` would be this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import aot, kernel_contenders, recurrences
from benchmarks.kernel_cases import FAMILIES, Case, Dtype, Gate, Mask, Mode, Op, counts, parse_shape
from benchmarks.kernel_contenders import Contender, check, failures, inputs, lowered, program, results
from benchmarks.kernel_peers import PEERS
from benchmarks.kernel_tables import Report, Row, as_json, show
from zoo.errors import ZooError
from zoo.terminal import parse

Target = Literal["v4", "v5e", "v5p", "v6e", "7x"]
Implementation = Literal["xla", "pallas", "reference"]
Peer = Literal["dot_product_attention", "pieces", "argmin", "tokamax", "reference"]
CANNOT_RUN = (NotImplementedError, jax.errors.JaxRuntimeError)
"""Not for these arguments or this machine, or not enough memory."""
WARM_UP = 2


@dataclass(frozen=True)
class Options:
    """Times the kernels, or with --target compiles them ahead for a TPU.

    Attributes:
        op: the operation
        shape: sizes by letter, such as B1,T8192,H96,K128,V128; several may be given
        gate: decay: none, one a head, a token and head (scalar), or a key channel
        dtype: of q, k, v and the like; gates and states are float32
        mode: what is run; several may be given, otherwise forward and forward_backward
        implementation: which are run, otherwise xla, or pallas with --target
        against: what they are compared with
        causal: whether linear_attention looks only back
        mask: of sparse_attention: window and symmetric_window of --window tokens, segments of --window tokens, strided
            (every --window tokens), longformer (symmetric window and tokens that see all), blocks of --block-size
        window: tokens of the window
        block_size: tokens of a block that is chosen
        stride: of native sparse attention's compressed blocks, which are twice as long
        chosen: blocks a query chooses
        density: share of the blocks that --mask blocks has on
        metric: of nearest_code
        quick: two small shapes instead of the default ones
        sweep_t: replaces T by each of these, such as 512,1024, and says where the first contender overtakes
        repeats: timed turns of each contender
        json: write the figures here
        target: compile for this TPU instead of timing
    """

    op: Op = "linear_attention"
    shape: tuple[str, ...] = ()
    gate: Gate | None = None
    dtype: Dtype | None = None
    mode: tuple[Mode, ...] = ()
    implementation: tuple[Implementation, ...] = ()
    against: tuple[Peer, ...] = ()
    causal: bool = True
    mask: Mask = "window"
    window: int = 512
    block_size: int = 64
    stride: int = 16
    chosen: int = 16
    density: float = 0.25
    metric: Literal["l2", "cosine"] = "l2"
    quick: bool = False
    sweep_t: str = ""
    repeats: int = 20
    json: Path | None = None
    target: Target | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 where a contender is wrong or does not compile ahead, 2 for bad input."""
    try:
        options = parse(Options, list(sys.argv[1:] if arguments is None else arguments), prog="benchmarks/kernels.py")
        return run(options)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: Options) -> int:
    """Checks, measures, shows and writes; 1 where a contender is wrong or does not compile ahead."""
    cases = list(read_cases(options))
    rows: list[Row] = []
    overtakings: list[str] = []
    if options.target:
        with tempfile.TemporaryDirectory() as dump:
            aot.prepare(Path(dump))
            for case in cases:
                rows += compile_case(case, options, Path(dump))
    else:
        for mode in modes(options):
            of_mode = [measure(case, mode, contenders(case, mode, options), options.repeats) for case in cases]
            rows += [row for each in of_mode for row in each]
            if options.sweep_t:
                overtakings += [f"{mode}: {line}" for line in find_overtakings(of_mode)]
    report = Report(options.op, describe_device(options), bool(options.target), rows, overtakings)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    return int(any(row.failed for row in rows))


def modes(options: Options) -> tuple[Mode, ...]:
    """Those asked for, or forward and backward where there is one."""
    possible = FAMILIES[options.op].MODES[options.op]
    for mode in options.mode:
        if mode not in possible:
            raise ZooError(f"--mode {mode}: {options.op} has {', '.join(possible)}")
    return options.mode or tuple(mode for mode in possible if mode != "step")


def read_cases(options: Options) -> Iterable[Case]:
    """The shapes asked for, or the default ones; ZooError for options that do not go together."""
    op, family = options.op, FAMILIES[options.op]
    gate: Gate = options.gate or ("channel" if op in ("linear_scan", "selective_scan") else "none")
    if gate != "channel" and op in ("linear_scan", "selective_scan"):
        raise ZooError(f"--gate: {op} has a decay a channel, got {gate}")
    if gate != "none" and family is not recurrences:
        raise ZooError(f"--gate: {op} has no decay, got {gate}")
    if not options.causal and op != "linear_attention":
        raise ZooError(f"--no-causal: only linear_attention has a bidirectional form, got --op {op}")
    if options.quick and options.shape:
        raise ZooError("--quick chooses shapes itself: got --shape too")
    if options.repeats < 2:
        raise ZooError(f"--repeats: got {options.repeats}, wanted 2 or more, for a median and quartiles")
    if "step" in modes(options) and (options.against or options.implementation or options.sweep_t):
        raise ZooError("--mode step: a step has one form and no T: leave out other contenders and --sweep-t")
    if options.json and not options.json.parent.is_dir():
        raise ZooError(f"--json: {options.json.parent} is not a folder")
    if options.target and options.against:
        raise ZooError("--target: nothing is timed: leave --against out")
    if options.sweep_t and (len(options.shape) != 1 or not set(options.against) | set(options.implementation[1:])):
        raise ZooError("--sweep-t: wanted one --shape, and two contenders, such as --against dot_product_attention")
    given = [(shape, options.dtype or "float32") for shape in options.shape]
    for shape, dtype in given or (family.QUICK if options.quick else family.DEFAULTS)[op]:
        sizes = parse_shape(op, shape)
        for time_ in read_times(options.sweep_t) or (None,):
            yield Case(
                op=op,
                sizes=sizes if time_ is None else sizes | {"T": time_},
                gate=gate,
                dtype=options.dtype or dtype,
                causal=options.causal,
                bounded="tokamax" in options.against,
                mask=options.mask,
                window=options.window,
                block_size=options.block_size,
                stride=options.stride,
                chosen=options.chosen,
                density=options.density,
                metric=options.metric,
            )


def read_times(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if text]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ZooError(f"--sweep-t: got {text!r}, wanted positive numbers such as 512,1024,2048")
    return sorted({int(part) for part in parts})


def contenders(case: Case, mode: Mode, options: Options) -> list[Contender]:
    """Those asked for, what they are compared with last."""
    if mode == "step":
        return [kernel_contenders.one_step(case)]
    chosen = [kernel_contenders.implementation(case, name) for name in options.implementation or ("xla",)]
    return chosen + [PEERS[name](case) for name in options.against if name not in options.implementation]


def measure(case: Case, mode: Mode, compared: Sequence[Contender], repeats: int) -> list[Row]:
    """One row a contender: checked, compiled, then timed by turns."""
    rows, ready = [], []
    for contender in compared:
        row = Row(
            str(case),
            case.length,
            case.variant,
            case.dtype,
            mode,
            contender.name,
            contender.note,
        )
        rows.append(row)
        try:
            row.errors = check(contender, case, mode)
            wrong = failures(row.errors, case.dtype)
            if wrong:
                row.failed = True
                row.problem = "wrong: " + ", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items())
                continue
            run_it = compile_here(contender, case, mode, row)
        except CANNOT_RUN as reason:
            row.problem = first_line(reason)
            continue
        if run_it is not None:
            ready.append((contender, row, *run_it))
    taken = take_turns([(compiled, arguments) for _, _, compiled, arguments in ready], repeats)
    for (contender, row, *_), seconds in zip(ready, taken, strict=True):
        work = counts(case, mode, contender.method)
        row.quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
        row.ratio = statistics.median(mine / first for mine, first in zip(seconds, taken[0], strict=True))
        row.flops_per_second, row.bytes_per_second = work.flops / row.quartiles[1], work.bytes / row.quartiles[1]
    return rows


def compile_here(contender: Contender, case: Case, mode: Mode, row: Row) -> tuple[Any, tuple[Any, ...]] | None:
    """The compiled program and its arguments, or None with the reason in the row: too large, or a result not finite."""
    function = program(contender.call, mode)
    arguments = tuple(map(contender.inward, inputs(contender, case, mode)))
    start = time.perf_counter()
    compiled = lowered(function, *arguments).compile()
    row.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    row.temporary_bytes = memory.temp_size_in_bytes
    row.temporary_ratio = memory.temp_size_in_bytes / (memory.argument_size_in_bytes + memory.output_size_in_bytes)
    needed, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, free_bytes()
    if needed > free:
        row.problem = f"needs {needed / 1e9:.1f} GB beside its inputs, {free / 1e9:.1f} GB are free"
        return None
    if not all(bool(jax.numpy.isfinite(x).all()) for x in compiled(*arguments).values()):
        row.failed, row.problem = True, "wrong: a result of full size is not finite"
        return None
    return compiled, arguments


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def free_bytes() -> int:
    """Memory of the device that programs run on; the machine's for the CPU, files it would forget counted as free."""
    statistics_ = jax.devices()[0].memory_stats()
    if statistics_ is None:
        meminfo = Path("/proc/meminfo")
        if meminfo.exists():
            kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())["MemAvailable"]
            return 1024 * int(kilobytes.split()[0])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return statistics_["bytes_limit"] - statistics_["bytes_in_use"]


def take_turns(programs: Sequence[tuple[Any, tuple[Any, ...]]], repeats: int) -> list[list[float]]:
    """Seconds of each program's calls, A B A B …, the first rounds left out."""
    taken: list[list[float]] = [[] for _ in programs]
    for round_ in range(WARM_UP + repeats):
        for (compiled, arguments), seconds in zip(programs, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if round_ >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    return taken


def find_overtakings(sweep: Sequence[Sequence[Row]]) -> list[str]:
    """Where the first contender becomes faster or slower than each other one, interpolated in log T of two shapes."""
    lines = []
    for number, other in enumerate(sweep[0][1:], start=1):
        rows = [rows[number] for rows in sweep if rows[0].quartiles and rows[number].ratio]
        points = [(math.log(row.time), math.log(row.ratio)) for row in rows if row.ratio]
        pair = f"{sweep[0][0].contender} and {other.contender}"
        if not points:
            lines.append(f"{pair}: nothing to compare")
        elif all(ratio > 0 for _, ratio in points):
            lines.append(f"{pair}: the first is faster from the shortest T on")
        elif all(ratio <= 0 for _, ratio in points):
            lines.append(f"{pair}: the first is slower up to the longest T")
        for (t0, r0), (t1, r1) in itertools.pairwise(points):
            if (r0 > 0) != (r1 > 0):
                turn = "faster" if r1 > 0 else "slower"
                lines.append(f"{pair}: the first is {turn} from T ≈ {math.exp(t0 - r0 * (t1 - t0) / (r1 - r0)):.0f} on")
    return lines


def compile_case(case: Case, options: Options, dump: Path) -> list[Row]:
    """One row for each implementation and mode, compiled ahead."""
    rows = []
    for mode in modes(options):
        for name in options.implementation or ("pallas",):
            # Compiled for a TPU, the implementation None is Pallas where that serves.
            if mode == "step":
                contender = kernel_contenders.one_step(case)
            else:
                contender = kernel_contenders.implementation(case, None if name == "pallas" else name, name)
            row = Row(str(case), case.length, case.variant, case.dtype, mode, contender.name)
            rows.append(row)
            arrays = case.shapes(step=mode == "step")
            arguments: tuple[Any, ...] = (arrays,)
            if mode == "forward_backward":
                arguments = (arrays, results(contender, arrays))
            try:
                compiled = aot.compile_ahead(program(contender.call, mode), arguments, str(options.target), dump)
            except CANNOT_RUN as reason:
                row.failed, row.problem = True, first_line(reason)
                continue
            row.compile_seconds, row.temporary_bytes = compiled.seconds, compiled.temporary_bytes
            row.kernels = compiled.kernels
            if contender.name == "pallas" and not compiled.kernels:
                row.problem = "the Pallas form does not serve these arguments: this is the XLA form"
    return rows


def describe_device(options: Options) -> str:
    if options.target:
        return f"compiled ahead for {options.target}"
    return f"on {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"


if __name__ == "__main__":
    sys.exit(main())
