"""β-VAE of EEG windows, and SCAN, which learns what its latents have to do with labels.

    task = BetaVAE("eeg_vae_base")                     # through the training loop
    window = task.decode(variables, latents)           # traversals, and labels made into EEG
    concepts = Scan(task, classes=2)                   # with the trained VAE's variables frozen
    made = concepts.imagine(variables, key, label)     # [B, C, T] of these labels

Sources: Honke et al., arXiv 2010.15274; Higgins et al., β-VAE, ICLR 2017, equation 4; Higgins et al., SCAN, 1707.03389,
equation 2. The windows are standardised, with a fixed variance of 1, so −log p(x|z) is half the summed square error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from zoo.encoders.eeg_vae import EEGVAE, HIGHEST, LOWEST, linear
from zoo.errors import ZooError
from zoo.layers.convolution import TransposedConvolution
from zoo.objectives.adversarial import mean_over
from zoo.objectives.supervised import cross_entropy
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Variables

Gaussian = tuple[Array, Array]
"""Mean and log-variance [B, D] of independent normal numbers."""


def kl_gaussians(
    mean: Float[AnyArray, "B D"],
    log_variance: Float[AnyArray, "B D"],
    other_mean: Float[AnyArray, "B D"] | float = 0.0,
    other_log_variance: Float[AnyArray, "B D"] | float = 0.0,
) -> Float[Array, " B"]:
    """KL(one ‖ other), in nats, summed over D: ½ Σ (ln v₂ − ln v₁ + (v₁ + (m₁ − m₂)²)/v₂ − 1). Other: N(0, I)."""
    apart = jnp.square(jnp.asarray(mean) - other_mean) * jnp.exp(-jnp.asarray(other_log_variance))
    relative = jnp.asarray(log_variance) - other_log_variance
    return 0.5 * jnp.sum(jnp.exp(relative) - relative + apart - 1, axis=-1)


class VAE(nn.Module):
    """The encoder, and a decoder that mirrors it."""

    encoder: EEGVAE

    def setup(self) -> None:
        widths, montage = self.encoder.widths, self.encoder.montage
        channels = montage if isinstance(montage, int) else len(montage)
        steps = self.encoder.samples >> len(widths)
        self.inner = linear(self.encoder.hidden, self.encoder.latents)
        self.outer = linear(widths[-1] * steps, self.encoder.hidden)
        self.up = [TransposedConvolution(width, 5, 2, 2, 1) for width in (*widths[-2::-1], channels)]

    def __call__(self, standard: Float[Array, "B C T"]) -> Float[Array, "B C T"]:
        """The window as its mean latents give it back."""
        return self.decode(self.posterior(standard)[0])

    def posterior(self, standard: Float[Array, "B C T"]) -> Gaussian:
        return self.encoder.posterior(standard)[:2]

    def decode(self, latents: Float[Array, "B D"]) -> Float[Array, "B C T"]:
        hidden = nn.gelu(self.inner(latents), approximate=False)
        x = nn.gelu(self.outer(hidden), approximate=False).reshape(len(latents), -1, self.encoder.widths[-1])
        for index, up in enumerate(self.up):
            x = up(x if index == 0 else nn.gelu(x, approximate=False))
        return x.swapaxes(1, 2)


@dataclass(frozen=True)
class BetaVAE:
    """The task. As published but for what the paper leaves open: Adam 1e-4, batches of 64.

    Attributes:
        model: registered encoder
        options: replacements for its options
        beta: weight of the KL divergence from N(0, I)
    """

    model: str = "eeg_vae_base"
    options: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 4.0

    def encoder(self) -> EEGVAE:
        """The encoder alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, EEGVAE):
            raise ZooError(f"task.model: {self.model} is not a variational encoder, such as eeg_vae_base")
        return encoder

    def module(self) -> VAE:
        """Encoder and decoder."""
        return VAE(self.encoder())

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        return self.module().init(key, self.encoder().standardised(batch["signal"], batch["sensors"]))

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Mean over examples of ½‖x − x̂‖² over valid channels + β·KL(q(z|x) ‖ N(0, I)); validation takes the mean z.

        Metrics: error, kl (nats), and active, how many latents have more than a hundredth of a nat; weight, examples.
        """
        standard = self.encoder().standardised(batch["signal"], batch["sensors"])
        mean, log_variance = self.posterior(variables, standard)
        latents = sampled(key, mean, log_variance) if train else mean
        wrong = jnp.square(self.decode(variables, latents) - standard).sum(-1)
        error = 0.5 * jnp.sum(wrong, axis=1, where=jnp.asarray(batch["sensors"].valid)).mean()
        kl = kl_gaussians(mean, log_variance).mean()
        metrics = {"error": error, "kl": kl, "active": _active(mean, log_variance), "weight": jnp.float32(len(mean))}
        return error + self.beta * kl, metrics, {}

    def posterior(self, variables: Variables, standard: Float[AnyArray, "B C T"]) -> Gaussian:
        """q(z|x) of standardised windows: mean and log-variance [B, D]."""
        found: Any = self.module().apply(
            {"params": variables["params"]}, jnp.asarray(standard, jnp.float32), method="posterior"
        )
        return found

    def decode(self, variables: Variables, latents: Float[AnyArray, "B D"]) -> Float[Array, "B C T"]:
        """Windows, standardised, as these latents [B, D] give them."""
        found: Any = self.module().apply(
            {"params": variables["params"]}, jnp.asarray(latents, jnp.float32), method="decode"
        )
        return found

    def flops(self, batch: Batch) -> float:
        """Operations of one pass over `batch`: the decoder mirrors the encoder."""
        examples, channels, samples = batch["signal"].shape
        return 2 * examples * self.encoder().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)


def traversals(latents: Float[AnyArray, " D"], values: Float[AnyArray, " V"]) -> Float[Array, "D V D"]:
    """The latents with each in turn replaced by each value: row [d, v] has values[v] at d."""
    latents, values = jnp.asarray(latents), jnp.asarray(values)
    own = jnp.eye(len(latents))[:, None]
    return jnp.where(own > 0, values[None, :, None], latents)


class Concepts(nn.Module):
    """Labels ↔ the same latents: a hidden layer each way."""

    latents: int
    classes: int
    hidden: int = 64

    def setup(self) -> None:
        self.encode_in, self.encode_out = linear(self.hidden, self.classes), linear(2 * self.latents, self.hidden)
        self.decode_in, self.decode_out = linear(self.hidden, self.latents), linear(self.classes, self.hidden)

    def __call__(self, label: Int[Array, " B"]) -> tuple[Gaussian, Float[Array, "B K"]]:
        mean, log_variance = self.posterior(label)
        return (mean, log_variance), self.logits(mean)

    def posterior(self, label: Int[Array, " B"]) -> Gaussian:
        """q(z|y)."""
        both = self.encode_out(nn.relu(self.encode_in(jax.nn.one_hot(label, self.classes))))
        mean, log_variance = jnp.split(both, 2, axis=-1)
        return mean, jnp.clip(log_variance, LOWEST, HIGHEST)

    def logits(self, latents: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """p(y|z)."""
        return self.decode_out(nn.relu(self.decode_in(latents)))


@dataclass(frozen=True)
class Scan:
    """The task of SCAN over a VAE. Its variables are the VAE's, under "vae", which stay as they are, and its own.

    The loop begins a run with random parameters; the trained VAE's go into the state by `with_vae`, and
    `optimizer.freeze=("vae/",)` keeps weight decay off them. Rows whose "label" is −1 count for nothing.

    Attributes:
        vae: the task that trained the VAE
        classes: K
        hidden: width of both hidden layers
        beta: weight of KL(q(z|y) ‖ N(0, I))
        grounding: λ of KL(q(z|x) ‖ q(z|y)), the window's first: a label covers all windows that have it
    """

    vae: BetaVAE = field(default_factory=BetaVAE)
    classes: int = 2
    hidden: int = 64
    beta: float = 1.0
    grounding: float = 10.0

    def module(self) -> Concepts:
        """Labels to latents and back."""
        return Concepts(self.vae.encoder().latents, self.classes, self.hidden)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        keys = jax.random.split(key)
        concepts = self.module().init(keys[0], jnp.zeros(1, jnp.int32))["params"]
        return {"params": {"concepts": concepts, "vae": self.vae.init(keys[1], batch)["params"]}}

    def with_vae(self, variables: Variables, vae: Variables) -> Variables:
        """The variables with the parameters of a trained VAE."""
        return {**variables, "params": {**variables["params"], "vae": vae["params"]}}

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """−log p(y|z_y) + β·KL(q(z_y|y) ‖ N(0, I)) + λ·KL(q(z_x|x) ‖ q(z_y|y)), a mean over rows with a label.

        Metrics: each term, unweighed; accuracy, how often a window's own latents tell its label; weight, rows.
        """
        if "label" not in batch:
            raise ZooError("SCAN learns what labels mean: the task needs batches with labels")
        label, valid = jnp.maximum(jnp.asarray(batch["label"]), 0), jnp.asarray(batch["label"]) >= 0
        standard = self.vae.encoder().standardised(batch["signal"], batch["sensors"])
        frozen = {"params": jax.lax.stop_gradient(variables["params"]["vae"])}
        seen = self.vae.posterior(frozen, standard)
        meant = self._apply(variables, label, method="posterior")
        latents = sampled(key, *meant) if train else meant[0]
        terms = {
            "naming": cross_entropy(self._apply(variables, latents, method="logits"), batch["label"]),
            "kl": mean_over(kl_gaussians(*meant), valid),
            "grounding": mean_over(kl_gaussians(*seen, *meant), valid),
        }
        value = terms["naming"] + self.beta * terms["kl"] + self.grounding * terms["grounding"]
        named = self._apply(variables, seen[0], method="logits").argmax(-1)
        right = mean_over((named == label).astype(jnp.float32), valid)
        return value, {**terms, "accuracy": right, "weight": valid.sum().astype(jnp.float32)}, {}

    def imagine(self, variables: Variables, key: Key[Array, ""], label: Int[AnyArray, " B"]) -> Float[Array, "B C T"]:
        """Windows, standardised, of latents drawn for these labels."""
        meant = self._apply(variables, jnp.asarray(label), method="posterior")
        return self.vae.decode({"params": variables["params"]["vae"]}, sampled(key, *meant))

    def flops(self, batch: Batch) -> float:
        """Operations of one pass over `batch`: the VAE's encoder; labels cost next to nothing."""
        examples, channels, samples = batch["signal"].shape
        return examples * self.vae.encoder().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder cannot take a recording of this rate and these channels."""
        self.vae.check_recording(rate_hz, kinds, names)

    def _apply(self, variables: Variables, *given: Array, method: str) -> Any:
        return self.module().apply({"params": variables["params"]["concepts"]}, *given, method=method)


def sampled(key: Key[Array, ""], mean: Float[Array, "B D"], log_variance: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Normal numbers of these means and log-variances, with gradients for both."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def _active(mean: Array, log_variance: Array) -> Array:
    each = 0.5 * (jnp.exp(log_variance) - log_variance + jnp.square(mean) - 1).mean(0)
    return (each > 0.01).sum().astype(jnp.float32)
