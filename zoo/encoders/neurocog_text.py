"""The recurrent classifier of EEG whose label becomes a prompt for a language model.

Source: "Neurocognitive Modeling for Text Generation", arXiv 2509.07202. It has no code; where it leaves a size open
(pools, the LSTM's place and features, the separable convolution) the choice here is ours.

Input: EEG of the ImageNet of Brain recordings, three seconds, any unit: each channel is standardised over the window.
The language model (Gemma-2B with LoRA) is not here; `prompt` is what it would be given. How well its text reads says
little of the EEG: judge the labels, beside labels drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import blank
from zoo.encoders.windowed import Windowed, all_there, flat
from zoo.layers.convolution import Convolution
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.layers.temporal_filters import average_pool, batch_norm
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors


class NeurocogText(Windowed):
    """Filters over time of every channel, LSTMs, weights over channels, a separable convolution; pooled is all of it.

    channels  names of the electrodes, or how many
    samples   T of its windows
    rate      sampling rate in Hz
    filters   of three parallel convolutions
    width     samples of each
    hidden    features of the two LSTMs, which read each channel's map alone
    depth     sums over channels of each of those features
    mixed     features of the last map
    pools     samples of the means after filters, sums and last map
    dropout   after the last two of them
    """

    channels: int | tuple[str, ...] = 14
    samples: int = 384
    rate: float = 128.0
    filters: tuple[int, int, int] = (8, 16, 32)
    width: int = 64
    hidden: int = 64
    depth: int = 2
    mixed: int = 16
    pools: tuple[int, int, int] = (4, 4, 4)
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self._times()[-1] * self.mixed

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
        """signal [B, C, T] → tokens [B, T', mixed], T' = T over the product of the pools. A channel that is not valid
        is silence.

        Raises ZooError for another montage or T, for a mask, and where pools leave nothing.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive(self._times()[-1])
        count, channels, _ = signal.shape
        drop = nn.Dropout(self.dropout, deterministic=not train)

        x = standardised_where(signal, sensors.valid, axes=(2,))[0].reshape(count * channels, -1, 1)
        # Kernels as long as one another, side by side, are one convolution.
        x = Convolution(sum(self.filters), (self.width,), paddings="same", name="filters")(x)
        x = average_pool(nn.elu(batch_norm(train, 1e-5, name="filters_norm")(x)), self.pools[0], self.pools[0])
        for layer in range(2):
            cell = nn.OptimizedLSTMCell(
                self.hidden,
                kernel_init=partitioned(nn.initializers.lecun_normal(), None, None),
                recurrent_kernel_init=partitioned(nn.initializers.orthogonal(), None, None),
                bias_init=partitioned(nn.initializers.zeros, None),
                name=f"lstm{layer}",
            )
            recurrent: Any = nn.RNN(cell)
            x = recurrent(x)
        maps = self.hidden * self.depth
        weights = self.param("sums", partitioned(LIKE_TORCH, None, None, None), (channels, self.hidden, self.depth))
        x = jnp.einsum("bctf,cfd->btfd", x.reshape(count, channels, -1, self.hidden), weights)
        x = nn.elu(batch_norm(train, 1e-5, name="sums_norm")(x.reshape(count, -1, maps)))
        x = drop(average_pool(x, self.pools[1], self.pools[1]))
        x = Convolution(maps, (16,), paddings="same", groups=maps, bias=False, name="late")(x)
        x = dense(self.mixed, (None, None), init=LIKE_TORCH, name="mix")(x)
        x = nn.elu(batch_norm(train, 1e-5, name="mix_norm")(x))
        tokens = drop(average_pool(x, self.pools[2], self.pools[2]))
        return all_there(tokens, flat(tokens))

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two."""
        wide, maps = sum(self.filters), self.hidden * self.depth
        first, second, _ = self._times()
        recurrent = 4 * self.hidden * (wide + 3 * self.hidden)
        per_channel = samples * self.width * wide + first * (recurrent + maps)
        return 2.0 * (channels * per_channel + second * maps * (16 + self.mixed))

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window of zeros."""
        return blank(self.channels, self.samples)

    @nn.nowrap
    def _times(self) -> tuple[int, int, int]:
        """Times after each pool."""
        first = self.samples // self.pools[0]
        second = first // self.pools[1]
        return first, second, second // self.pools[2]


def prompt(labels: Sequence[str]) -> str:
    """What a language model is asked for the labels of windows one after the other."""
    seen = ", then ".join(labels)
    return f"A person was shown {seen}. Describe in one sentence what they saw."


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "neurocog_text_tiny": (
        {"channels": 5, "samples": 128, "filters": (4, 4, 8), "width": 16, "hidden": 16, "mixed": 8},
        5_536,
        "learns which channel has alpha waves, and not labels drawn at random",
    ),
    "neurocog_text_base": ({}, 73_928, "its layers are those of neurocog_text_tiny"),
}
"""Options, parameters (encoder without head), evidence. base has the paper's filters and our sizes."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        NeurocogText,
        _options,
        Card(
            title=f"recurrent classifier of EEG for prompts, {_parameters / 1e3:.0f} k parameters",
            paper="Neurocognitive Modeling for Text Generation. arXiv 2509.07202",
            code="none published",
            licence="Apache-2.0, ours",
            inputs="EEG [B, 14, 384] at 128 Hz, any unit (tiny: [B, 5, 128])",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
