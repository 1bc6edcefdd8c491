"""The feed-forward half of a block, by name."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.parameters import dense
from zoo.types import Array

MLPS: dict[str, str] = {
    "gelu": "zoo.layers.mlp:GeluMLP",
    "kan": "zoo.layers.kan:KAN",
    "moe": "zoo.layers.mixture_of_experts:MixtureOfExperts",
    "mohd": "zoo.layers.mixture_of_hidden:MixtureOfHidden",
    "swiglu": "zoo.layers.mlp:SwiGLU",
}
"""Name → module:class. "none" leaves the half out, for mixers that are whole blocks, such as Mamba."""


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ⊙ W_in x) (Shazeer, 2002.05202), no biases.

    hidden  width; 8/3 · dim unless given, rounded up to a multiple of 8: as many parameters as a plain one of 4 · dim
    """

    dim: int
    hidden: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"], *, train: bool = False) -> Float[Array, "*lead D"]:
        hidden = -(-8 * self.dim // 24) * 8 if self.hidden is None else self.hidden
        gate = dense(hidden, dtype=self.dtype, name="gate")(x)
        inner = jax.nn.silu(gate) * dense(hidden, dtype=self.dtype, name="in")(x)
        return dense(self.dim, ("mlp", "embed"), dtype=self.dtype, name="out")(inner)


class GeluMLP(nn.Module):
    """W_out gelu(W_in x) with biases, exact GELU (Transformers since GPT and ViT).

    hidden  width; 4 · dim unless given
    """

    dim: int
    hidden: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"], *, train: bool = False) -> Float[Array, "*lead D"]:
        hidden = 4 * self.dim if self.hidden is None else self.hidden
        inner = nn.gelu(dense(hidden, bias=True, dtype=self.dtype, name="in")(x), approximate=False)
        return dense(self.dim, ("mlp", "embed"), bias=True, dtype=self.dtype, name="out")(inner)


def create_mlp(name: str, dim: int, **options: Any) -> nn.Module:
    """The MLP called `name` for D = `dim`; called as `mlp(x[..., D], train=...)`.

    Losses that one adds (balance of experts) are sown in the collection "losses". Raises ZooError for an unknown name
    or option, naming the nearest right one.
    """
    if name not in MLPS:
        near = difflib.get_close_matches(name, MLPS, n=1, cutoff=0.0)
        raise ZooError(f"no MLP is called {name!r}; the nearest name is {near[0]!r}")
    module, _, cls = MLPS[name].partition(":")
    made = getattr(importlib.import_module(module), cls)
    known = set(made.__dataclass_fields__) - {"parent", "name", "dim"}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            raise ZooError(f"MLP {name!r} has no option {option!r}; the nearest is {near[0]!r}")
    return made(dim=dim, **options)
