"""CBraMod against its authors' code, and against braindecode's.

For the first, BRAIN_ZOO_PEERS names a folder with a copy of github.com/wjq-learning/CBraMod.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_module

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")

import zoo  # noqa: E402
from zoo.encoders.cbramod import HEAD_KEYS, KEYS, MEAN_HEAD_KEYS  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CHANNELS, PATCHES, CLASSES, DEPTH = 16, 5, 6, 2
SENSORS = electrodes([""] * CHANNELS)
SIGNAL = np.random.default_rng(0).normal(size=(2, CHANNELS, 200 * PATCHES)).astype(np.float32)
BLOCKS = 2 + 3 * 4 + 2 + DEPTH * 16


def official(module: str) -> Any:
    if "BRAIN_ZOO_PEERS" not in os.environ:
        pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with CBraMod")
    root = Path(os.environ["BRAIN_ZOO_PEERS"]) / "CBraMod"
    if not root.exists():
        pytest.skip("no CBraMod in BRAIN_ZOO_PEERS")
    return peer_module(root, module)


def drawn(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("mask_encoding"):
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def arrays(module: Any) -> dict[str, Any]:
    """Tensors by name, but for braindecode's classifier, which reads what pretraining predicts."""
    return {name: value.numpy() for name, value in module.state_dict().items() if not name.startswith("final_layer")}


def carried(keys: Any, tensors: Any, module: Any, *given: Any) -> tuple[Any, int]:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)
    filled, rows = fill(keys, tensors, shapes)
    return filled, len({row.source for row in rows if row.target})


def close(ours: Any, theirs: Any, name: str) -> None:
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max()
    print(f"{name}: largest error {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("classifier", ["all_patch_reps", "avgpooling_patch_reps"])
def test_the_fine_tuned_model_is_the_authors(classifier: str) -> None:
    module = official("models.model_for_tuev")
    param = SimpleNamespace(use_pretrained_weights=False, classifier=classifier, num_of_classes=CLASSES, dropout=0.1)
    model = module.Model(param)
    del model.backbone.encoder.layers[DEPTH:]
    model = drawn(model)
    every = classifier == "all_patch_reps"
    encoder = zoo.create("cbramod_base", channels=CHANNELS, depth=DEPTH, patches=PATCHES * every)
    variables, count = carried(KEYS, arrays(model.backbone), encoder, SIGNAL, SENSORS)
    assert count == BLOCKS
    out = jax.jit(encoder.apply)(variables, SIGNAL, SENSORS)
    head = encoder.head(CLASSES)
    mapped, count = carried(
        HEAD_KEYS if every else MEAN_HEAD_KEYS,
        {f"classifier.{name}": value for name, value in arrays(model.classifier).items()},
        head,
        out.pooled,
    )
    assert count == (6 if every else 2)
    patches = torch.tensor(SIGNAL).reshape(2, CHANNELS, PATCHES, 200)
    close(out.tokens, model.backbone(patches), "tokens")
    close(head.apply(mapped, out.pooled), model(patches), "logits")


def test_the_pretrained_model_is_the_authors_where_patches_are_hidden() -> None:
    model = drawn(official("models.cbramod").CBraMod(n_layer=DEPTH))
    encoder = zoo.create("cbramod_base", channels=CHANNELS, depth=DEPTH)
    variables, count = carried(KEYS, arrays(model), encoder, SIGNAL, SENSORS)
    assert count == BLOCKS
    mask = np.random.default_rng(1).random((2, CHANNELS, PATCHES)) < 0.5
    out = jax.jit(encoder.apply)(variables, SIGNAL, SENSORS, mask=mask)
    theirs = model(torch.tensor(SIGNAL).reshape(2, CHANNELS, PATCHES, 200), torch.tensor(mask).long())
    rows = arrays(model)
    close(np.asarray(out.tokens) @ rows["proj_out.0.weight"].T + rows["proj_out.0.bias"], theirs, "predictions")


def test_braindecode_s_model_is_ours() -> None:
    from braindecode_models import braindecode_models

    models = braindecode_models()
    model = drawn(models.CBraMod(n_chans=CHANNELS, n_times=200 * PATCHES, n_outputs=CLASSES, n_layer=DEPTH))
    encoder = zoo.create("cbramod_base", channels=CHANNELS, depth=DEPTH)
    variables, count = carried(KEYS, arrays(model), encoder, SIGNAL, SENSORS)
    assert count == BLOCKS
    out = jax.jit(encoder.apply)(variables, SIGNAL, SENSORS)
    rows = arrays(model)
    ours = np.asarray(out.tokens) @ rows["proj_out.0.weight"].T + rows["proj_out.0.bias"]
    close(ours, model(torch.tensor(SIGNAL), return_features=True)["features"], "features")
