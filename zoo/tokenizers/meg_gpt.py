"""EphysTokenizer, the tokenizer of MEG-GPT: each sample of each channel is one of V tokens, each token a short wave.

Source: "MEG-GPT", 2510.18080, the study of tokenizers 2602.16626, and the official code
(github.com/OHBA-analysis/EphysTokenizer and /MEG-GPT, MIT).

A recurrent network reads a channel sample by sample; logits l = 10 · LayerNorm(Linear h) choose a token at each; the
rebuilt signal is the sum of all tokens' waves. In training the choice is tau · softmax(l) + (1 − tau) · one-hot(l), tau
falling in stages from 1 to 0.001; after it the choice is hard. There is neither a straight-through gradient nor noise,
so at tau = 0, where the study's schedule ends, nothing but the waves would learn: the official code's own end, 0.001,
is the default. Channels are read alone and alike, so any kind of signal will do.

Input: standardised by session and channel (the official loader does it). A window cannot know a session's mean and
deviation, so that is the recording's affair: give `zoo prepare` a recipe that does it.

    tokenizer = zoo.create("ephys_tokenizer")
    ...                                                       # training, see zoo.objectives.train_tokenizer
    counts = np.bincount(codes[codes >= 0], minlength=tokenizer.vocabulary)                        # of training data
    tokenizer, variables = refactored(tokenizer, variables, counts)

Differences: waves are summed over the convolution's output channels before, not after, they meet the tokens (the same
function, 128 times cheaper); the step of the schedule is counted here, in the collection `schedule`, not in epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import dense, partitioned
from zoo.layers.quantizers import annealed_one_hot
from zoo.objectives.signal import mean_square
from zoo.registry import Card, register
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized, Variables
from zoo.weights.keys import Fresh, Ignore, Key, Rule

SCHEDULE = "schedule"
"""The mutable collection that counts training steps."""
PADDINGS = ("causal", "same")
SHARPNESS = 10.0
"""What normalised logits are multiplied by; the official code divides by 0.1."""


class EphysTokenizer(Tokenizer):
    """The tokenizer. One token a sample: N = C · T, channel by channel, Q = 1.

    vocabulary    V tokens
    known         K, set by `refactored`: codes are then 1 to K by falling frequency and 0 for tokens that training data
                  never had; 0 leaves codes as they are, 0 to V − 1
    units         of the recurrent network
    wave          samples of a token's wave
    padding       causal: a wave begins at its token's sample; same: it is centred there, wave/2 samples begin before
    first_tau, last_tau, stages, anneal_steps
                  tau is one of `stages` values evenly from first to last, each for anneal_steps/stages training steps,
                  the last for good. Published: an epoch each of 20; anneal_steps is our choice
    rate_hz       of its windows; None for any
    margin        samples at both ends of a window whose codes are not kept where a long recording is cut into windows:
                  the network has not yet seen what precedes the first, nor the decoder all waves over them
    """

    SINGLE_CHANNEL = True
    vocabulary: int = 128
    known: int = 0
    units: int = 128
    wave: int = 10
    padding: str = "causal"
    first_tau: float = 1.0
    last_tau: float = 1e-3
    stages: int = 20
    anneal_steps: int = 20_000
    rate_hz: float | None = 250.0
    margin: int = 10

    def setup(self) -> None:
        self._check_options()
        self.recurrent = GatedRecurrent(self.units)
        glorot, ones, zeros = nn.initializers.glorot_uniform(), nn.initializers.ones, nn.initializers.zeros
        self.logits = dense(self.vocabulary, bias=True, init=glorot)
        self.norm = nn.LayerNorm(epsilon=1e-5, scale_init=partitioned(ones, "mlp"), bias_init=partitioned(zeros, "mlp"))
        # Of the published shape, for published weights: only its sum over the last axis counts.
        shape = (self.wave, self.vocabulary, self.vocabulary)
        self.wave_kernel = self.param("wave_kernel", partitioned(glorot, None, "embed", "mlp"), shape)
        self.wave_bias = self.param("wave_bias", partitioned(zeros, "mlp"), shape[-1:])
        self.steps = self.variable(SCHEDULE, "step", jnp.zeros, (), jnp.int32)

    @property
    def sampling_rate(self) -> float | None:
        return self.rate_hz

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.known + 1 if self.known else self.vocabulary,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"waveform": 1.0}

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if samples < self.wave:
            raise ZooError(f"EphysTokenizer: got a window of {samples} samples, wanted at least {self.wave}")
        return channels, samples

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        batch, channels, samples = signal.shape
        valid = self.token_valid(sensors, samples)
        signal = jnp.where(sensors.valid[..., None], jnp.asarray(signal, jnp.float32), 0)
        logits = SHARPNESS * self.norm(self.logits(self.recurrent(signal)))
        token = jnp.argmax(logits, axis=-1)
        if self.known:
            token = jnp.where(token < self.known, token + 1, 0)
        codes = jnp.where(valid, token.reshape(batch, -1), -1).astype(jnp.int32)[..., None]
        if train:
            waves = annealed_one_hot(logits, self.tau()) @ self._waves()
            waves = jnp.where(sensors.valid[..., None, None], waves, 0)
            if not self.is_initializing():
                self.steps.value += 1
        else:
            waves = self._chosen(codes, channels)
        reconstruction = self._overlapped(waves, jnp.asarray(sensors.valid))
        losses = {"waveform": mean_square(reconstruction, signal, jnp.asarray(sensors.valid))}
        return Tokenized(codes, waves.reshape(batch, -1, self.wave), reconstruction, losses, valid)

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        valid = jnp.asarray(sensors.valid)
        return self._overlapped(self._chosen(jnp.asarray(codes), valid.shape[1]), valid)

    def tau(self) -> Float[Array, ""]:
        """The share of the soft choice at the step that training has come to."""
        stage = jnp.minimum(self.steps.value // max(self.anneal_steps // self.stages, 1), self.stages - 1)
        return jnp.linspace(self.first_tau, self.last_tau, self.stages)[stage]

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        recurrent = 3 * self.units * (1 + self.units)
        return 2.0 * channels * samples * (recurrent + self.units * self.vocabulary + self.vocabulary * self.wave)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        blank, one = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32)
        return jnp.zeros((1, 1, self.wave)), Sensors(blank, blank, one, one, jnp.ones((1, 1), bool))

    def _waves(self) -> Float[Array, "V W"]:
        """Each token's wave: the sample it adds `lag` samples on is element lag."""
        return jnp.flip(self.wave_kernel.sum(-1), 0).T

    def _chosen(self, codes: Int[Array, "B N 1"], channels: int) -> Float[Array, "B C T W"]:
        """The wave of each code; 0 for −1. Code 0 of a refactored vocabulary has that of the first token never seen."""
        waves = self._waves()
        if self.known:
            unseen = waves[self.known] if self.known < self.vocabulary else jnp.zeros(self.wave)
            waves = jnp.concatenate([unseen[None], waves[: self.known]])
        chosen = jnp.where(codes >= 0, waves[jnp.maximum(codes[..., 0], 0)], 0)
        return chosen.reshape(codes.shape[0], channels, -1, self.wave)

    def _overlapped(self, waves: Float[Array, "B C T W"], valid: Bool[Array, "B C"]) -> Float[Array, "B C T"]:
        """Sum of the tokens' waves, each begun at its place; what reaches beyond the window is lost."""
        samples = waves.shape[2]
        before = 0 if self.padding == "causal" else self.wave // 2
        places = [jnp.pad(waves[..., lag], ((0, 0), (0, 0), (lag, self.wave - 1 - lag))) for lag in range(self.wave)]
        total = jnp.stack(places).sum(0)
        signal = total[..., before : before + samples] + self.wave_bias.sum()
        return jnp.where(valid[..., None], signal, 0)

    def _check_options(self) -> None:
        if self.padding not in PADDINGS:
            raise ZooError(f"EphysTokenizer padding: got {self.padding!r}, wanted one of {PADDINGS}")
        if not 0 <= self.known <= self.vocabulary:
            raise ZooError(f"EphysTokenizer known: got {self.known}, wanted 0 to the vocabulary's {self.vocabulary}")
        if not 0 <= self.last_tau <= self.first_tau <= 1:
            raise ZooError(
                f"EphysTokenizer: got tau from {self.first_tau} to {self.last_tau}, wanted it to fall within 0 to 1"
            )
        for name in ("vocabulary", "units", "wave", "stages", "anneal_steps"):
            if getattr(self, name) < 1:
                raise ZooError(f"EphysTokenizer {name}: got {getattr(self, name)}, wanted at least 1")


class GatedRecurrent(nn.Module):
    """Gated recurrent units over the last axis of a signal [B, C, T] → [B, C, T, U], from a state of zeros.

    r, z = sigmoid(W x + b + V h + c); n = tanh(W_n x + b_n + r (V_n h + c_n)); h ← (1 − z) n + z h: PyTorch's form,
    with both biases (1406.1078 has the reset inside the product). Kernels hold r, z and n side by side.
    """

    units: int

    @nn.compact
    def __call__(self, signal: Float[Array, "B C T"]) -> Float[Array, "B C T U"]:
        units, zeros = self.units, nn.initializers.zeros

        def parameter(name: str, init: Any, *shape: int) -> Array:
            axes = ("embed", "mlp") if name == "state_kernel" else (None,) * (len(shape) - 1) + ("mlp",)
            value = self.param(name, partitioned(init, *axes), shape)
            # Whole on every device before the loop, not again at each of its steps.
            return nn.with_logical_constraint(value, (None,) * len(shape))

        input_kernel = parameter("input_kernel", nn.initializers.glorot_uniform(), 1, 3 * units)
        state_kernel = parameter("state_kernel", nn.initializers.orthogonal(), units, 3 * units)
        input_bias = parameter("input_bias", zeros, 3 * units)
        state_bias = parameter("state_bias", zeros, 3 * units)

        def step(state: Array, sample: Array) -> tuple[Array, Array]:
            given = jnp.split(sample[..., None] * input_kernel[0] + input_bias, 3, axis=-1)
            kept = jnp.split(state @ state_kernel + state_bias, 3, axis=-1)
            reset, update = (nn.sigmoid(given[n] + kept[n]) for n in range(2))
            new = jnp.tanh(given[2] + reset * kept[2])
            state = (1 - update) * new + update * state
            return state, state

        first = jnp.zeros((*signal.shape[:2], units))
        return jnp.moveaxis(jax.lax.scan(step, first, jnp.moveaxis(signal, -1, 0))[1], 0, 2)


def refactored(tokenizer: EphysTokenizer, variables: Variables, counts: np.ndarray) -> tuple[EphysTokenizer, Variables]:
    """The same tokenizer with its K tokens that occur numbered 1 to K, most frequent first, and all others 0.

    counts  [V] how often each code of the trained tokenizer occurs in training data

    Tokens change places in the parameters; what it rebuilds of seen tokens stays the same. Code 0 stands for an outlier
    and decodes, as in the official code, to the wave of the first token never seen. Raises ZooError for a tokenizer
    that is refactored already, or counts that are not its own.
    """
    counts = np.asarray(counts)
    if tokenizer.known:
        raise ZooError(f"refactored: the vocabulary is refactored already, to {tokenizer.known} tokens")
    if counts.shape != (tokenizer.vocabulary,) or (counts < 0).any() or not counts.any():
        raise ZooError(f"refactored: got counts {list(counts.shape)}, wanted those of {tokenizer.vocabulary} codes")
    order = np.argsort(-counts.astype(np.int64), kind="stable")

    def reordered(parameter: Any, axis: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), parameter)

    params = dict(variables["params"])
    params["logits"] = {name: reordered(parameter, -1) for name, parameter in params["logits"].items()}
    params["norm"] = {name: reordered(parameter, -1) for name, parameter in params["norm"].items()}
    params["wave_kernel"] = reordered(params["wave_kernel"], 1)
    return tokenizer.clone(known=int((counts > 0).sum())), {**variables, "params": params}


_PAPER = "MEG-GPT, arXiv 2510.18080; tokenizers compared in arXiv 2602.16626"
VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "ephys_tokenizer": (
        {},
        231_040,
        "parity: codes and rebuilt signal of the released weights equal the official code's",
    ),
    "ephys_tokenizer_tiny": (
        {"vocabulary": 64, "units": 32, "anneal_steps": 1_000},
        46_624,
        "parity of its layers; over 95 % of variance explained on an alpha-like signal: "
        "tests/tokenizers/test_meg_gpt.py",
    ),
}
"""Options, parameters, evidence. tiny is ours; the other is the published one."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        EphysTokenizer,
        _options,
        Card(
            title=f"EphysTokenizer, MEG-GPT's, {_parameters / 1e3:.0f} k parameters: one token a sample",
            paper=_PAPER,
            code="https://github.com/OHBA-analysis/EphysTokenizer",
            licence="MIT",
            inputs="any channels [B, C, T] at 250 Hz (option rate_hz), standardised by session and channel",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )

_ENCODER, _CHOICE = "encoder_layer.rnn_layers.0.", "token_weights_layer."

KEYS: tuple[Rule, ...] = (
    Key(f"{_ENCODER}weight_ih_l0", "params/recurrent/input_kernel", "u i -> i u"),
    Key(f"{_ENCODER}weight_hh_l0", "params/recurrent/state_kernel", "u i -> i u"),
    Key(f"{_ENCODER}bias_ih_l0", "params/recurrent/input_bias"),
    Key(f"{_ENCODER}bias_hh_l0", "params/recurrent/state_bias"),
    Key(f"{_CHOICE}dense_layer.weight", "params/logits/kernel", "o i -> i o"),
    Key(f"{_CHOICE}dense_layer.bias", "params/logits/bias"),
    Key(f"{_CHOICE}norm_layer.weight", "params/norm/scale"),
    Key(f"{_CHOICE}norm_layer.bias", "params/norm/bias"),
    Key("decoder_layer.token_basis_layer.weight", "params/wave_kernel", "o i w -> w i o"),
    Key("decoder_layer.token_basis_layer.bias", "params/wave_bias"),
    Ignore(f"{_CHOICE}_temperature", "tau, which is computed here from the step"),
    Fresh(f"{SCHEDULE}/step", "files tell no step: training goes on from the schedule's beginning"),
)
"""Of `model_state.pt` of MEG-GPT's tokenizer, and of any that EphysTokenizer trains with one layer of GRU."""
