"""One-line errors for arguments: the operation, the argument, the shape got and the shape wanted."""

from collections.abc import Mapping
from typing import Any

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
        known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes and letter.isalpha())
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


def check_chunk_size(op: str, chunk_size: int | None) -> int:
    """64 unless given; raises ValueError unless a power of two from 8 to 512."""
    if chunk_size is None:
        return 64
    if chunk_size not in (8, 16, 32, 64, 128, 256, 512):
        raise ValueError(f"{op}: chunk_size: got {chunk_size}, wanted a power of two from 8 to 512")
    return chunk_size
