"""LaBraM against its authors' code, and against braindecode's.

For the first, BRAIN_ZOO_PEERS names a folder with a copy of github.com/935963004/LaBraM (which imports timm 0.4.12 and
einops).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")

from zoo.encoders.labram import (  # noqa: E402
    BRAINDECODE_HEAD_KEYS,
    BRAINDECODE_KEYS,
    HEAD_KEYS,
    KEYS,
    PRETRAINED_KEYS,
    LaBraM,
)
from zoo.sensors import LABRAM_NAMES  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES, PATCHES, CLASSES = ("CZ", "FP1", "O2", "T3"), 3, 5
SIGNAL = np.random.default_rng(0).normal(size=(2, len(NAMES), 200 * PATCHES)).astype(np.float32)


def official(module: str) -> Any:
    """A module of the official repository; skips where there is none."""
    return peer_or_skip("LaBraM", module)


def drawn(model: Any) -> Any:
    """Every parameter anew, so that none is zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def carried(keys: Any, head_keys: Any, model: Any, ours: LaBraM) -> tuple[Any, Any, int]:
    """Our variables, our head's, and how many tensors were matched; encoder and head by one strict map each."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = {rule.source for rule in head_keys}
    shapes = jax.eval_shape(ours.init, jax.random.key(0), SIGNAL, electrodes(NAMES))
    variables, rows = fill(keys, {name: value for name, value in tensors.items() if name not in heads}, shapes)
    head_shapes = jax.eval_shape(ours.head(CLASSES).init, jax.random.key(0), np.zeros((1, ours.dim), np.float32))
    head = None
    if heads:
        head, more = fill(head_keys, {name: tensors[name] for name in heads}, head_shapes)
        rows += more
    matched = {row.source for row in rows if row.target}
    assert matched <= set(tensors)
    return variables, head, len(matched)


def close(ours: Any, theirs: Any, name: str) -> None:
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max()
    print(f"{name}: largest error {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_fine_tuned_model_is_the_authors(size: str) -> None:
    options = {"base": {}, "large": {"embed_dim": 400, "out_chans": 16, "num_heads": 16, "init_values": 1e-5}}[size]
    module = official("modeling_finetune")
    norm = lambda width, **more: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    given = {"embed_dim": 200, "depth": 2, "num_heads": 10, "out_chans": 8, "init_values": 0.1, **options}
    model = drawn(
        module.NeuralTransformer(
            num_classes=CLASSES, norm_layer=norm, qk_norm=norm, qkv_bias=False, use_mean_pooling=True, **given
        )
    )
    ours = LaBraM(
        depth=2, dim=given["embed_dim"], heads=given["num_heads"], conv_features=given["out_chans"], layer_scale=0.1
    )
    variables, head, count = carried(KEYS, HEAD_KEYS, model, ours)
    assert count == 1 + 2 + 12 + 2 * 17 + 2 + 2
    rows = torch.tensor([0] + [1 + LABRAM_NAMES.index(name) for name in NAMES])
    patches = torch.tensor(SIGNAL).reshape(2, len(NAMES), PATCHES, 200)
    out = jax.jit(ours.apply)(variables, SIGNAL, electrodes(NAMES))
    close(out.tokens, model.forward_features(patches, rows, return_patch_tokens=True), "tokens")
    close(out.pooled, model.forward_features(patches, rows), "pooled")
    close(ours.head(CLASSES).apply(head, out.pooled), model(patches, rows), "logits")


def test_the_pretrained_model_is_the_authors() -> None:
    module = official("modeling_pretrain")
    norm = lambda width, **more: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    model = drawn(
        module.NeuralTransformerForMEM(
            patch_size=200,
            embed_dim=200,
            depth=2,
            num_heads=10,
            qkv_bias=False,
            norm_layer=norm,
            qk_norm=norm,
            init_values=0.1,
        )
    )
    ours = LaBraM(depth=2, cls_position="first_channel")
    variables, _, count = carried(PRETRAINED_KEYS, (), model, ours)
    assert count == 1 + 2 + 12 + 2 * 17 + 2
    rows = torch.tensor([0] + [1 + LABRAM_NAMES.index(name) for name in NAMES])
    patches = torch.tensor(SIGNAL).reshape(2, len(NAMES), PATCHES, 200)
    nothing = torch.zeros((2, len(NAMES) * PATCHES), dtype=torch.bool)
    theirs = model.student(patches, rows, nothing, return_patch_tokens=True)
    close(jax.jit(ours.apply)(variables, SIGNAL, electrodes(NAMES)).tokens, theirs, "tokens")


def test_braindecode_s_model_is_ours() -> None:
    from braindecode_models import braindecode_models

    model = drawn(
        braindecode_models().Labram(
            n_times=200 * PATCHES, n_chans=len(NAMES), n_outputs=CLASSES, num_layers=2, use_mean_pooling=True
        )
    )
    ours = LaBraM(depth=2, max_patches=PATCHES + 1)
    variables, head, count = carried(BRAINDECODE_KEYS, BRAINDECODE_HEAD_KEYS, model, ours)
    assert count == 1 + 2 + 12 + 2 * 17 + 2 + 2
    given = {"x": torch.tensor(SIGNAL), "ch_names": list(NAMES)}
    out = jax.jit(ours.apply)(variables, SIGNAL, electrodes(NAMES))
    close(out.tokens, model.forward_features(given["x"], _rows(), return_patch_tokens=True), "tokens")
    close(out.pooled, model.forward_features(given["x"], _rows()), "pooled")
    close(ours.head(CLASSES).apply(head, out.pooled), model(**given), "logits")


def _rows() -> Any:
    return torch.tensor([0] + [1 + LABRAM_NAMES.index(name) for name in NAMES])
