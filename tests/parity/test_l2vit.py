"""L2ViT against its authors' code: github.com/ChuanyangZheng/L2ViT, whose `classification/models` is on the path."""

from __future__ import annotations

from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = pytest.importorskip("l2vit", reason="no package: PYTHONPATH=L2ViT/classification/models of the authors' code")

from zoo.attention.local_global_linear import L2ViT  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DIMS, DEPTHS, WINDOW = (32, 64), (2, 2), 2  # windows that divide the grids of all stages


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


class Copied:
    """Our variables, filled in the order in which our modules are made: the n-th of a kind is called kind_n."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.statistics: dict[str, Any] = {}
        self.made: Counter[str] = Counter()

    def add(self, kind: str, parameters: Any, statistics: Any = None) -> None:
        name = f"{kind}_{self.made[kind]}"
        self.made[kind] += 1
        self.parameters[name] = parameters
        if statistics is not None:
            self.statistics[name] = statistics

    def norm(self, module: Any) -> None:
        self.add("LayerNorm", scaled(module))

    def batch_norm(self, module: Any) -> None:
        self.add("BatchNorm", scaled(module), running(module))

    def convolution(self, module: Any) -> None:
        self.add("Conv", convolved(module))

    def around(self, module: Any) -> None:
        self.add("GridConvolution", depthwise(module.proj))

    def mlp(self, module: Any) -> None:
        self.add("GeluMLP", {"in": linear(module.fc1), "out": linear(module.fc2)})


def scaled(module: Any) -> dict[str, np.ndarray]:
    return {"scale": array(module.weight), "bias": array(module.bias)}


def running(module: Any) -> dict[str, np.ndarray]:
    return {"mean": array(module.running_mean), "var": array(module.running_var)}


def linear(module: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(module.weight).T, "bias": array(module.bias)}


def convolved(module: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(module.weight).transpose(2, 3, 1, 0), "bias": array(module.bias)}


def depthwise(module: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(module.weight)[:, 0].transpose(1, 2, 0), "bias": array(module.bias)}


def projections(module: Any, heads: int) -> dict[str, Any]:
    weight, bias = array(module.qkv.weight), array(module.qkv.bias)
    dim = weight.shape[1]
    kernels, biases = weight.reshape(3, heads, -1, dim), bias.reshape(3, heads, -1)
    own = {
        name: {"kernel": kernels[n].transpose(2, 0, 1), "bias": biases[n]}
        for n, name in enumerate(("query", "key", "value"))
    }
    out = array(module.proj.weight).T.reshape(heads, -1, dim)
    return {**own, "out": {"kernel": out, "bias": array(module.proj.bias)}}


def copied(model: Any) -> Copied:
    ours = Copied()
    for stage, (step, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        if stage == 0:
            first, first_norm, _, second, second_norm = step.proj.proj
            ours.convolution(first)
            ours.batch_norm(first_norm)
            ours.convolution(second)
            ours.batch_norm(second_norm)
            ours.norm(step.norm)
        else:
            ours.norm(step.norm)
            ours.convolution(step.proj)
        for block in blocks:
            ours.around(block.cpe[0])
            heads = block.num_heads
            ours.norm(block.norm1)
            if hasattr(block, "local_mp"):
                temperature = array(block.attn.temperature).ravel()
                ours.add("GlobalLinear", {**projections(block.attn, heads), "temperature": temperature})
                near = block.local_mp
                parameters = {"first": depthwise(near.conv1), "norm": scaled(near.bn), "second": depthwise(near.conv2)}
                ours.add("Concentration", parameters, {"norm": running(near.bn)})
                ours.norm(block.norm3)
            else:
                ours.add("LocalWindow", projections(block.attn, heads))
                ours.around(block.cpe[1])
            ours.mlp(block.mlp)
            ours.norm(block.norm2)
    ours.norm(model.norm)
    ours.parameters["head"] = linear(model.head)
    return ours


def test_class_scores_and_gradients_are_the_authors():
    torch.manual_seed(0)
    # Their loop over stages counts to four.
    dims, depths = (*DIMS, *DIMS), (*DEPTHS, 1, 1)
    options = {"dims": list(dims), "depths": list(depths), "num_heads": [dim // 32 for dim in dims]}
    model = peer.L2ViT(
        **options, num_classes=7, block_type="mix_local_enhanced_vit", conv_stem=True, window_size=WINDOW
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor + (noise.abs() if name.endswith("running_var") else noise))
    image = np.random.default_rng(2).standard_normal((2, 64, 128, 3)).astype(np.float32)
    given = torch.tensor(image.transpose(0, 3, 1, 2), requires_grad=True)
    scores = model(given)
    scores[:, 0].sum().backward()

    ours, variables = L2ViT(7, dims, depths, WINDOW), copied(model)
    values = jax.tree.map(jnp.asarray, {"params": variables.parameters, "batch_stats": variables.statistics})
    made = nn.unbox(jax.eval_shape(ours.init, jax.random.key(0), jnp.asarray(image)))
    assert jax.tree.map(np.shape, values) == jax.tree.map(lambda leaf: leaf.shape, made)

    @jax.jit
    def pulled(image: Any) -> Any:
        out, vjp = jax.vjp(lambda image: ours.apply(values, image), image)
        return out, vjp(jnp.zeros_like(out).at[:, 0].set(1))[0]

    out, gradient = pulled(jnp.asarray(image))
    wanted = array(given.grad).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, array(scores), rtol=1e-4, atol=1e-4 * np.abs(array(scores)).max())
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
