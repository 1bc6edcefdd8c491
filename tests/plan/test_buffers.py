"""The largest arrays of a compiled program, by source line."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zoo.plan.buffers import Buffers
from zoo.plan.hlo import Hlo


def test_the_largest_come_first_with_their_lines() -> None:
    def small_and_large(x: jax.Array) -> jax.Array:
        small = jnp.cumsum(x)
        large = jnp.sort(jnp.outer(small, small))
        return large @ small

    line = small_and_large.__code__.co_firstlineno
    text = jax.jit(small_and_large).lower(jax.ShapeDtypeStruct((512,), jnp.float32)).compile().as_text()
    first, *others = Buffers(Hlo(str(text))).largest()
    assert first.startswith("1.00M"), first
    assert f"test_buffers.py:{line + 2}" in first, first
    assert all("1.00M" in each or float(each.split("M")[0]) < 1 for each in others)


def test_what_the_compiler_put_in_is_told_by_its_taker() -> None:
    """The sums of a scan's outputs begin as zeros that no line of source made."""

    def kept(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry), carry), x, None, length=64)[1]

    line = kept.__code__.co_firstlineno
    text = jax.jit(kept).lower(jax.ShapeDtypeStruct((4096,), jnp.float32)).compile().as_text()
    largest = Buffers(Hlo(str(text))).largest()
    assert largest[0].startswith("1.00M")
    assert all(f"test_buffers.py:{line + 1}" in each for each in largest if each.startswith("1.00M")), largest
