"""Titans: attention for the near past, and beside it a network that learns the far past while it reads.

Source: Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (2501.00663): the memory §3.1 and 3.2
(`zoo.state_space.titans_memory`), persistent tokens §3.3, the wirings §4.1–4.3 (eq. 19–31), projections and gates §4.4.
There is no official code; what the paper leaves open is said where it is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.decoding import ring_times, written
from kernels.packing import runs, starts
from kernels.sparse_attention import Causal, Window
from kernels.turns import in_turns
from zoo.attention.softmax import segment_pair
from zoo.errors import ZooError
from zoo.layers.devices import over_time, splits_time
from zoo.layers.mixer import Mixer, State, head_count
from zoo.layers.parameters import dense, norm, partitioned
from zoo.layers.rotary import times
from zoo.state_space.titans_layers import MemoryStream, NeuralMemory, SeveralAttention
from zoo.state_space.titans_memory import ACTIVATIONS, GRANULARITIES, Memory, retrieve
from zoo.types import Array

WIRINGS = ("lmm", "mac", "mag", "mal")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TitansState:
    """Attention and memory between two tokens."""

    memory: MemoryStream
    keys: Array
    """[B, S, H, K] a ring of the window; "mac": those of the segment's memories, then those of its tokens"""
    values: Array
    """[B, S, H, K]"""
    length: Array
    """[B] int32, how many tokens have come"""
    segment: tuple[Any, ...]
    """"mac": the memory before the segment, and the last tokens that the convolution of queries saw; else nothing"""


class Titans(Mixer):
    """Short-term memory is attention, long-term memory the weights of a small network.

    wiring       "lmm" the memory alone: W (RMSNorm(M(x)) ⊙ silu(W_g x)). "mac", memory as context: in each segment, h =
                 M(x) by the weights before it, y = attention over persistent tokens, h and x, and y ⊗ M(y). "mag",
                 memory as gate: window attention ⊗ M(x). "mal", memory as layer: window attention over what "lmm" gives
    heads        H, of memory and attention
    depth        layers of the memory; 1 is a matrix
    expansion    its hidden width in head widths
    activation   between its layers, "gelu" or "silu"
    residual     its output through layer norm and plus its input
    chunk        tokens whose gradients are taken at the same weights; 16 as in TTT (2407.04620), the paper gives none
    granularity  gates and steps for each "token" or "chunk", see `neural_memory`
    step_size    theta = step_size · (1 − eta) · sigmoid, at most 1; 1 / chunk unless given. Then the steps of a chunk
                 of keys of length one, with all that momentum makes of them, add up to less than 1, and a memory of
                 one layer cannot grow without bound (`neural_memory`)
    persistent   learned tokens that all see (not "lmm"); in "mal" through the memory, as all that attention sees
    segment      "mac": tokens attended to at once, a multiple of `chunk`
    window       "mag" and "mal": tokens attended to
    convolution  width of the short ones

    y ⊗ m = W (RMSNorm(y) ⊙ sigmoid(RMSNorm(m))). Ours: the paper has both normalised and one through "a non-linearity";
    SiLU and a projection as in Gated DeltaNet for "lmm". Where we differ: in "mac" token t sees the h of tokens up to t
    only, as h holds the later tokens themselves; persistent tokens pass into the memory before everything else, so that
    each segment begins with the same memory, and by a convolution of their own. Packed segments are cut out of the grid
    of chunks (and segments of "mac"), so they equal separate ones where they begin on it. Where time is split over
    devices, each with whole chunks (segments of "mac"), the memory is handed on: they take turns, so that memory is
    saved and no time. In "mac" the attention is part of a turn, and heads are not split.
    """

    wiring: str = "mac"
    heads: int | None = None
    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = False
    chunk: int = 16
    granularity: str = "token"
    step_size: float | None = None
    persistent: int = 4
    segment: int = 128
    window: int = 128
    convolution: int = 4

    def setup(self) -> None:
        self._check_options()
        heads = head_count("titans", self.dim, self.heads)
        step_size = 1 / self.chunk if self.step_size is None else self.step_size
        options = (self.depth, self.expansion, self.activation, self.residual, self.chunk, self.granularity)
        self.memory = NeuralMemory(self.dim, heads, *options, step_size, self.convolution, self.dtype)
        self.memory_norm = norm("rms", dtype=self.dtype)
        self.out = dense(self.dim, ("mlp", "embed"), dtype=self.dtype)
        if self.wiring in ("lmm", "mal"):
            self.gate = dense(self.dim, dtype=self.dtype)
        else:
            self.attention_norm = norm("rms", dtype=self.dtype)
        if self.wiring != "lmm":
            self.attention = SeveralAttention(self.dim, heads, self.dtype)
            normal = partitioned(nn.initializers.normal(0.02), None, "embed")
            self.persistent_tokens = self.param("persistent", normal, (self.persistent, self.dim))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        segment_ids = None if segment_ids is None else runs(segment_ids)
        if self.wiring == "mac":
            return self._by_segments(x, segment_ids, mask)
        prefix, initial = self._begin()
        seen: dict[str, Any] = {"initial": initial, "segment_ids": segment_ids, "mask": mask}
        if self.wiring == "mag":
            return self._joined(self._window(x, prefix, segment_ids, mask), self.memory(x, **seen)[0])
        y = self._read_out(x, self.memory(x, **seen)[0])
        return y if self.wiring == "lmm" else self._window(y, prefix, segment_ids, mask)

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        self.check_causal()
        stream = self.memory.stream(batch, self._begin()[1])
        if self.wiring == "lmm":
            return stream
        heads = head_count("titans", self.dim, self.heads)
        room = 2 * self.segment if self.wiring == "mac" else self.window
        cache = jnp.zeros((batch, room, heads, self.dim // heads), self.dtype)
        segment = (stream.memory, stream.convolved[0]) if self.wiring == "mac" else ()
        return TitansState(stream, cache, cache, jnp.zeros(batch, jnp.int32), segment)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        if self.wiring == "lmm":
            m, state = self.memory.step(x, state)
            return self._read_out(x, m), state
        if self.wiring == "mac":
            return self._segment_step(x, state)
        prefix, _ = self._begin()
        m, stream = self.memory.step(x, state.memory)
        y, keys, values = self._window_step(x if self.wiring == "mag" else self._read_out(x, m), prefix, state)
        state = TitansState(stream, keys, values, state.length + 1, ())
        return self._joined(y, m) if self.wiring == "mag" else y, state

    def _begin(self) -> tuple[Float[Array, "1 P D"], Memory]:
        """What attention always sees, and the memory before a segment."""
        initial = self.memory.initial()
        if self.wiring == "lmm":
            return jnp.zeros((1, 0, self.dim), self.dtype), initial
        tokens = self.persistent_tokens[None].astype(self.dtype)
        if self.wiring == "mac":
            return tokens, initial
        m, initial = self.memory(tokens)
        return tokens if self.wiring == "mag" else self._read_out(tokens, m), initial

    def _read_out(self, x: Float[Array, "*lead D"], m: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return self.out(self.memory_norm(m) * jax.nn.silu(self.gate(x)))

    def _joined(self, y: Float[Array, "*lead D"], m: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return self.out(self.attention_norm(y) * jax.nn.sigmoid(self.memory_norm(m)))

    def _window(self, x: Array, prefix: Array, segment_ids: Array | None, mask: Array | None) -> Float[Array, "B T D"]:
        """Attention to the last tokens of x [B, T, D] and to the prefix [1, Np, D]."""
        positions = times(x.shape[1], segment_ids)
        near, always = self.attention.keys(x, positions), self.attention.keys(prefix, None)
        sight = Causal() & Window(self.window)
        q = self.attention.queries(x, positions)
        return self.attention(q, always, [near], sight, segment_pair(segment_ids, mask))

    def _window_step(self, x: Array, prefix: Array, state: TitansState) -> tuple[Float[Array, "B D"], Array, Array]:
        """One token, and the rings of keys and values with it."""
        positions = state.length[:, None]
        k, v = self.attention.keys(x[:, None], positions)
        place = state.length % self.window
        keys, values = written(state.keys, k[:, 0], place), written(state.values, v[:, 0], place)
        come = ring_times(state.length + 1, self.window) >= 0
        q = self.attention.queries(x[:, None], positions)[:, 0]
        return self.attention.step(q, [self._always(prefix, len(x)), (keys, values, come)]), keys, values

    def _always(self, prefix: Array, batch: int) -> tuple[Array, Array, Array]:
        """Keys and values of the prefix, for each row, and that they are seen."""
        k, v = (jnp.broadcast_to(y, (batch, *y.shape[1:])) for y in self.attention.keys(prefix, None))
        return k, v, jnp.ones(k.shape[:2], bool)

    def _by_segments(self, x: Array, segment_ids: Array | None, mask: Array | None) -> Float[Array, "B T D"]:
        """Memory as context: one segment of the row after another."""
        batch, time = x.shape[:2]
        # A short row is one short segment.
        size = min(self.segment, -(-time // self.chunk) * self.chunk)
        missing = -time % size
        if missing:
            mask = jnp.ones((batch, time), bool) if mask is None else mask
            x, mask = (jnp.pad(y, ((0, 0), (0, missing), *((0, 0),) * (y.ndim - 2))) for y in (x, mask))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, missing)), mode="edge")
        count, before = (time + missing) // size, self.convolution

        def cut(y: Array | None) -> Array | None:
            """[B, T, …] → [B, segments, segment, …]"""
            return None if y is None else y.reshape(batch, count, size, *y.shape[2:])

        def cut_longer(y: Array | None) -> Array | None:
            """[B, T] → [B, segments, before + segment], each with the end of the one before it."""
            if y is None:
                return None
            places = jnp.arange(count)[:, None] * size + jnp.arange(before + size)
            return jnp.pad(y, ((0, 0), (before, 0)), mode="edge")[:, places]

        given = {
            "x": cut(x),
            "q": cut(self.memory.queries(x, segment_ids, mask)),
            "positions": cut(jnp.broadcast_to(times(time + missing, segment_ids), (batch, time + missing))),
            "fresh": None if segment_ids is None else cut(starts(segment_ids)),
            "segment_ids": cut_longer(segment_ids),
            "mask": cut_longer(mask),
        }
        if splits_time(count) and not self.is_initializing():
            out = self._segments_in_turns(given)
        else:
            out, _ = self._segments(given, self._before_segments(batch))
        return out.reshape(batch, time + missing, self.dim)[:, :time]

    def _before_segments(self, batch: int) -> tuple[Memory, Array]:
        """What `_one_segment` finds first."""
        memory = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape[1:])), self.memory.initial())
        return memory, jnp.zeros((batch, self.convolution, self.dim), self.dtype)

    def _segments(self, given: dict[str, Any], state: tuple[Memory, Array]) -> tuple[Array, tuple[Memory, Array]]:
        """One segment after another: what is given of each [B, segments, …] → out [B, segments, segment, D]."""
        body = nn.remat(Titans._one_segment, prevent_cse=False)
        scanned = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        state, out = scanned(self, state, given)
        return out, state

    def _segments_in_turns(self, given: dict[str, Any]) -> Array:
        """`_segments` from the beginning, the devices that time is split over taking turns."""
        pure = self.clone(parent=None)
        leaves, structure = jax.tree.flatten((given, self.variables["params"]))
        count = len(jax.tree.leaves(given))

        def run(params: Any, given: dict[str, Any], state: tuple[Memory, Array]) -> Any:
            return pure.apply({"params": params}, given, state, method="_segments")

        def op(*leaves: Array, axis: str | None) -> Array:
            assert axis is not None
            given, params = jax.tree.unflatten(structure, leaves)
            state = pure.apply({"params": params}, given["x"].shape[0], method="_before_segments")
            return in_turns(axis, run, params, given, state)[0]

        of_time, whole = ("batch", "tokens", None, None, None), (None,) * 4
        axes = [of_time[: x.ndim] for x in leaves[:count]] + [whole[: x.ndim] for x in leaves[count:]]
        return over_time(op, leaves, axes, of_time[:4])

    def _one_segment(self, carry: tuple[Memory, Array], given: dict[str, Any]) -> tuple[tuple[Memory, Array], Array]:
        """The memory and the last y [B, before, D], which its convolutions still see → both afterwards, and out."""
        memory, last = carry
        x, positions, ids, mask = (given[name] for name in ("x", "positions", "segment_ids", "mask"))
        before = last.shape[1]
        prefix, initial = self._begin()
        h = retrieve(given["q"], memory, initial, given["fresh"], self.activation).reshape(x.shape)
        pair = segment_pair(*(None if each is None else each[:, before:] for each in (ids, mask)))
        sets = [self.attention.keys(each, positions) for each in (h, x)]
        q = self.attention.queries(x, positions)
        y = self.attention(q, self.attention.keys(prefix, None), sets, Causal(), pair)
        longer = jnp.concatenate([last, y], axis=1)
        m, memory = self.memory(longer, state=memory, segment_ids=ids, mask=mask, before=before)
        return (memory, longer[:, -before:]), self._joined(y, m)

    def _segment_step(self, x: Array, state: TitansState) -> tuple[Float[Array, "B D"], TitansState]:
        memory, convolved = state.segment
        place = state.length % self.segment

        def turned(now: Array, held: Array) -> Array:
            """The memory that a segment's first token finds serves all of it."""
            return jnp.where(jnp.expand_dims(place == 0, range(1, now.ndim)), now, held)

        memory = jax.tree.map(turned, state.memory.memory, memory)
        q, convolved = self.memory.query_step(x, convolved)
        prefix, initial = self._begin()
        h = retrieve(q[:, None], memory, initial, None, self.activation).reshape(x.shape)
        keys, values, positions = state.keys, state.values, state.length[:, None]
        for offset, token in ((0, h), (self.segment, x)):
            k, v = self.attention.keys(token[:, None], positions)
            keys, values = written(keys, k[:, 0], place + offset), written(values, v[:, 0], place + offset)
        come = jnp.tile(jnp.arange(self.segment) <= place[:, None], (1, 2))
        q = self.attention.queries(x[:, None], positions)[:, 0]
        y = self.attention.step(q, [self._always(prefix, len(x)), (keys, values, come)])
        m, stream = self.memory.step(y, state.memory)
        state = TitansState(stream, keys, values, state.length + 1, (memory, convolved))
        return self._joined(y, m), state

    def _check_options(self) -> None:
        for option, known in (("wiring", WIRINGS), ("granularity", GRANULARITIES), ("activation", ACTIVATIONS)):
            if getattr(self, option) not in known:
                raise ZooError(f"titans: {option} is one of {', '.join(known)}, got {getattr(self, option)!r}")
        for option in ("depth", "expansion", "chunk", "persistent", "segment", "window", "convolution"):
            if getattr(self, option) < 1:
                raise ZooError(f"titans: {option}: got {getattr(self, option)}, wanted at least 1")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise ZooError(f"titans: step_size: got {self.step_size}, wanted more than 0 and at most 1")
        if self.wiring == "mac" and self.segment % self.chunk:
            raise ZooError(f"titans: segment: got {self.segment}, wanted a multiple of chunk ({self.chunk})")
