"""MVCNet's two branches against its authors' code, and PyTorch's transformer layer, which is its second branch.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/wzwvv/MVCNet (whose IFNet imports timm).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.encoders.mvcnet import KEYS
from zoo.objectives.mvcnet import TRANSFORMER_KEYS, ChannelTransformer
from zoo.weights.keys import fill

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("FZ", "C3", "C4", "O1", "O2")


def tensors(module: Any) -> dict[str, np.ndarray]:
    """Every parameter and statistic, drawn anew."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape) + 0.3)
    module.eval()
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("samples", [501, 1001])
def test_the_convolutional_branch_is_theirs(samples):
    if "BRAIN_ZOO_PEERS" not in os.environ:
        pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with MVCNet")
    path = Path(os.environ["BRAIN_ZOO_PEERS"]) / "MVCNet" / "models" / "IFNet.py"
    if not path.exists():
        pytest.skip("BRAIN_ZOO_PEERS has no MVCNet")
    pytest.importorskip("timm")
    spec: Any = importlib.util.spec_from_file_location("ifnet", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    theirs = peer.IFNet("", len(NAMES), 64, 63, 1, 125, samples, 2)
    given = tensors(theirs)
    signal = np.random.default_rng(0).normal(size=(3, len(NAMES), samples)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(signal)).numpy()
    encoder = zoo.create("mvcnet_base", channels=NAMES, samples=samples)
    sensors = electrodes(NAMES, 3)
    variables, _ = fill(KEYS, given, encoder.init(jax.random.key(0), signal, sensors))
    pooled = jax.jit(encoder.apply)(variables, signal, sensors).pooled
    print("branch", np.abs(pooled - expected).max() / np.abs(expected).max(), len(given))
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_other_branch_is_a_transformer_layer():
    samples = 40
    theirs = torch.nn.TransformerEncoderLayer(samples, 2, max(2 * samples, 128), batch_first=True)
    given = tensors(theirs)
    x = np.random.default_rng(0).normal(size=(3, 5, samples)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(x)).numpy()
    ours = ChannelTransformer()
    variables, _ = fill(TRANSFORMER_KEYS, given, ours.init(jax.random.key(0), x, False))
    out = jax.jit(lambda variables: ours.apply(variables, x, False))(variables)
    print("layer", np.abs(out - expected).max() / np.abs(expected).max(), len(given))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
