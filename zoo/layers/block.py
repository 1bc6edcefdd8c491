"""One layer of a stack: any mixer and any MLP, each a residual branch after a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.layers.mixer import State, create_mixer
from zoo.layers.mlp import create_mlp
from zoo.layers.parameters import norm, partitioned
from zoo.layers.residual import drop_path
from zoo.types import Array


class Block(nn.Module):
    """x += scale · drop(mixer(norm x)); x += scale · drop(mlp(norm x)).

    mixer, mlp          their names; an mlp "none" leaves the second line out
    mixer_options, mlp_options
    norm                "rms" or "layer"
    layer_scale         initial value of a learned factor for each feature (2103.17239); 0 leaves them out
    """

    dim: int
    mixer: str = "softmax"
    mlp: str = "swiglu"
    mixer_options: Mapping[str, Any] | None = None
    mlp_options: Mapping[str, Any] | None = None
    norm: str = "rms"
    layer_scale: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.mixing = create_mixer(self.mixer, self.dim, **{"dtype": self.dtype, **(self.mixer_options or {})})
        self.mixer_norm = norm(self.norm, dtype=self.dtype)
        names = ["mixer"]
        if self.mlp != "none":
            self.feeding = create_mlp(self.mlp, self.dim, **{"dtype": self.dtype, **(self.mlp_options or {})})
            self.mlp_norm = norm(self.norm, dtype=self.dtype)
            names.append("mlp")
        if self.layer_scale:
            initial = partitioned(nn.initializers.constant(self.layer_scale), "embed")
            self.scales = {name: self.param(f"{name}_scale", initial, (self.dim,)) for name in names}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        drop: Float[Array, ""] | float = 0.0,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """`drop` is the probability that an example does without a branch, where `train`; see `Mixer` for the rest."""
        mixed = self.mixing(self.mixer_norm(x), segment_ids=segment_ids, mask=mask, train=train)
        x = self._fed(x + self._branch("mixer", mixed, drop if train else None), drop if train else None)
        return nn.with_logical_constraint(x, ("batch", "tokens", None))

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        """The mixer's."""
        return self.mixing.initial_state(batch, capacity)

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], State]:
        """A prompt and the state after it, see `Mixer.prefill`."""
        mixed, state = self.mixing.prefill(self.mixer_norm(x), length, capacity)
        return self._fed(x + self._branch("mixer", mixed)), state

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One token and the mixer's new state."""
        mixed, state = self.mixing.step(self.mixer_norm(x), state)
        return self._fed(x + self._branch("mixer", mixed)), state

    def _fed(self, x: Array, drop: Array | float | None = None) -> Array:
        """x after the MLP, which trains where there is a `drop`."""
        if self.mlp == "none":
            return x
        return x + self._branch("mlp", self.feeding(self.mlp_norm(x), train=drop is not None), drop)

    def _branch(self, name: str, branch: Array, drop: Array | float | None = None) -> Array:
        if self.layer_scale:
            branch = branch * self.scales[name].astype(branch.dtype)
        if drop is not None and self.has_rng("dropout"):
            branch = drop_path(branch, drop, self.make_rng("dropout"))
        return branch
