"""EEG Conformer against its authors' code: tokens and logits.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/eeyhsong/EEG-Conformer (which imports torchvision, einops,
scikit-learn, matplotlib; an empty torchsummary stands in for the package, which only prints).
"""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from peer_modules import peer_or_skip

import zoo
from zoo.encoders.eeg_conformer import OFFICIAL_HEAD_KEYS, OFFICIAL_KEYS
from zoo.encoders.encoder import blank
from zoo.weights.keys import fill

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
stub: Any = types.ModuleType("torchsummary")
stub.summary = None
sys.modules.setdefault("torchsummary", stub)
peer = peer_or_skip("EEG-Conformer", "conformer")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tokens_and_logits_are_theirs():
    """At its 22 electrodes and 1,000 samples, which are fixed in the code."""
    torch.manual_seed(0)
    theirs = peer.Conformer()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in theirs.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape) + 0.3)
    theirs.eval()
    signal = np.random.default_rng(0).normal(size=(2, 22, 1000)).astype(np.float32)
    with torch.no_grad():
        pooled, logits = (each.numpy() for each in theirs(torch.as_tensor(signal)[:, None]))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    in_head = {name for name in tensors if name.startswith("2.")}

    encoder = zoo.create("eeg_conformer_official")
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), blank(22, 1000)[1])
    made = encoder.init(jax.random.key(0), signal, sensors)
    variables, _ = fill(OFFICIAL_KEYS, {name: tensors[name] for name in tensors if name not in in_head}, made)
    encoded = jax.jit(encoder.apply)(variables, signal, sensors)
    head = encoder.head(4)
    weights = head.init(jax.random.key(0), encoded.pooled)
    weights, _ = fill(OFFICIAL_HEAD_KEYS, {name: tensors[name] for name in in_head}, weights)
    for ours, their in ((encoded.pooled, pooled), (jax.jit(head.apply)(weights, encoded.pooled), logits)):
        print(np.abs(ours - their).max() / np.abs(their).max(), len(tensors))
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5 * np.abs(their).max())
