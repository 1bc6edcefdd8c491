"""REVE against braindecode's, whose parts are the official ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from electrodes import electrodes

torch = pytest.importorskip("torch", reason="PyTorch runs the peer")

from braindecode_models import braindecode_models  # noqa: E402

import zoo  # noqa: E402
from zoo.encoders.reve import HEAD_KEYS, KEYS  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES, DEPTH, CLASSES = ("CZ", "FP1", "O2"), 2, 5


def test_braindecode_s_model_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    models = braindecode_models()
    from braindecode.models import reve as peer

    class Bank(torch.nn.Module):
        """In place of the one that is fetched from the network."""

    monkeypatch.setattr(peer, "RevePositionBank", Bank)
    torch.manual_seed(0)
    model = models.REVE(
        n_chans=3, n_times=600, n_outputs=CLASSES, sfreq=200, depth=DEPTH, attention_pooling=True
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    encoder, sensors = zoo.create("reve_small", depth=DEPTH), electrodes(NAMES)
    signal = np.random.default_rng(0).normal(size=(2, 3, 600)).astype(np.float32)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith("final_layer")}
    variables, rows = fill(KEYS, tensors, jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    shapes = jax.eval_shape(encoder.head(CLASSES).init, jax.random.key(0), np.zeros((1, 512), np.float32))
    head, more = fill(HEAD_KEYS, heads, shapes)
    assert len({row.source for row in (*rows, *more) if row.target}) == 8 + 6 * DEPTH + 4
    given = torch.tensor(signal), torch.tensor(np.array(sensors.position))
    out = jax.jit(encoder.apply)(variables, signal, sensors)
    with torch.no_grad():
        tokens = model(*given, return_features=True)["features"]
        logits = model(*given)
    for name, ours, theirs in (
        ("tokens", out.tokens, tokens.reshape(2, -1, 512)),
        ("logits", encoder.head(CLASSES).apply(head, out.pooled), logits),
    ):
        error = np.abs(np.asarray(ours) - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        print(f"{name}: largest error {error:.1e}")
        assert error < 1e-5
