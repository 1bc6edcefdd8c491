"""LightNet: a softmax over time for every key channel, kept up to date by adding; tokens of grids in one pass.

Source: Qin et al., "You Only Scan Once" (2405.21022): the additive recurrence, MD-TPE and MD-LRPE. Sizes, gate and norm
as in the layer of fla (flash-linear-attention); where the first author's library (xmixers, xopes) differs, an option
says so. Projections are drawn as everywhere in the zoo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from kernels.linear_scan import linear_scan_step
from kernels.packing import begins, runs, starts
from zoo.errors import ZooError
from zoo.layers.devices import linear_attention, linear_scan
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import partitioned
from zoo.layers.rotary import BASE, grid_positions, times
from zoo.state_space.gla import QueryKeyValue, ReadOut
from zoo.types import Array

NOTHING = -1e30
"""The key of a token that is not there: exp is 0, yet differences of two are 0 and not NaN."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LightNetState:
    """What LightNet remembers."""

    state: Array
    """[B, H, K, V] float32, each key channel's mean of values; K twice as wide with MD-LRPE"""
    log_sum: Array
    """[B, H, K] float32, log of the sum of exp(k)"""
    faded: Array
    """[B, D] float32, the sum that MD-TPE reads; of width 0 without it"""
    length: Array
    """[B] int32, tokens so far"""


class LightNet(Mixer):
    """s_t = s_{t−1} + exp(k_t); M_t = M_{t−1} + exp(k_t) v_tᵀ; out_t = M_tᵀ (silu(q_t) / s_t), as many heads of them.

    Run as gated linear attention with log s_{t−1} − log s_t for a decay and exp(k_t) / s_t for a key, so that nothing
    overflows. Both ways, every token reads the sums over all of them, s_T and M_T: one pass, whatever the grid. What is
    read is normalised over all heads, gated by silu(W_up W_down x_t) and projected. fla also divides it by √K, which
    the norm undoes but for its epsilon.

    heads           H; as many of about 128 features as fit unless given
    grid, prefix    sizes of the axes on which the last tokens lie, for the positions, and how many come before them
                    that have none; not causal. () is time alone
    tpe             MD-TPE, as the residual branch x + MDTPE(x) before the projections; the authors have one where a
                    model begins
    lrpe, base      MD-LRPE on queries and keys, see `turned`, and where its rates begin
    gate, rank      of what is read: "silu", "sigmoid" or "none"; of the gate's two matrices, 0 for a full one. The
                    author's library has a sigmoid and the width of a head
    joint_norm      False normalises each head by itself, as the author's library does
    start_at_one    s_0 = 1 instead of 0, as in the author's library: a key and value of 0 before the first token
    causal          False lets every token see all
    """

    heads: int | None = None
    grid: tuple[int, ...] = ()
    prefix: int = 0
    tpe: bool = False
    lrpe: bool = False
    base: float = BASE
    gate: str = "silu"
    rank: int = 128
    joint_norm: bool = True
    start_at_one: bool = False

    ways = (True, False)

    def setup(self) -> None:
        if self.causal and self.grid:
            raise ZooError(f"lightnet: grid {self.grid} has no order in time, wanted causal=False")
        if self.prefix and not self.grid:
            raise ZooError(f"lightnet: got a prefix of {self.prefix} tokens and no grid after it")
        heads, width = self.head_sizes()
        self.project = QueryKeyValue(self.dim, heads, heads, width, width, dtype=self.dtype)
        self.read_out = ReadOut(self.dim, heads, width, self.gate, self.rank, joint=self.joint_norm, dtype=self.dtype)
        if self.tpe:
            self.position = MDTPE(self.dim, heads, self.grid, self.prefix, self.causal, dtype=self.dtype)
        if self.lrpe:
            share = -(-width // max(1, len(self.grid)))
            rates = self.base ** (-2 / width * jnp.arange(share)) * jnp.ones((heads, 1))
            initial = partitioned(lambda _, shape: rates, "heads", None)
            self.rates = self.param("rates", initial, (heads, share))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        check_grid(self.grid, self.prefix, x.shape[1])
        if self.tpe:
            x = x + self.position(x, segment_ids, mask)
        q, k, v = self.project(x)
        q, k = jax.nn.silu(q), k.astype(jnp.float32)
        if mask is not None:
            k = jnp.where(mask[..., None, None], k, NOTHING)
        log_sum = self._started(running_logsumexp(k, segment_ids) if self.causal else logsumexp(k, segment_ids))
        k = jnp.exp(k - log_sum)
        log_decay: Array | None = None
        if self.causal:
            log_decay = jnp.minimum(jnp.concatenate([log_sum[:, :1], log_sum[:, :-1]], axis=1) - log_sum, 0)
            if segment_ids is not None:
                log_decay = jnp.where(starts(segment_ids)[..., None, None], 0, log_decay)
        if mask is not None:
            k = jnp.where(mask[..., None, None], k, 0)
        if self.lrpe:
            places = self._positions(x.shape[1], segment_ids)
            q, k = turned(q, places, self.rates), turned(k, places, self.rates)
            log_decay = None if log_decay is None else jnp.tile(log_decay, 2)
        k = k.astype(self.dtype)
        read, _ = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, causal=self.causal, segment_ids=segment_ids)
        return self.read_out(read, x)

    def initial_state(self, batch: int, capacity: int = 2048) -> LightNetState:
        self.check_causal()
        heads, width = self.head_sizes()
        return LightNetState(
            jnp.zeros((batch, heads, width * (2 if self.lrpe else 1), width), jnp.float32),
            jnp.full((batch, heads, width), NOTHING, jnp.float32),
            jnp.zeros((batch, self.dim if self.tpe else 0), jnp.float32),
            jnp.zeros(batch, jnp.int32),
        )

    def step(self, x: Float[Array, "B D"], state: LightNetState) -> tuple[Float[Array, "B D"], LightNetState]:
        faded = state.faded
        if self.tpe:
            position, faded = self.position.step(x, faded)
            x = x + position
        q, k, v = self.project(x[:, None])
        q, k = jax.nn.silu(q), k.astype(jnp.float32)
        log_sum = jnp.logaddexp(state.log_sum, k[:, 0])
        before, now = (self._started(each)[:, None] for each in (state.log_sum, log_sum))
        k, log_decay = jnp.exp(k - now), before - now
        if self.lrpe:
            place = state.length[:, None, None]
            q, k = turned(q, place, self.rates), turned(k, place, self.rates)
            log_decay = jnp.tile(log_decay, 2)
        q, k, v, log_decay = (each[:, 0] for each in (q, k.astype(self.dtype), v, log_decay))
        read, after = linear_attention_step(q, k, v, state.state, log_decay=log_decay, scale=1.0)
        return self.read_out(read, x), LightNetState(after, log_sum, faded, state.length + 1)

    @nn.nowrap
    def head_sizes(self) -> tuple[int, int]:
        """(H, K). Raises ZooError where they do not divide."""
        heads = head_count("lightnet", self.dim, self.heads, 128)
        return heads, self.dim // heads

    @nn.nowrap
    def _started(self, log_sum: Array) -> Array:
        return jnp.logaddexp(log_sum, 0.0) if self.start_at_one else log_sum

    @nn.nowrap
    def _positions(self, length: int, segment_ids: Array | None) -> Int[Array, "_ T A"]:
        if not self.grid:
            return times(length, segment_ids)[..., None]
        return jnp.pad(grid_positions(*self.grid), ((0, 0), (self.prefix, 0), (0, 0)))


class MDTPE(nn.Module):
    """The sum over a grid's axes of one `TPE` along each, the multi-dimensional Toeplitz positional encoding.

    grid, prefix  as in `LightNet`; tokens before the grid get zeros
    causal        False runs both directions along each axis and counts the token itself once, which is our choice
    """

    dim: int
    heads: int
    grid: tuple[int, ...] = ()
    prefix: int = 0
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.axes = [TPE(self.dim, self.heads, self.causal, dtype=self.dtype) for _ in range(max(1, len(self.grid)))]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        check_grid(self.grid, self.prefix, x.shape[1])
        if not self.grid:
            return self.axes[0](x, segment_ids, mask)
        run = None if segment_ids is None else runs(segment_ids)
        total = sum(self._along(axis, x, run, mask) for axis in range(len(self.grid)))
        return jnp.pad(total, ((0, 0), (self.prefix, 0), (0, 0)))

    def step(self, x: Float[Array, "B D"], faded: Float[Array, "B D"]) -> tuple[Array, Array]:
        """One token and the sum so far → its encoding and the new sum; of time alone."""
        return self.axes[0].step(x, faded)

    def _along(self, axis: int, x: Array, run: Array | None, mask: Array | None) -> Array:
        """The encoding [B, tokens of the grid, D] of one axis, every line of the grid along it a sequence."""
        size = self.grid[axis]

        def lines(array: Array) -> Array:
            grid = array[:, self.prefix :].reshape(len(array), *self.grid, *array.shape[2:])
            return jnp.moveaxis(grid, 1 + axis, len(self.grid)).reshape(-1, size, *array.shape[2:])

        ids, there = (None if each is None else lines(each) for each in (run, mask))
        out = self.axes[axis](lines(x), ids, there)
        others = [other for n, other in enumerate(self.grid) if n != axis]
        grid = out.reshape(len(x), *others, size, self.dim)
        return jnp.moveaxis(grid, len(self.grid), 1 + axis).reshape(len(x), -1, self.dim)


class TPE(nn.Module):
    """y_t = (q · k) sum over j ≤ t of lambda^(t−j) x_j for every head, normalised and projected.

    q and k are learned vectors of a head, lambda = sigmoid of a learned number; all three are normal at first. The norm
    is one over all heads: that of each head by itself, as in the author's library, leaves of q · k only its sign.
    Where a token is not there, nothing fades.
    """

    dim: int
    heads: int
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        width = self.dim // self.heads
        vector = partitioned(nn.initializers.normal(1.0), "heads", "head_width")
        self.query = self.param("query", vector, (self.heads, width))
        self.key = self.param("key", vector, (self.heads, width))
        self.decay = self.param("decay", partitioned(nn.initializers.normal(1.0), "heads"), (self.heads,))
        self.read_out = ReadOut(self.dim, self.heads, width, "none", joint=True, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        log_decay = self._log_decay()
        if mask is not None:
            x, log_decay = jnp.where(mask[..., None], x, 0), jnp.where(mask[..., None], log_decay, 0)
        faded, _ = linear_scan(x, log_decay, segment_ids=segment_ids)
        if not self.causal:
            later, _ = linear_scan(x, log_decay, segment_ids=segment_ids, reverse=True)
            faded = faded + later - x
        return self._read(faded)

    def step(self, x: Float[Array, "B D"], faded: Float[Array, "B D"]) -> tuple[Array, Array]:
        """One token and the sum so far → its encoding and the new sum."""
        out, faded = linear_scan_step(x, self._log_decay(), faded)
        return self._read(out), faded

    def _log_decay(self) -> Float[Array, " D"]:
        return jnp.repeat(jax.nn.log_sigmoid(self.decay), self.dim // self.heads)

    def _read(self, faded: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        gain = jnp.sum(self.query * self.key, axis=-1, keepdims=True).astype(self.dtype)
        return self.read_out(gain * faded.reshape(*faded.shape[:-1], self.heads, -1), faded)


def turned(x: Float[Array, "B T H K"], positions: Array, rates: Float[Array, "H E"]) -> Float[Array, "B T H K2"]:
    """MD-LRPE, its cosine form: [x cos φ, x sin φ], so that products depend on differences of positions alone.

    positions [B or 1, T, A], rates [H, E] with A · E >= K; φ are the first K of the axes' position · rates, one axis
    after the other. Angles are float32, the result has x's dtype.
    """
    angle = positions[:, :, None, :, None].astype(jnp.float32) * rates[:, None]
    angle = angle.reshape(*angle.shape[:3], -1)[..., : x.shape[-1]]
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).astype(x.dtype)


def running_logsumexp(x: Float[Array, "B T H K"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B T H K"]:
    """log of the sum of exp(x) over the tokens of a segment up to each."""
    if segment_ids is None:
        return jax.lax.associative_scan(jnp.logaddexp, x, axis=1)

    def join(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, fresh), (y, restarted) = earlier, later
        return jnp.where(restarted, y, jnp.logaddexp(x, y)), fresh | restarted

    return jax.lax.associative_scan(join, (x, starts(segment_ids)[..., None, None]), axis=1)[0]


def logsumexp(x: Float[Array, "B T H K"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B _ H K"]:
    """log of the sum of exp(x) over all tokens [B, 1, H, K], or over those of each token's segment [B, T, H, K]."""
    if segment_ids is None:
        return jax.nn.logsumexp(x, axis=1, keepdims=True)
    last = x.shape[1] - 1 - jnp.flip(begins(jnp.flip(segment_ids, 1)), 1)
    return jnp.take_along_axis(running_logsumexp(x, segment_ids), last[..., None, None], axis=1)


def check_grid(grid: tuple[int, ...], prefix: int, length: int) -> None:
    """Raises ZooError where a grid and the tokens before it are not the T there are."""
    if grid and math.prod(grid) + prefix != length:
        raise ZooError(f"lightnet: grid {grid} after {prefix} tokens has not the {length} places of the input")
