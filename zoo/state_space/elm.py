"""ELM: the expressive leaky memory neuron, a model of a cortical neuron and of its dendrites.

Source: Spieler et al., "The ELM Neuron: an Efficient and Expressive Cortical Neuron Model Can Solve Long-Horizon Tasks"
(2306.16922), §2 and §3; both versions of AaronSpieler/elmneuron.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kernels.linear_scan import linear_scan_step
from kernels.packing import starts
from zoo.errors import ZooError
from zoo.layers.devices import linear_scan, on_devices
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.types import Array

INITIAL_WEIGHT = 0.5
ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ELMState:
    """What the neuron remembers."""

    trace: Array
    """[B, branches] float32"""
    memory: Array
    """[B, memory] float32"""


def windows(inputs: int, branches: int, synapses: int) -> tuple[np.ndarray, np.ndarray]:
    """Which input each of `synapses` of each branch hears [branches, synapses], and whether it hears any.

    NeuronIO's inputs are the excitatory ones, then the inhibitory ones: they are taken in turn, and each branch hears a
    window of them that begins ceil(inputs / branches) after the one before. Places past the end hear nothing.
    """
    in_turn = np.arange(inputs) % 2 * (inputs // 2) + np.arange(inputs) // 2
    places = np.arange(branches)[:, None] * -(-inputs // branches) + np.arange(synapses)
    return in_turn[np.minimum(places, inputs - 1)], places < inputs


class ELM(Mixer):
    """b_t = κ_b b_{t−1} + sum over a branch's synapses of w ⊙ x_t, w not negative;
    Δm_t = 1.7159 tanh(2/3 · MLP([b_t, κ_m ⊙ m_{t−1}])); m_t = κ_m ⊙ m_{t−1} + ρ ⊙ Δm_t; out_t = W_y m_t + b_y.

    κ = exp(−interval / τ). ρ = λ (1 − κ_m) in version 1, the paper's, and 1 − exp(−λ interval / τ_m) in version 2, the
    steadier. Version 1 keeps a trace for every synapse; as all have the same time constant, their sum is the branch's
    trace. The memory feeds on itself through the MLP, so it runs token by token; traces and all that depends on them
    alone do not. Trace, memory and the loop are float32. Biases start at zero, which PyTorch's do not. D inputs; with
    `outputs` not as many features out as in, a bare neuron. The defaults are the official code's.

    memory        units m
    branches      b; D unless given
    synapses      of each branch; all together D, unless `routing` says which inputs they hear
    routing       "none": each input has one synapse, in order; "windows" as NeuronIO's, see `windows`
    version       1 or 2
    strength      λ
    hidden        width of the MLP's one hidden layer; 2 · memory unless given
    activation    of that layer: relu or silu
    trace_time    τ_b
    memory_times  shortest and longest τ_m, the units' evenly between on a log scale
    learn_times   makes τ_m a parameter within these bounds
    interval      time between tokens, in the unit of the time constants
    outputs       features out; D unless given
    """

    memory: int = 100
    branches: int | None = None
    synapses: int = 1
    routing: str = "none"
    version: int = 1
    strength: float = 5.0
    hidden: int | None = None
    activation: str = "relu"
    trace_time: float = 5.0
    memory_times: tuple[float, float] = (1.0, 1000.0)
    learn_times: bool = False
    interval: float = 1.0
    outputs: int | None = None

    def setup(self) -> None:
        branches = self.branch_count()
        self._check_options(branches)
        hidden = 2 * self.memory if self.hidden is None else self.hidden
        weight = partitioned(nn.initializers.constant(INITIAL_WEIGHT), None)
        self.weight = self.param("weight", weight, (branches * self.synapses,))
        into, zeros = partitioned(LIKE_TORCH, None, None), partitioned(nn.initializers.zeros, None)
        self.inner_kernel = self.param("inner_kernel", into, (branches + self.memory, hidden))
        self.inner_bias = self.param("inner_bias", zeros, (hidden,))
        self.change_kernel = self.param("change_kernel", into, (hidden, self.memory))
        self.change_bias = self.param("change_bias", zeros, (self.memory,))
        if self.learn_times:
            self.time_logit = self.param("time_logit", partitioned(self._initial_time_logits, None), (self.memory,))
        features, axis = (self.dim, "embed") if self.outputs is None else (self.outputs, None)
        self.out = dense(features, (None, axis), bias=True, init=LIKE_TORCH, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T O"]:
        heard, log_decay = self._heard(x), jnp.float32(-self.interval / self.trace_time)
        if mask is not None:
            heard, log_decay = (jnp.where(mask[..., None], each, 0) for each in (heard, log_decay))
        trace, _ = linear_scan(heard, log_decay, segment_ids=segment_ids)
        there = jnp.ones(x.shape[:2], bool) if mask is None else mask
        fresh = jnp.zeros_like(there) if segment_ids is None else starts(segment_ids)
        weights = self._loop_weights()

        def op(drive: Array, there: Array, fresh: Array, *weights: Array) -> Array:
            def token(memory: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
                drive, there, fresh = now
                memory = jnp.where(fresh[:, None], 0, memory)
                memory = jnp.where(there[:, None], self._updated(drive, memory, *weights), memory)
                return memory, memory

            over_time = tuple(jnp.swapaxes(each, 0, 1) for each in (drive, there, fresh))
            empty = jnp.zeros((drive.shape[0], self.memory), jnp.float32)
            return jnp.swapaxes(jax.lax.scan(token, empty, over_time)[1], 0, 1)

        tokens, flags = ("batch", None, None), ("batch", None)
        axes = (tokens, flags, flags, *((None,) * each.ndim for each in weights))
        return self.out(on_devices(op, (self._drive(trace), there, fresh, *weights), axes, tokens))

    def initial_state(self, batch: int, capacity: int = 2048) -> ELMState:
        sizes = self.branch_count(), self.memory
        return ELMState(*(jnp.zeros((batch, size), jnp.float32) for size in sizes))

    def step(self, x: Float[Array, "B D"], state: ELMState) -> tuple[Float[Array, "B O"], ELMState]:
        log_decay = jnp.float32(-self.interval / self.trace_time)
        now, trace = linear_scan_step(self._heard(x), log_decay, state.trace)
        memory = self._updated(self._drive(now), state.memory, *self._loop_weights())
        return self.out(memory), ELMState(trace, memory)

    @nn.nowrap
    def branch_count(self) -> int:
        return self.dim if self.branches is None else self.branches

    def _heard(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead branches"]:
        """What each branch hears of tokens, float32."""
        branches = self.branch_count()
        weight = jax.nn.relu(self.weight).reshape(branches, self.synapses)
        if self.routing == "windows":
            source, hears = windows(self.dim, branches, self.synapses)
            weight *= hears
        else:
            source = np.arange(self.dim).reshape(branches, self.synapses)
        matrix = jnp.zeros((self.dim, branches)).at[source, np.arange(branches)[:, None]].add(weight)
        return jnp.matmul(x.astype(self.dtype), matrix.astype(self.dtype)).astype(jnp.float32)

    def _drive(self, trace: Float[Array, "*lead branches"]) -> Float[Array, "*lead hidden"]:
        """The branches' part of the hidden layer, float32."""
        kernel = self.inner_kernel[: self.branch_count()].astype(self.dtype)
        return jnp.matmul(trace.astype(self.dtype), kernel).astype(jnp.float32) + self.inner_bias

    def _loop_weights(self) -> tuple[Array, ...]:
        """κ_m, ρ and the weights of the MLP that the loop over time needs."""
        shortest, longest = self.memory_times
        if self.learn_times:
            times = shortest + (longest - shortest) * jax.nn.sigmoid(self.time_logit)
        else:
            times = jnp.asarray(np.geomspace(shortest, longest, self.memory), jnp.float32)
        decay = jnp.exp(-self.interval / times)
        rise = -jnp.expm1(-self.interval / times * (1 if self.version == 1 else self.strength))
        rise *= self.strength if self.version == 1 else 1
        return decay, rise, self.inner_kernel[self.branch_count() :], self.change_kernel, self.change_bias

    @nn.nowrap
    def _updated(
        self, drive: Array, memory: Array, decay: Array, rise: Array, inner: Array, kernel: Array, bias: Array
    ) -> Float[Array, "B memory"]:
        """m_t of the drive [B, hidden] and m_{t−1}."""
        kept = decay * memory
        change = ACTIVATIONS[self.activation](drive + kept @ inner) @ kernel + bias
        return kept + rise * 1.7159 * jnp.tanh(2 / 3 * change)

    @nn.nowrap
    def _initial_time_logits(self, key: Array, shape: tuple[int, ...]) -> Array:
        shortest, longest = self.memory_times
        part = (np.geomspace(shortest, longest, self.memory) - shortest) / (longest - shortest)
        part = np.clip(part, 1e-6, 1 - 1e-6)
        return jnp.asarray(np.log(part / (1 - part)), jnp.float32)

    @nn.nowrap
    def _check_options(self, branches: int) -> None:
        if self.routing not in ("none", "windows"):
            raise ZooError(f"elm: routing is none or windows, got {self.routing!r}")
        if self.version not in (1, 2):
            raise ZooError(f"elm: version is 1 or 2, got {self.version}")
        if self.activation not in ACTIVATIONS:
            raise ZooError(f"elm: activation is relu or silu, got {self.activation!r}")
        if not 0 < self.memory_times[0] < self.memory_times[1]:
            raise ZooError(f"elm: memory_times: got {self.memory_times}, wanted 0 < shortest < longest")
        if self.routing == "none" and branches * self.synapses != self.dim:
            raise ZooError(f"elm: {branches} branches of {self.synapses} synapses are not the {self.dim} inputs")
        if self.routing == "windows" and branches * self.synapses < self.dim:
            raise ZooError(f"elm: {branches} windows of {self.synapses} synapses do not cover the {self.dim} inputs")
