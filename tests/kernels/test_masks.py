"""Masks of sparse attention: what they show, what their blocks hold, and the lists of tiles made from them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_attention import (
    Blocks,
    Causal,
    Compressed,
    Full,
    Global,
    Segments,
    Sinks,
    Strided,
    Window,
)
from kernels.sparse_attention.form import Form
from kernels.sparse_attention.mask import predicate
from kernels.sparse_attention.tiles import LIVE, WHOLE, tiles

MAP = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0]], bool)
BORDERS = (3, 13)
KINDS = {
    "full": (Full(), lambda t, j: True),
    "causal": (Causal(), lambda t, j: j <= t),
    "window": (Window(5), lambda t, j: t - 5 < j <= t),
    "symmetric": (Window(5, symmetric=True), lambda t, j: abs(t - j) <= 2),
    "segments": (Segments((3, 10, 11)), lambda t, j: all((t < border) == (j < border) for border in BORDERS)),
    "even segments": (Segments((10, 10, 4)), lambda t, j: t // 10 == j // 10),
    "one segment": (Segments((24,)), lambda t, j: True),
    "global": (Global(3), lambda t, j: t < 3 or j < 3),
    "sinks": (Sinks(3), lambda t, j: j < 3),
    "strided": (Strided(7), lambda t, j: (t - j) % 7 == 0),
    "compressed": (Compressed(6, 3), lambda t, j: j * 3 + 6 <= t + 1),
    "blocks": (Blocks(MAP, 8), lambda t, j: MAP[t // 8, j // 8]),
    "both": (Causal() & Strided(3), lambda t, j: j <= t and (t - j) % 3 == 0),
    "either": (Window(3) | Sinks(2), lambda t, j: t - 3 < j <= t or j < 2),
}


def form(mask, time_q, time_k, block_q, block_k):
    return Form(1.0, predicate(mask), block_q, block_k, time_q, time_k, segments=False)


def blocked(dense, block_q, block_k, how):
    """[…, nq, nk]: `how` (np.any or np.all) of every block of […, time_q, time_k]."""
    *_, time_q, time_k = dense.shape
    rows = [dense[..., t : t + block_q, :] for t in range(0, time_q, block_q)]
    cells = [[how(row[..., j : j + block_k], axis=(-2, -1)) for j in range(0, time_k, block_k)] for row in rows]
    return np.moveaxis(np.array(cells), (0, 1), (-2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_shows_what_it_says(kind):
    mask, rule = KINDS[kind]
    wanted = np.array([[rule(t, j) for j in range(24)] for t in range(24)], bool)
    dense = mask.dense(24, 24)
    np.testing.assert_array_equal(dense, wanted)
    assert dense.dtype == bool
    if kind != "blocks":  # the others need no bits
        t, j = jnp.arange(24)[:, None], jnp.arange(24)
        np.testing.assert_array_equal(mask.visible(t, j), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [(8, 8), (4, 2), (1, 8)])
def test_blocks_of_a_single_mask_are_exact(kind, blocks):
    mask, _ = KINDS[kind]
    dense = mask.dense(24, 24)
    exact = blocked(dense, *blocks, np.any).astype(int) + blocked(dense, *blocks, np.all)
    got = mask.block_map(24, 24, *blocks)
    assert got.dtype == np.uint8
    if kind in ("both", "either"):
        assert ((got == exact) | (got == 1)).all()
    else:
        np.testing.assert_array_equal(got, exact)


@st.composite
def cases(draw):
    """A mask of up to five joined ones, its sizes, and blocks that fit its maps."""
    block_q, block_k = draw(st.sampled_from([(4, 4), (8, 2), (3, 5)]))
    time_q = draw(st.integers(1, 30))
    time_k = draw(st.sampled_from([time_q, draw(st.integers(1, 30))]))
    numbers = st.integers(1, 12)
    random = np.random.default_rng(draw(st.integers(0, 99)))

    def blocks(lead):
        sizes = (block_q * draw(st.integers(1, 2)), block_k * draw(st.integers(1, 2)))
        return Blocks(random.random((*lead, -(-time_q // sizes[0]), -(-time_k // sizes[1]))) < 0.4, sizes)

    def leaf():
        kinds = [
            Full,
            Causal,
            lambda: Window(draw(numbers), symmetric=draw(st.booleans())),
            lambda: Global(draw(numbers)),
            lambda: Sinks(draw(numbers)),
            lambda: Strided(draw(numbers)),
            lambda: Compressed(draw(numbers), draw(numbers)),
            lambda: blocks(draw(st.sampled_from([(), (4,), (2, 1), (2, 4)]))),
        ]
        if time_q == time_k:
            first = draw(st.integers(1, time_q))
            kinds.append(lambda: Segments((first, time_q - first) if first < time_q else (first,)))
        return draw(st.sampled_from(kinds))()

    mask = leaf()
    for _ in range(draw(st.integers(0, 4))):
        other = leaf()
        mask = draw(st.sampled_from([mask & other, mask | other, other & mask, other | mask]))
    return mask, time_q, time_k, block_q, block_k


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_block_map_of_any_mask_is_on_the_safe_side(case):
    mask, *sizes = case
    dense, got = mask.dense(*sizes[:2]), mask.block_map(*sizes)
    some, whole = (blocked(dense, *sizes[2:], how) for how in (np.any, np.all))
    assert got.shape == some.shape
    assert not (some & (got == 0)).any()
    assert not (~whole & (got == 2)).any()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_is_seen_lies_within_reach(case):
    mask, time_q, time_k, *_ = case
    first, last = mask.reach(max(time_q, time_k))
    t, j = np.arange(time_q)[:, None], np.arange(time_k)
    seen = mask.dense(time_q, time_k) & (j <= t)
    assert not (seen & (j >= first) & (t - j >= last)).any()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_lists_hold_every_tile_with_something_visible(case):
    """And say of it what is so: walked tile by tile they make the dense mask again."""
    mask, time_q, time_k, block_q, block_k = case
    shape = (2, 4, time_q, time_k)
    dense = np.broadcast_to(mask.dense(time_q, time_k), shape)
    this = form(mask, time_q, time_k, block_q, block_k)
    for by_key, made in zip((False, True), tiles(this, mask), strict=True):
        walked = np.zeros((2, 4, -(-time_q // block_q) * block_q, -(-time_k // block_k) * block_k), bool)
        owners, listed, _ = made.row.shape
        for b, h in np.ndindex(2, 4):
            row, column, bits = (x[b % owners, h % listed] for x in (made.row, made.column, made.bits))
            live = bits & LIVE > 0
            major, minor = (column, row) if by_key else (row, column)
            places = [(int(x), int(y)) for x, y in zip(major[live], minor[live], strict=True)]
            assert places == sorted(set(places))
            assert (np.diff(major) >= 0).all()
            assert set(major) == set(range(-(-(time_k if by_key else time_q) // (block_k if by_key else block_q))))
            for r, c, these in zip(row[live], column[live], bits[live], strict=True):
                t, j = np.arange(block_q)[:, None] + r * block_q, np.arange(block_k) + c * block_k
                seen = this.visible(t, j, these) & np.ones((block_q, block_k), bool)
                assert not these & WHOLE or seen.all()
                walked[b, h, t, j] = seen
        np.testing.assert_array_equal(walked[..., :time_q, :time_k], dense)
        assert not walked[..., time_q:, :].any()
        assert not walked[..., time_k:].any()


def live_tiles(made):
    owners, listed, _ = made.row.shape
    lists = [[np.asarray(x)[b, g] for x in (made.row, made.column, made.bits)] for b, g in np.ndindex(owners, listed)]
    return [sorted(tile for tile in zip(*map(list, arrays), strict=True) if tile[2] & LIVE) for arrays in lists]


def test_a_traced_map_gives_the_tiles_of_a_known_one():
    allowed = np.random.default_rng(0).random((2, 3, 6, 6)) < 0.3
    allowed[0, 0] = False

    def made(map):
        mask = Causal() & (Blocks(map, 8) | Window(3))
        return tiles(form(mask, 45, 45, 8, 8), mask)

    for known, traced in zip(made(allowed), jax.jit(made)(allowed), strict=True):
        assert live_tiles(known) == live_tiles(traced)
        assert isinstance(known.row, np.ndarray)
        assert known.row.shape[-1] <= traced.row.shape[-1] == 21  # what is causal


def test_segment_ids_leave_the_tiles_where_they_may_be_equal():
    ids = jnp.asarray([[0] * 20 + [3] * 25, [5] * 45])
    with_ids = replace(form(Causal(), 45, 45, 8, 8), segments=True)
    by_query, by_key = tiles(with_ids, Causal(), ids, ids)
    for made in (by_query, by_key):
        assert made.row.shape == (2, 1, 21)
        two, one = live_tiles(made)
        places = [(r, c) for r in range(6) for c in range(r + 1)]
        assert [tile[:2] for tile in two] == [(r, c) for r, c in places if (r <= 2) == (c <= 2) or c == 2]
        assert [tile[:2] for tile in one] == places
        assert {(r, c) for r, c, bits in one if bits & WHOLE} == {(r, c) for r, c in places if c < r < 5}
        assert {(r, c) for r, c, bits in two if bits & WHOLE} == {(1, 0), (4, 3)}


def test_a_long_night_is_quick_to_map():
    """65,536 tokens: no array of all pairs, and as many tiles as the window needs."""
    mask = Causal() & (Window(512) | Sinks(4))
    blocks = mask.block_map(65536, 65536, 128, 128)
    assert blocks.shape == (512, 512)
    assert blocks.sum(axis=1).max() <= 5 + 4 + 1
    by_query, _ = tiles(form(mask, 65536, 65536, 128, 128), mask)
    assert by_query.row.shape == (1, 1, (blocks > 0).sum())


def test_masks_are_values():
    assert Causal() & Window(4) == Causal() & Window(4)
    assert len({Causal() | Sinks(2), Causal() | Sinks(2), Causal() & Sinks(2)}) == 2
    assert predicate(Blocks(MAP, 8)) == predicate(Blocks(~MAP, 8))
    with pytest.raises(TypeError):
        Causal() & True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Window, 0), "Window: size: got 0"),
        (partial(Window, 2.5), "Window: size: got 2.5"),
        (partial(Global, -1), "Global: count: got -1"),
        (partial(Sinks, 0), "Sinks: count: got 0"),
        (partial(Strided, 0), "Strided: stride: got 0"),
        (partial(Compressed, 4, 0), "Compressed: stride: got 0"),
        (partial(Segments, ()), "Segments: lengths: got ()"),
        (partial(Segments, (3, 0)), "Segments: lengths: got (3, 0)"),
        (partial(Blocks, np.ones((3, 3))), "Blocks: map: got float"),
        (partial(Blocks, np.ones(3, bool)), "Blocks: map: got bool [3]"),
        (partial(Blocks, MAP, (8, 0)), "Blocks: block_size: got (8, 0)"),
        (lambda: Segments((3, 4)).dense(8, 8), "dense: Segments: lengths: got 7 tokens in all"),
        (lambda: Segments((4, 4)).dense(8, 7), "wanted as many as queries (8) and keys (7)"),
        (lambda: (Causal() & Blocks(MAP, 8)).dense(25, 24), "dense: Blocks: map: got shape (3, 3), wanted [4, 3]"),
        (lambda: Blocks(MAP, 8).block_map(24, 24, 8, 16), "got (8, 16), wanted divisors of (8, 8)"),
        (lambda: jax.jit(lambda map: Blocks(map, 8).block_map(24, 24, 8, 8))(MAP), "got a traced array"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_maps_than_bits_are_refused():
    mask = Blocks(MAP, 8)
    for _ in range(28):
        mask = mask | Blocks(MAP, 8)
    np.testing.assert_array_equal(mask.dense(24, 24), Blocks(MAP, 8).dense(24, 24))
    with pytest.raises(ValueError, match="got 30 maps of blocks, wanted at most 29"):
        _ = mask | Blocks(MAP, 8)
