"""Which form of an operation runs: the one file here that knows platforms.

Every operation has a definition (`reference.py`), a form in plain XLA (`xla.py`) and a Pallas TPU form (`tpu.py`).
`implementation=None` means the Pallas form where the program is compiled for a TPU and the form serves these
arguments, else XLA. The choice is made when the program is lowered, so compiling ahead for a TPU on a machine without
one takes the kernels. A named implementation runs or raises; nothing is replaced in silence.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

IMPLEMENTATIONS = ("reference", "xla", "pallas")

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)
_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def interpreted(parameters: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Runs Pallas TPU kernels on the CPU, for tests: slowly, and on request with races detected and memory poisoned."""
    token = _interpreted.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(parameters or pltpu.InterpretParams()):
            yield
    finally:
        _interpreted.reset(token)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Operations traced inside are in plain XLA, for one program that runs on several platforms (`jax.export`)."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def check_implementation(op: str, implementation: str | None, refusal: str | None) -> None:
    """Raises for an unknown name, and NotImplementedError where Pallas was asked for and cannot serve.

    `refusal` says why the Pallas form does not take these arguments, or is None where it does.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{op}: implementation: got {implementation!r}, wanted None or one of {IMPLEMENTATIONS}")
    if implementation != "pallas":
        return
    if refusal is not None:
        raise NotImplementedError(f"{op}: implementation 'pallas': {refusal}")
    if not _interpreted.get() and jax.default_backend() != "tpu":
        raise NotImplementedError(
            f"{op}: implementation 'pallas' needs a TPU, this process computes on {jax.default_backend()}; "
            "to compile ahead for a TPU leave implementation=None"
        )


def run(
    implementation: str | None, refusal: str | None, xla: Callable[..., Any], pallas: Callable[..., Any], *arrays: Any
) -> Any:
    """Calls the chosen one of two forms with the same results; `implementation` has been checked.

    A kernel runs over so many blocks: where a size is a symbol, as `jax.export` may have it, XLA's form is the one.
    """
    if implementation == "pallas" or (implementation is None and refusal is None and _interpreted.get()):
        return pallas(*arrays)
    if implementation == "xla" or refusal is not None or _portable.get() or not known_sizes(*arrays):
        return xla(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=pallas, default=xla)


def known_sizes(*arrays: Any) -> bool:
    """Whether every axis of these arrays has a number for its size."""
    return all(isinstance(size, int) for leaf in jax.tree.leaves(arrays) for size in jnp.shape(leaf))


def on_cuda(cuda: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `cuda` where the program is compiled for an NVIDIA GPU, else `default`, with the same results."""
    if _interpreted.get() or _portable.get():
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=cuda, default=default)


def fitting(most: int, size: int) -> int:
    """How often `size` goes into `most`, at least once; once where it is a symbol."""
    return max(most // max(size, 1), 1) if isinstance(size, int) else 1


def block_rows() -> int:
    """How many rows (batch × heads × time) an XLA form works on at once: bounds its temporary memory."""
    return 2**10 if jax.default_backend() == "cpu" else 2**18


def state_elements() -> int:
    """How many elements of state a loop over time should update in a step at least: off the CPU a step is a launch."""
    return 1 if jax.default_backend() == "cpu" else 2**18
