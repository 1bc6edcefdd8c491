"""A stack of blocks from a pattern of mixer names.

Backbone(dim=512, mixers=("kda", "kda", "kda", "softmax") * 6)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.block import Block
from zoo.layers.mixer import State
from zoo.layers.parameters import norm
from zoo.layers.residual import REMAT
from zoo.types import Array

VARIABLES = {"params": 0, "losses": 0, "batch_stats": 0}
"""Collections of layers that a scan stacks."""


class Period(nn.Module):
    """The blocks of one turn of the pattern, the body of a scan over turns."""

    mixers: tuple[str, ...]
    options: Mapping[str, Any]
    mixer_options: Mapping[str, Mapping[str, Any]]

    def setup(self) -> None:
        self.blocks = [
            Block(mixer=mixer, mixer_options=self.mixer_options.get(mixer), **self.options) for mixer in self.mixers
        ]

    def __call__(
        self, x: Array, drops: Array, segment_ids: Array | None, mask: Array | None, train: bool, keep: bool
    ) -> tuple[Array, Array | None]:
        """x [B, T, D], drops [period] → x and, where `keep`, what came out of each block [period, B, T, D]."""
        outs = []
        for n, block in enumerate(self.blocks):
            x = block(x, drops[n], segment_ids, mask, train)
            outs.append(x)
        return x, jnp.stack(outs) if keep else None

    def initial_state(self, carry: tuple[()], batch: int, capacity: int) -> tuple[tuple[()], tuple[State, ...]]:
        """`carry` is what a scan passes on: nothing."""
        return carry, tuple(block.initial_state(batch, capacity) for block in self.blocks)

    def prefill(self, x: Array, length: Array | None, capacity: int) -> tuple[Array, tuple[State, ...]]:
        states = []
        for block in self.blocks:
            x, state = block.prefill(x, length, capacity)
            states.append(state)
        return x, tuple(states)

    def step(self, x: Array, states: tuple[State, ...]) -> tuple[Array, tuple[State, ...]]:
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return x, tuple(after)


class Backbone(nn.Module):
    """Blocks one after another, then a norm.

    mixers         a name for each layer. The shortest pattern that they repeat is compiled once and scanned
    mixer_options  name → options of that mixer, wherever it stands
    mlp, mlp_options, norm, layer_scale   see `Block`
    drop_path      stochastic-depth rate of the last layer; layer l of L has rate · (l − 1) / (L − 1)
    scan           False makes every layer a program of its own, with parameters of its own: `layer_0`, `layer_1`, …
                   in place of `layers` stacked along the first axis. Compiles longer
    remat          "none", "full" (recompute all) or "dots" (keep matmul outputs)
    """

    dim: int
    mixers: tuple[str, ...]
    mixer_options: Mapping[str, Mapping[str, Any]] | None = None
    mlp: str = "swiglu"
    mlp_options: Mapping[str, Any] | None = None
    norm: str = "rms"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self._check_options()
        pattern = self.pattern()
        options = {"dim": self.dim, "mlp": self.mlp, "mlp_options": self.mlp_options, "norm": self.norm}
        options |= {"layer_scale": self.layer_scale, "dtype": self.dtype}
        body: Any = Period
        if self.remat != "none":
            static = (5, 6)  # train and keep, the module itself counted
            body = nn.remat(Period, policy=REMAT[self.remat], prevent_cse=not self.scan, static_argnums=static)
        turns = len(self.mixers) // len(pattern)
        if self.scan:
            shared = {"variable_axes": VARIABLES, "split_rngs": {"params": True, "dropout": True}, "length": turns}
            shared |= {"metadata_params": {nn.PARTITION_NAME: "layers"}}
            methods = {"__call__": (0, *(nn.broadcast,) * 4), "step": (0,)}
            methods |= dict.fromkeys(("initial_state", "prefill"), (nn.broadcast,) * 2)
            body = nn.scan(body, methods={name: shared | {"in_axes": axes} for name, axes in methods.items()})
            self.layers = body(pattern, options, self.mixer_options or {})
        else:
            self.layer = [body(pattern, options, self.mixer_options or {}) for _ in range(turns)]
        self.final_norm = norm(self.norm, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        intermediates: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """Tokens [B, T, D] → tokens; with `intermediates` also what came out of each of the L layers, un-normed.

        segment_ids, mask and train as in `Mixer`; `train` draws from the "dropout" stream where there is one.
        """
        depth, period = len(self.mixers), len(self.pattern())
        drops = jnp.linspace(0.0, self.drop_path, depth).reshape(-1, period)
        if self.scan:
            x, outs = self.layers(x, drops, segment_ids, mask, train, intermediates)
        else:
            each = []
            for layer, rates in zip(self.layer, drops, strict=True):
                x, out = layer(x, rates, segment_ids, mask, train, intermediates)
                each.append(out)
            outs = jnp.stack(each) if intermediates else None
        y = self.final_norm(x)
        return (y, outs.reshape(depth, *x.shape)) if intermediates else y

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        """States of all layers before the first token. A memory of tokens has room for `capacity` of them.

        Where layers are scanned, arrays are [turns of the pattern, B, ...].
        """
        if self.scan:
            return self.layers.initial_state((), batch, capacity)[1]
        return tuple(layer.initial_state((), batch, capacity)[1] for layer in self.layer)

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], State]:
        """A prompt [B, T, D], of which so many tokens of each row count → its outputs and the states after it."""
        if self.scan:
            x, state = self.layers.prefill(x, length, capacity)
        else:
            states = []
            for layer in self.layer:
                x, own = layer.prefill(x, length, capacity)
                states.append(own)
            state = tuple(states)
        return self.final_norm(x), state

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One token [B, D] and the states → its output [B, D] and the new states."""
        if self.scan:
            x, state = self.layers.step(x, state)
        else:
            after = []
            for layer, own in zip(self.layer, state, strict=True):
                x, own = layer.step(x, own)
                after.append(own)
            state = tuple(after)
        return self.final_norm(x), state

    @nn.nowrap
    def pattern(self) -> tuple[str, ...]:
        """The shortest tuple that `mixers` repeats."""
        count = len(self.mixers)
        for period in range(1, count):
            if count % period == 0 and self.mixers == self.mixers[:period] * (count // period):
                return self.mixers[:period]
        return self.mixers

    def _check_options(self) -> None:
        if not self.mixers:
            raise ZooError("Backbone: mixers: got none, wanted a name for each layer")
        for name in self.mixer_options or {}:
            if name not in self.mixers:
                raise ZooError(f"Backbone: mixer_options: {name!r} is not among the mixers {sorted(set(self.mixers))}")
        if self.remat not in REMAT:
            raise ZooError(f"Backbone: remat must be one of {sorted(REMAT)}, got {self.remat!r}")
        if not 0 <= self.drop_path < 1:
            raise ZooError(f"Backbone: drop_path must be in [0, 1), got {self.drop_path}")
