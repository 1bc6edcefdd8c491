"""Nearest-code search and a codebook's statistics: every form against brute force in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.nearest_code import code_statistics, nearest_code
from kernels.nearest_code import tpu as pallas
from kernels.nearest_code import xla as blocks

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
FORMS = ("reference", "xla", "pallas")
METRICS = ("l2", "cosine")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few codes and vectors are several blocks and tiles."""
    monkeypatch.setattr(blocks, "MIN_BLOCK", 32)
    monkeypatch.setattr(blocks, "MAX_BLOCK", 32)
    monkeypatch.setattr(pallas, "CODES", 128)
    monkeypatch.setattr(pallas, "SEARCHED_VECTORS", 256)
    monkeypatch.setattr(pallas, "ADDED_VECTORS", 128)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x):
    return np.asarray(jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32)), np.float64)


def run(function, *arrays):
    """As one program, its results as NumPy arrays."""
    with dispatch.interpreted(STRICT):
        return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(*arrays))


def search(x, codebook, implementation, **options):
    return run(partial(nearest_code, implementation=implementation, **options), x, codebook)


def statistics(x, codes, size, implementation, valid=None):
    def collect(x, codes):
        return code_statistics(x, codes, size, valid=valid, implementation=implementation)

    return run(collect, x, codes)


def unit(x):
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def distances(x, codebook, metric):
    """[N, M] in double precision, less what is the same for all codes: |c|² / 2 - x · c, or the cosine's negative."""
    x, codebook = wide(x).reshape(-1, x.shape[-1]), wide(codebook)
    if metric == "cosine":
        return -unit(x) @ unit(codebook).T
    return (codebook**2).sum(1) / 2 - x @ codebook.T


def assert_nearest(codes, x, codebook, metric, rounding=2.0**-22):
    """The very code of brute force, but where distances differ by less than the rounding of what they are made of."""
    assert codes.shape == x.shape[:-1]
    assert codes.dtype == np.int32
    far = distances(x, codebook, metric)
    terms = np.ones(len(far)) if metric == "cosine" else np.linalg.norm(wide(x).reshape(len(far), -1), axis=1)
    if metric == "l2":
        longest = np.linalg.norm(wide(codebook), axis=1).max()
        terms = longest * (terms + longest)
    excess = far[np.arange(len(far)), codes.reshape(-1)] - far.min(axis=1)
    assert (excess <= rounding * terms).all(), excess.max()


@pytest.mark.parametrize(
    ("implementation", "metric", "dtype"),
    [
        ("reference", "l2", jnp.float32),
        ("reference", "cosine", jnp.float32),
        ("xla", "l2", jnp.float32),
        ("xla", "cosine", jnp.float32),
        ("xla", "l2", jnp.bfloat16),
        ("pallas", "l2", jnp.float32),
        ("pallas", "cosine", jnp.bfloat16),
    ],
)
def test_every_form_is_brute_force(implementation, metric, dtype):
    x, codebook = normal(0, 3, 100, 20, dtype=dtype), normal(1, 300, 20, dtype=dtype)
    codes = search(x, codebook, implementation, metric=metric)
    half = (
        implementation == "pallas" and dtype == jnp.bfloat16 and metric == "cosine"
    )  # unit codes are rounded once more
    assert_nearest(codes, x, codebook, metric, **({"rounding": 2.0**-7} if half else {}))
    if not half:
        assert (codes.reshape(-1) == distances(x, codebook, metric).argmin(1)).mean() > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_xla_is_the_definition_in_float64(metric):
    with jax.enable_x64(True):
        x, codebook = normal(2, 200, 7, dtype=jnp.float64), normal(3, 90, 7, dtype=jnp.float64)
        codes = search(x, codebook, "reference", metric=metric)
        np.testing.assert_array_equal(search(x, codebook, "xla", metric=metric), codes)
        np.testing.assert_array_equal(distances(x, codebook, metric).argmin(1), codes)
        for got, wanted in zip(*(statistics(x, codes, 90, form) for form in ("xla", "reference")), strict=True):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", jnp.float32), ("xla", jnp.float32), ("pallas", jnp.float32), ("pallas", jnp.bfloat16)],
)
def test_exact_ties_go_to_the_lowest_index(implementation, dtype):
    """Whole numbers: every distance is exact, and most rows have several nearest codes, in one tile and in others."""
    rng = np.random.default_rng(4)
    x, codebook = (jnp.asarray(rng.integers(-2, 3, (n, 3)), dtype) for n in (290, 300))
    far = distances(x, codebook, "l2")
    assert ((far == far.min(1, keepdims=True)).sum(1) > 1).mean() > 0.5
    np.testing.assert_array_equal(search(x, codebook, implementation), far.argmin(1))


@pytest.mark.parametrize(
    ("implementation", "rows", "metric"),
    [("reference", 5, "l2"), ("xla", 1, "l2"), ("xla", 5, "cosine"), ("xla", 70, "l2"), ("pallas", 5, "cosine")],
)
def test_of_equal_codes_the_first_is_found(implementation, rows, metric):
    x, codebook = normal(5, rows, 9), normal(6, 45, 9)
    once = search(x, codebook, implementation, metric=metric)
    repeated = jnp.concatenate([codebook, codebook[::-1], codebook, codebook])
    np.testing.assert_array_equal(search(x, repeated, implementation, metric=metric), once)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 100), st.integers(1, 20), st.sampled_from(METRICS))
def test_any_shape(rows, size, width, metric):
    x, codebook = normal(7, *rows, width), normal(8, size, width)

    def quantize(x, codebook):
        codes = nearest_code(x, codebook, metric=metric, implementation="xla")
        return codes, code_statistics(x, codes, size, implementation="xla")

    codes, (counts, sums) = run(quantize, x, codebook)
    assert_nearest(codes, x, codebook, metric)
    one_hot = np.eye(size)[codes.reshape(-1)]
    np.testing.assert_array_equal(counts, one_hot.sum(0))
    np.testing.assert_allclose(sums, one_hot.T @ wide(x).reshape(-1, width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "size", "width"), [(1, 1, 1), (257, 129, 3), (2, 260, 300)])
def test_pallas_serves_ragged_tiles(rows, size, width):
    x, codebook = normal(9, rows, width), normal(10, size, width)

    def quantize(x, codebook):
        codes = nearest_code(x, codebook, implementation="pallas")
        return codes, code_statistics(x, codes, size, implementation="pallas")

    codes, (counts, sums) = run(quantize, x, codebook)
    assert_nearest(codes, x, codebook, "l2")
    one_hot = np.eye(size)[codes]
    np.testing.assert_array_equal(counts, one_hot.sum(0))
    np.testing.assert_allclose(sums, one_hot.T @ wide(x), rtol=1e-6, atol=1e-6)


def test_no_rows():
    x, codebook = jnp.zeros((0, 4)), normal(11, 5, 4)
    assert nearest_code(x, codebook).shape == (0,)
    counts, sums = code_statistics(x, jnp.zeros(0, int), 5)
    np.testing.assert_array_equal(counts, np.zeros(5))
    np.testing.assert_array_equal(sums, np.zeros((5, 4)))


@pytest.mark.parametrize("implementation", FORMS)
def test_what_is_not_finite(implementation):
    """A row gets code 0, a code is not found; the others are as without."""
    x, codebook = np.array(normal(12, 60, 4)), np.array(normal(13, 64, 4))
    x[7, 1], x[8, 2], x[9, 3] = np.nan, np.inf, -np.inf
    codebook[:2] = -100.0  # so that code 0 is not found by itself
    codebook[41, 0], codebook[42, 1], codebook[43, 2] = np.nan, np.inf, -np.inf
    clean_x, clean_codebook = x.copy(), codebook.copy()
    clean_x[7:10], clean_codebook[41:44] = 0, 1000.0
    wanted = distances(clean_x, clean_codebook, "l2").argmin(1)
    assert wanted[7] != 0
    wanted[7:10] = 0
    np.testing.assert_array_equal(search(x, codebook, implementation), wanted)
    np.testing.assert_array_equal(search(x, np.full_like(codebook, np.nan), implementation), np.zeros(60))


@pytest.mark.parametrize("implementation", FORMS)
def test_cosine_of_zeros_and_of_any_length(implementation):
    codebook = jnp.asarray([[-1.0, 0.0], [0.0, 0.0], [1e-30, 1e-30], [0.0, 1e30]])
    x = jnp.asarray([[0.0, 0.0], [-1.0, -3.0], [1e-6, 1e-6], [1e6, 2e6], [-0.1, 1e4]])
    np.testing.assert_array_equal(search(x, codebook, implementation, metric="cosine"), [0, 0, 2, 2, 3])
    np.testing.assert_array_equal(search(-x[3:], codebook[1:], implementation, metric="cosine"), [0, 0])


def test_bfloat16_finds_codes_that_are_hardly_farther():
    """Against the numbers before they were rounded: not always the same code, but one as near within the rounding."""
    x, codebook = normal(14, 500, 32), normal(15, 400, 32)
    codes = search(x.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16), "xla")
    assert_nearest(codes, x, codebook, "l2", rounding=2.0**-8)
    assert 0.9 < (codes == distances(x, codebook, "l2").argmin(1)).mean() < 1


def problem(seed=16, rows=(3, 150), size=140, width=11, dtype=jnp.float32):
    """Rows of which some are masked, have codes out of range or are not finite; and NumPy's counts and sums."""
    rng = np.random.default_rng(seed)
    x = np.array(normal(seed, *rows, width, dtype=dtype).astype(jnp.float32))
    codes = rng.integers(-3, size + 3, rows)
    valid = rng.random(rows) < 0.8
    x[0, 5], x[1, 7] = np.nan, np.inf
    codes[0, 5], valid[0, 5] = 3, False
    codes[1, 7], valid[1, 7] = 4, True
    kept = valid & (codes >= 0) & (codes < size) & np.isfinite(x).all(-1)
    counts, sums = np.zeros(size), np.zeros((size, width))
    np.add.at(counts, codes[kept], 1)
    np.add.at(sums, codes[kept], x[kept].astype(np.float64))
    return jnp.asarray(x, dtype), jnp.asarray(codes), jnp.asarray(valid), counts, sums


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", jnp.float32), ("xla", jnp.bfloat16), ("pallas", jnp.float32), ("pallas", jnp.bfloat16)],
)
def test_statistics_leave_out_what_is_masked_out_of_range_or_not_finite(implementation, dtype):
    x, codes, valid, counts, sums = problem(dtype=dtype)
    got_counts, got_sums = statistics(x, codes, 140, implementation, valid=valid)
    assert got_counts.dtype == got_sums.dtype == np.float32
    np.testing.assert_array_equal(got_counts, counts)
    np.testing.assert_allclose(got_sums, sums, rtol=1e-6, atol=2e-6)


def test_statistics_as_products_are_those_in_order():
    """The form of machines whose scattered sums come in any order."""
    x, codes, *_ = problem(rows=(2, 200))
    kept = jnp.isfinite(x).all(-1) & (codes >= 0)
    x, codes = jnp.where(kept[..., None], x, 0), jnp.where(kept, codes, 140)
    products = blocks.one_hot_products(140, jax.lax.Precision.HIGHEST, x, codes)
    in_order = blocks.rows_in_order(140, x, codes)
    np.testing.assert_array_equal(products[0], in_order[0])
    np.testing.assert_allclose(products[1], in_order[1], rtol=1e-6, atol=2e-6)


def test_pallas_sums_float32_as_exactly_as_xla():
    x, codes = 1e3 + normal(17, 2000, 5), jnp.zeros(2000, int)
    truth = wide(x).sum(0)
    wrong = {form: np.abs(statistics(x, codes, 1, form)[1][0] - truth).max() for form in ("xla", "pallas")}
    assert wrong["pallas"] <= 2 * wrong["xla"]


def test_codes_of_few_bits():
    codes = jnp.asarray([255, 0, 255], jnp.uint8)
    counts, _ = code_statistics(jnp.ones((3, 2)), codes, 300)
    assert (counts[0], counts[255], counts.sum()) == (1, 2, 3)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_same_result_twice_bit_for_bit(implementation):
    def quantize(x, codebook):
        codes = nearest_code(x, codebook, implementation=implementation)
        return codes, code_statistics(x, codes % 7, 7, implementation=implementation)

    arrays = normal(18, 300, 20), normal(19, 150, 20)
    with dispatch.interpreted():
        quantize = jax.jit(quantize)
        (codes, (_, sums)), (codes_again, (_, sums_again)) = quantize(*arrays), quantize(*arrays)
    np.testing.assert_array_equal(codes_again, codes)
    np.testing.assert_array_equal(sums_again, sums)


@pytest.mark.parametrize("implementation", FORMS)
def test_gradients_are_zero(implementation):
    def loss(x, codebook):
        codes = nearest_code(x, codebook, implementation=implementation)
        counts, sums = code_statistics(x, codes, len(codebook), implementation=implementation)
        return jnp.sum(sums**2) + jnp.sum(counts) + jnp.sum(codebook[codes] * x)

    x, codebook = normal(20, 6, 3), normal(21, 4, 3)
    codes = nearest_code(x, codebook)
    d_x, d_codebook = run(jax.grad(loss, (0, 1)), x, codebook)
    np.testing.assert_allclose(d_x, codebook[codes], rtol=1e-6)  # what does not go through either
    np.testing.assert_allclose(d_codebook, code_statistics(x, codes, 4)[1], rtol=1e-6, atol=1e-6)


def test_averages_without_memory_are_a_step_of_k_means():
    x, codebook = normal(22, 400, 5), normal(23, 12, 5)
    counts, sums = code_statistics(x, nearest_code(x, codebook), 12)
    assert (counts > 0).all()
    nearest = np.square(wide(x)[:, None] - wide(codebook)).sum(-1).argmin(1)
    means = np.stack([wide(x)[nearest == code].mean(0) for code in range(12)])
    np.testing.assert_allclose(sums / counts[:, None], means, rtol=1e-5, atol=1e-6)


def test_memory_is_a_small_part_of_the_matrix_of_distances(monkeypatch):
    monkeypatch.undo()  # blocks of the size that is used
    x, codebook, codes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((65536, 64), jnp.float32), ((8192, 64), jnp.float32), ((65536,), jnp.int32))
    )

    def temporary(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    matrix = 65536 * 8192 * 4
    assert temporary(nearest_code, x, codebook) < 0.02 * matrix
    assert temporary(lambda x, codes: code_statistics(x, codes, 8192), x, codes) < 0.02 * matrix


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
def test_rows_split_over_devices_stay_where_they_are(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, codebook = normal(24, 8, 16, 6), normal(25, 70, 6)

    def quantize(x, codebook):
        codes = nearest_code(x, codebook)
        return codes, code_statistics(x, codes, 70)

    split = jax.jit(quantize, in_shardings=(NamedSharding(mesh, spec), NamedSharding(mesh, P())))
    text = split.lower(x, codebook).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    codes, (counts, sums) = split(x, codebook)
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    expected, (expected_counts, expected_sums) = quantize(x, codebook)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6, atol=1e-6)


def test_on_every_devices_own_part():
    """What the package says to do where the Pallas kernels run."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, codebook = normal(26, 2, 130, 6), normal(27, 70, 6)

    def local(x, codebook):
        codes = nearest_code(x, codebook, implementation="pallas")
        return codes, jax.lax.psum(code_statistics(x, codes, len(codebook), implementation="pallas"), "data")

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=False)
    with dispatch.interpreted():
        codes, (counts, sums) = jax.jit(split)(x, codebook)
    np.testing.assert_array_equal(codes, nearest_code(x, codebook))
    expected_counts, expected_sums = code_statistics(x, codes, 70)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "codebook", "options", "message"),
    [
        (jnp.float32(1), jnp.ones((4, 3)), {}, r"x: got shape \(\), wanted \[\.\.\., D\]"),
        (jnp.ones((2, 0)), jnp.ones((4, 0)), {}, r"x: got shape \(2, 0\), wanted \[\.\.\., D\]"),
        (jnp.ones((2, 3), int), jnp.ones((4, 3)), {}, "x: got dtype int32"),
        (jnp.ones((2, 3)), jnp.ones((4, 3), int), {}, "codebook: got dtype int32"),
        (jnp.ones((2, 3)), jnp.ones((4, 2)), {}, r"codebook: got shape \(4, 2\), wanted \[M, D\] with D=3"),
        (jnp.ones((2, 3)), jnp.ones((0, 3)), {}, "codebook: got no codes"),
        (jnp.ones((2, 3)), jnp.ones((4, 3)), {"metric": "dot"}, "metric: got 'dot'"),
        (jnp.ones((2, 3)), jnp.ones((4, 3)), {"implementation": "cuda"}, "implementation: got 'cuda'"),
    ],
)
def test_wrong_arguments_of_the_search_are_named_in_one_line(x, codebook, options, message):
    with pytest.raises(ValueError, match=f"^nearest_code: {message}[^\n]*$"):
        nearest_code(x, codebook, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((2, 3), int)}, "x: got dtype int32"),
        ({"codes": jnp.zeros(3, int)}, r"codes: got shape \(3,\), wanted \(2,\)"),
        ({"codes": jnp.zeros(2)}, "codes: got dtype float32, wanted integer"),
        ({"valid": jnp.ones((2, 1), bool)}, r"valid: got shape \(2, 1\), wanted \(2,\)"),
        ({"valid": jnp.ones(2, int)}, "valid: got dtype int32, wanted bool"),
        ({"size": 0}, "size: got 0"),
        ({"implementation": "cuda"}, "implementation: got 'cuda'"),
    ],
)
def test_wrong_arguments_of_the_statistics_are_named_in_one_line(changes, message):
    arguments = {"x": jnp.ones((2, 3)), "codes": jnp.zeros(2, int), "size": 4} | changes
    with pytest.raises(ValueError, match=f"^code_statistics: {message}[^\n]*$"):
        code_statistics(**arguments)


def test_pallas_is_refused_where_it_cannot_serve():
    x, codebook = jnp.ones((2, 3)), jnp.ones((4, 3))
    with pytest.raises(NotImplementedError, match=r"^nearest_code: .*needs a TPU"):
        nearest_code(x, codebook, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"^code_statistics: .*needs a TPU"):
        code_statistics(x, jnp.zeros(2, int), 4, implementation="pallas")
    with pytest.raises(NotImplementedError, match="need float16"):
        nearest_code(x.astype(jnp.float16), codebook.astype(jnp.float16), implementation="pallas")
    with pytest.raises(NotImplementedError, match="a width from 1 to"):
        nearest_code(jnp.ones((2, 5000)), jnp.ones((4, 5000)), implementation="pallas")


def test_the_kernels_are_what_a_tpu_gets():
    x, codebook = jax.ShapeDtypeStruct((300, 16), jnp.float32), jax.ShapeDtypeStruct((200, 16), jnp.float32)

    def quantize(x, codebook):
        codes = nearest_code(x, codebook)
        return codes, code_statistics(x, codes, 200)

    text = jax.export.export(jax.jit(quantize), platforms=["tpu"])(x, codebook).mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2
