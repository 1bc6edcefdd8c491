"""Additive attention as a pointer: to inputs, one after another, or as a mixer to earlier tokens.

Source: Vinyals, Fortunato and Jaitly, "Pointer Networks" (1506.03134), §2.2–2.3 (eq. 3 and the glimpse of §2.2), §3.1
for sizes and initial values (LSTMs of 256 or 512 features, uniform in ±0.08).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.decoding import written
from kernels.packing import runs
from zoo.errors import ZooError
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import dense, fan_in, partitioned
from zoo.types import Array

UNIFORM = nn.initializers.uniform(0.16)
TOGETHER = 64
"""Queries of the mixer that are worked on at once: scores of all hidden features are held for no more."""


def small(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Uniform in ±0.08 (§3.1)."""
    return UNIFORM(key, shape, dtype) - 0.08


def scores(keys: Float[Array, "*lead N F"], query: Float[Array, "*lead F"], v: Float[Array, " F"]) -> Array:
    """u_j = v · tanh(W_1 e_j + W_2 d), eq. 3, of what W_1 and W_2 gave; [..., N] float32."""
    hidden = jnp.tanh(keys.astype(jnp.float32) + query.astype(jnp.float32)[..., None, :])
    return jnp.einsum("...nf,f->...n", hidden, v)


def masked_log_softmax(u: Float[Array, "*lead N"], visible: Bool[Array, "*lead N"]) -> Float[Array, "*lead N"]:
    """Logarithms of probabilities, −inf where not visible; all −inf, and no gradient, where nothing is."""
    u = jnp.where(visible, u, -jnp.inf)
    any_visible = jnp.any(visible, axis=-1, keepdims=True)
    logs = jax.nn.log_softmax(jnp.where(any_visible, u, 0), axis=-1)
    return jnp.where(visible, logs, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PointerCache:
    """The tokens so far, and what W_1 makes of them."""

    keys: Array
    """[B, S, F]; S is the capacity."""
    values: Array
    """[B, S, D]"""
    length: Array
    """[B] int32"""


class Pointer(Mixer):
    """The glimpse: out_t = sum_j softmax_j(v · tanh(W_1 x_j + W_2 x_t)) x_j.

    A score costs as many operations as there are hidden features, times three; memory grows with the length alone.

    hidden  features F of W_1 and W_2; D unless given
    causal  False lets every token see all
    """

    hidden: int | None = None

    ways = (True, False)

    def setup(self) -> None:
        hidden = self.dim if self.hidden is None else self.hidden
        self.key, self.query = (dense(hidden, dtype=self.dtype) for _ in range(2))
        self.v = self.param("v", partitioned(fan_in((0,), ()), "mlp"), (hidden,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        length = x.shape[1]
        keys, values = self.key(x), x.astype(self.dtype)
        run = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else runs(segment_ids)
        seen = run if mask is None else jnp.where(mask, run, -1)
        places = jnp.arange(length)

        @jax.checkpoint
        def glimpse(query: Array, own: Array, place: Array) -> Array:
            """One query of every row."""
            visible = seen == own[:, None]
            if self.causal:
                visible &= places <= place
            return self._glimpse(keys, values, query, visible)

        queries = jnp.swapaxes(self.query(x), 0, 1)
        each = (queries, run.T, places)
        out = lax.map(lambda one: glimpse(*one), each, batch_size=min(TOGETHER, length))
        return jnp.swapaxes(out, 0, 1)

    def initial_state(self, batch: int, capacity: int = 2048) -> PointerCache:
        self.check_causal()
        hidden = self.dim if self.hidden is None else self.hidden
        keys, values = (jnp.zeros((batch, capacity, width), self.dtype) for width in (hidden, self.dim))
        return PointerCache(keys, values, jnp.zeros(batch, jnp.int32))

    def step(self, x: Float[Array, "B D"], state: PointerCache) -> tuple[Float[Array, "B D"], PointerCache]:
        """One token. A row whose cache is full gives NaN, and nothing is written."""
        time, capacity = state.length, state.keys.shape[1]
        keys, values = written(state.keys, self.key(x), time), written(state.values, x, time)
        out = self._glimpse(keys, values, self.query(x), jnp.arange(capacity) <= time[:, None])
        full = time >= capacity
        out = jnp.where(full[:, None], jnp.nan, out)
        return out, PointerCache(keys, values, jnp.where(full, time, time + 1))

    def _glimpse(self, keys: Array, values: Array, query: Array, visible: Array) -> Float[Array, "B D"]:
        p = jnp.exp(masked_log_softmax(scores(keys, query, self.v), visible))
        return jnp.einsum("bn,bnd->bd", p, values.astype(jnp.float32)).astype(values.dtype)


class LSTM(nn.Module):
    """Hochreiter and Schmidhuber's with forget gates: one kernel for input, forget, cell and output of both inputs."""

    features: int
    inputs: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shape = (self.inputs + self.features, 4 * self.features)
        self.kernel = self.param("kernel", partitioned(small, "embed", "mlp"), shape)
        self.bias = self.param("bias", partitioned(small, "mlp"), (4 * self.features,))

    def __call__(self, state: tuple[Array, Array], x: Float[Array, "B F"]) -> tuple[Array, Array]:
        """(cell, output) and an input → the new ones."""
        cell, output = state
        both = jnp.concatenate([x.astype(self.dtype), output], axis=-1)
        gates = both @ self.kernel.astype(self.dtype) + self.bias.astype(self.dtype)
        take, keep, fresh, give = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(take) * jnp.tanh(fresh)
        return cell, jax.nn.sigmoid(give) * jnp.tanh(cell)


class PointerNetwork(nn.Module):
    """An LSTM reads the inputs, another points to one of them at each step and reads that next (eq. 3).

    Outputs are places of inputs, so one network serves inputs of any number. Where sequences of places may end early
    (hulls), append an input that stands for the end.

    inputs    features of an input
    features  of both LSTMs, and of W_1 and W_2
    """

    inputs: int
    features: int = 256
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder, self.decoder = (LSTM(self.features, self.inputs, self.dtype) for _ in range(2))
        self.key, self.query = (dense(self.features, ("embed", "mlp"), init=small, dtype=self.dtype) for _ in range(2))
        self.v = self.param("v", partitioned(small, "mlp"), (self.features,))
        self.start = self.param("start", partitioned(small, None), (self.inputs,))

    def __call__(
        self,
        inputs: Float[Array, "B N F"],
        targets: Int[Array, "B M"],
        *,
        mask: Bool[Array, "B N"] | None = None,
    ) -> Float[Array, "B M N"]:
        """Logarithms of the probabilities of pointing to each input, each step having read the target before.

        mask [B, N]: False where an input is not there. They must come after those that are; their targets are not read.
        """
        keys, state, visible = self._read(inputs, mask)
        before = jnp.take_along_axis(inputs, targets[:, :-1, None], axis=1)
        start = jnp.broadcast_to(self.start, (inputs.shape[0], 1, self.inputs)).astype(inputs.dtype)
        given = jnp.concatenate([start, before], axis=1)[:, : targets.shape[1]]

        def step(module: PointerNetwork, state: Any, x: Array) -> tuple[Any, Array]:
            state = module.decoder(state, x)
            return state, module._point(keys, state[1], visible)

        return self._scanned(step)(self, state, given)[1]

    def decode(
        self,
        inputs: Float[Array, "B N F"],
        steps: int,
        *,
        mask: Bool[Array, "B N"] | None = None,
        revisit: bool = True,
    ) -> tuple[Int[Array, "B M"], Float[Array, " B"]]:
        """The likeliest input at each of `steps` steps, and the logarithm of the probability of all.

        revisit: False leaves out inputs pointed to before, for tours; their probability goes to the others. Raises
        ZooError where `steps` are then more than there are inputs.
        """
        batch, count, _ = inputs.shape
        if not revisit and steps > count:
            raise ZooError(f"PointerNetwork: {steps} steps to {count} inputs, none twice")
        keys, state, visible = self._read(inputs, mask)
        start = jnp.broadcast_to(self.start, (batch, self.inputs)).astype(inputs.dtype)

        def step(module: PointerNetwork, carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            state, x, free = carry
            state = module.decoder(state, x)
            logs = module._point(keys, state[1], free)
            place = jnp.argmax(logs, axis=-1).astype(jnp.int32)
            x = jnp.take_along_axis(inputs, place[:, None, None], axis=1)[:, 0]
            if not revisit:
                free &= jnp.arange(count) != place[:, None]
            return (state, x, free), (place, jnp.take_along_axis(logs, place[:, None], axis=1)[:, 0])

        _, (places, logs) = self._scanned(step, steps)(self, (state, start, visible), None)
        return places, jnp.sum(logs, axis=1)

    def _read(self, inputs: Array, mask: Array | None) -> tuple[Array, tuple[Array, Array], Array]:
        """W_1 of what the encoder made of each input, its last state, and which inputs there are."""
        visible = jnp.ones(inputs.shape[:2], bool) if mask is None else mask
        nothing = jnp.zeros((inputs.shape[0], self.features), self.dtype)

        def step(module: PointerNetwork, state: Any, each: tuple[Array, Array]) -> tuple[Any, Array]:
            x, there = each
            after = module.encoder(state, jnp.where(there[:, None], x, 0))
            state = jax.tree.map(partial(jnp.where, there[:, None]), after, state)
            return state, state[1]

        state, outputs = self._scanned(step)(self, (nothing, nothing), (inputs, visible))
        return self.key(outputs), state, visible

    def _point(self, keys: Array, output: Array, visible: Array) -> Array:
        return masked_log_softmax(scores(keys, self.query(output), self.v), visible)

    @nn.nowrap
    def _scanned(self, step: Any, length: int | None = None) -> Any:
        """`step` over the second axis of its inputs."""
        shared: Any = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(step, **shared, in_axes=1, out_axes=1, length=length)
