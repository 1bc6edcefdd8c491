"""BIOT against its authors' code, and against braindecode's.

For the first, BRAIN_ZOO_PEERS names a folder with a copy of github.com/ycq091044/BIOT (which imports
linear-attention-transformer).
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

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")
pytest.importorskip("linear_attention_transformer", reason="the package that their layers are of")

import zoo  # noqa: E402
from zoo.encoders.biot import (  # noqa: E402
    BIPOLAR,
    BRAINDECODE_HEAD_KEYS,
    BRAINDECODE_KEYS,
    CLASSIFIER_KEYS,
    HEAD_KEYS,
)
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES, SAMPLES, FRAMES = 6, 730, 6
SIGNAL = np.random.default_rng(0).normal(size=(2, 16, SAMPLES)).astype(np.float32)
# As their loaders scale it.
SCALED = SIGNAL / (np.quantile(np.abs(SIGNAL), 0.95, axis=-1, keepdims=True) + 1e-8)


def compare(model: Any, inner: Any, keys: Any, head_keys: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = {rule.source for rule in head_keys}
    encoder, sensors = zoo.create("biot_base"), electrodes(BIPOLAR)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), SIGNAL, sensors)
    variables, rows = fill(keys, {name: value for name, value in tensors.items() if name not in heads}, shapes)
    head_shapes = jax.eval_shape(encoder.head(CLASSES).init, jax.random.key(0), np.zeros((1, 256), np.float32))
    head, more = fill(head_keys, {name: tensors[name] for name in heads}, head_shapes)
    assert len({row.source for row in (*rows, *more) if row.target}) == 3 + 4 * 13 + 2

    seen: list[Any] = []
    inner.transformer.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        logits, pooled = model(torch.tensor(SCALED)), inner(torch.tensor(SCALED))
    out = jax.jit(encoder.apply)(variables, SIGNAL, sensors)
    for name, ours, theirs in (
        ("tokens", out.tokens, seen[0]),
        ("pooled", out.pooled, pooled),
        ("logits", encoder.head(CLASSES).apply(head, out.pooled), logits),
    ):
        error = np.abs(np.asarray(ours) - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        print(f"{name}: largest error {error:.1e}")
        assert error < 1e-5


def test_the_classifier_is_the_authors() -> None:
    if "BRAIN_ZOO_PEERS" not in os.environ:
        pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with BIOT")
    path = Path(os.environ["BRAIN_ZOO_PEERS"]) / "BIOT" / "model" / "biot.py"
    if not path.exists():
        pytest.skip("no BIOT in BRAIN_ZOO_PEERS")
    spec = importlib.util.spec_from_file_location("official_biot", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.BIOTClassifier(n_classes=CLASSES, n_channels=16)
    compare(model, model.biot, CLASSIFIER_KEYS, HEAD_KEYS)


def test_braindecode_s_model_is_ours() -> None:
    from braindecode_models import braindecode_models

    model = braindecode_models().BIOT(n_chans=16, n_times=SAMPLES, n_outputs=CLASSES, sfreq=200)
    compare(model, model.encoder, BRAINDECODE_KEYS, BRAINDECODE_HEAD_KEYS)
