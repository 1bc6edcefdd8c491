"""An encoder that is given other channels than it wants, by an adapter before it.

adapter = ChannelAdapter("interpolate", outputs=encoder.montage)
adapted = Adapted(encoder, adapter)                       # an encoder of any scalp EEG with known positions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank, check_montage
from zoo.errors import ZooError
from zoo.layers.channel_adapter import ChannelAdapter, template_positions, usable
from zoo.sensors import KINDS
from zoo.types import AnyArray, Array, Encoded, Sensors


class Adapted(Encoder):
    """An encoder behind an adapter: it takes every recording that the adapter can lead to it.

    Tokens are those of the adapter's outputs. encoder, adapter: any encoder, and an adapter with its channels as
    outputs.
    """

    encoder: Any
    adapter: ChannelAdapter

    ORDER_FREE: ClassVar[bool] = False

    @property
    def sampling_rate(self) -> float | None:
        """The encoder's."""
        rate: float | None = self.encoder.sampling_rate
        return rate

    @property
    def montage(self) -> int | tuple[str, ...] | None:
        """What the adapter takes: any for interpolation, the encoder's own for identity."""
        own: int | tuple[str, ...] | None = self.encoder.montage
        return own if self.adapter.kind == "identity" else self.adapter.inputs

    @property
    def subjects(self) -> int:
        """The encoder's."""
        return int(self.encoder.subjects)

    @property
    def features(self) -> int:
        """The encoder's."""
        return int(self.encoder.features)

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """mask: of the adapted channels. Raises ZooError where adapter and encoder do not fit, besides theirs."""
        if self.adapter.kind != "identity":
            self._check_outputs()
            self.present(signal, sensors)
        signal, sensors = self.adapter(signal, sensors)
        encoded: Encoded = self.encoder(signal, sensors, mask=mask, subject=subject, train=train)
        return encoded

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """The encoder's."""
        head: nn.Module = self.encoder.head(classes)
        return head

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """The encoder's, and those of the map of channels."""
        if self.adapter.kind == "identity":
            return float(self.encoder.flops(channels, samples))
        outputs = self.adapter.count
        return float(self.encoder.flops(outputs, samples)) + 2.0 * outputs * channels * samples

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The encoder's, of channels that the adapter takes."""
        signal, sensors = self.encoder.example()
        if self.adapter.kind == "identity":
            return signal, sensors
        if self.adapter.kind == "learned":
            return blank(self.adapter.inputs or self.adapter.outputs, signal.shape[-1], KINDS[int(sensors.kind[0, 0])])
        assert isinstance(self.adapter.outputs, tuple)
        signal, sensors = blank(self.adapter.outputs, signal.shape[-1])
        position = jnp.asarray(template_positions(self.adapter.outputs))[None]
        return signal, dataclasses.replace(sensors, position=position)

    @nn.nowrap
    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when no adapter leads a recording of this rate and these channels to the encoder."""
        if self.adapter.kind == "identity":
            self.encoder.check_recording(rate_hz, kinds, names)
            return
        self._check_outputs()
        outputs = self.adapter.outputs if isinstance(self.adapter.outputs, tuple) else ("",) * self.adapter.count
        if self.adapter.kind == "learned":
            check_montage(type(self.encoder).__name__, self.adapter.inputs, names)
            kind = kinds[0]
        elif "eeg" in kinds:
            kind = "eeg"
        else:
            raise ZooError(f"channel adapter 'interpolate': got channels of kind {kinds[0]!r}, takes eeg")
        self.encoder.check_recording(rate_hz, (kind,) * len(outputs), outputs)

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError when these are not the channels that the adapter takes."""
        check_montage(type(self.encoder).__name__, self.montage, names)

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for a recording, on the host, whose electrodes have no places to interpolate from."""
        if self.adapter.kind == "identity":
            self.encoder.check_positions(sensors)
        elif self.adapter.kind == "interpolate":
            placed = np.asarray(usable(sensors)).sum(1)
            if placed.min() == 0:
                raise ZooError("channel adapter 'interpolate': a recording has no EEG channel with a known position")

    @nn.nowrap
    def _check_outputs(self) -> None:
        wanted = self.encoder.montage
        outputs = self.adapter.outputs
        if isinstance(wanted, int) or isinstance(outputs, int):
            wanted = wanted if wanted is None or isinstance(wanted, int) else len(wanted)
            outputs = ("",) * self.adapter.count
        check_montage(f"{type(self.encoder).__name__} behind a channel adapter", wanted, outputs)
