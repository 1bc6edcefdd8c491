"""ReLU attention against its definition, whatever is visible, and its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import QUICK, causal, close, drawn, merged, mixed, normal, projected, run, scores, streamed

from zoo.attention import relu
from zoo.attention.caches import KeepWindow, TaskKV
from zoo.attention.relu import Relu, relu_attention
from zoo.errors import ZooError


@pytest.mark.parametrize("queries", [4, 128])
@pytest.mark.parametrize("both_ways", [False, True])
def test_equals_the_definition_whatever_is_visible(monkeypatch, queries, both_ways):
    monkeypatch.setattr(relu, "QUERIES", queries)
    mixer = Relu(16, heads=4, kv_heads=2, rotary=False, causal=not both_ways)
    x = normal(0, 2, 11, 16)
    variables = drawn(mixer, x)
    ids = np.repeat([[3, 5, 3]], 2, axis=0).repeat([4, 3, 4], axis=1)
    there = np.ones((2, 11), bool)
    there[0, 2], there[1, 9:] = False, False
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    run_of = np.repeat([0, 1, 2], [4, 3, 4])
    visible = (run_of[:, None] == run_of) & (both_ways | causal(11))
    visible = (visible & there[:, None])[:, None]
    p = np.where(visible, np.maximum(scores(q, k), 0), 0) / np.maximum(visible.sum(-1, keepdims=True), 1)
    jax.clear_caches()  # the number of queries at once is no argument
    got = run(mixer, variables, x, segment_ids=jnp.asarray(ids), mask=jnp.asarray(there))
    close(got, merged(variables, mixed(p, v)))


def test_a_window_cache_divides_by_what_it_keeps():
    mixer = Relu(16, heads=2, rotary=False, cache=KeepWindow(window=3, sinks=1))
    x = normal(0, 1, 9, 16)
    variables = drawn(mixer, x)
    state = mixer.apply(variables, 1, method="initial_state")
    got, _ = streamed(mixer, variables, x, state)
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    t = np.arange(9)
    visible = causal(9) & ((t[:, None] - t < 3) | (t < 1))
    p = np.where(visible, np.maximum(scores(q, k), 0), 0) / visible.sum(-1, keepdims=True)
    close(got, merged(variables, mixed(p, v)))


def test_budgets_want_a_softmax():
    with pytest.raises(ZooError, match="relu has no softmax to weigh tokens by: cache: got TaskKV"):
        jax.eval_shape(Relu(16, cache=TaskKV()).init, jax.random.key(0), normal(0, 1, 4, 16))


def test_no_matrix_of_all_queries_and_keys():
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 8), jnp.float32)
    gradient = jax.grad(lambda q, k, v: jnp.sum(relu_attention(q, k, v) ** 2), (0, 1, 2))
    compiled = jax.jit(gradient, compiler_options=QUICK).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192**2 * 4 / 8
