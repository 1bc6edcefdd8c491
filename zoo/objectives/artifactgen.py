"""Artifacts of a class made to order: ArtifactGen's two generators, and what trains them.

    task = ArtifactGAN()                                            # WGAN-GP
    task = ArtifactDiffusion()                                      # DDPM
    made = task.generate(variables, key, label, guidance=3.5)       # [B, C, T] of the classes label [B]

Source: arXiv 2509.08188 and the official code (github.com/ahritik/ArtifactGen, MIT). What is made is scaled as the
models' input is (`zoo.encoders.artifactgen`): its amplitude is not the recording's.

Where this differs from the official code:
- Labels are dropped in a tenth of the examples of diffusion, without which guidance has nothing to lead away from; the
  released training never drops any.
- Diffusion has the paper's schedule and target (squared cosine, v) unless told otherwise; the released code has
  `schedule="linear", kind="noise", skips=False` with the encoder "artifactgen_ddpm_released".
- Critic and generator are trained by one optimiser, in one step: each has the gradient of its own loss alone, and the
  generator has one in every fifth step. With β₁ = 0 and no weight decay, as published, it stands still in the others.
  Its second moment goes on there, a fifth of it zeros, so its steps are about twice as long as those of an optimiser
  that counts its own steps alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from zoo.encoders.artifactgen import CONV, CRITIC_KEYS, UNET_KEYS, ArtifactCritic, ArtifactUNet, block_keys
from zoo.errors import ZooError
from zoo.layers.convolution import Convolution, TransposedConvolution
from zoo.layers.parameters import LIKE_TORCH, like_torch_bias, partitioned
from zoo.objectives import diffusion
from zoo.objectives.adversarial import critic_loss, generator_loss, gradient_penalty
from zoo.objectives.signal import mean_square
from zoo.registry import create
from zoo.types import AnyArray, Array, Batch, Variables
from zoo.weights import keys


class Generator(nn.Module):
    """Noise [B, Z] and classes [B] → windows [B, C, T] in (−1, 1): steps double, double, and double with two more.

    channels, samples  C, T; T is 8 times some number, and 2
    classes            K of the labels
    width              features of the last hidden level; those before it have twice and four times as many
    """

    channels: int
    samples: int
    classes: int
    width: int = 64

    @nn.compact
    def __call__(self, noise: Float[Array, "B Z"], label: Int[Array, " B"]) -> Float[Array, "B C T"]:
        if self.samples % 8 != 2:
            raise ZooError(f"Generator samples: got {self.samples}, wanted a multiple of 8 and 2 more, such as 250")
        given = jnp.concatenate([noise, jax.nn.one_hot(label, self.classes)], axis=-1)
        steps, features = self.samples // 8, 4 * self.width
        x = nn.Einsum(
            (given.shape[-1], steps, features),
            "bi,itd->btd",
            kernel_init=partitioned(
                nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0,), (1, 2)), None, None, None
            ),
            bias_init=partitioned(like_torch_bias(given.shape[-1]), None, None),
            name="first",
        )(given)
        x = nn.relu(TransposedConvolution(2 * self.width, 4, 2, 1, name="up0")(x))
        x = nn.relu(TransposedConvolution(self.width, 4, 2, 1, name="up1")(x))
        return jnp.tanh(TransposedConvolution(self.channels, 6, 2, 1, name="up2")(x)).swapaxes(1, 2)


class Adversaries(nn.Module):
    """A critic, called `encoder`, with what makes a score of its features; and a generator."""

    encoder: ArtifactCritic
    samples: int
    classes: int
    noise: int

    def setup(self) -> None:
        montage, features = self.encoder.montage, self.encoder.features
        channels = montage if isinstance(montage, int) else len(montage)
        self.generator = Generator(channels, self.samples, self.classes, self.encoder.width)
        init, bias = partitioned(LIKE_TORCH, None, None), partitioned(like_torch_bias(features), None)
        self.linear = nn.Dense(1, kernel_init=init, bias_init=bias)
        self.label = nn.Embed(
            self.classes, features, embedding_init=partitioned(nn.initializers.normal(1.0), None, None)
        )

    def __call__(self, label: Int[Array, " B"], noise: Float[Array, "B Z"]) -> Float[Array, " B"]:
        """The score of what is made of noise."""
        return self.score(self.generate(noise, label), label)

    def generate(self, noise: Float[Array, "B Z"], label: Int[Array, " B"]) -> Float[Array, "B C T"]:
        return self.generator(noise, label)

    def score(self, scaled: Float[Array, "B C T"], label: Int[Array, " B"]) -> Float[Array, " B"]:
        """A linear map of the pooled features, and their product with a vector of the class."""
        pooled = self.encoder.describe(scaled).mean(1)
        return self.linear(pooled)[:, 0] + jnp.sum(pooled * self.label(label), axis=-1)


@dataclass(frozen=True)
class ArtifactGAN:
    """The task of WGAN-GP. As published: Adam 2e-4 with β (0, 0.9) and no weight decay, batches of 64.

    A batch has "label" [B]; rows without one (−1) count for nothing. The gradient is clipped as one vector of both
    networks, so `optimizer.clip_norm` belongs at 0. The counter of steps is a collection: `train.accumulate` must be 1.

    Attributes:
        model: registered critic
        options: replacements for its options
        classes: K
        noise: Z
        penalty: weight of the gradient penalty
        critic_steps: the generator learns in every step of this number
    """

    model: str = "artifactgen_wgan"
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 5
    noise: int = 128
    penalty: float = 10.0
    critic_steps: int = 5

    def encoder(self) -> ArtifactCritic:
        """The critic without its score. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, ArtifactCritic):
            raise ZooError(f"task.model: {self.model} is not a critic, such as artifactgen_wgan")
        return encoder

    def module(self, samples: int) -> Adversaries:
        """Critic and generator of windows of so many samples."""
        return Adversaries(self.encoder(), samples, self.classes, self.noise)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names, and the counter of steps."""
        count, _, samples = batch["signal"].shape
        variables = self.module(samples).init(key, _labels(batch), jnp.zeros((count, self.noise)))
        return {**variables, "turn": {"steps": jnp.zeros((), jnp.int32)}}

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """In training the critic's loss and, in its steps, the generator's; else the estimate of their distance.

        Metrics: wasserstein, how much higher the critic scores what is real; penalty, unweighed; generator, its loss,
        0 in the critic's steps; weight, the rows that have a label.
        """
        module, label, valid = self.module(batch["signal"].shape[-1]), _labels(batch), batch["label"] >= 0
        keys = jax.random.split(key, 3)
        drawn = [jax.random.normal(each, (len(label), self.noise)) for each in keys[:2]]
        # Each network learns from its own loss: in the other's it stands still.
        learning = {"params": variables["params"]}
        still = jax.lax.stop_gradient(learning)

        def score(given: Any, signal: Any) -> Any:
            return module.apply(given, signal, label, method="score")

        def make(given: Any, noise: Any) -> Any:
            return module.apply(given, noise, label, method="generate")

        real, made = module.encoder.scaled(batch["signal"], batch["sensors"]), make(still, drawn[0])
        lead = critic_loss(score(learning, real), score(learning, made), valid)
        metrics = {"wasserstein": -lead, "weight": valid.sum().astype(jnp.float32)}
        if not train:
            return -lead, metrics, {}
        share = jax.random.uniform(keys[2], label.shape)
        penalty = gradient_penalty(lambda between: score(learning, between), real, made, share, valid)
        steps = variables["turn"]["steps"] + 1
        generator = jax.lax.cond(
            steps % self.critic_steps == 0,
            lambda: generator_loss(score(still, make(learning, drawn[1])), valid),
            lambda: jnp.zeros(()),
        )
        value = lead + self.penalty * penalty + generator
        return value, {**metrics, "penalty": penalty, "generator": generator}, {"turn": {"steps": steps}}

    def generate(
        self, variables: Variables, key: Key[Array, ""], label: Int[AnyArray, " B"], samples: int = 250
    ) -> Float[Array, "B C T"]:
        """Windows of these classes, in (−1, 1)."""
        noise = jax.random.normal(key, (len(label), self.noise))
        made = self.module(samples).apply(
            {"params": variables["params"]}, noise, jnp.asarray(label, jnp.int32), method="generate"
        )
        assert isinstance(made, jax.Array)
        return made

    def flops(self, batch: Batch) -> float:
        """Operations of one pass of the critic over `batch`, what is real and what is made."""
        examples, channels, samples = batch["signal"].shape
        return 2 * examples * self.encoder().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the critic cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)


class Denoiser(nn.Module):
    """The encoder and a way up that mirrors it: noisy windows [B, C, T] → what the schedule's kind predicts.

    skips  each level of the way up is handed the features that its level of the way down ends with
    """

    encoder: ArtifactUNet
    skips: bool = True

    def setup(self) -> None:
        widths = [self.encoder.width * multiple for multiple in self.encoder.multiples]
        montage = self.encoder.montage
        self.up = [[self.encoder.block(width) for _ in range(self.encoder.blocks)] for width in widths[::-1]]
        self.double = [TransposedConvolution(width, 4, 2, 1) for width in widths[:0:-1]]
        self.last = Convolution(montage if isinstance(montage, int) else len(montage), (3,), paddings=(1,))

    def __call__(
        self, noisy: Float[Array, "B C T"], step: Int[Array, " B"], label: Int[Array, " B"], *, train: bool = False
    ) -> Float[Array, "B C T"]:
        """label [B]: K is none."""
        told = self.encoder.tell(step, label)
        x, levels = self.encoder.describe(noisy, told, train=train)
        for level, blocks in enumerate(self.up):
            if self.skips:
                x = jnp.concatenate([x, levels[-1 - level]], axis=-1)
            for block in blocks:
                x = block(x, told, train)
            if level < len(self.double):
                x = self.double[level](x)
        return self.last(x).swapaxes(1, 2)


@dataclass(frozen=True)
class ArtifactDiffusion:
    """The task of DDPM. As published: AdamW 1e-4 without decay, batches of 32, and an average of the parameters.

    A batch may have "label" [B]; −1 is none.

    Attributes:
        model: registered denoiser
        options: replacements for its options
        kind: what is predicted: v, noise or clean
        schedule: cosine or linear
        steps: of the schedule
        drop: share of the examples whose class is not told
        skips: the way up is handed the levels of the way down
    """

    model: str = "artifactgen_ddpm"
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "v"
    schedule: str = "cosine"
    steps: int = 1000
    drop: float = 0.1
    skips: bool = True

    def encoder(self) -> ArtifactUNet:
        """The way down alone. Its variables are `{"params": variables["params"]["encoder"]}`."""
        encoder = create(self.model, **self.options)
        if not isinstance(encoder, ArtifactUNet):
            raise ZooError(f"task.model: {self.model} is not a denoiser, such as artifactgen_ddpm")
        return encoder

    def module(self) -> Denoiser:
        """Way down and way up."""
        return Denoiser(self.encoder(), self.skips)

    def plan(self) -> diffusion.Schedule:
        """How much noise each step has. Raises ZooError for another schedule."""
        if self.schedule not in ("cosine", "linear"):
            raise ZooError(f"task.schedule: got {self.schedule!r}, wanted 'cosine' or 'linear'")
        return (diffusion.squared_cosine if self.schedule == "cosine" else diffusion.linear)(self.steps)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names."""
        none = jnp.zeros(len(batch["signal"]), jnp.int32)
        return self.module().init(key, jnp.asarray(batch["signal"], jnp.float32), none, none)

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""], train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """Mean squared error of the prediction, at a step drawn for each example; weight, how many they are."""
        encoder, schedule = self.encoder(), self.plan()
        keys = dict(zip(("step", "noise", "drop", "dropout"), jax.random.split(key, 4), strict=True))
        clean = encoder.standardised(batch["signal"], batch["sensors"])
        step = jax.random.randint(keys["step"], (len(clean),), 0, self.steps)
        noise = jax.random.normal(keys["noise"], clean.shape)
        label = jnp.where(batch["label"] >= 0, batch["label"], encoder.classes)
        if train:
            label = diffusion.drop_labels(keys["drop"], label, self.drop, encoder.classes)
        prediction = self.module().apply(
            {"params": variables["params"]},
            diffusion.noised(schedule, clean, step, noise),
            step,
            label,
            train=train,
            rngs={"dropout": keys["dropout"]},
        )
        assert isinstance(prediction, jax.Array)
        wanted = diffusion.target(schedule, self.kind, clean, step, noise)
        value = mean_square(prediction, wanted, batch["sensors"].valid)
        return value, {"weight": jnp.float32(len(clean))}, {}

    def generate(
        self,
        variables: Variables,
        key: Key[Array, ""],
        label: Int[AnyArray, " B"],
        samples: int = 500,
        *,
        guidance: float = 3.5,
        steps: int = 50,
    ) -> Float[Array, "B C T"]:
        """Windows of these classes (−1: none), standardised; guidance 1 leaves the model as it is."""
        module, encoder = self.module(), self.encoder()
        montage = encoder.montage
        channels = montage if isinstance(montage, int) else len(montage)
        told = jnp.where(jnp.asarray(label) >= 0, jnp.asarray(label), encoder.classes)
        both = jnp.concatenate([told, jnp.full_like(told, encoder.classes)])

        def predict(noisy: Array, step: Array) -> Array:
            twice = module.apply({"params": variables["params"]}, jnp.tile(noisy, (2, 1, 1)), jnp.tile(step, 2), both)
            assert isinstance(twice, jax.Array)
            return diffusion.guided(twice[: len(told)], twice[len(told) :], guidance)

        noise = jax.random.normal(key, (len(told), channels, samples))
        return diffusion.sample_ddim(predict, self.plan(), noise, self.kind, steps=steps)

    def flops(self, batch: Batch) -> float:
        """Operations of one pass over `batch`: the way up has about as many as the way down."""
        examples, channels, samples = batch["signal"].shape
        return 2 * examples * self.encoder().flops(channels, samples)

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the denoiser cannot take a recording of this rate and these channels."""
        self.encoder().check_recording(rate_hz, kinds, names)


def _labels(batch: Batch) -> Array:
    """Classes, 0 where a row has none."""
    if "label" not in batch:
        raise ZooError("artifacts are made by class: the task needs batches with labels")
    return jnp.maximum(jnp.asarray(batch["label"]), 0)


ADVERSARY_KEYS: tuple[keys.Rule, ...] = (
    *keys.below(CRITIC_KEYS, "encoder", "critic."),
    keys.Key("critic.fc.weight", "params/linear/kernel", "o i -> i o"),
    keys.Key("critic.fc.bias", "params/linear/bias"),
    keys.Key("critic.proj.embed.weight", "params/label/embedding"),
    keys.Key("generator.fc.weight", "params/generator/first/kernel", "(d t) i -> i t d"),
    keys.Key("generator.fc.bias", "params/generator/first/bias", "(d t) -> t d"),
    *(
        key
        for level in range(3)
        for key in (
            keys.Key(f"generator.net.{2 * level}.weight", f"params/generator/up{level}/kernel", "i o t -> t i o"),
            keys.Key(f"generator.net.{2 * level}.bias", f"params/generator/up{level}/bias"),
        )
    ),
)
"""The official critic and generator, their tensors' names beginning with `critic.` and `generator.`."""

DENOISER_KEYS: tuple[keys.Rule, ...] = (
    *keys.below(UNET_KEYS, "encoder"),
    *(key for level in range(3) for key in block_keys(f"ups.{2 * level}.0", f"up_{level}_0", wider=level > 0)),
    *(key for level in range(3) for key in block_keys(f"ups.{2 * level}.1", f"up_{level}_1", wider=False)),
    *(
        key
        for level in range(2)
        for key in (
            keys.Key(f"ups.{2 * level + 1}.0.weight", f"params/double_{level}/kernel", "i o t -> t i o"),
            keys.Key(f"ups.{2 * level + 1}.0.bias", f"params/double_{level}/bias"),
        )
    ),
    keys.Key("out_conv.weight", "params/last/kernel", CONV),
    keys.Key("out_conv.bias", "params/last/bias"),
)
"""The official denoiser, whose encoder has `groups=0` and which has `skips=False`."""
