"""Spiking attention with lateral inhibition (SpiLiFormer).

Source: Zheng et al., "SpiLiFormer: Enhancing Spiking Transformers with Lateral Inhibition" (2503.15986). The official
repository holds no code; the feed-forward form (FF-LiDiff) and the differences of the feedback form (FB-LiDiff) follow
re-implementations that name the paper, the feedback itself is our choice: the inhibitory half is made of what the block
put out one time step before. Neurons are those of SpikingJelly's MultiStepLIFNode, with which such models are written.

What a mixer of real tokens adds: tokens are the same current at each of `steps` time steps, which are not those of the
sequence; what comes out is the mean over them. In the feed-forward form every token decides alone whether its own
channels fire, tokens meeting in the network's other convolutions. Here keys have one, over `width` neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from zoo.attention.local_global_linear import GridConvolution, batch_norm
from zoo.errors import ZooError
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import dense, partitioned
from zoo.types import Array

SCALE = 0.125
"""Of spiking self-attention's sums, in place of a softmax (Spikformer, 2209.15425, eq. 7)."""


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def spike(v: Array, surrogate: str = "sigmoid") -> Array:
    """1 where v is at least 0, else 0. Its derivative is taken to be that of sigmoid(4 v), or of arctan(π v) / π."""
    return (v >= 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(surrogate: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (d_v,) = primals, tangents
    if surrogate == "sigmoid":
        s = jax.nn.sigmoid(4 * v)
        slope = 4 * s * (1 - s)
    else:
        slope = 1 / (1 + (jnp.pi * v) ** 2)
    return spike(v, surrogate), slope * d_v


@dataclass(frozen=True)
class Neuron:
    """Leaky integrate-and-fire: v_t = v_{t−1} + (x_t − v_{t−1}) / τ; a spike where v_t ≥ threshold, then v_t = 0.

    The reset is no part of the gradient. Potentials are float32.
    """

    tau: float = 2.0
    threshold: float = 1.0
    surrogate: str = "sigmoid"

    def step(self, v: Array, x: Array) -> tuple[Array, Array]:
        """The potential and a current → the new potential and spikes, both of the potential's dtype."""
        v = v + (x.astype(v.dtype) - v) / self.tau
        s = spike(v - self.threshold, self.surrogate)
        return v * (1 - lax.stop_gradient(s)), s

    def __call__(self, x: Float[Array, "S ..."]) -> Float[Array, "S ..."]:
        """Currents at S time steps → spikes, from rest."""
        return lax.scan(self.step, jnp.zeros(x.shape[1:], jnp.float32), x)[1].astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpikingState:
    """What later tokens need of earlier ones."""

    window: Array
    """[B, W − 1, D] tokens the keys' convolution still sees."""
    memory: Array
    """[B, S, H, K, K] float32, sums of keys times values at each time step; S = 0 in the feed-forward form."""


class Spiking(Mixer):
    """FF-LiDiff: y = a ⊙ k, a = LIF(sum of q_e − sum of q_i) for every head; FB-LiDiff: spiking self-attention.

    q_e and q_i are spikes of the excitatory and the inhibitory half of the channels of BN(W_q x), k those of
    BN(W_k conv(x)). The feedback form has as many of each as there are channels: q = LIF(w_e q_e − w_i q_i + b) with
    q_i = LIF(BN(W_i o)), o the last time step's output spikes, and y = LIF(0.125 · q kᵀ v). Then LIF(BN(W y + c)).

    Batch norms hold running statistics ("batch_stats"), so that without `train` tokens depend on no others; in training
    their statistics are those of all tokens of a batch, whatever their segments. Those after the heads are over
    all time steps too, in the feedback form over each.

    heads                           H; as many of 64 features as fit unless given
    feedback                        FB-LiDiff, the form of deep stages
    steps                           time steps
    tau, threshold, surrogate       see `Neuron`; surrogate is sigmoid or atan
    attention_threshold             of the neurons a, and of q and y in the feedback form
    width                           tokens a key's convolution sees: itself and those before it; around it (an odd
                                    number) where not causal. 1 is the paper's, tokens then do not meet in FF-LiDiff
    grid                            sizes of one to three axes along which it sees so many, where not causal
    readout                         "current", the mean current into the last neurons, for residuals of membrane
                                    potentials; or "spikes", the rate at which they fire, which is the paper's output
    """

    heads: int | None = None
    feedback: bool = False
    steps: int = 4
    tau: float = 2.0
    threshold: float = 1.0
    attention_threshold: float = 0.5
    surrogate: str = "sigmoid"
    width: int = 3
    grid: tuple[int, ...] = ()
    readout: str = "current"

    ways = (True, False)

    def setup(self) -> None:
        self._check_options()
        self.query, self.key = (dense(self.dim, ("embed", "heads"), dtype=self.dtype) for _ in range(2))
        self.query_norm, self.key_norm = (batch_norm(self.dtype, "heads") for _ in range(2))
        self.convolution = self._made_convolution()
        if self.feedback:
            self.value, self.inhibit = (dense(self.dim, ("embed", "heads"), dtype=self.dtype) for _ in range(2))
            self.value_norm, self.inhibit_norm = (batch_norm(self.dtype, "heads") for _ in range(2))
            initial = (("excitation", 1.0), ("inhibition", 1.0), ("offset", 0.0))
            self.balance = {
                name: self.param(name, partitioned(nn.initializers.constant(value)), ()) for name, value in initial
            }
        self.out = dense(self.dim, ("heads", "embed"), bias=True, dtype=self.dtype)
        self.out_norm = batch_norm(self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        norm = {"use_running_average": not train, "mask": None if mask is None else mask[..., None]}
        if self.causal:
            near = self.convolution(x, segment_ids=segment_ids, mask=mask)
        else:
            near = self.convolution(x, self.grid or (x.shape[1],), segment_ids=segment_ids, mask=mask)

        def attend(step: int, q: Array, k: Array, v: Array) -> Array:
            if mask is not None:
                k = jnp.where(mask[..., None, None], k, 0)
            return linear_attention(q, k, v, scale=SCALE, causal=self.causal, segment_ids=segment_ids)[0]

        return self._mixed(x, near, attend, norm)

    def initial_state(self, batch: int, capacity: int = 2048) -> SpikingState:
        self.check_causal()
        heads = head_count("Spiking", self.dim, self.heads)
        sizes = (self.steps if self.feedback else 0, heads, self.dim // heads, self.dim // heads)
        return SpikingState(self.convolution.initial_state(batch), jnp.zeros((batch, *sizes), jnp.float32))

    def step(self, x: Float[Array, "B D"], state: SpikingState) -> tuple[Float[Array, "B D"], SpikingState]:
        near, window = self.convolution.step(x, state.window)
        memory = []

        def attend(step: int, q: Array, k: Array, v: Array) -> Array:
            out, new = linear_attention_step(q, k, v, state.memory[:, step], scale=SCALE)
            memory.append(new)
            return out

        out = self._mixed(x, near, attend, {"use_running_average": True})
        return out, SpikingState(window, jnp.stack(memory, axis=1) if memory else state.memory)

    def _mixed(self, x: Array, near: Array, attend: Callable[..., Array], norm: dict[str, Any]) -> Array:
        """Tokens and what the convolution made of them [..., D] → the mean over time steps."""
        q, k = self.query_norm(self.query(x), **norm), self.key_norm(self.key(near), **norm)
        currents = self._fed_back(q, k, x, attend, norm) if self.feedback else self._fed_forward(q, k, norm)
        if self.readout == "spikes":
            currents = self._neuron()(currents)
        return jnp.mean(currents, axis=0)

    def _fed_forward(self, q: Array, k: Array, norm: dict[str, Any]) -> Float[Array, "S *lead D"]:
        fire = self._neuron()
        q, k = fire(self._repeated(q)), self._split(fire(self._repeated(k)))
        excited, inhibited = jnp.split(self._split(q), 2, axis=-1)
        awake = self._neuron(attention=True)(jnp.sum(excited, axis=-1) - jnp.sum(inhibited, axis=-1))
        y = awake[..., None] * k
        return self.out_norm(self.out(y.reshape(q.shape)), **norm)

    def _fed_back(
        self, q: Array, k: Array, x: Array, attend: Callable[..., Array], norm: dict[str, Any]
    ) -> Float[Array, "S *lead D"]:
        fire, choose = self._neuron(), self._neuron(attention=True)
        excitation, inhibition = (jax.nn.softplus(self.balance[name]) for name in ("excitation", "inhibition"))
        v = self.value_norm(self.value(x), **norm)
        excited, keys, values = (fire(self._repeated(current)) for current in (q, k, v))
        rest = jnp.zeros(q.shape, jnp.float32)
        inhibiting = choosing = attending = giving = rest
        spikes, currents = jnp.zeros_like(q), []
        for step in range(self.steps):
            inhibiting, inhibited = fire.step(inhibiting, self.inhibit_norm(self.inhibit(spikes), **norm))
            difference = excitation * excited[step] - inhibition * inhibited + self.balance["offset"]
            choosing, query = choose.step(choosing, difference)
            parts = (self._split(each.astype(self.dtype)) for each in (query, keys[step], values[step]))
            attending, y = choose.step(attending, attend(step, *parts).reshape(q.shape))
            currents.append(self.out_norm(self.out(y.astype(self.dtype)), **norm))
            giving, given = fire.step(giving, currents[-1])
            spikes = given.astype(self.dtype)
        return jnp.stack(currents)

    @nn.nowrap
    def _made_convolution(self) -> Any:
        if self.causal:
            return ShortConvolution(self.dim, self.width, dtype=self.dtype)
        axes = max(1, len(self.grid))
        # As PyTorch draws one of so many neighbours; the short convolution is drawn so already.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", tuple(range(axes)), axes)
        return GridConvolution(self.dim, self.width, axes, init, self.dtype)

    @nn.nowrap
    def _neuron(self, attention: bool = False) -> Neuron:
        return Neuron(self.tau, self.attention_threshold if attention else self.threshold, self.surrogate)

    @nn.nowrap
    def _repeated(self, x: Float[Array, "*lead D"]) -> Float[Array, "S *lead D"]:
        return jnp.broadcast_to(x, (self.steps, *x.shape))

    @nn.nowrap
    def _split(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        return x.reshape(*x.shape[:-1], head_count("Spiking", self.dim, self.heads), -1)

    @nn.nowrap
    def _check_options(self) -> None:
        width = self.dim // head_count("Spiking", self.dim, self.heads)
        if not self.feedback and width % 2:
            raise ZooError(f"Spiking: heads of {width} features do not halve into excitation and inhibition")
        if self.surrogate not in ("sigmoid", "atan"):
            raise ZooError(f"Spiking: surrogate is sigmoid or atan, got {self.surrogate!r}")
        if self.readout not in ("current", "spikes"):
            raise ZooError(f"Spiking: readout is current or spikes, got {self.readout!r}")
        if self.steps < 1:
            raise ZooError(f"Spiking: steps: got {self.steps}, wanted at least 1")
        if self.grid and self.causal:
            raise ZooError(f"Spiking: grid {self.grid}: a causal mixer knows time alone")
