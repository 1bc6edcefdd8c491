"""What the kernels are compared with: other ways to compute the same, or what people use instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import recurrences, sparse
from benchmarks.kernel_cases import Arrays, Case
from benchmarks.kernel_contenders import Contender, implementation
from benchmarks.recurrences import LOWEST
from zoo.errors import ZooError

TOKAMAX = "tokamax==0.0.17"


def softmax_attention(case: Case) -> Contender:
    """`jax.nn.dot_product_attention` on the same q, k and v, without any gate, state or choice; with the same mask."""
    s = case.sizes
    linear = case.op == "linear_attention"
    if not linear and case.op not in ("sparse_attention", "selected_attention", "native_sparse_attention", "moba"):
        serves = "linear_attention and sparse attention over T keys"
        raise ZooError(f"--against dot_product_attention: serves {serves}, got --op {case.op}")
    if s["K"] != s["V"] or (linear and "G" in s):
        raise ZooError(f"--against dot_product_attention: wanted as wide values as keys, and no G, got {case}")
    causal = case.causal if linear else case.op != "sparse_attention" or case.mask == "causal"

    def visible(time: int) -> np.ndarray | None:
        """[1, 1, T, T], where `causal` does not say it all."""
        if linear or causal:
            return None
        return np.asarray(sparse.mask(case, time).dense(time, time))[None, None]

    def call(arrays: Arrays) -> Arrays:
        q, k, v = (arrays[name] for name in "qkv")
        return {"out": jax.nn.dot_product_attention(q, k, v, mask=visible(q.shape[1]), is_causal=causal)}

    name = "dot_product_attention"
    note = "softmax, no gate, no state" if linear else "softmax over all keys, " + ("causal" if causal else "masked")
    return Contender(name, call, partial(_dense, causal, visible), ("q", "k", "v"), name, note)


def _dense(causal: bool, visible: Callable[[int], np.ndarray | None], arrays: Arrays) -> Arrays:
    q, k, v = (arrays[name] for name in "qkv")
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    mask = np.tri(q.shape[1], dtype=bool) if causal else visible(q.shape[1])
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return {"out": jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v)}


def pieces(case: Case) -> Contender:
    """Dense attention on small pieces: each segment, or each window of queries with its own and the keys before it."""
    s, window = case.sizes, case.window
    if case.op != "sparse_attention" or case.mask not in ("window", "segments") or s["K"] != s["V"]:
        raise ZooError(
            "--against pieces: serves sparse_attention with --mask window or segments and as wide values as keys, "
            f"got --op {case.op} --mask {case.mask} and {case}"
        )
    if s["T"] % window:
        raise ZooError(f"--against pieces: wanted T a multiple of --window {window}, got T={s['T']}")

    def call(arrays: Arrays) -> Arrays:
        q, k, v = (arrays[name] for name in "qkv")
        parts = [x.reshape(-1, window, *x.shape[2:]) for x in (q, k, v)]
        if case.mask == "segments":
            return {"out": jax.nn.dot_product_attention(*parts).reshape(q.shape)}
        query, key = np.arange(window)[:, None] + window, np.arange(2 * window)
        near = (key <= query) & (key > query - window)
        first = np.arange(len(parts[0])) % (q.shape[1] // window) == 0  # no keys before it
        mask = near & ~(first[:, None, None] & (key < window))
        k, v = (_with_before(x, window) for x in (k, v))
        return {"out": jax.nn.dot_product_attention(parts[0], k, v, mask=mask[:, None]).reshape(q.shape)}

    return Contender("pieces", call, sparse.operation(case, "reference"), ("q", "k", "v"), "pieces", "dense, on pieces")


def _with_before(x: jax.Array, window: int) -> jax.Array:
    """[B, T, …] → [B · T / window, 2 · window, …]: each piece behind the one before it, the first behind zeros."""
    before = jnp.pad(x, ((0, 0), (window, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
    parts = [part.reshape(-1, window, *x.shape[2:]) for part in (before, x)]
    return jnp.concatenate(parts, axis=1)


def argmin(case: Case) -> Contender:
    """The matrix of all distances, then `jnp.argmin`."""
    if case.op != "nearest_code" or case.metric != "l2":
        raise ZooError(f"--against argmin: serves nearest_code with --metric l2, got {case.op} {case.variant}")

    def call(arrays: Arrays) -> Arrays:
        x, codebook = arrays["x"], arrays["codebook"]
        distances = jnp.sum(codebook**2, axis=1) / 2 - x @ codebook.T
        return {"codes": jnp.argmin(distances, axis=1).astype(jnp.int32)}

    reference = case.family.operation(case, "reference")
    return Contender("argmin", call, reference, ("x", "codebook"), case.op, "of the matrix of all distances")


def tokamax(case: Case) -> Contender:
    """tokamax's KDA in its chunked XLA form, which takes gates before their activation and heads first."""
    if case.op != "delta_rule" or case.gate != "channel" or "G" in case.sizes:
        raise ZooError(
            "--against tokamax: its only chunked XLA form is KDA: wanted --op delta_rule --gate channel without G, "
            f"got --op {case.op} --gate {case.gate} and {case}"
        )
    try:
        kda = importlib.import_module("tokamax._src.ops.kda.api").kimi_delta_attention
    except ModuleNotFoundError as missing:
        raise ZooError(
            f"--against tokamax: {missing.name} is not installed; pip install {TOKAMAX} (Python 3.12)"
        ) from None

    def call(arrays: Arrays) -> Arrays:
        out, state = kda(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays["gate"],
            arrays["beta"],
            a_log=jnp.zeros(case.sizes["H"]),
            initial_state=arrays["initial_state"],
            output_final_state=True,
            use_gate_in_kernel=True,
            lower_bound=LOWEST,
            implementation="xla_chunked",
        )
        return {"out": out, "final_state": state}

    def relaid(order: Sequence[int], heads_first: bool) -> Callable[[Arrays], Arrays]:
        def relay(arrays: Arrays) -> Arrays:
            return {
                name: (array[:, None] if heads_first else array[:, 0])
                if name.endswith("_state")
                else jnp.transpose(array, (*order, *range(3, array.ndim)))
                for name, array in arrays.items()
            }

        return relay

    return Contender(
        "tokamax",
        call,
        recurrences.operation(case, "reference"),
        tuple(case.shapes()),
        case.op,
        f"{TOKAMAX} KDA, xla_chunked, chunks of 64, gates {LOWEST:g}·sigmoid inside",
        relaid((2, 0, 1), heads_first=True),
        relaid((1, 2, 0), heads_first=False),
    )


PEERS: Mapping[str, Callable[[Case], Contender]] = {
    "dot_product_attention": softmax_attention,
    "tokamax": tokamax,
    "pieces": pieces,
    "argmin": argmin,
    "reference": lambda case: implementation(case, "reference"),
}
