"""The sparse attentions, as `benchmarks/kernels.py` measures them.

Sizes go by letter: B batch, T time, H heads, K key width, V value width, and G heads of k and v where they are fewer.
Latents are as wide as keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Arrays, Case, Mode

LETTERS = dict.fromkeys(
    (
        "sparse_attention",
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "native_sparse_attention",
        "moba",
        "local_latent_attention",
        "global_latent_attention",
    ),
    "BTHKV",
)
_SHAPES = (
    ("B1,T8192,H64,G4,K128,V128", "bfloat16"),
    ("B1,T65536,H16,G1,K128,V128", "bfloat16"),
    ("B1,T16384,H4,K64,V64", "float32"),
    ("B1,T65536,H4,G1,K64,V64", "float32"),
)
DEFAULTS = dict.fromkeys(LETTERS, _SHAPES)
QUICK = dict.fromkeys(LETTERS, (("B1,T4096,H4,K64,V64", "float32"), ("B1,T16384,H4,G1,K64,V64", "float32")))
SMALL = {"B": 2, "T": 1536, "H": 4}
"""Sizes of the check, at most: longer than what a query chooses."""
MODES = {
    op: ("forward",) if op == "select_blocks" else ("forward", "forward_backward") for op in LETTERS
} | dict.fromkeys(("sparse_attention", "native_sparse_attention", "moba"), ("forward", "forward_backward", "step"))
HOMES = {
    "compressed_attention": "native_sparse_attention",
    "select_blocks": "native_sparse_attention",
    "local_latent_attention": "alternating_sparse_attention",
    "global_latent_attention": "alternating_sparse_attention",
}
"""The modules of operations that have none of their own name."""
GLOBALS = 16  # tokens that see all and that all see, of the mask "longformer"


def variant(case: Case) -> str:
    if case.op == "sparse_attention":
        if case.mask == "blocks":
            return f"blocks of {case.block_size}, {case.density:.0%}"
        return case.mask if case.mask == "causal" else f"{case.mask} {case.window}"
    if case.op == "compressed_attention":
        return f"{2 * case.stride} every {case.stride}"
    if case.op == "native_sparse_attention":
        return f"{case.chosen} of {case.block_size}, window {case.window}"
    if case.op == "local_latent_attention":
        return f"window {case.window}"
    return f"{case.chosen} of {case.block_size}"


def shapes(case: Case, step: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """One step's arrays are those of a token after T - 1 others, whose keys and values come as `k_past`, `v_past`."""
    s, dtype = case.sizes, jnp.dtype(case.dtype)
    batch, time, heads, few = s["B"], s["T"], s["H"], s.get("G", s["H"])
    leading = (batch,) if step else (batch, time)
    given: dict[str, tuple[int, ...]] = {"q": (*leading, heads, s["K"])}
    if case.op in ("compressed_attention", "select_blocks"):
        entries = max((time - 2 * case.stride) // case.stride + 1, 1)
        given["k_compressed"] = (batch, entries, few, s["K"])
        if case.op == "compressed_attention":
            given["v_compressed"] = (batch, entries, few, s["V"])
    elif case.op == "local_latent_attention":
        given |= {"latents": (*leading, s["K"]), "up_k": (s["K"], heads, s["K"]), "up_v": (s["K"], heads, s["V"])}
    elif case.op == "global_latent_attention":
        given |= {"latents": (*leading, few, s["K"]), "up_k": (few, s["K"], s["K"]), "up_v": (few, s["K"], s["V"])}
    else:
        given |= {"k": (*leading, few, s["K"]), "v": (*leading, few, s["V"])}
    if step:
        given |= {"k_past": (batch, time - 1, few, s["K"]), "v_past": (batch, time - 1, few, s["V"])}
    if case.op in ("native_sparse_attention", "global_latent_attention"):
        given["gates"] = (*leading, heads, 3 if case.op == "native_sparse_attention" else 2)
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in given.items()}
    if case.op == "selected_attention":
        arrays["blocks"] = jax.ShapeDtypeStruct((*leading, few, case.chosen), jnp.dtype("int32"))
    return arrays


def numbers(case: Case, name: str, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, projections that keep lengths, gates in (0, 1), the query's block and others evenly apart."""
    if name != "blocks":
        x = random.standard_normal(shape, np.float32)
        if name in ("up_k", "up_v"):
            return x / np.sqrt(case.sizes["K"])
        return 1 / (1 + np.exp(-x)) if name == "gates" else x
    chosen = shape[3]
    own = np.arange(shape[1])[:, None, None] // case.block_size
    apart = random.integers(1, max(int(own.max()) // chosen, 1) + 1, (*shape[:3], 1))
    return own - apart * np.arange(chosen)


def mask(case: Case, time: int) -> Any:
    """The mask of sparse_attention that the case names, for so many tokens."""
    masks = importlib.import_module("kernels.sparse_attention")
    window = case.window
    if case.mask == "segments":
        full, rest = divmod(time, window)
        return masks.Segments((window,) * full + (rest,) * bool(rest))
    if case.mask == "blocks":
        size = -(-time // case.block_size)
        on = np.random.default_rng(0).random((size, size)) < case.density
        return masks.Blocks(on, case.block_size)
    return {
        "causal": masks.Causal(),
        "window": masks.Window(window),
        "symmetric_window": masks.Window(window, symmetric=True),
        "longformer": masks.Window(window, symmetric=True) | masks.Global(GLOBALS),
        "strided": masks.Causal() & (masks.Window(window) | masks.Strided(window)),
    }[case.mask]


def operation(case: Case, name: str | None) -> Callable[[Arrays], Arrays]:
    """The operation in one of its implementations, from named arrays to named arrays."""
    op = getattr(importlib.import_module(f"kernels.{HOMES.get(case.op, case.op)}"), case.op)
    result = "blocks" if case.op == "select_blocks" else "out"
    return lambda arrays: {result: op(**arrays, **_options(case, arrays["q"].shape[1]), implementation=name)}


def _options(case: Case, time: int) -> dict[str, Any]:
    compression: dict[str, Any] = {"stride": case.stride}
    selection = {"block_size": case.block_size, "selected_blocks": case.chosen}
    return {
        "sparse_attention": lambda: {"mask": mask(case, time)},
        "compressed_attention": lambda: compression | {"block_size": 2 * case.stride},
        "select_blocks": lambda: compression | selection | {"compression_block": 2 * case.stride},
        "selected_attention": lambda: {"block_size": case.block_size},
        "native_sparse_attention": lambda: compression | selection | {"window": case.window},
        "moba": lambda: {"block_size": case.block_size, "top_k": case.chosen},
        "local_latent_attention": lambda: {"window": case.window},
        "global_latent_attention": lambda: compression | selection,
    }[case.op]()


def step(case: Case) -> tuple[Callable[[Arrays], Arrays], ...]:
    """One token after T - 1 others; its definition, the last row of the operation on all; and what makes its cache.

    The new cache is not a result: what is timed is the attention, not a copy of the cache.
    """
    module = importlib.import_module(f"kernels.{case.op}")
    one, whole = getattr(module, f"{case.op}_step"), operation(case, "reference")

    def inward(arrays: Arrays) -> Arrays:
        time = arrays["k_past"].shape[1] + 1
        if case.op == "sparse_attention":
            position = jnp.full(arrays["q"].shape[0], time - 1, jnp.int32)
            return {"q": arrays["q"], "k": _joined(arrays, "k"), "v": _joined(arrays, "v"), "position": position}
        token = {name: array for name, array in arrays.items() if not name.endswith("_past")}
        make = module.moba_cache if case.op == "moba" else module.native_sparse_cache
        kept = ("block_size",) if case.op == "moba" else ("block_size", "stride", "window")
        options = {name: value for name, value in _options(case, time).items() if name in kept}
        return token | {"cache": make(arrays["k_past"], arrays["v_past"], capacity=time, **options)}

    def call(arrays: Arrays) -> Arrays:
        options = _options(case, case.sizes["T"])
        if case.op == "sparse_attention":
            return {"out": one(**arrays, mask=mask(case, arrays["k"].shape[1]))}
        return {"out": one(**arrays, **options)[0]}

    def definition(arrays: Arrays) -> Arrays:
        time = arrays["k_past"].shape[1] + 1
        repeated = {name: jnp.repeat(arrays[name][:, None], time, axis=1) for name in ("q", "gates") if name in arrays}
        return {"out": whole(repeated | {name: _joined(arrays, name) for name in "kv"})["out"][:, -1]}

    return call, definition, inward


def _joined(arrays: Arrays, name: str) -> jax.Array:
    return jnp.concatenate([arrays[f"{name}_past"], arrays[name][:, None]], axis=1)


def work(case: Case, mode: Mode, method: str) -> tuple[float, float]:
    """Operations on the keys a query sees, and bytes of each array once (a step: of the keys and values it reads).

    Backward: products for scores again, gradients of probabilities, values, queries, keys. Projections of latents are
    left out.
    """
    s = case.sizes
    tokens = s["B"] * (1 if mode == "step" else s["T"])
    seen, scored = _keys(case, method, mode)
    forward = 2 * (s["K"] + s["V"]) * seen + 2 * s["K"] * scored
    backward = 2 * (3 * s["K"] + 2 * s["V"]) * seen
    flops = tokens * s["H"] * (forward + (backward if mode == "forward_backward" else 0))

    size, shared = jnp.dtype(case.dtype).itemsize, s.get("G", s["H"]) / s["H"]
    read = (s["K"] + shared * (s["K"] + s["V"]) * (seen + scored if mode == "step" else 1)) * size
    written = 0 if case.op == "select_blocks" else s["V"] * size
    moved = 3 * read + 2 * written if mode == "forward_backward" else read + written
    return flops, tokens * s["H"] * moved


def _keys(case: Case, method: str, mode: Mode) -> tuple[float, float]:
    """How many keys a query attends to, and how many it only scores, in the mean (a step's: the last)."""
    time, window = case.sizes["T"], case.window
    past = time if mode == "step" else time / 2
    compressed, chosen = past / case.stride, min(case.chosen * case.block_size, past)
    if method == "dot_product_attention":
        return (past if _is_causal(case) else time), 0
    if method == "pieces":
        return (2 * window if case.mask == "window" else window), 0
    return {
        "sparse_attention": lambda: (_visible(case, past), 0),
        "compressed_attention": lambda: (compressed, 0),
        "select_blocks": lambda: (0, compressed),
        "selected_attention": lambda: (chosen, 0),
        "native_sparse_attention": lambda: (compressed + chosen + min(window, past), compressed),
        "moba": lambda: (chosen, past / case.block_size),
        "local_latent_attention": lambda: (min(window, past), 0),
        "global_latent_attention": lambda: (compressed + chosen, compressed),
    }[case.op]()


def _visible(case: Case, past: float) -> float:
    time, window = case.sizes["T"], case.window
    return {
        "causal": past,
        "window": min(window, past),
        "symmetric_window": min(window + 1, time),
        "segments": min(window, time),
        "longformer": min(window + 1 + GLOBALS, time),
        "strided": min(window + past / window, past),
        "blocks": case.density * time,
    }[case.mask]


def _is_causal(case: Case) -> bool:
    return case.op != "sparse_attention" or case.mask in ("causal", "window", "strided")
