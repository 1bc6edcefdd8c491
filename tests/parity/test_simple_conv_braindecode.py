"""SimpleConv against braindecode's BrainModule."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from braindecode_models import braindecode_models
from electrodes import electrodes

torch = pytest.importorskip("torch", reason="PyTorch runs braindecode's models")
models = braindecode_models()

import zoo  # noqa: E402
from zoo.encoders.simple_conv import BRAINDECODE_HEAD_KEYS, BRAINDECODE_KEYS  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("FZ", "F8", "C4", "P4", "OZ", "P3", "C3")


def drawn(model: Any) -> dict[str, np.ndarray]:
    """The model's tensors, statistics drawn too."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor += torch.tensor(rng.normal(size=tensor.shape), dtype=torch.float32)
            elif name.endswith("running_var"):
                tensor *= torch.tensor(rng.uniform(0.5, 2, tensor.shape), dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_features_and_logits_are_those_of_the_brain_module():
    # On a ring about the head both ways of flattening it agree.
    sensors = electrodes(NAMES)
    places = [{"ch_name": name, "loc": place} for name, place in zip(NAMES, sensors.position[0], strict=True)]
    torch.manual_seed(0)
    theirs = models.BrainModule(n_outputs=3, n_chans=len(NAMES), n_times=40, chs_info=places, use_merger=True).eval()
    tensors = drawn(theirs)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("final_layer")}
    body = {name: tensor for name, tensor in tensors.items() if name not in head}
    encoder = zoo.create("simple_conv_base", mixed=320, outputs=0)
    signal = np.random.default_rng(1).normal(size=(2, len(NAMES), 40)).astype(np.float32)
    variables, ledger = fill(BRAINDECODE_KEYS, body, jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    encoded = jax.jit(encoder.apply)(variables, signal, sensors)
    classifier = encoder.head(3)
    weights, _ = fill(BRAINDECODE_HEAD_KEYS, head, jax.eval_shape(classifier.init, jax.random.key(0), encoded.pooled))
    with torch.no_grad():
        wanted = theirs(torch.tensor(signal)).numpy()
        tokens = theirs.merger(torch.tensor(signal), theirs.channel_positions[None].expand(2, -1, -1))
        tokens = theirs.encoder(theirs.input_projection(tokens)).numpy().swapaxes(1, 2)
    errors = [
        np.abs(np.asarray(ours) - right).max() / np.abs(right).max()
        for ours, right in ((encoded.tokens, tokens), (classifier.apply(weights, encoded.pooled), wanted))
    ]
    print(f"{len(ledger)} tensors, largest errors {errors}")
    assert max(errors) < 1e-5
