"""Region attention against its definition, and RAT's layer against its lines written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import close, drawn, merged, mixed, normal, projected, run, weights
from scipy.special import erf

from zoo.attention.region import Region, RegionLayer
from zoo.errors import ZooError

TIME = 12


def definition(variables, x, same, scale=None):
    """Every pair of tokens where `same` [B, T, T]."""
    q, k, v = (projected(variables, name, x) for name in ("query", "key", "value"))
    return merged(variables, mixed(weights(q, k, same[:, None], scale), v))


def equal(labels):
    return labels[:, :, None] == labels[:, None]


def test_tokens_of_equal_ids_see_each_other_wherever_they_lie():
    mixer = Region(16, heads=4)
    x = normal(0, 2, TIME, 16)
    variables = drawn(mixer, x)
    labels = np.random.default_rng(1).integers(-3, 3, (2, TIME))
    there = np.ones((2, TIME), bool)
    there[0, 4], there[1, 8:] = False, False
    same = equal(labels) & there[:, None]
    got = run(mixer, variables, x, segment_ids=jnp.asarray(labels), mask=jnp.asarray(there))
    close(got[there], definition(variables, x, same)[there])


@pytest.mark.parametrize("scale", ["width", "heads"])
def test_regions_of_an_atlas_end_where_a_segment_does(scale):
    labels = np.asarray([5, 1, 5, 9] * 3)
    mixer = Region(16, heads=2, regions=tuple(labels.tolist()), scale=scale)
    x = normal(0, 1, TIME, 16)
    variables = drawn(mixer, x)
    ids = np.repeat([[2, 7, 2]], 4, axis=1)
    same = equal(labels[None]) & (np.arange(3).repeat(4)[:, None] == np.arange(3).repeat(4))
    wanted = definition(variables, x, same, 2**-0.5 if scale == "heads" else 8**-0.5)
    close(run(mixer, variables, x, segment_ids=jnp.asarray(ids)), wanted)


def tiles(*sizes):
    """Labels of a 3 × 4 grid's tiles."""
    row, column = np.indices((3, 4)).reshape(2, -1)
    return (row // sizes[0] * 10 + column // sizes[1])[None]


def test_windows_are_tiles_of_the_grid():
    mixer = Region(16, heads=2, grid=(3, 4), windows=(2, 2))
    x = normal(0, 1, TIME, 16)
    variables = drawn(mixer, x)
    close(run(mixer, variables, x), definition(variables, x, equal(tiles(2, 2))))


def test_the_layer_is_its_four_lines():
    layer = RegionLayer(16, grid=(3, 4), heads=2, windows=(2, 2))
    x, labels = normal(0, 1, TIME, 16), np.asarray([[0, 1, 0, 2] * 3])
    variables = drawn(layer, x, jnp.asarray(labels))
    parts = jax.tree.map(np.float64, variables["params"])

    def normalised(y, n):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * parts[f"norms_{n}"]["scale"] + parts[f"norms_{n}"]["bias"]

    def fed(y, n):
        inner = y @ parts[f"mlps_{n}"]["in"]["kernel"] + parts[f"mlps_{n}"]["in"]["bias"]
        inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
        return inner @ parts[f"mlps_{n}"]["out"]["kernel"] + parts[f"mlps_{n}"]["out"]["bias"]

    y = np.float64(x)
    for n, (name, own) in enumerate((("region", labels), ("window", tiles(2, 2)))):
        attended = definition({"params": parts[name]}, normalised(y, 2 * n), equal(own), 2**-0.5)
        y = y + parts[f"{name}_scale"] * attended
        y = y + fed(normalised(y, 2 * n + 1), n)
    close(run(layer, variables, x, jnp.asarray(labels)), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "none"}, "scale: got 'none', wanted width or heads"),
        ({"regions": (1, 2), "windows": (2,), "grid": (12,)}, "got regions and windows, wanted at most one of them"),
        ({"windows": (2,), "grid": (3, 4)}, "windows: got .2,., wanted a size for each axis of grid .3, 4."),
        ({"regions": (1, 2)}, "got 2 labels, wanted one for each of 12 tokens"),
        ({"causal": True}, "causal: got True, wanted False"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(Region(16, **options).init, jax.random.key(0), normal(0, 1, TIME, 16))
