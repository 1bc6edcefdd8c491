"""The parts of Titans that hold parameters: the memory with its projections, and attention to several sets of keys.

Source: Behrouz, Zhong and Mirrokni, "Titans" (2501.00663), §4.4 for projections, convolutions and norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.decoding import attend as attend_to_cache
from kernels.decoding import written
from kernels.packing import starts
from kernels.sparse_attention import Mask
from kernels.split_attention import split_attend
from kernels.turns import in_turns
from zoo.attention.softmax import SPLIT_HEADS, SPLIT_IDS
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import Axes, over_time, splits_time
from zoo.layers.parameters import dense, merge_heads, partitioned, split_heads
from zoo.layers.rotary import rotate
from zoo.state_space.titans_memory import Memory, layer_shapes, neural_memory, pooled
from zoo.types import Array

REMEMBERS = -5.0
"""Where the gate of forgetting begins: alpha = 0.7 % a token. Ours, as the paper gives none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryStream:
    """A memory between two tokens."""

    memory: Memory
    """before the chunk"""
    convolved: tuple[Array, Array, Array]
    """[B, W, D] each, the last tokens that the convolutions of queries, keys and values saw"""
    keys: Array
    """[B, C, H, K] of the chunk so far"""
    values: Array
    """[B, C, H, K]"""
    gates: Array
    """[B, C, H, 3] logits of theta, alpha and eta"""
    place: Array
    """[B] int32, how many tokens of the chunk have come"""


class NeuralMemory(nn.Module):
    """The memory with its projections: queries, keys and values by linear map, short convolution and SiLU, queries and
    keys of length one; three gates a head from the token.

    Options are those of `Titans`.
    """

    dim: int
    heads: int
    depth: int
    expansion: int
    activation: str
    residual: bool
    chunk: int
    granularity: str
    step_size: float
    convolution: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.query, self.key, self.value = (dense(self.dim, dtype=self.dtype) for _ in range(3))
        self.query_convolution, self.key_convolution, self.value_convolution = (
            ShortConvolution(self.dim, self.convolution, dtype=self.dtype) for _ in range(3)
        )
        self.theta, self.alpha, self.eta = (
            dense(self.heads, ("embed", "heads"), bias=True, bias_init=nn.initializers.constant(begin))
            for begin in (0.0, REMEMBERS, 0.0)
        )
        xavier = nn.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        self.weights = tuple(
            self.param(f"weights_{n}", self._boxed(xavier, shape), (self.heads, *shape))
            for n, shape in enumerate(layer_shapes(self.dim // self.heads, self.depth, self.expansion, self.residual))
        )

    def initial(self) -> Memory:
        """[1, H, …]: the learned weights and no momentum."""
        return Memory(tuple(w[None] for w in self.weights), tuple(jnp.zeros_like(w[None]) for w in self.weights))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        initial: Memory | None = None,
        state: Memory | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
        before: int = 0,
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """What the memory tells each token, and the memory afterwards.

        initial  where segments begin, and before all unless `state` is given; the learned one unless given
        before   so many tokens at the front are those that came before, which only the convolutions still see
        """
        q, k, v = (
            self._by_head(convolution(project(x), segment_ids=segment_ids, mask=mask)[:, before:], unit)
            for project, convolution, unit in self._projections()
        )
        fresh = None if segment_ids is None else starts(segment_ids)[:, before:]
        mask = None if mask is None else mask[:, before:]
        out, state = self._remember(q, k, v, self._gates(x[:, before:]), initial, state, fresh, mask)
        return out.reshape(*out.shape[:2], self.dim), state

    def queries(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, mask: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T H K"]:
        return self._by_head(self.query_convolution(self.query(x), segment_ids=segment_ids, mask=mask), True)

    def query_step(self, x: Float[Array, "B D"], convolved: Array) -> tuple[Float[Array, "B H K"], Array]:
        q, convolved = self.query_convolution.step(self.query(x), convolved)
        return self._by_head(q, True), convolved

    def stream(self, batch: int, memory: Memory) -> MemoryStream:
        """Before the first token, `memory` [1, H, …] being the initial one."""
        room = jnp.zeros((batch, self.chunk, self.heads, self.dim // self.heads), self.dtype)
        return MemoryStream(
            jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape[1:])), memory),
            tuple(convolution.initial_state(batch) for _, convolution, _ in self._projections()),
            room,
            room,
            jnp.zeros((batch, self.chunk, self.heads, 3), jnp.float32),
            jnp.zeros(batch, jnp.int32),
        )

    def step(self, x: Float[Array, "B D"], stream: MemoryStream) -> tuple[Float[Array, "B D"], MemoryStream]:
        """One token: what its chunk, as far as it has come, tells it."""
        token, convolved = [], []
        for (project, convolution, unit), last in zip(self._projections(), stream.convolved, strict=True):
            y, last = convolution.step(project(x), last)
            token.append(self._by_head(y, unit))
            convolved.append(last)
        place = stream.place
        keys, values = written(stream.keys, token[1], place), written(stream.values, token[2], place)
        gates = written(stream.gates, self._gates(x), place)
        come = jnp.arange(self.chunk) <= place[:, None]
        q = jnp.broadcast_to(token[0][:, None], keys.shape)
        out, after = self._remember(q, keys, values, gates, None, stream.memory, None, come)
        full = place == self.chunk - 1

        def turned(after: Array, before: Array) -> Array:
            return jnp.where(jnp.expand_dims(full, range(1, after.ndim)), after, before)

        memory = jax.tree.map(turned, after, stream.memory)
        out = out[jnp.arange(len(x)), place].reshape(len(x), self.dim)
        return out, MemoryStream(memory, tuple(convolved), keys, values, gates, jnp.where(full, 0, place + 1))

    def _projections(self) -> list[tuple[Any, Any, bool]]:
        """Of queries, keys and values; the last says whether they are made of length one."""
        return [
            (self.query, self.query_convolution, True),
            (self.key, self.key_convolution, True),
            (self.value, self.value_convolution, False),
        ]

    def _by_head(self, x: Float[Array, "*lead D"], unit: bool) -> Float[Array, "*lead H K"]:
        x = jax.nn.silu(x).reshape(*x.shape[:-1], self.heads, -1)
        if not unit:
            return x
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

    def _gates(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H 3"]:
        return jnp.stack([gate(x) for gate in (self.theta, self.alpha, self.eta)], axis=-1).astype(jnp.float32)

    def _remember(
        self,
        q: Array,
        k: Array,
        v: Array,
        gates: Float[Array, "B T H 3"],
        initial: Memory | None,
        state: Memory | None,
        fresh: Array | None,
        mask: Array | None,
    ) -> tuple[Float[Array, "B T H K"], Memory]:
        theta, alpha, eta = (gates[..., n] for n in range(3))
        there = mask
        if self.granularity == "chunk":
            alpha, _ = pooled(alpha, self.chunk, fresh, mask)
            eta, there = pooled(eta, self.chunk, fresh, mask)
        fading = jax.nn.sigmoid(-eta)
        if self.granularity == "chunk":
            fading = jnp.repeat(fading, self.chunk, axis=1)[:, : theta.shape[1]]
        theta = self.step_size * fading * jax.nn.sigmoid(theta)
        if mask is not None:
            theta = jnp.where(mask[..., None], theta, 0)
        logs = [jax.nn.log_sigmoid(-alpha), jax.nn.log_sigmoid(eta)]
        if there is not None:
            logs = [jnp.where(there[..., None], log, 0) for log in logs]
        initial = self.initial() if initial is None else initial
        options: dict[str, Any] = {"chunk": self.chunk, "granularity": self.granularity, "activation": self.activation}
        if state is None and splits_time(q.shape[1], self.chunk):
            return _memory_over_time((q, k, v, theta, *logs), fresh, initial, options)
        return neural_memory(q, k, v, theta, *logs, initial=initial, state=state, fresh=fresh, **options)

    @nn.nowrap
    def _boxed(self, init: Any, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return partitioned(nn.initializers.zeros, "heads", "head_width")
        return partitioned(init, "heads", None, None)


class SeveralAttention(nn.Module):
    """Softmax attention to several sets of keys at once. Tokens have rotary positions, persistent ones have none."""

    dim: int
    heads: int
    dtype: DTypeLike

    def setup(self) -> None:
        width = self.dim // self.heads
        self.query, self.key, self.value = (
            split_heads(self.dim, self.heads, width, dtype=self.dtype) for _ in range(3)
        )
        self.out = merge_heads(self.heads, width, self.dim, dtype=self.dtype)

    def queries(self, x: Float[Array, "B T D"], positions: Array) -> Float[Array, "B T H K"]:
        return rotate(self.query(x), positions)

    def keys(self, x: Float[Array, "B T D"], positions: Array | None) -> tuple[Array, Array]:
        """Keys and values [B, T, H, K]; `positions` None leaves keys unturned."""
        k = self.key(x)
        return k if positions is None else rotate(k, positions), self.value(x)

    def __call__(
        self,
        q: Float[Array, "B T H K"],
        prefix: tuple[Float[Array, "1 P H K"], Float[Array, "1 P H K"]],
        sets: Sequence[tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]],
        sight: Mask,
        ids: tuple[Array, ...],
    ) -> Float[Array, "B T D"]:
        """One softmax over a prefix that all see and over sets of keys and values, each of which `sight` shows alike.

        ids  those of queries and of keys, or ()
        """
        count, shape = len(sets), q.shape
        # The sets are heads of one call of the kernel, those of a head side by side, so that devices keep their heads.
        k, v = (jnp.stack(each, axis=3).reshape(*shape[:2], -1, shape[3]) for each in zip(*sets, strict=True))
        outs, logs = _attended(jnp.repeat(q, count, axis=2), k, v, sight, ids)
        k, v = (x[0] for x in prefix)
        scores = jnp.einsum("bthk,phk->bthp", q, k, preferred_element_type=jnp.float32) * shape[3] ** -0.5
        # A set counts for as much as the sum of its keys, a token of the prefix is a set of one key.
        shares = jax.nn.softmax(jnp.concatenate([logs.reshape(*shape[:3], count), scores], axis=-1), axis=-1)
        shares = shares.astype(v.dtype)
        near = jnp.einsum("bths,bthsk->bthk", shares[..., :count], outs.reshape(*shape[:3], count, -1))
        return self.out(near + jnp.einsum("bthp,phk->bthk", shares[..., count:], v))

    def step(
        self, q: Float[Array, "B H K"], sets: Sequence[tuple[Array, Array, Bool[Array, "B _"]]]
    ) -> Float[Array, "B D"]:
        """One token; each set: keys, values [B, S, H, K] and which are seen."""
        k, v, visible = (jnp.concatenate(each, axis=1) for each in zip(*sets, strict=True))
        return self.out(attend_to_cache(q, k, v, visible=visible[..., None], scale=q.shape[-1] ** -0.5))


def _attended(q: Array, k: Array, v: Array, sight: Mask, ids: tuple[Array, ...]) -> tuple[Array, Array]:
    """(out, log of the softmax's denominator) of `kernels.sparse_attention.attend` on the mesh."""

    def op(q: Array, k: Array, v: Array, *ids: Any, axis: str | None) -> tuple[Array, Array]:
        return split_attend(q, k, v, sight, axis=axis, segment_ids=ids or None)

    axes = (SPLIT_HEADS,) * 3 + (SPLIT_IDS,) * len(ids)
    return over_time(op, (q, k, v, *ids), axes, (SPLIT_HEADS, SPLIT_HEADS[:3]))


def _memory_over_time(
    arrays: tuple[Array, ...], fresh: Array | None, initial: Memory, options: dict[str, Any]
) -> tuple[Array, Memory]:
    """`neural_memory` of q, k, v, theta and gates, the devices that time is split over taking turns."""
    batch = arrays[0].shape[0]
    of_time: list[Array] = [*arrays, *([] if fresh is None else [fresh])]
    weights, structure = jax.tree.flatten(initial)

    def op(*leaves: Array, axis: str | None) -> tuple[Array, list[Array]]:
        assert axis is not None
        own, initial = leaves[: len(of_time)], jax.tree.unflatten(structure, leaves[len(of_time) :])

        def run(initial: Memory, own: tuple[Array, ...], state: Memory) -> tuple[Array, Memory]:
            begins = own[-1] if len(own) > len(arrays) else None
            return neural_memory(*own[: len(arrays)], initial=initial, state=state, fresh=begins, **options)

        rows = own[0].shape[0]
        dtype = jnp.promote_types(jnp.result_type(*own[:3]), jnp.float32)
        state = jax.tree.map(lambda w: jnp.broadcast_to(w.astype(dtype), (rows, *w.shape[1:])), initial)
        out, state = in_turns(axis, run, initial, own, state)
        return out, jax.tree.leaves(state)

    def of_heads(x: Array, first: str | None) -> Axes:
        return first, "heads", *(None,) * (x.ndim - 2)

    axes = [SPLIT_HEADS[: x.ndim] for x in arrays] + [SPLIT_IDS] * (len(of_time) - len(arrays))
    axes += [of_heads(w, None if w.shape[0] != batch or batch == 1 else "batch") for w in weights]
    after = [of_heads(w, "batch") for w in weights]
    out, state = over_time(op, (*of_time, *weights), axes, (SPLIT_HEADS, after), options["chunk"])
    return out, jax.tree.unflatten(structure, state)
