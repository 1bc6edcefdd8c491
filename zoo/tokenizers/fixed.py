"""The fixed baselines: every sample of every channel rounded to one of V levels that nothing learned.

Source: the mu-law and quantile tokenizers that a study of tokenizers for MEG foundation models compares with learned
ones (2602.16626; github.com/OHBA-analysis/Cho2026_Tokenizer and /EphysTokenizer, MIT); mu-law companding itself is
ITU-T G.711.

    tokenizer = zoo.create("mu_law")
    variables = tokenizer.fit(signal)          # [B, C, T] of the training data
    codes = tokenizer.apply(variables, signal, sensors, method="encode")

Both have no parameters; what `fit` measures stands in the collection `levels`. Before it, the levels are those of data
within ±1 (mu-law), or spread evenly there (quantile).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.objectives.signal import mean_square
from zoo.registry import Card, register
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors, Tokenized, Variables

COLLECTION = "levels"
INWARD = 1e-6
"""How far the outermost edges stand within the training data, as a share of it, so that its extremes are outer tokens.
The published code has 1e-10 (mu-law), which float32 cannot hold, and 1e-6 (quantile)."""


class LevelTokenizer(Tokenizer):
    """A tokenizer of V levels: token v stands for samples between edge v − 1 and edge v, and decodes to centre v.

    vocabulary  V, at least 4

    One token a sample: N = C · T, channel by channel, Q = 1.
    """

    SINGLE_CHANNEL = True
    vocabulary: int = 256

    def setup(self) -> None:
        if self.vocabulary < 4:
            raise ZooError(f"{type(self).__name__} vocabulary: got {self.vocabulary}, wanted at least 4")
        edges, centres = self._levels(np.linspace(-1.0, 1.0, 1001))
        self.edges = self.variable(COLLECTION, "edges", jnp.asarray, edges, jnp.float32)
        self.centres = self.variable(COLLECTION, "centres", jnp.asarray, centres, jnp.float32)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.vocabulary,)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"waveform": 1.0}

    @nn.nowrap
    def fit(self, signal: np.ndarray, valid: Bool[np.ndarray, "B C"] | None = None) -> Variables:
        """The levels for training data [B, C, T]; channels that are not valid do not count.

        Raises ZooError for data that are not finite or that do not vary.
        """
        signal = np.asarray(signal, np.float64)
        samples = signal.ravel() if valid is None else signal[valid].ravel()
        if not samples.size or not np.isfinite(samples).all() or samples.min() == samples.max():
            raise ZooError(f"{type(self).__name__}.fit: got {samples.size} samples, wanted finite ones that vary")
        edges, centres = self._levels(samples)
        return {COLLECTION: {"edges": jnp.asarray(edges, jnp.float32), "centres": jnp.asarray(centres, jnp.float32)}}

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        if samples < 1:
            raise ZooError(f"{type(self).__name__}: got a window of {samples} samples, wanted at least 1")
        return channels, samples

    def __call__(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, *, train: bool = False) -> Tokenized:
        signal = jnp.asarray(signal, jnp.float32)
        codes = jnp.searchsorted(self.edges.value, signal, side="right", method="compare_all").astype(jnp.int32)
        valid = self.token_valid(sensors, signal.shape[-1])
        codes = jnp.where(valid, codes.reshape(valid.shape), -1)[..., None]
        reconstruction = self.decode(codes, sensors)
        waveform = mean_square(reconstruction, signal, jnp.asarray(sensors.valid))
        return Tokenized(codes, self._values(codes), reconstruction, {"waveform": waveform}, valid)

    def decode(self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, scale: Any = None) -> Float[Array, "B C T"]:
        return self._values(codes).reshape(codes.shape[0], sensors.valid.shape[1], -1)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        return 0.0

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        blank, one = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32)
        return jnp.zeros((1, 1, 1)), Sensors(blank, blank, one, one, jnp.ones((1, 1), bool))

    def _values(self, codes: Int[AnyArray, "B N 1"]) -> Float[Array, "B N 1"]:
        return jnp.where(codes >= 0, self.centres.value[jnp.maximum(codes, 0)], 0)

    def _levels(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Edges [V − 1], rising, and centres [V]."""
        raise NotImplementedError


class MuLaw(LevelTokenizer):
    """Levels evenly spaced in f(x) = sgn(x) ln(1 + mu |x| / m) / ln(1 + mu), m the largest |x| of the training data.

    The two outer tokens, from ±m on, decode to ±m.
    """

    mu: float = 255.0

    def _levels(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        largest = np.abs(samples).max()

        def expand(companded: np.ndarray) -> np.ndarray:
            return np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(self.mu)) / self.mu * largest

        companded = np.linspace(-1, 1, self.vocabulary - 1)
        edges = expand(companded)
        edges[0], edges[-1] = -largest * (1 - INWARD), largest * (1 - INWARD)
        middle = expand((companded[1:] + companded[:-1]) / 2)
        return edges, np.concatenate([[-largest], middle, [largest]])


class Quantile(LevelTokenizer):
    """Levels that hold equal shares of the training data; the outer tokens decode to the least and largest sample."""

    vocabulary: int = 108

    def _levels(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        edges = np.quantile(samples, np.linspace(0, 1, self.vocabulary - 1), method="inverted_cdf")
        nudge = INWARD * max(abs(edges[0]), abs(edges[-1]))
        edges[0], edges[-1] = edges[0] + nudge, edges[-1] - nudge
        centres = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
        return edges, centres


VARIANTS: dict[str, tuple[type[LevelTokenizer], dict[str, Any]]] = {
    "mu_law": (MuLaw, {}),
    "mu_law_182": (MuLaw, {"vocabulary": 182, "mu": 181.0}),
    "mu_law_108": (MuLaw, {"vocabulary": 108, "mu": 107.0}),
    "mu_law_54": (MuLaw, {"vocabulary": 54, "mu": 53.0}),
    "quantile": (Quantile, {}),
}
"""The sizes that the study compares."""

for _name, (_class, _options) in VARIANTS.items():
    register(
        _name,
        _class,
        _options,
        Card(
            title=f"{_options.get('vocabulary', _class.vocabulary)} {'mu-law' if _class is MuLaw else 'quantile'} "
            "levels, a fixed tokenizer: one token a sample",
            paper="arXiv 2602.16626",
            code="https://github.com/OHBA-analysis/EphysTokenizer",
            licence="MIT",
            inputs="any channels, any rate, any unit; levels are fitted to training data",
            parameters=0,
            evidence="parity: levels and codes equal the official code's; round trip within a level: "
            "tests/tokenizers/test_fixed.py",
        ),
    )
