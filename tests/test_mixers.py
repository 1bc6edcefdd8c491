"""Every mixer keeps its contract: `zoo.layers.mixer.Mixer`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.block import Block
from zoo.layers.mixer import MIXERS, Mixer, create_mixer
from zoo.train.config import Rules
from zoo.train.mesh import logical_rules, parameter_shardings

QUICK = {"xla_backend_optimization_level": 0}  # each program runs once: the last optimisations only cost time
DIM, BATCH, LENGTH = 32, 2, 24


@dataclass(frozen=True)
class Case:
    """A mixer with small options.

    parameters  what the card's wiring comes to at D = 32, counted by hand in the comment beside it
    border      where a second segment begins; a multiple of the block for mixers that lie on a grid of blocks
    rounding    RMS error of bfloat16 against float32, relative; more where a choice can flip
    idle        parameters without gradient, by a part of their path, and why
    """

    mixer: str
    parameters: int
    options: Mapping[str, Any] = field(default_factory=dict)
    border: int = 10
    rounding: float = 0.03
    idle: Mapping[str, str] = field(default_factory=dict)

    def create(self, **options: Any) -> Mixer:
        return create_mixer(self.mixer, DIM, **{**self.options, **options})


BLOCKS = {"heads": 4, "kv_heads": 2, "block_size": 4, "stride": 2, "compression_block": 4, "selected_blocks": 4}
TITANS = {"heads": 2, "expansion": 2, "chunk": 4, "segment": 8, "window": 6, "persistent": 2}

CASES = {
    # Hierarchical windows: q, k, v and out 4 · (32² + 32), an embedding of 32 for each level.
    "hierarchical_window": Case(
        "hierarchical_window",
        4224 + 64,
        {"heads": 2, "grid": (4, 6), "window": 2, "reach": (1, 3), "samples": (2, 2)},
    ),
    "hierarchical_window in time": Case("hierarchical_window", 4224 + 96, {"heads": 2}),
    # Spiking: q, k and out 3 · (32² + 2 · 32) and 32, convolution 32 · 3, around its place 32 · (3 + 1); feedback also
    # v and inhibition 2 · (32² + 2 · 32) and 3. Thresholds low enough for neurons to fire; in bfloat16 a few others do.
    "spiking": Case("spiking", 3264 + 32 + 96, {"heads": 2, "threshold": 0.5}),
    "spiking spikes, both ways": Case(
        "spiking",
        3264 + 32 + 128,
        {"heads": 2, "threshold": 0.2, "causal": False, "readout": "spikes", "surrogate": "atan"},
        rounding=0.2,
    ),
    "spiking feedback": Case(
        "spiking",
        3264 + 32 + 96 + 2176 + 3,
        {"heads": 2, "threshold": 0.2, "attention_threshold": 0.1, "feedback": True, "steps": 2},
        rounding=0.2,
    ),
    # Pointer: W_1 and W_2 32² each, v 32; with 16 hidden features 32 · 16 each and 16.
    "pointer": Case("pointer", 2048 + 32),
    "pointer both ways": Case("pointer", 1024 + 16, {"hidden": 16, "causal": False}),
    # Duplex: q, k, v and out 4 · 32², a gate for each of 2 heads.
    "duplex": Case("duplex", 4096 + 2, {"heads": 2, "modalities": (5, 6)}),
    "duplex both ways": Case("duplex", 4096 + 2, {"heads": 2, "modalities": (6,), "causal": False}),
    # Reversed: q, k, v 3 · 32², out 32² + 32, selector 32 · 2, controller 32 · 16 + 16.
    "reversed": Case("reversed", 3072 + 1056 + 64 + 528, {"heads": 2}),
    # L2ViT: q, k, v and out 4 · (32² + 32), position 32 · (3² + 1); global also τ 2, norm 64, two convolutions of
    # 32 · (7² + 1), batch norm 64; over time alone convolutions of 3 and 7.
    "l2vit local": Case("l2vit_local", 4224 + 320, {"heads": 2, "grid": (4, 6), "window": 3}),
    "l2vit global": Case("l2vit_global", 4224 + 320 + 2 + 64 + 3200 + 64, {"heads": 2, "grid": (4, 6)}),
    "l2vit global in time": Case("l2vit_global", 4224 + 128 + 2 + 64 + 512 + 64, {"heads": 2, "clamp": 20.0}),
    # H · K = 16, V = 8: q and k 32 · 16 each, v, gate and out 32² each, decay 32 · 16 + 16 · 16 + 16, norm 8.
    "gla": Case("gla", 1024 + 3072 + 784 + 8),
    # Convolutions of 4 over 16 + 16 + 32 features.
    "gla convolved": Case("gla", 1024 + 3072 + 784 + 8 + 256, {"convolution": 4, "lowest_decay": -0.05}),
    # V = 2 K = 32: q and k 32² each, v, gate and out 32 · 64 each, norm 32; Lightning with V = K: 5 · 32² and norm 16.
    "retention": Case("retention", 2048 + 6144 + 32, {"heads": 2}),
    "retention lightning": Case(
        "retention",
        5120 + 16,
        {"heads": 2, "expand_value": 1.0, "decay": "lightning", "layer": 1, "layers": 4, "gate": "sigmoid"},
    ),
    "retention both ways": Case("retention", 2048 + 6144 + 32, {"heads": 2, "causal": False}),
    # K = V = 8: q, k, v and out 4 · 32², convolutions 4 · 96, beta 32 · 4, norm 8.
    "deltanet": Case("deltanet", 4096 + 384 + 128 + 8),
    # Each of two heads of K = V = 16 has two of values: q and k 32² each, v, gate and out 32 · 64 each, beta 32 · 4,
    # norm 16.
    "deltanet gated, grouped": Case(
        "deltanet",
        2048 + 6144 + 128 + 16,
        {"heads": 2, "value_heads": 4, "convolution": 0, "gate": "silu", "negative_eigenvalues": True},
    ),
    # K = 12, V = 24: q and k 32 · 24 each, v, gate and out 32 · 48 each, convolutions 4 · 96, beta and decay 32 · 2
    # each, A and its bias 2 each, norm 24.
    "gated_deltanet": Case("gated_deltanet", 1536 + 4608 + 384 + 128 + 4 + 24, {"heads": 2}),
    # K = V = 16: q, k, v and out 4 · 32², convolutions 4 · 96, beta 32 · 2, decay 32 · 16 + 16 · 32, A 2 and its bias
    # 32, gate 32 · 16 + 16 · 32 + 32, norm 16.
    "kda": Case("kda", 4096 + 384 + 64 + 1024 + 34 + 1056 + 16, {"heads": 2}),
    # 64 features within, two groups of N = 8: x, gate and out 32 · 64 each, B and C 32 · 16 each, Δ 32 · 4, convolution
    # (4 + 1) · 96, three of 4 a head, norm 64.
    "mamba2": Case("mamba2", 6144 + 1024 + 128 + 480 + 12 + 64, {"heads": 4, "states": 8, "groups": 2}),
    # Memory: q, k, v 3 · 32², convolutions 3 · 4 · 32, gates 3 · (32 · 2 + 2), two heads of 2 · 16 · 32 weights, of 16²
    # in one layer, 16 more with a norm; alone with a norm 32, gate and out 32² each. Attention 4 · 32², persistent
    # 2 · 32; mac and mag have a second norm in place of the gate.
    "titans lmm": Case(
        "titans",
        3654 + 2 * 272 + 2080,
        {**TITANS, "wiring": "lmm", "depth": 1, "residual": True, "granularity": "chunk"},
        border=8,
    ),
    "titans mac": Case("titans", 3654 + 2048 + 4096 + 64 + 64 + 1024, TITANS, border=8),
    "titans mag": Case("titans", 3654 + 512 + 4096 + 64 + 64 + 1024, {**TITANS, "wiring": "mag", "depth": 1}, border=8),
    "titans mal": Case(
        "titans", 3654 + 2048 + 4096 + 64 + 2080, {**TITANS, "wiring": "mal", "activation": "silu"}, border=8
    ),
    # q, k, v and out 4 · 32², gate 32 · 8 + 8 · 32, norm 32.
    "lightnet": Case("lightnet", 4096 + 512 + 32, {"heads": 2, "rank": 8}),
    # A norm of 8, rates 4 · 8, and for TPE two vectors and a norm of 32, a decay of 4 and 32².
    "lightnet of the author": Case(
        "lightnet",
        4096 + 512 + 8 + 32 + 1124,
        {
            "heads": 4,
            "rank": 8,
            "gate": "sigmoid",
            "joint_norm": False,
            "tpe": True,
            "lrpe": True,
            "start_at_one": True,
        },
    ),
    # Rates 4 · 4 for two axes, TPE of two axes.
    "lightnet both ways, 2-D": Case(
        "lightnet",
        4096 + 512 + 32 + 16 + 2248,
        {"heads": 4, "rank": 8, "causal": False, "grid": (4, 5), "prefix": 4, "tpe": True, "lrpe": True},
    ),
    # q, k, v and out: 4 · 32².
    "linear": Case("linear", 4096, {"heads": 2}),
    "linear relu rms": Case("linear", 4096 + 16, {"heads": 2, "features": "relu", "normalise": "rms"}),
    "linear dpfp": Case("linear", 4096, {"heads": 2, "features": "dpfp2"}),
    "linear both ways": Case("linear", 4096, {"heads": 2, "causal": False}),
    # In and gate 32 · 64 each, convolution 64 · (4 + 1), selection 64 · (2 + 2 · 16), its map 2 · 64 with a bias of 64,
    # A 64 · 16, D 64, out 64 · 32.
    "mamba": Case("mamba", 4096 + 320 + 2176 + 192 + 1024 + 64 + 2048),
    # Gate and input 33 · 48 each, convolution 48 · (4 + 1), two block maps of 2 · 24² + 48, decay 48, out 49 · 32;
    # complex: block maps of 2 · 24 · 12 + 24, decay and angle 24 each.
    "rg_lru": Case("rg_lru", 3168 + 240 + 2 * 1200 + 48 + 1568, {"heads": 2, "features": 48}),
    "rg_lru complex": Case("rg_lru", 3168 + 240 + 2 * 600 + 48 + 1568, {"heads": 2, "features": 48, "real": False}),
    # Step and D 32 each, A, B and C 2 · 32 · 4 each, value and gate 32² + 32 each; both ways: a second C.
    "s4d": Case("s4d", 64 + 3 * 256 + 2112, {"states": 8}),
    "s4d bilinear legs": Case(
        "s4d", 64 + 3 * 256 + 2112, {"states": 8, "discretization": "bilinear", "frequencies": "legs", "rate": 4.0}
    ),
    "s4d both ways": Case("s4d", 64 + 4 * 256 + 2112, {"states": 8, "frequencies": "inv", "causal": False}),
    # Λ and step 3 · 8, B and C 2 · 8 · 32 each, D 32, gate 32² + 32; all states: 16 of each; both ways: a second C.
    "s5": Case("s5", 24 + 2 * 512 + 32 + 1056, {"states": 16, "blocks": 2}),
    "s5 bilinear exp": Case(
        "s5",
        48 + 2 * 1024 + 32 + 1056,
        {"states": 16, "blocks": 2, "conjugate": False, "discretization": "bilinear", "negative": "exp"},
    ),
    "s5 both ways": Case("s5", 24 + 3 * 512 + 32 + 1056, {"states": 16, "blocks": 2, "causal": False}),
    # Weights of 8 · 4 synapses, hidden (8 + 16 + 1) · 32, change 33 · 16, out 17 · 32; the other with 4 · 10 synapses
    # and 16 time constants.
    "elm": Case("elm", 32 + 800 + 528 + 544, {"memory": 16, "branches": 8, "synapses": 4}),
    "elm windows": Case(
        "elm",
        40 + 672 + 528 + 544 + 16,
        {
            "memory": 16,
            "branches": 4,
            "synapses": 10,
            "routing": "windows",
            "version": 2,
            "activation": "silu",
            "learn_times": True,
        },
    ),
    # Reduction 33 · 8, planes (28 + 1) · 32, gate 65 · 32, norm 64.
    "grassmann": Case("grassmann", 264 + 928 + 2080 + 64, {"width": 8, "offsets": (1, 2, 5)}),
    "grassmann residual": Case(
        "grassmann", 264 + 928 + 2080 + 64, {"width": 8, "offsets": (3, 12), "fusion": "residual"}
    ),
    # Attention 4 · (32² + 32) and its norm 64; for time and for frequency two of Mamba (9920 as above) with a norm of
    # 32, and their join 65 · 32.
    "mambattention": Case(
        "mambattention",
        4224 + 64 + 2 * (2 * (9920 + 32) + 2080),
        {"grid": (6, 4), "expand": 2},
        border=8,
        idle={"attention/key/bias": "softmax does not see what all keys share"},
    ),
    # q, k, v and out; grouped: q and out 32² each, k and v of two heads of four 32 · 16 each, two norms of 8.
    "softmax": Case("softmax", 4096, {"heads": 2}),
    "softmax grouped": Case("softmax", 3072 + 16, {"heads": 4, "kv_heads": 2, "qk_norm": True}),
    "softmax both ways, 3-D": Case("softmax", 4096, {"heads": 2, "causal": False, "grid": (2, 3, 4), "base": 100.0}),
    # Softmax's 4096 and a gate for every feature, 32 · 32, or, shared by the heads, 32 · 16; of the output 32 · 32; one
    # for each head of values 32 · 2, where softmax grouped without norms is 3072.
    "gated": Case("gated", 4096 + 1024, {"heads": 2}),
    "gated values": Case("gated", 3072 + 64, {"heads": 4, "kv_heads": 2, "position": "value", "granularity": "head"}),
    "gated queries, shared and added": Case(
        "gated", 4096 + 512, {"heads": 2, "position": "query", "shared": True, "additive": True, "activation": "silu"}
    ),
    "gated output": Case("gated", 4096 + 1024, {"heads": 2, "position": "output", "causal": False}),
    # As softmax.
    "relu": Case("relu", 3072, {"heads": 4, "kv_heads": 2}),
    "relu both ways": Case("relu", 4096, {"heads": 2, "causal": False}),
    # Heads of 8: q and out 32² each, three of k and v for two groups 32 · 16 each, gates 32 · 12; compression of k and
    # v 4 · 8 positions, 4 · 8 · 8 and 8 · 8. In bfloat16 other blocks may be chosen.
    "native_sparse": Case(
        "native_sparse", 2048 + 3072 + 384 + 2 * 352, {**BLOCKS, "window": 6}, border=12, rounding=0.1
    ),
    # One k and v; heads of 4 for keys (q 32 · 16, k 32 · 8, v 32 · 16); 2 · 4 weights of pooling for k and for v.
    "native_sparse shared": Case(
        "native_sparse",
        512 + 256 + 512 + 1024 + 384 + 16,
        {**BLOCKS, "window": 6, "shared_kv": True, "rotary_compressed": True, "compress": "pool", "key_width": 4},
        border=12,
        rounding=0.1,
    ),
    # Queries by a latent of 32 and its norm 32, heads of 8: 3 · 32² with out, 4 rotary features 32 · 16 and 32 · 4.
    # Local: latent of 32 and its norm 32² + 32, up 2 · 32². Global: latents of two groups of 16, their norm 32² + 16,
    # up 2 · 2 · 16 · 8, gates 32 · 8, compression 4 · 16 + 4 · 16 · 16 + 16². In bfloat16 other blocks may be chosen.
    "asa_local": Case("asa_local", 3744 + 1056 + 2048, {"heads": 4, "window": 6}, border=12),
    "asa_global": Case("asa_global", 3744 + 1040 + 512 + 256 + 1344, BLOCKS, border=12, rounding=0.1),
    # As softmax, with biases of 4 · 32.
    "region": Case("region", 4096 + 128, {"heads": 2}, idle={"key/bias": "a softmax does not see what all keys share"}),
    "region windows": Case("region", 4096, {"heads": 2, "grid": (4, 6), "windows": (4, 4), "bias": False}),
    # As softmax grouped without norms. In bfloat16 other blocks may be chosen.
    "moba": Case("moba", 3072, {"heads": 4, "kv_heads": 2, "block_size": 4, "top_k": 3}, border=12, rounding=0.1),
    "sliding_window": Case("sliding_window", 4096, {"heads": 2, "window": 5}),
    "sliding_window sinks": Case("sliding_window", 3072, {"heads": 4, "kv_heads": 2, "window": 5, "sinks": 2}),
    "sliding_window both ways": Case("sliding_window", 4096, {"heads": 2, "window": 9, "sinks": 2, "causal": False}),
}


# Of several cases of one mixer the first is enough for what hardly depends on options; the rest are slow.
_NAMED_FIRST = {case.mixer: name for name, case in reversed(CASES.items())}.values()
# Stacks differ by what a mixer keeps: parameters alone, statistics, weights for a kernel, a scan of its own.
_STACKED = {"softmax", "gla", "l2vit global", "mamba", "native_sparse", "titans lmm"}
# Split as the delta rule is.
_LIKE_DELTANET = {"gated_deltanet", "kda"}


def _default(names: Collection[str]) -> list[Any]:
    """All cases, those of other names slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in CASES]


FIRST = _default(_NAMED_FIRST)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@cache
def prepared(name: str) -> tuple[Mixer, Any]:
    """The mixer and its boxed variables, moved off their initial values so that zeros and ones do not hide a slip."""
    mixer = CASES[name].create()
    variables = jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), normal(1, BATCH, LENGTH, DIM))
    leaves, tree = jax.tree.flatten(variables["params"])
    moved = [x + 0.05 * normal(n, *x.shape).astype(x.dtype) for n, x in enumerate(leaves)]
    return mixer, {**variables, "params": jax.tree.unflatten(tree, moved)}


def pulled(mixer: Mixer, variables: Any, x: jax.Array) -> Any:
    """Outputs, and gradients of variables and inputs for a fixed cotangent."""
    out, vjp = jax.vjp(lambda variables, x: mixer.apply(variables, x), variables, x)
    return out, vjp(normal(2, *x.shape))


@cache
def pulled_on_one_device(name: str) -> Any:
    mixer, boxed = prepared(name)
    whole = jax.jit(partial(pulled, mixer), compiler_options=QUICK)
    return whole(nn.unbox(boxed), normal(1, BATCH, LENGTH, DIM))


def run(mixer: Mixer, variables: Any, x: jax.Array, segment_ids: Any = None, mask: Any = None) -> np.ndarray:
    """The mixer's outputs where both arguments are given, if only to say one segment and all there: one program."""
    ids = np.zeros((BATCH, LENGTH), np.int32) if segment_ids is None else segment_ids
    there = np.ones((BATCH, LENGTH), bool) if mask is None else mask
    return np.asarray(_apply(mixer, variables, x, jnp.asarray(ids), jnp.asarray(there)), np.float32)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _apply(mixer: Mixer, variables: Any, x: jax.Array, segment_ids: Any = None, mask: Any = None) -> jax.Array:
    return mixer.apply(nn.unbox(variables), x, segment_ids=segment_ids, mask=mask)


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(wanted).max()))


@pytest.mark.parametrize("name", CASES, scope="module")
def test_shapes_parameters_and_gradients(name):
    case, (_, boxed) = CASES[name], prepared(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed["params"]))) == case.parameters
    out, (d_variables, d_x) = pulled_on_one_device(name)
    assert out.shape == d_x.shape == (BATCH, LENGTH, DIM)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert np.isfinite(d_x).all()
    assert np.abs(d_x).max() > 0
    for path, gradient in jax.tree_util.tree_leaves_with_path(d_variables["params"]):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), place
        assert np.abs(gradient).max() > 0 or any(part in place for part in case.idle), f"{place} has no gradient"


@pytest.mark.parametrize("name", CASES, scope="module")
def test_sees_no_later_token_where_causal(name):
    mixer, variables = prepared(name)
    x = normal(1, BATCH, LENGTH, DIM)
    changed = x.at[:, 15:].set(3 * normal(3, BATCH, LENGTH - 15, DIM))
    before, after = run(mixer, variables, x), run(mixer, variables, changed)
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 1e-3
    if mixer.causal:
        close(after[:, :15], before[:, :15], 1e-6)
    else:
        assert np.abs(before[:, :15] - after[:, :15]).max() > 1e-6


@pytest.mark.parametrize("name", CASES, scope="module")
def test_step_by_step_equals_parallel(name):
    mixer, variables = prepared(name)
    x = normal(1, BATCH, LENGTH, DIM)
    if not mixer.causal:
        with pytest.raises(ZooError, match="is not causal: it has no step-by-step form"):
            mixer.apply(nn.unbox(variables), BATCH, LENGTH, method="initial_state")
        return

    @partial(jax.jit, compiler_options=QUICK)
    def streamed(variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        state = mixer.apply(variables, BATCH, LENGTH, method="initial_state")

        def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            out, state = mixer.apply(variables, token, state, method="step")
            return state, out

        return jnp.swapaxes(jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    close(streamed(nn.unbox(variables), x), pulled_on_one_device(name)[0])


@pytest.mark.parametrize("name", FIRST, scope="module")
def test_packed_equals_separate(name):
    mixer, variables = prepared(name)
    border, x = CASES[name].border, normal(1, BATCH, LENGTH, DIM)
    ids = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < border, 7, 3), (BATCH, LENGTH))
    other = x.at[:, :border].set(normal(3, BATCH, border, DIM)), x.at[:, border:].set(0)
    packed, *alone = (run(mixer, variables, each, segment_ids=ids) for each in (x, *other))
    assert np.isfinite(packed).all()
    close(alone[0][:, border:], packed[:, border:], 1e-6)
    close(alone[1][:, :border], packed[:, :border], 1e-6)
    close(run(mixer, variables, x), pulled_on_one_device(name)[0], 2e-6)
    if mixer.causal:
        # The second segment is what it would be at the start of a row.
        moved = jnp.roll(x, -border, axis=1)
        close(run(mixer, variables, moved)[:, : LENGTH - border], packed[:, border:])


@pytest.mark.parametrize("name", FIRST, scope="module")
def test_does_not_see_tokens_that_are_not_there(name):
    mixer, variables = prepared(name)
    x = normal(1, BATCH, LENGTH, DIM)
    there = np.ones((BATCH, LENGTH), bool)
    there[0, 5:8], there[1, 20:] = False, False
    changed = jnp.where(there[..., None], x, 100.0)
    before, after = (run(mixer, variables, each, mask=there) for each in (x, changed))
    assert np.isfinite(after).all()
    close(after[there], before[there], 1e-6)
    whole = run(mixer, variables, x)
    assert np.abs(before[there] - whole[there]).max() > 1e-5, "the tokens left out made no difference"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES, scope="module")
def test_each_argument_alone(name):
    mixer, variables = prepared(name)
    x = normal(1, BATCH, LENGTH, DIM)
    ids = jnp.broadcast_to(jnp.arange(LENGTH) >= CASES[name].border, (BATCH, LENGTH)).astype(jnp.int32)
    there = jnp.broadcast_to(jnp.arange(LENGTH) < 20, (BATCH, LENGTH))
    close(_apply(mixer, variables, x, ids), run(mixer, variables, x, segment_ids=ids), 2e-6)
    close(_apply(mixer, variables, x, mask=there)[:, :20], run(mixer, variables, x, mask=there)[:, :20], 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES, scope="module")
def test_a_prompt_leaves_what_its_tokens_leave_one_by_one(name):
    mixer, variables = prepared(name)
    if not mixer.causal:
        return
    x, counts = normal(1, BATCH, LENGTH, DIM), jnp.array([7, 18])
    own = nn.unbox(variables)
    prompt = jax.jit(partial(mixer.apply, method="prefill"), static_argnums=3, compiler_options=QUICK)
    out, state = prompt(own, x[:, :18], counts, LENGTH)
    token = jnp.take_along_axis(x, counts[:, None, None], axis=1)[:, 0]
    following, _ = jax.jit(partial(mixer.apply, method="step"), compiler_options=QUICK)(own, token, state)
    whole = pulled_on_one_device(name)[0]
    for row, count in enumerate(counts.tolist()):
        close(out[row, :count], whole[row, :count])
        close(following[row], whole[row, count])


@pytest.mark.parametrize("name", FIRST, scope="module")
def test_bfloat16_within_rounding(name):
    _, variables = prepared(name)
    x = normal(1, BATCH, LENGTH, DIM)
    rough = CASES[name].create(dtype=jnp.bfloat16)
    out = _apply(rough, variables, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    wanted = pulled_on_one_device(name)[0]
    error = np.sqrt(np.mean((np.asarray(out, np.float32) - wanted) ** 2) / np.mean(wanted**2))
    assert error < CASES[name].rounding


@pytest.mark.parametrize("name", _default(set(_NAMED_FIRST) - _LIKE_DELTANET), scope="module")
def test_split_over_devices_equals_whole(name):
    mixer, boxed = prepared(name)
    wanted = pulled_on_one_device(name)
    variables = nn.unbox(boxed)  # with a mesh in force, flax would place them itself
    rules = Rules()
    mesh = jax.make_mesh(
        (1, 1, 2, 2, 2), ("slice", "data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 5
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
        split = jax.device_put(variables, parameter_shardings(boxed, rules, mesh))
        tokens = jax.device_put(normal(1, BATCH, LENGTH, DIM), NamedSharding(mesh, P("fsdp", "sequence")))
        got = jax.jit(partial(pulled, mixer), compiler_options=QUICK)(split, tokens)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        if not any(part in place for part in CASES[name].idle):  # of which rounding alone is left
            close(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", _default(_STACKED), scope="module")
def test_scanned_layers_equal_layers_in_turn(name):
    case = CASES[name]
    options = {"mixer_options": {case.mixer: case.options}, "mlp": "gelu", "mlp_options": {"hidden": 8}}
    stack = Backbone(DIM, (case.mixer,) * 2, **options)
    x = normal(1, BATCH, LENGTH, DIM)
    variables = nn.unbox(jax.jit(stack.init, compiler_options=QUICK)(jax.random.key(0), x))

    @partial(jax.jit, compiler_options=QUICK)
    def scanned(variables: Any, x: jax.Array) -> Any:
        return stack.apply(variables, x, intermediates=True)

    block = Block(DIM, case.mixer, "gelu", case.options, {"hidden": 8})
    one = jax.jit(block.apply, compiler_options=QUICK)
    final, outs = scanned(variables, x)
    for n in range(2):
        own = {
            key: jax.tree.map(lambda leaf, n=n: leaf[n], part["layers"]["blocks_0"]) for key, part in variables.items()
        }
        x = one(own, x)
        close(outs[n], x)
    norm = nn.RMSNorm(epsilon=1e-6).apply({"params": variables["params"]["final_norm"]}, x)
    close(final, norm)


def test_every_mixer_has_a_case():
    assert {case.mixer for case in CASES.values()} == set(MIXERS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_mixer("gated_delta", 32),
            r"no mixer is called 'gated_delta'; the nearest name is 'gated_deltanet'",
        ),
        (lambda: create_mixer("gla", 32, causal=False), r"GLA: causal: got False, wanted True$"),
        (lambda: create_mixer("linear", 32, head=2), r"mixer 'linear' has no option 'head'; the nearest is 'heads'"),
    ],
)
def test_wrong_names_are_named(call: Callable[[], Any], message: str):
    with pytest.raises(ZooError, match=message):
        call()
