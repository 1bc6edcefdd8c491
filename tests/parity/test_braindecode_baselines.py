"""EEGNet, ShallowFBCSPNet, Deep4Net and EEGConformer against braindecode's: feature maps and logits.

Needs braindecode (1.8.1 was compared). Weights are random, statistics of normalisations too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from braindecode_models import braindecode_models  # noqa: E402

import zoo  # noqa: E402
from zoo.encoders import deep4, eeg_conformer, eegnet, shallow  # noqa: E402
from zoo.encoders.encoder import blank  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

models = braindecode_models()
NAMES = ("FP1", "FP2", "C3", "C4", "O1")
CLASSES = 3

# Ours and its options; braindecode's and its; key maps of encoder and head; samples; the module whose output is tokens.
CASES = [
    ("eegnet_base", {}, "EEGNet", {}, eegnet.KEYS, eegnet.HEAD_KEYS, 256, "pool_2"),
    (
        "eegnet_base",
        {"head_max_norm": 0.25},
        "EEGNet",
        {"final_layer_with_constraint": True},
        eegnet.KEYS,
        eegnet.MAX_NORM_HEAD_KEYS,
        160,
        "pool_2",
    ),
    ("shallow_base", {}, "ShallowFBCSPNet", {}, shallow.KEYS, shallow.HEAD_KEYS, 250, "pool_nonlin_exp"),
    ("deep4_base", {}, "Deep4Net", {}, deep4.KEYS, deep4.HEAD_KEYS, 550, "pool_4"),
    ("eeg_conformer_base", {}, "EEGConformer", {}, eeg_conformer.KEYS, eeg_conformer.HEAD_KEYS, 200, "transformer"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options", "peer", "peer_options", "keys", "head_keys", "samples", "last"), CASES)
def test_features_and_logits_are_theirs(name, options, peer, peer_options, keys, head_keys, samples, last):
    torch.manual_seed(0)
    theirs = getattr(models, peer)(n_chans=len(NAMES), n_outputs=CLASSES, n_times=samples, sfreq=250, **peer_options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for buffer_name, buffer in theirs.named_buffers():
            if "running" in buffer_name:
                buffer.copy_(torch.rand(buffer.shape) + 0.3)
    theirs.eval()
    kept: dict[str, Any] = {}
    dict(theirs.named_modules())[last].register_forward_hook(lambda _, __, out: kept.update(map=out))
    signal = np.random.default_rng(0).normal(size=(4, len(NAMES), samples)).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.as_tensor(signal)).numpy()
    tensors = {key: value.numpy() for key, value in theirs.state_dict().items()}
    in_head = {key for rule in head_keys for key in tensors if key == rule.source}

    encoder = zoo.create(name, channels=NAMES, samples=samples, **options)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), blank(NAMES, samples)[1])
    made = encoder.init(jax.random.key(0), signal, sensors)
    variables, _ = fill(keys, {key: value for key, value in tensors.items() if key not in in_head}, made)
    encoded = jax.jit(encoder.apply)(variables, signal, sensors)
    head = encoder.head(CLASSES)
    weights, _ = fill(head_keys, {key: tensors[key] for key in in_head}, head.init(jax.random.key(0), encoded.pooled))
    tokens = kept["map"].numpy()
    if last != "transformer":
        tokens = tokens.reshape(len(tokens), encoded.tokens.shape[2], -1).swapaxes(1, 2)
    for ours, their in ((encoded.tokens, tokens), (jax.jit(head.apply)(weights, encoded.pooled), logits)):
        np.testing.assert_allclose(ours, their, rtol=0, atol=1e-5 * np.abs(their).max())
        print(name, np.abs(ours - their).max() / np.abs(their).max(), len(tensors))
