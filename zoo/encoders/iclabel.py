"""ICLabel: what an independent component of EEG is: brain, muscle, eye, heart, line noise, channel noise, or other.

Source: Pion-Tonachini, Kreutz-Delgado and Makeig, "ICLabel: An automated electroencephalographic independent component
classifier, dataset, and website", NeuroImage 198, 2019, and the weights that the package mne-icalabel carries
(BSD-3-Clause). `zoo.evaluate.components` computes its three inputs from a recording and a fitted ICA.

It is no `zoo.encoders.encoder.Encoder`: what it takes are components, one example each, and not channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.layers.convolution import Convolution
from zoo.registry import Card, register
from zoo.types import AnyArray, Array
from zoo.weights.keys import Ignore, Key, Rule

CLASSES = ("brain", "muscle artifact", "eye blink", "heart beat", "line noise", "channel noise", "other")
"""What a component may be, in the order of the network's outputs and in the words of MNE-ICALabel."""

PIXELS = 32
BINS = 100
WIDTHS = (128, 256, 512)
TOWER_WIDTHS = (128, 256, 1)


class ICLabel(nn.Module):
    """The ICLabel network.

    copies  the published average over the map, its negative, its mirror image, and the negative of that: the sign of
            a component is arbitrary, and left and right should not matter. False: the map as it is, alone
    """

    copies: bool = True

    @nn.compact
    def __call__(
        self,
        topography: Float[AnyArray, "N 32 32"],
        spectrum: Float[AnyArray, "N 100"],
        autocorrelation: Float[AnyArray, "N 100"],
    ) -> Float[Array, "N 7"]:
        """Probabilities of `CLASSES`, float32, for N components.

        topography: the scalp map, rows from back to front and columns from left to right; spectrum: 1 to 100 Hz;
        autocorrelation: lags of 10 ms to 1 s. All as `zoo.evaluate.components.features` scales them.
        """
        maps = jnp.asarray(topography, jnp.float32)
        mirrored = maps[:, :, ::-1]
        maps = jnp.stack([maps, -maps, mirrored, -mirrored] if self.copies else [maps])
        x = maps.reshape(-1, PIXELS, PIXELS, 1)
        for number, width in enumerate(WIDTHS, 1):
            x = leaky(Convolution(width, (4, 4), (2, 2), paddings=(1, 1), name=f"topography_{number}")(x))
        towers = jnp.concatenate(
            [self._tower(spectrum, "spectrum"), self._tower(autocorrelation, "autocorrelation")], axis=-1
        )
        # Every pixel of the map sees all of both curves.
        towers = jnp.broadcast_to(towers[None, :, None, None, :], (maps.shape[0], len(towers), 4, 4, towers.shape[-1]))
        x = jnp.concatenate([x, towers.reshape(*x.shape[:-1], -1)], axis=-1)
        logits = Convolution(len(CLASSES), (4, 4), name="classes")(x)
        return jnp.mean(jax.nn.softmax(logits).reshape(maps.shape[0], -1, len(CLASSES)), axis=0)

    @nn.nowrap
    def example(self) -> tuple[Array, Array, Array]:
        """One component."""
        return jnp.zeros((1, PIXELS, PIXELS)), jnp.zeros((1, BINS)), jnp.zeros((1, BINS))

    def _tower(self, curve: AnyArray, name: str) -> Float[Array, "N 100"]:
        x = jnp.asarray(curve, jnp.float32)[..., None]
        for number, width in enumerate(TOWER_WIDTHS, 1):
            x = leaky(Convolution(width, (3,), paddings=(1,), name=f"{name}_{number}")(x))
        return x[..., 0]


def leaky(x: Array) -> Array:
    return nn.leaky_relu(x, 0.2)


def _convolutions(source: str, target: str, how: str) -> tuple[Rule, ...]:
    """The three layers of a tower; the file of PyTorch lists each again as an element of the tower's sequence."""
    rules: list[Rule] = []
    for number in (1, 2, 3):
        rules += [
            Key(f"{source}.conv{number}.weight", f"params/{target}_{number}/kernel", how),
            Key(f"{source}.conv{number}.bias", f"params/{target}_{number}/bias"),
        ]
        for part in ("weight", "bias"):
            again = f"{source}.sequential.{2 * number - 2}.{part}"
            rules.append(Ignore(again, "the same layer, listed twice", same_as=f"{source}.conv{number}.{part}"))
    return tuple(rules)


KEYS: tuple[Rule, ...] = (
    *_convolutions("img_conv", "topography", "o i h w -> h w i o"),
    *_convolutions("psds_conv", "spectrum", "o i 1 w -> w i o"),
    *_convolutions("autocorr_conv", "autocorrelation", "o i 1 w -> w i o"),
    Key("conv.weight", "params/classes/kernel", "o i h w -> h w i o"),
    Key("conv.bias", "params/classes/bias"),
    Ignore("seq.0.weight", "the same layer, listed twice", same_as="conv.weight"),
    Ignore("seq.0.bias", "the same layer, listed twice", same_as="conv.bias"),
)
"""Tensors of mne-icalabel's ICLabelNet, the .pt or the .onnx file; the latter lists every tensor once."""

VARIANTS: dict[str, tuple[dict[str, Any], int]] = {"iclabel_base": ({}, 2_903_817)}

for _name, (_options, _parameters) in VARIANTS.items():
    register(
        _name,
        ICLabel,
        _options,
        Card(
            title="ICLabel, classifier of independent components, 2.9 M parameters",
            paper="Pion-Tonachini, Kreutz-Delgado, Makeig. ICLabel: An automated electroencephalographic independent "
            "component classifier, dataset, and website. NeuroImage 198, 2019, arXiv 1901.07915",
            code="github.com/mne-tools/mne-icalabel",
            licence="BSD-3-Clause",
            inputs="components of an extended Infomax ICA of EEG in average reference, 1–100 Hz: maps [N, 32, 32], "
            "spectra [N, 100], autocorrelations [N, 100]",
            parameters=_parameters,
            evidence="parity: probabilities of the ONNX network and features of mne-icalabel on real components, 1e-5",
        ),
    )
