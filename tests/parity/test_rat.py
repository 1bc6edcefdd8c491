"""RAT's layer against its authors' code, whose checkout is on the path.

github.com/Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = pytest.importorskip("Model_RAT", reason="no package: PYTHONPATH=a checkout of the authors' code")

from zoo.attention.region import RegionLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIM, HEADS, GRID = 16, 8, (8, 4)


def array(tensor: Any) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())


def linear(module: Any) -> dict[str, Any]:
    """Of a linear map or a convolution of 1 × 1."""
    return {"kernel": array(module.weight).reshape(module.weight.shape[:2]).T, "bias": array(module.bias)}


def attention(qkv: Any, out: Any) -> dict[str, Any]:
    whole, merge = linear(qkv), linear(out)
    thirds = zip(jnp.split(whole["kernel"], 3, axis=1), jnp.split(whole["bias"], 3), strict=True)
    parts: dict[str, Any] = {
        name: {"kernel": kernel.reshape(DIM, HEADS, -1), "bias": bias.reshape(HEADS, -1)}
        for name, (kernel, bias) in zip(("query", "key", "value"), thirds, strict=True)
    }
    return {**parts, "out": {"kernel": merge["kernel"].reshape(HEADS, -1, DIM), "bias": merge["bias"]}}


def test_outputs_are_those_of_the_layer():
    module = peer.BasicLayer(DIM, HEADS, 4, 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    params: dict[str, Any] = {
        "region": attention(module.ra.qkv, module.ra.project_out),
        "window": attention(module.wa.qkv, module.wa.proj_out),
        "region_scale": array(module.lambda_ra).reshape(-1),
        "window_scale": array(module.lambda_wa).reshape(-1),
    }
    for n, mlp in enumerate((module.mlp_ra, module.mlp_wa)):
        params[f"mlps_{n}"] = {"in": linear(mlp.fc1), "out": linear(mlp.fc2)}
    for n, norm in enumerate((module.norm_ra, module.norm_ra_mlp, module.norm_wa, module.norm_wa_mlp)):
        params[f"norms_{n}"] = {"scale": array(norm.weight), "bias": array(norm.bias)}

    rng = np.random.default_rng(1)
    time = GRID[0] * GRID[1]
    x, labels = rng.standard_normal((2, time, DIM), np.float32), rng.integers(0, 5, (2, time))
    other = torch.tensor(labels[:, :, None] != labels[:, None])
    image = torch.tensor(x).transpose(1, 2).reshape(2, DIM, *GRID)
    with torch.no_grad():
        theirs = module(image, -1000.0 * other).flatten(2).transpose(1, 2).numpy()
    layer = RegionLayer(DIM, GRID, heads=HEADS)
    ours = layer.apply({"params": params}, jnp.asarray(x), jnp.asarray(labels))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
