"""What linear attention and the delta rule share of their arguments: grouped heads, log decay, state, scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels.checks import check_floating, check_shape
from kernels.chunks import compute_dtype

SHAPES = {"q": "Hq K", "k": "Hk K", "v": "Hv V", "beta": "Hb"}


@dataclass(frozen=True)
class Arguments:
    sizes: dict[str, int]
    """By letter of the shapes; H is the largest head count, which every other divides."""
    log_decay: jax.Array | None
    """None or [B, T, Hg, 1 or K] in at least float32."""
    state: jax.Array
    """[B, H, K, V]."""
    scale: float


def canonical(
    op: str,
    arrays: Mapping[str, Any],
    log_decay: Any,
    initial_state: Any,
    scale: float | None,
) -> Arguments:
    """Checks the arrays [B, T, …] of an operation and fills in what was not given.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    sizes = _sizes(op, arrays, "B T")
    check_floating(op, {**arrays, "log_decay": log_decay, "initial_state": initial_state})
    dtype, _ = compute_dtype(arrays["q"], arrays["k"], arrays["v"])
    if initial_state is None:
        initial_state = jnp.zeros([sizes[letter] for letter in "BHKV"], dtype)
    check_shape(op, "initial_state", initial_state, "B H K V", sizes)
    return Arguments(sizes, _decay(op, log_decay, sizes), jnp.asarray(initial_state, dtype), _scale(scale, sizes))


def canonical_token(
    op: str,
    arrays: Mapping[str, Any],
    log_decay: Any,
    state: Any,
    scale: float | None,
) -> Arguments:
    """The same for the arrays [B, …] of one token, whose log decay may be [H], [B, Hg] or [B, Hg, K].

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    sizes = _sizes(op, arrays, "B") | {"T": 1}
    check_floating(op, {**arrays, "log_decay": log_decay, "state": state})
    check_shape(op, "state", state, "B H K V", sizes)
    if log_decay is not None and jnp.ndim(log_decay) > 1:
        log_decay = jnp.expand_dims(log_decay, 1)
    return Arguments(sizes, _decay(op, log_decay, sizes), jnp.asarray(state), _scale(scale, sizes))


def repeat_heads(x: Any, heads: int) -> Any:
    """[B, T, G, ...] → [B, T, heads, ...], each head serving heads / G neighbours; None stays."""
    return x if x is None or x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _sizes(op: str, arrays: Mapping[str, Any], leading: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        check_shape(op, name, array, f"{leading} {SHAPES[name]}", sizes)
    counts = {name: sizes[SHAPES[name].split()[0]] for name in arrays}
    heads = max(counts.values())
    for name, count in counts.items():
        _check_divides(op, name, count, heads)
    return sizes | {"H": heads}


def _check_divides(op: str, name: str, count: int, heads: int) -> None:
    if count == 0 or heads % count:
        raise ValueError(f"{op}: {name}: got {count} heads, wanted a divisor of the largest count {heads}")


def _scale(scale: float | None, sizes: dict[str, int]) -> float:
    return float(sizes["K"]) ** -0.5 if scale is None else float(scale)


def _decay(op: str, log_decay: Any, sizes: dict[str, int]) -> jax.Array | None:
    """None, [H], [B, T, Hg] or [B, T, Hg, K] → None or [B, T, Hg, 1 or K] in float32 (float64 stays)."""
    if log_decay is None:
        return None
    log_decay = jnp.asarray(log_decay)
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    batch, time, heads, width = (sizes[letter] for letter in "BTHK")
    if log_decay.shape == (heads,):
        return jnp.broadcast_to(log_decay[:, None], (batch, time, heads, 1))
    if log_decay.ndim >= 3 and log_decay.shape[:2] == (batch, time) and log_decay.shape[3:] in ((), (width,)):
        _check_divides(op, "log_decay", log_decay.shape[2], heads)
        return log_decay if log_decay.ndim == 4 else log_decay[..., None]
    raise ValueError(
        f"{op}: log_decay: got shape {log_decay.shape}, wanted [H], [B, T, H] or [B, T, H, K] "
        f"with B={batch}, T={time}, H={heads}, K={width}"
    )
