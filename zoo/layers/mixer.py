"""What every mixer keeps to, and the list of them by name.

A mixer lets tokens see each other: `mixer(x[B, T, D]) -> y[B, T, D]`. Which tokens a token sees, and at what cost, is
the whole difference between them, so a model is written once and its mixers are words in its configuration.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.types import Array

MIXERS: dict[str, str] = {
    "asa_global": "zoo.attention.alternating_sparse:GlobalLatent",
    "asa_local": "zoo.attention.alternating_sparse:LocalLatent",
    "deltanet": "zoo.state_space.deltanet:DeltaNet",
    "duplex": "zoo.attention.duplex:Duplex",
    "elm": "zoo.state_space.elm:ELM",
    "gated": "zoo.attention.gated:Gated",
    "gated_deltanet": "zoo.state_space.gated_deltanet:GatedDeltaNet",
    "gla": "zoo.state_space.gla:GLA",
    "grassmann": "zoo.state_space.grassmann:Grassmann",
    "hierarchical_window": "zoo.attention.hierarchical_window:HierarchicalWindow",
    "kda": "zoo.state_space.kda:KDA",
    "l2vit_global": "zoo.attention.local_global_linear:GlobalLinear",
    "l2vit_local": "zoo.attention.local_global_linear:LocalWindow",
    "lightnet": "zoo.state_space.lightnet:LightNet",
    "linear": "zoo.state_space.linear:LinearAttention",
    "mamba": "zoo.state_space.mamba:Mamba",
    "mamba2": "zoo.state_space.mamba2:Mamba2",
    "mambattention": "zoo.state_space.mambattention:MambAttention",
    "moba": "zoo.attention.moba:MoBA",
    "native_sparse": "zoo.attention.native_sparse:NativeSparse",
    "pointer": "zoo.attention.pointer:Pointer",
    "region": "zoo.attention.region:Region",
    "relu": "zoo.attention.relu:Relu",
    "retention": "zoo.state_space.retention:Retention",
    "reversed": "zoo.attention.reversed:Reversed",
    "rg_lru": "zoo.state_space.rg_lru:RGLRU",
    "s4d": "zoo.state_space.s4d:S4D",
    "s5": "zoo.state_space.s5:S5",
    "sliding_window": "zoo.attention.sliding_window:SlidingWindow",
    "softmax": "zoo.attention.softmax:Softmax",
    "spiking": "zoo.attention.spiking:Spiking",
    "titans": "zoo.state_space.titans:Titans",
}
"""Name → module:class. Imported when first asked for."""

State = Any
"""A pytree of arrays [B, ...]: what a mixer remembers of the tokens so far."""


class Mixer(nn.Module):
    """A mixer of tokens.

    dim     features D of tokens, in and out
    dtype   compute dtype; parameters, states, gates and softmax are float32
    causal  no token sees a later one; those that can only be one way refuse the other

    A causal one lets no token see a later one and has the second pair of methods, whose outputs are those of
    the first. Parameters are made in `setup`, as all methods share them. Bad options raise ZooError when the module is
    bound, bad inputs when it is called.
    """

    dim: int
    dtype: DTypeLike = jnp.float32
    causal: bool = True

    ways: ClassVar[tuple[bool, ...]] = (True,)
    """What `causal` may be."""

    def __post_init__(self) -> None:
        if self.causal not in self.ways:
            wanted = " or ".join(map(str, self.ways))
            raise ZooError(f"{type(self).__name__}: causal: got {self.causal}, wanted {wanted}")
        super().__post_init__()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Mixes tokens [B, T, D].

        segment_ids [B, T]: a segment is a run of equal ids, and no token sees another segment: packed = separate.
        mask [B, T]: False where a token is not there. It is not seen and leaves states as they are; what comes out in
        its place means nothing, but is finite.
        train: draws what is random from the "dropout" stream, where a mixer has anything random.
        """
        raise NotImplementedError

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        """The state before the first token. A memory of tokens has room for `capacity` of them; others do not care."""
        self.check_causal()
        raise NotImplementedError

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One token [B, D] and the state → its output [B, D] and the new state."""
        self.check_causal()
        raise NotImplementedError

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], State]:
        """A prompt [B, T, D] → what `step` gives for its tokens one by one, and the state after them.

        length [B]: so many tokens of each row count; all unless given. Memories of tokens take them all at once and
        have room for `capacity`; states are built token by token.
        """
        count = jnp.full(x.shape[0], x.shape[1]) if length is None else length
        there = jnp.arange(x.shape[1]) < count[:, None]

        def turn(mixer: Mixer, state: State, token: tuple[Array, Array]) -> tuple[State, Array]:
            out, after = mixer.step(token[0], state)

            def where(new: Array, old: Array) -> Array:
                return jnp.where(token[1].reshape(-1, *(1,) * (new.ndim - 1)), new, old)

            return jax.tree.map(where, after, state), out

        over_time = nn.scan(turn, variable_broadcast=True, split_rngs={"params": False}, in_axes=1, out_axes=1)
        state, out = over_time(self, self.initial_state(x.shape[0], capacity), (x, there))
        return out, state

    @nn.nowrap
    def check_causal(self) -> None:
        """Raises ZooError where this mixer is not causal and so has no states."""
        if not self.causal:
            raise ZooError(f"{type(self).__name__} is not causal: it has no step-by-step form")


def mixer_class(name: str) -> type[Mixer]:
    """The class of the mixer called `name`. Raises ZooError for an unknown name, naming the nearest right one."""
    if name not in MIXERS:
        near = difflib.get_close_matches(name, MIXERS, n=1, cutoff=0.0)
        raise ZooError(f"no mixer is called {name!r}; the nearest name is {near[0]!r}")
    module, _, cls = MIXERS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def create_mixer(name: str, dim: int, **options: Any) -> Mixer:
    """The mixer called `name` for D = `dim`.

    Raises ZooError for an unknown name or option, naming the nearest right one.
    """
    made = mixer_class(name)
    known = set(made.__dataclass_fields__) - {"parent", "name", "dim"}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            raise ZooError(f"mixer {name!r} has no option {option!r}; the nearest is {near[0]!r}")
    return made(dim=dim, **options)


def head_count(mixer: str, dim: int, heads: int | None, width: int = 64) -> int:
    """Heads of a mixer: as asked, or as many of about `width` features as `dim` holds.

    Raises ZooError where `dim` does not divide into them.
    """
    if heads is None:
        heads = max(1, dim // width)
        while dim % heads:
            heads -= 1
    if heads < 1 or dim % heads:
        raise ZooError(f"{mixer}: dim {dim} does not divide into {heads} heads")
    return heads
