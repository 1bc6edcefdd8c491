"""Duplex attention is what its docstring writes, and without its parts the attention they are parts of."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from zoo.attention.duplex import Duplex
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
DIM, HEADS, LENGTH = 8, 2, 13
WIDTH = DIM // HEADS


def close(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=3e-5, atol=3e-5 * np.abs(wanted).max())


def drawn(mixer: nn.Module) -> Any:
    variables = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, LENGTH, DIM))))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.6 * rng.standard_normal(leaf.shape), jnp.float32), variables)


def tokens() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((1, LENGTH, DIM)).astype(np.float32)


def run(mixer: nn.Module, variables: Any, x: np.ndarray, **options: Any) -> np.ndarray:
    arrays = {name: jnp.asarray(value) for name, value in options.items()}
    return np.asarray(jax.jit(partial(mixer.apply, **arrays), compiler_options=QUICK)(variables, jnp.asarray(x)))


def naive(mixer: Duplex, variables: Any, x: np.ndarray, ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[N, D], token by token, from the equations of the file in float64; without rotary positions."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x, count = np.asarray(x, np.float64), len(mixer.modalities) + 1
    starts = np.array([np.flatnonzero(ids == ids[t])[0] for t in range(len(x))])
    labels = ((np.arange(len(x)) - starts)[:, None] >= np.cumsum(mixer.modalities)).sum(1)
    back = mixer.causal or bool(mixer.autoregressive)
    q, k, v = (np.einsum("nd,dhk->nhk", x, own[name]["kernel"]) for name in ("query", "key", "value"))
    gate = expit(own["gate"])
    out = np.zeros_like(q)

    def mapped(j: int, modality: int) -> np.ndarray:
        if mixer.mapping == "none":
            return x[j]
        basis = [i for i in range(len(x)) if ids[i] == ids[j] and labels[i] == modality and there[i]]
        basis = [i for i in basis if not back or i <= j]
        parts = []
        for rows, row in zip(np.split(x[basis], HEADS, axis=1), np.split(x[j], HEADS), strict=True):
            gram = rows.T @ rows
            parts.append(row @ gram / np.linalg.norm(gram) if len(basis) else 0 * row)
        return np.concatenate(parts)

    def attended(query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray | float:
        return softmax(np.stack(keys) @ query / np.sqrt(WIDTH)) @ np.stack(values) if keys else 0.0

    for t in range(len(x)):
        m = labels[t]
        same = [j for j in range(len(x)) if ids[j] == ids[t] and there[j] and labels[j] == m]
        if mixer.causal or m in mixer.autoregressive:
            same = [j for j in same if j <= t]
        others = [j for j in range(len(x)) if ids[j] == ids[t] and there[j] and labels[j] != m]
        others = [j for j in others if not back or j <= t]
        seen = [mapped(j, m) for j in others]
        for h in range(HEADS):
            within = attended(q[t, h], [k[j, h] for j in same], [v[j, h] for j in same])
            keys, values = ([y @ own[name]["kernel"][:, h] for y in seen] for name in ("key", "value"))
            out[t, h] = gate[h] * within + (1 - gate[h]) * attended(q[t, h], keys, values)
    assert count > labels.max()
    return np.einsum("nhk,hkd->nd", out, own["out"]["kernel"])


@pytest.mark.parametrize(
    "options",
    [
        {"modalities": (3, 2)},
        {"modalities": (4,), "causal": False},
        {"modalities": (4,), "causal": False, "autoregressive": (1,)},
    ],
    ids=["causal, three", "both ways", "vision both ways, text causal"],
)
def test_duplex_attention_is_its_definition(options: dict[str, Any]):
    mixer = Duplex(DIM, heads=HEADS, rotary=False, **options)
    variables, x = drawn(mixer), tokens()
    ids, there = (np.arange(LENGTH) >= 6)[None].astype(np.int32), np.arange(LENGTH)[None] % 5 != 3
    got = run(mixer, variables, x, segment_ids=ids, mask=there)[0]
    close(got[there[0]], naive(mixer, variables, x[0], ids[0], there[0])[there[0]])


def test_without_mapping_and_at_an_even_gate_it_is_block_attention():
    mixer = Duplex(DIM, heads=HEADS, modalities=(5,), mapping="none", causal=False, rotary=False)
    variables, x = drawn(mixer), tokens()
    own = {**variables["params"], "gate": jnp.zeros(HEADS)}
    q, k, v = (np.einsum("nd,dhk->hnk", x[0], own[name]["kernel"]) for name in ("query", "key", "value"))
    scores, label = np.einsum("hik,hjk->hij", q, k) / np.sqrt(WIDTH), np.arange(LENGTH) >= 5
    same = label[:, None] == label
    blocks = [softmax(np.where(seen, scores, -np.inf), axis=-1) for seen in (same, ~same)]
    wanted = np.einsum("hij,hjk,hkd->id", (blocks[0] + blocks[1]) / 2, v, own["out"]["kernel"])
    close(run(mixer, {"params": own}, x)[0], wanted)


@pytest.mark.slow
def test_prefix_gram_hides_later_text():
    mixer = Duplex(DIM, heads=HEADS, modalities=(5,), causal=False, autoregressive=(1,))
    variables, x = drawn(mixer), tokens()
    changed = x.copy()
    changed[:, 9:] = 7
    before, after = run(mixer, variables, x), run(mixer, variables, changed)
    close(after[:, :9], before[:, :9])
    # Within the first modality tokens do see later ones.
    changed = x.copy()
    changed[:, 4] = 7
    assert np.abs(run(mixer, variables, changed)[:, 0] - before[:, 0]).max() > 1e-3


def test_full_cache_gives_nan_and_lengths_stay():
    mixer = Duplex(DIM, heads=HEADS, modalities=(1,))
    variables, x = drawn(mixer), jnp.ones((1, DIM))
    state = mixer.apply(variables, 1, 1, method="initial_state")
    step = jax.jit(partial(mixer.apply, method="step"), compiler_options=QUICK)
    first, state = step(variables, x, state)
    second, after = step(variables, x, state)
    assert np.isfinite(first).all()
    assert np.isnan(second).all()
    assert after.length == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"modalities: got \(\), wanted the sizes of the spans of all but the last"),
        ({"modalities": (2,), "mapping": "aligner"}, "mapping is gram or none, got 'aligner'"),
        ({"modalities": (2,), "autoregressive": (2,)}, r"autoregressive: got \(2,\), wanted numbers below 2"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    mixer = Duplex(DIM, heads=HEADS, **options)
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, LENGTH, DIM)))
