"""NeuroBridge's two encoders against their authors' code, which is only run here.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/feroooooo/NeuroBridge (whose models import einops).
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

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
pytest.importorskip("einops", reason="the authors' models import it")
if "BRAIN_ZOO_PEERS" not in os.environ:
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with NeuroBridge", allow_module_level=True)
FILE = Path(os.environ["BRAIN_ZOO_PEERS"]) / "NeuroBridge" / "module" / "eeg_encoder" / "model.py"
if not FILE.exists():
    pytest.skip("no NeuroBridge in BRAIN_ZOO_PEERS", allow_module_level=True)

import zoo  # noqa: E402
from zoo.encoders.neurobridge import PROJECT_KEYS, TSCONV_KEYS  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def peer(name: str, channels: int) -> Any:
    """Their model with every number drawn, statistics too."""
    spec = importlib.util.spec_from_file_location("neurobridge_models", FILE)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = getattr(module, name)(channels_num=channels).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor *= 0.5 + torch.rand(tensor.shape)
            elif not key.endswith("num_batches_tracked"):
                tensor += 0.05 * torch.randn(tensor.shape)
    return model


@pytest.mark.parametrize(
    ("name", "theirs", "keys", "count"),
    [
        ("neurobridge_intra", "EEGProject", PROJECT_KEYS, 5_404_672),
        ("neurobridge_inter", "TSConv", TSCONV_KEYS, 2_630_912),
    ],
)
def test_vectors_are_theirs(name, theirs, keys, count):
    encoder = zoo.create(name)
    channels = encoder.channels
    model = peer(theirs, len(channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    signal = np.random.default_rng(0).normal(size=(2, len(channels), 250)).astype(np.float32)
    sensors = electrodes(channels)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    variables, ledger = fill(keys, tensors, jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    with torch.no_grad():
        wanted = model(torch.tensor(signal)).numpy()
    ours = np.asarray(jax.jit(encoder.apply)(variables, signal, sensors).pooled)
    error = np.abs(ours - wanted).max() / np.abs(wanted).max()
    print(f"{len(ledger)} tensors, largest error {error:.1e}")
    assert error < 1e-5
