"""What streaming keeps: windows with sinks, budgets for each head, and how much memory that is."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import causal, close, drawn, merged, mixed, normal, prefilled, projected, run, streamed, weights

from zoo.attention.caches import KeepWindow, RingCache, TaskKV, TaskKVCache
from zoo.attention.sliding_window import SlidingWindow
from zoo.attention.softmax import Softmax
from zoo.errors import ZooError

TIME, PROMPT = 24, 17
TASK = {"sinks": 2, "recent": 4, "middle": 3, "observed": 5}


def numbers(state):
    """How many keys and values are stored."""
    parts = (state.far, state.near) if isinstance(state, TaskKVCache) else (state,)
    return sum(part.k.size + part.v.size for part in parts)


def window(time, size, sinks):
    t = np.arange(time)
    return causal(time) & ((t[:, None] - t < size) | (t < sinks))


@pytest.mark.parametrize(("size", "sinks"), [(5, 2), (3, 0), (40, 4)])
def test_a_window_and_sinks_are_what_a_step_sees(size, sinks):
    mixer = Softmax(16, heads=2, kv_heads=1, rotary=False, cache=KeepWindow(size, sinks))
    x = normal(0, 2, TIME, 16)
    variables = drawn(mixer, x)
    state = mixer.apply(variables, 2, 100_000, method="initial_state")
    assert state.k.shape == (2, size + sinks, 1, 8)
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    close(
        streamed(mixer, variables, x, state)[0], merged(variables, mixed(weights(q, k, window(TIME, size, sinks)), v))
    )


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_sliding_window_after_prompts_of_unlike_lengths(sinks):
    mixer = SlidingWindow(16, heads=2, window=5, sinks=sinks)
    x = normal(0, 3, TIME, 16)
    variables = drawn(mixer, x)
    whole = run(mixer, variables, x)
    length = np.asarray([17, 6, 1])
    out, state = prefilled(mixer, variables, x[:, :17], TIME, length)
    rest = jnp.stack([x[row, begin : begin + 7] for row, begin in enumerate(length)])
    later, state = streamed(mixer, variables, rest, state)
    assert state.k.shape[1] == 5 + sinks
    for row, begin in enumerate(length):
        close(out[row, :begin], whole[row, :begin])
        close(later[row], whole[row, begin : begin + 7])


def test_sinks_of_a_sliding_window_both_ways_in_segments():
    mixer = SlidingWindow(16, heads=2, rotary=False, window=4, sinks=2, causal=False)
    x = normal(0, 1, 12, 16)
    variables = drawn(mixer, x)
    ids, there = np.repeat([[4, 9]], 6, axis=1), np.ones((1, 12), bool)
    there[0, 7] = False
    t = np.arange(12)
    near, sink = np.abs(t[:, None] - t) <= 2, t % 6 < 2
    visible = (near | sink) & (ids[0][:, None] == ids[0]) & there
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    wanted = merged(variables, mixed(weights(q, k, visible), v))
    close(run(mixer, variables, x, segment_ids=jnp.asarray(ids), mask=jnp.asarray(there)), wanted)


def test_all_heads_far_is_exact():
    full, task = (Softmax(16, heads=4, kv_heads=2, **own) for own in ({}, {"cache": TaskKV(share=1.0, **TASK)}))
    x = normal(0, 2, TIME, 16)
    variables = drawn(full, x)
    _, state = prefilled(task, variables, x[:, :PROMPT], TIME)
    assert state.near.k.shape[2] == 0
    out, state = streamed(task, variables, x[:, PROMPT:], state)
    close(out, run(full, variables, x)[:, PROMPT:], 1e-6)
    np.testing.assert_array_equal(state.length, TIME)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_heads_keep_their_budgets(share):
    """Against the definition: who is far, what the others keep, and what a step then sees."""
    heads, groups = 6, 3
    mixer = Softmax(24, heads=heads, kv_heads=groups, rotary=False, cache=TaskKV(share=share, **TASK))
    x = normal(0, 2, TIME, 24)
    variables = drawn(mixer, x)
    length = np.asarray([PROMPT, 12])
    _, state = prefilled(mixer, variables, x[:, :PROMPT], TIME, length)
    rest = jnp.stack([x[row, begin : begin + 7] for row, begin in enumerate(length)])
    got, after = streamed(mixer, variables, rest, state)
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    p, out = weights(q, k, causal(TIME)), np.float64(variables["params"]["out"]["kernel"])
    far_heads, t = math.ceil(share * groups), np.arange(TIME)
    for row, begin in enumerate(length):
        observed = slice(begin - 5, begin)
        head = np.einsum("thk,hkd->hd", mixed(p, v)[row, observed], out)
        centre = head.mean(0)
        distance = 1 - head @ centre / np.linalg.norm(head, axis=-1) / np.linalg.norm(centre)
        order = np.argsort(-distance.reshape(groups, -1).max(-1))
        np.testing.assert_array_equal(state.heads[row], order)
        weight = p[row, :, observed].reshape(groups, 2, 5, TIME).sum((1, 2))
        weight[:, (t < 2) | (t >= begin - 4)] = -np.inf
        kept = np.zeros((groups, TIME), bool)
        for group in range(groups):
            kept[group, np.argsort(-weight[group])[:3]] = True
        kept[order[:far_heads]] = True
        steps = np.arange(begin, begin + 7)[:, None]
        near = (t < 2) | ((steps - t < 4) & (t <= steps))
        visible = (kept[:, None] & (t <= steps)) | near
        own = np.repeat(visible, 2, axis=0)[None] & (t <= steps)
        # Tokens that came later were not weighed, so only far heads and recent tokens see them.
        own[:, np.repeat(order[far_heads:] * 2, 2) + np.tile([0, 1], groups - far_heads)] &= (t < begin) | near
        seen = weights(q[row : row + 1, begin : begin + 7], k[row : row + 1], own)
        close(got[row], merged(variables, mixed(seen, v[row : row + 1]))[0])
    every, budget = 2 * 2 * 4 * TIME, 2 * 2 * 4 * (2 + 3 + 4)
    assert numbers(state) == numbers(after) == far_heads * every + (groups - far_heads) * budget


def test_a_prompt_shorter_than_the_budgets_loses_nothing():
    mixer = Softmax(16, heads=2, cache=TaskKV(share=0.5, sinks=4, recent=30, middle=8, observed=6))
    x = normal(0, 2, TIME, 16)
    variables = drawn(mixer, x)
    _, state = prefilled(mixer, variables, x[:, :5], TIME, [5, 3])
    rest = jnp.stack([x[0, 5:20], x[1, 3:18]])
    got, _ = streamed(mixer, variables, rest, state)
    whole = run(mixer, variables, x)
    close(got[0], whole[0, 5:20])
    close(got[1], whole[1, 3:18])


def test_errors():
    with pytest.raises(ZooError, match="KeepWindow: got window 0 and sinks 4, wanted"):
        KeepWindow(window=0)
    with pytest.raises(ZooError, match=r"TaskKV: share: got 1.5, wanted a number from 0 to 1"):
        TaskKV(share=1.5)
    with pytest.raises(ZooError, match=r"TaskKV: got TaskKV.*, wanted sinks and middle of at least 0"):
        TaskKV(recent=0)
    x = normal(0, 1, 6, 16)
    mixer = Softmax(16, heads=2, cache=TaskKV())
    with pytest.raises(ZooError, match="TaskKV: a prompt decides what each head keeps: begin with `prefill`"):
        mixer.apply(drawn(mixer, x), 1, method="initial_state")
    for options, message in (
        ({"window": 0}, "got window 0 and sinks 0, wanted at least 1 and at least 0"),
        ({"window": 4, "sinks": 4, "causal": False}, "sinks: got 4, wanted at most 3 where a window of 4 looks both"),
        ({"cache": TaskKV()}, "cache: got TaskKV.*, wanted none"),
    ):
        with pytest.raises(ZooError, match=f"^sliding_window.*{message}"):
            jax.eval_shape(SlidingWindow(16, **options).init, jax.random.key(0), x)


def test_a_ring_is_never_full():
    mixer = SlidingWindow(16, heads=2, window=3)
    x = normal(0, 1, TIME, 16)
    variables = drawn(mixer, x)
    state = mixer.apply(variables, 1, 1, method="initial_state")
    assert isinstance(state, RingCache)
    close(streamed(mixer, variables, x, state)[0], run(mixer, variables, x))
