"""What encoders of a signal share that read what a trained tokenizer makes of it.

The tokenizer is named by its registered name and options; its variables, parameters and codebooks alike, lie in the
collection `tokenizer` of the encoder, as `zoo.encoders.codes` keeps them: no gradient reaches them. `init` makes
untrained ones; a trained tokenizer's take their place:

    encoder = zoo.create("tfm_encoder")
    variables = encoder.init(key, signal, sensors) | {"tokenizer": trained}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.encoders.codes import COLLECTION
from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.registry import create
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Sensors


class TokenizerEncoder(Encoder):
    """An encoder with a tokenizer in it.

    tokenizer, tokenizer_options  registered name, and replacements for its options
    """

    tokenizer: str = ""
    tokenizer_options: Mapping[str, Any] | None = None

    @property
    def sampling_rate(self) -> float | None:
        """The tokenizer's."""
        return self.made_tokenizer().sampling_rate

    @nn.nowrap
    def made_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ZooError for a model that is none."""
        made = create(self.tokenizer, **(self.tokenizer_options or {}))
        if not isinstance(made, Tokenizer):
            raise ZooError(f"{type(self).__name__}: tokenizer {self.tokenizer!r} is {type(made).__name__}, none")
        return made

    @nn.nowrap
    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        """(rows, frames) of its tokens; a mask [B, N] or [B, rows, frames] hides them. Raises ZooError as they do."""
        return self.made_tokenizer().grid(channels, samples)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The tokenizer's smallest input."""
        return self.made_tokenizer().example()

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for valid channels whose place the tokenizer must know and does not."""
        self.made_tokenizer().check_positions(sensors)

    @nn.nowrap
    def from_tokenizer(self, signal: Float[AnyArray, "B C T"], sensors: Sensors, method: Any) -> Any:
        """What the tokenizer's `method` (a name, or a function of it, signal and sensors) makes of the signal.

        Raises ZooError where the collection `tokenizer` is missing.
        """
        tokenizer = self.made_tokenizer()
        if self.is_initializing():
            made = tokenizer.init(self.make_rng("params"), signal, sensors)
            for name, value in nn.unbox(made).items():
                self.put_variable(COLLECTION, name, value)
        if COLLECTION not in self.variables:
            raise ZooError(
                f"{type(self).__name__}: got no variables of its tokenizer, wanted those of a {self.tokenizer} in the "
                f"collection {COLLECTION!r}"
            )
        variables = jax.tree.map(jnp.asarray, self.variables[COLLECTION])
        found = tokenizer.apply(variables, signal, sensors, method=method)
        return jax.tree.map(jax.lax.stop_gradient, found)

    def check_mask(self, mask: AnyArray, tokens: tuple[int, int]) -> AnyArray:
        """mask [B, N] of N = rows · frames `tokens`, which may come as [B, rows, frames]. Raises ZooError."""
        rows, frames = tokens
        if mask.shape[1:] not in ((rows * frames,), (rows, frames)):
            raise ZooError(
                f"{type(self).__name__} wants a mask of {rows * frames} tokens, or of {rows} rows of {frames}, "
                f"got {list(mask.shape)}"
            )
        return mask.reshape(mask.shape[0], -1)
