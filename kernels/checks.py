"""One-line errors for arguments: the operation, the argument, the shape got and the shape wanted."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def check_shape(op: str, name: str, array: Any, wanted: str, sizes: dict[str, int]) -> None:
    """Compares `array.shape` with `wanted`, such as "B T H K"; letters met for the first time are added to `sizes`.

    Raises:
      ValueError: another number of dimensions, or a size that differs from what its letter already stands for.
    """
    letters = wanted.split()
    shape = jnp.shape(array)
    fits = len(shape) == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
        raise ValueError(
            f"{op}: {name}: got shape {tuple(shape)}, wanted [{', '.join(letters)}]{known and ' with '}{known}"
        )
    sizes.update(zip(letters, shape, strict=True))


def check_floating(op: str, arrays: Mapping[str, Any], *, complex_too: bool = False) -> None:
    """Raises ValueError for an array (None is skipped) that is neither floating nor, where allowed, complex."""
    for name, array in arrays.items():
        if array is None:
            continue
        kind = jnp.result_type(array)
        if not (jnp.issubdtype(kind, jnp.floating) or (complex_too and jnp.issubdtype(kind, jnp.complexfloating))):
            wanted = "floating or complex" if complex_too else "floating"
            raise ValueError(f"{op}: {name}: got dtype {kind}, wanted a {wanted} one")


def check_segment_ids(op: str, segment_ids: Any, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `segment_ids` is None or an integer array [B, T]."""
    if segment_ids is None:
        return
    check_shape(op, "segment_ids", segment_ids, "B T", sizes)
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise ValueError(f"{op}: segment_ids: got dtype {jnp.result_type(segment_ids)}, wanted an integer one")


def check_heads(op: str, counts: Mapping[str, int]) -> int:
    """The largest head count; raises ValueError unless every other one divides it."""
    heads = max(counts.values())
    for name, count in counts.items():
        if count == 0 or heads % count:
            raise ValueError(f"{op}: {name}: got {count} heads, wanted a divisor of the largest count {heads}")
    return heads


def canonical_decay(op: str, log_decay: Any, sizes: dict[str, int], heads: int) -> jax.Array | None:
    """None, [H], [B, T, Hg] or [B, T, Hg, K] → None or [B, T, Hg, 1 or K] in float32 (float64 stays).

    Raises:
      ValueError: another shape, or Hg does not divide the number of heads.
    """
    if log_decay is None:
        return None
    log_decay = jnp.asarray(log_decay)
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    batch, time, width = sizes["B"], sizes["T"], sizes["K"]
    if log_decay.shape == (heads,):
        return jnp.broadcast_to(log_decay[:, None], (batch, time, heads, 1))
    if log_decay.shape[:2] == (batch, time) and log_decay.shape[3:] in ((), (width,)) and log_decay.ndim >= 3:
        check_heads(op, {"log_decay": log_decay.shape[2], "the arrays": heads})
        return log_decay if log_decay.ndim == 4 else log_decay[..., None]
    raise ValueError(
        f"{op}: log_decay: got shape {log_decay.shape}, wanted [H], [B, T, H] or [B, T, H, K] "
        f"with B={batch}, T={time}, H={heads}, K={width}"
    )


def check_chunk_size(op: str, chunk_size: int | None) -> int:
    """64 unless given; raises ValueError unless a power of two from 8 to 512."""
    if chunk_size is None:
        return 64
    if chunk_size not in (8, 16, 32, 64, 128, 256, 512):
        raise ValueError(f"{op}: chunk_size: got {chunk_size}, wanted a power of two from 8 to 512")
    return chunk_size
