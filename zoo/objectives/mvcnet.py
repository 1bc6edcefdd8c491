"""MVCNet's training: four views of every window, a class for each, and contrast between views and between branches.

    task = MVCNetTask(classes=2, rate_hz=250, options={"channels": names})
    value, metrics, variables = task.loss(variables, batch, key, train=True)     # batch["label"] [B], −1 for none

Source: Wang et al., "MVCNet: Multi-View Contrastive Network for Motor Imagery Classification", Knowledge-Based Systems
2025; what it leaves open from the facts of the authors' code (github.com/wzwvv/MVCNet, no licence; nothing of it is
used here). Where this differs: a shift of frequency is in hertz at the recording's own rate (the code takes every rate
for 250 Hz), and the mirror knows electrodes by name or place (the code has a list of channel numbers a dataset).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm
from zoo.objectives.contrast import nt_xent
from zoo.objectives.supervised import cross_entropy
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Sensors, Variables
from zoo.weights.keys import Key

EPSILON = 1e-5
NEAR = 0.02
"""Metres that an electrode may lie from the mirror image of its partner."""


def frequency_shift(signal: Float[AnyArray, "*rows T"], hertz: float, rate_hz: float) -> Float[Array, "*rows T"]:
    """The real part of the analytic signal times exp(2πi · hertz · time): every frequency moved by `hertz`.

    The transform is over the window and zeros after it, to a power of two, so a window's ends change a little.
    """
    signal = jnp.asarray(signal, jnp.float32)
    samples = signal.shape[-1]
    length = 1 << (samples - 1).bit_length()
    bins = np.zeros(length, np.float32)
    bins[0] = bins[length // 2] = 1
    bins[1 : length // 2] = 2
    analytic = jnp.fft.ifft(jnp.fft.fft(signal, length) * bins)[..., :samples]
    turn = np.exp(2j * np.pi * hertz / rate_hz * np.arange(samples)).astype(np.complex64)
    return (analytic * turn).real


def mirror_by_name(names: Sequence[str]) -> tuple[int, ...]:
    """For each channel, which one lies opposite: C3's is C4's, CZ's its own; of a pair of electrodes, the pair's.

    Raises ZooError naming those whose opposite is not there.
    """

    def opposite(electrode: str) -> str:
        return re.sub(r"\d+", lambda number: str(int(number[0]) + (1 if int(number[0]) % 2 else -1)), electrode)

    wanted = [opposite(name) for name in names]
    alone = [f"{name} (wants {there})" for name, there in zip(names, wanted, strict=True) if there not in names]
    if alone:
        raise ZooError(f"mirror: no electrode lies opposite to {', '.join(alone)}")
    return tuple(list(names).index(each) for each in wanted)


def mirror_by_position(position: Float[np.ndarray, "C 3"]) -> tuple[int, ...]:
    """The same from places in head coordinates, +x the right ear, metres: the nearest to the mirror image.

    Raises ZooError where none is within `NEAR`, or two have the same opposite.
    """
    away = np.linalg.norm(position[:, None] * np.array([-1, 1, 1]) - position, axis=-1)
    order = away.argmin(1)
    far = [int(channel) for channel in np.flatnonzero(~(away.min(1) <= NEAR))]
    if far:
        raise ZooError(f"mirror: no electrode within {NEAR:g} m opposite to channels {far}")
    if not np.array_equal(order[order], np.arange(len(order))):
        raise ZooError(f"mirror: places are not pairs: channels' nearest opposites are {order.tolist()}")
    return tuple(int(channel) for channel in order)


def mirrored_labels(label: Int[AnyArray, " B"], sides: tuple[int, int] | None) -> Int[Array, " B"]:
    """Labels of the mirrored windows: the two classes `sides` (left, right hand) for each other; None leaves all."""
    label = jnp.asarray(label)
    if sides is None:
        return label
    left, right = sides
    return jnp.where(label == left, right, jnp.where(label == right, left, label))


def views(
    signal: Float[AnyArray, "B C T"],
    label: Int[AnyArray, " B"],
    *,
    rate_hz: float,
    mirror: Sequence[int],
    hertz: float = 0.1,
    sides: tuple[int, int] | None = (0, 1),
) -> tuple[Float[Array, "4 B C T"], Int[Array, "4 B"]]:
    """The window itself, with its sign turned, shifted in frequency, mirrored; and their labels."""
    signal, label = jnp.asarray(signal, jnp.float32), jnp.asarray(label)
    moved = frequency_shift(signal, hertz, rate_hz)
    mirrored = signal[:, np.asarray(mirror)]
    return jnp.stack([signal, -signal, moved, mirrored]), jnp.stack([label] * 3 + [mirrored_labels(label, sides)])


class ChannelTransformer(nn.Module):
    """One post-norm transformer layer over channels as tokens, their T samples as features: PyTorch's
    TransformerEncoderLayer with ReLU.

    heads    attention heads; they divide T
    hidden   features of the second branch; 2 · T, at least 128, where 0
    dropout  of attention, of both branches and within the second
    """

    heads: int = 2
    hidden: int = 0
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B C T"], train: bool) -> Float[Array, "B C T"]:
        batch, channels, samples = x.shape
        if samples % self.heads:
            raise ZooError(f"ChannelTransformer: {samples} samples do not divide into {self.heads} heads")
        x = jnp.asarray(x, jnp.float32)
        glorot, zeros = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"), nn.initializers.zeros

        def dropped(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        def projected(name: str) -> Array:
            # Glorot's uniform of the three together, as PyTorch draws them: (T + 3 T) / 2 for its fan.
            each = dense(samples, ("embed", None), bias=True, init=glorot, bias_init=zeros, name=name)(x)
            return each.reshape(batch, channels, self.heads, -1)

        scores = jnp.einsum("bqhk,bshk->bhqs", projected("query"), projected("key")) * (samples / self.heads) ** -0.5
        weights = dropped(jax.nn.softmax(scores))
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights, projected("value")).reshape(batch, channels, samples)
        mixed = dense(samples, (None, "embed"), bias=True, init=LIKE_TORCH, bias_init=zeros, name="out")(mixed)
        x = norm("layer", epsilon=EPSILON, name="norm1")(x + dropped(mixed))
        hidden = dropped(nn.relu(_linear(self.hidden or max(2 * samples, 128), samples, "mlp_in", ("embed", "mlp"))(x)))
        out = _linear(samples, hidden.shape[-1], "mlp_out", ("mlp", "embed"))(hidden)
        return norm("layer", epsilon=EPSILON, name="norm2")(x + dropped(out))


class Projector(nn.Module):
    """[B, F] → [B, features] in ±1: a linear map to four times as many, a layer norm, ReLU, a linear map, tanh."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B D"]:
        x = _linear(4 * self.features, x.shape[-1], "first", (None, "mlp"))(x)
        x = nn.relu(norm("layer", epsilon=EPSILON, axis="mlp", name="norm")(x))
        return jnp.tanh(_linear(self.features, x.shape[-1], "second", ("mlp", None))(x))


class TwoBranches(nn.Module):
    """An encoder with its classifier, and the branch that only training has."""

    encoder: Any
    classes: int

    def setup(self) -> None:
        self.head = self.encoder.head(self.classes)
        self.transformer = ChannelTransformer()
        self.projector = Projector(self.encoder.features)

    def __call__(
        self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"], Float[Array, "B D"]]:
        """Logits, and the window as both branches see it."""
        pooled = self.encoder(signal, sensors, train=train).pooled
        seen = self.transformer(self.encoder.window(signal, sensors, None), train)
        return self.head(pooled, train=train), pooled, self.projector(seen.reshape(len(seen), -1))


@dataclass(frozen=True)
class MVCNetTask:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        model: a registered encoder of fixed windows, `mvcnet_base` or another
        options: replacements for its options; its `channels` by name, unless `mirror` is given
        classes: K
        rate_hz: of the recording
        mirror: for each channel the one opposite; from the names where empty
        sides: the two classes that a mirror exchanges; None where none are lateral
        hertz: by which the third view is shifted
        between_views: λ1, weight of the contrast between the window and each other view
        between_branches: λ2, weight of the contrast between the branches
        temperature: of both
    """

    model: str = "mvcnet_base"
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 2
    rate_hz: float = 250.0
    mirror: tuple[int, ...] = ()
    sides: tuple[int, int] | None = (0, 1)
    hertz: float = 0.1
    between_views: float = 0.1
    between_branches: float = 0.1
    temperature: float = 0.2

    def encoder(self) -> Any:
        """The encoder alone. Its variables are those called `encoder` in each collection."""
        return create(self.model, **self.options)

    def module(self) -> TwoBranches:
        """Encoder, classifier, second branch."""
        return TwoBranches(self.encoder(), self.classes)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, batch["signal"], batch["sensors"])

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Cross-entropy of the four views, summed, and the two contrasts; outside training the window alone.

        Every view goes through on its own, so batch statistics are a view's. Metrics: each term, accuracy of the
        window itself, how many rows have a label.
        """
        label = jnp.asarray(batch["label"])
        shown, labels = jnp.asarray(batch["signal"])[None], label[None]
        if train:
            shown, labels = views(
                batch["signal"], label, rate_hz=self.rate_hz, mirror=self._mirror(), hertz=self.hertz, sides=self.sides
            )

        def seen(state: dict[str, Any], given: tuple[Array, Array]) -> tuple[dict[str, Any], Any]:
            out, new = self.module().apply(
                {"params": variables["params"], **state},
                given[0],
                batch["sensors"],
                train=train,
                mutable=list(state) if train else [],
                rngs={"dropout": given[1]},
            )
            return {**state, **new}, out

        state = {name: value for name, value in variables.items() if name != "params"}
        state, (logits, ours, theirs) = jax.lax.scan(seen, state, (shown, jax.random.split(key, len(shown))))
        there = label >= 0
        right = jnp.sum(logits[0].argmax(-1) == label, where=there) / jnp.maximum(there.sum(), 1)
        entropy = sum(cross_entropy(each, wanted) for each, wanted in zip(logits, labels, strict=True))
        metrics = {"cross_entropy": jnp.asarray(entropy), "accuracy": right, "weight": there.sum().astype(jnp.float32)}
        if not train:
            return metrics["cross_entropy"], metrics, {}
        both = jnp.concatenate([ours, theirs], axis=1)
        metrics["between_views"] = jnp.mean(
            jnp.stack([nt_xent(both[0], each, temperature=self.temperature) for each in both[1:]])
        )
        flat_ours, flat_theirs = (each.reshape(-1, each.shape[-1]) for each in (ours, theirs))
        metrics["between_branches"] = nt_xent(flat_ours, flat_theirs, temperature=self.temperature)
        value = metrics["cross_entropy"] + self.between_views * metrics["between_views"]
        return value + self.between_branches * metrics["between_branches"], metrics, state

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass of all views over `batch`, both branches."""
        examples, channels, samples = batch["signal"].shape
        encoder = self.encoder()
        layer = 2 * channels * (4 * samples**2 + 2 * samples * max(2 * samples, 128)) + 4 * channels**2 * samples
        hidden = 4 * encoder.features
        projector = 2 * hidden * (channels * samples + encoder.features)
        return 4.0 * examples * (encoder.flops(channels, samples) + layer + projector)

    def check_sensors(self, names: tuple[str, ...]) -> None:
        """Raises ZooError when the encoder cannot take channels of these canonical names."""
        self.encoder().check_sensors(names)

    def _mirror(self) -> tuple[int, ...]:
        channels = self.encoder().montage
        if self.mirror:
            return self.mirror
        if isinstance(channels, int):
            raise ZooError("MVCNetTask: wanted channels by name, or mirror, got their number")
        return mirror_by_name(channels)


def _linear(features: int, inputs: int, name: str, axes: tuple[str | None, str | None]) -> nn.Dense:
    """As PyTorch's begins."""
    return dense(features, axes, bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(inputs), name=name)


TRANSFORMER_KEYS = (
    *(
        key
        for part, name in enumerate(("query", "key", "value"))
        for key in (
            Key("self_attn.in_proj_weight", f"params/{name}/kernel", "o i -> i o", (part, 3)),
            Key("self_attn.in_proj_bias", f"params/{name}/bias", part=(part, 3)),
        )
    ),
    *(
        key
        for theirs, ours in (("self_attn.out_proj", "out"), ("linear1", "mlp_in"), ("linear2", "mlp_out"))
        for key in (
            Key(f"{theirs}.weight", f"params/{ours}/kernel", "o i -> i o"),
            Key(f"{theirs}.bias", f"params/{ours}/bias"),
        )
    ),
    Key("norm{l}.weight", "params/norm{l}/scale"),
    Key("norm{l}.bias", "params/norm{l}/bias"),
)
"""PyTorch's TransformerEncoderLayer to ChannelTransformer."""
