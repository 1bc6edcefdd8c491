"""EEGPT against its authors' code, and against braindecode's.

For the first, BRAIN_ZOO_PEERS names a folder with a copy of github.com/BINE022/EEGPT.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from electrodes import electrodes

torch = pytest.importorskip("torch", reason="PyTorch runs the peers")

import zoo  # noqa: E402
from zoo.encoders.eegpt import BRAINDECODE_HEAD_KEYS, CHANNELS, KEYS, encoder_keys  # noqa: E402
from zoo.objectives.eegpt import KEYS as PRETRAINING_KEYS  # noqa: E402
from zoo.objectives.eegpt import AlignAndReconstruct  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES, DEPTH, CLASSES = ("CZ", "FP1", "O2", "PO5", "AF8", "T7"), 2, 4
SIGNAL = np.random.default_rng(0).normal(size=(2, len(NAMES), 256)).astype(np.float32)


def official() -> Any:
    """Their model file of pretraining; skips where there is none."""
    if "BRAIN_ZOO_PEERS" not in os.environ:
        pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with EEGPT")
    path = Path(os.environ["BRAIN_ZOO_PEERS"]) / "EEGPT" / "pretrain" / "modeling_pretraining.py"
    if not path.exists():
        pytest.skip("no EEGPT in BRAIN_ZOO_PEERS")
    spec = importlib.util.spec_from_file_location("official_eegpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def arrays(module: Any) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def carried(keys: Any, tensors: Any, module: Any, *given: Any) -> tuple[Any, int]:
    filled, rows = fill(keys, tensors, jax.eval_shape(module.init, jax.random.key(0), *given))
    return filled, len({row.source for row in rows if row.target})


def close(ours: Any, theirs: Any, name: str) -> None:
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max()
    print(f"{name}: largest error {error:.1e}")
    assert error < 1e-5


def test_the_encoder_is_the_authors_hidden_or_not() -> None:
    module = official()
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    given = {"img_size": (6, 256), "embed_dim": 512, "embed_num": 4, "depth": DEPTH, "num_heads": 8}
    model = drawn(module.EEGTransformer(**given, norm_layer=norm))
    encoder = zoo.create("eegpt_large", depth=DEPTH, patches=4, visible=2)
    variables, count = carried(encoder_keys(""), arrays(model), encoder, SIGNAL, electrodes(NAMES))
    assert count == 4 + 12 * DEPTH + 2
    rows = model.prepare_chan_ids(NAMES)
    apply = jax.jit(encoder.apply)
    close(apply(variables, SIGNAL, electrodes(NAMES)).tokens, model(torch.tensor(SIGNAL), rows), "tokens")

    # Patches 0 and 2 keep two channels each, the others none.
    kept = {0: (1, 4), 2: (0, 5)}
    mask = np.ones((2, 6, 4), bool)
    for patch, channels in kept.items():
        mask[:, channels, patch] = False
    keep = torch.tensor([[patch * 6 + channel for channel in channels] for patch, channels in kept.items()])
    theirs = model(torch.tensor(SIGNAL), rows, mask_x=keep)
    ours = np.asarray(apply(variables, SIGNAL, electrodes(NAMES), mask=mask).tokens).reshape(2, 4, 4, 512)
    close(ours[:, [0, 2]], theirs, "tokens of patches with hidden channels")


def test_a_step_of_pretraining_is_the_authors() -> None:
    """Predictions, reconstructions and both losses, with one mask for the batch, as theirs is."""
    module, functional = official(), torch.nn.functional
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    size = {"embed_dim": 64, "embed_num": 2, "num_heads": 4, "norm_layer": norm}
    parts = torch.nn.ModuleDict({"encoder": module.EEGTransformer(img_size=(6, 256), depth=2, **size)})
    parts["target_encoder"] = module.EEGTransformer(img_size=(6, 256), depth=2, **size)
    grid = {"num_patches": parts["encoder"].num_patches, **size}
    parts["predictor"] = module.EEGTransformerPredictor(predictor_embed_dim=64, depth=1, use_part_pred=True, **grid)
    parts["reconstructor"] = module.EEGTransformerReconstructor(reconstructor_embed_dim=64, depth=2, **grid)
    frequencies = {name: value.clone() for name, value in parts.state_dict().items() if name.endswith("freqs")}
    drawn(parts)
    parts.load_state_dict(frequencies, strict=False)

    shown, x = {1: (0, 4), 2: (3, 5)}, torch.tensor(SIGNAL)
    kept, asked = np.zeros((2, 6, 4), bool), np.ones((2, 6, 4), bool)
    for patch, channels in shown.items():
        kept[:, channels, patch] = True
        asked[:, :, patch] = False
    asked[:, 2, 1] = True
    mask_x = torch.tensor([[patch * 6 + channel for channel in channels] for patch, channels in shown.items()])
    mask_y = torch.tensor(
        [patch * 6 + channel for patch in range(4) for channel in range(6) if asked[0, channel, patch]]
    )
    rows = parts["encoder"].prepare_chan_ids(NAMES)
    with torch.no_grad():
        wanted = parts["target_encoder"](x, rows)
        wanted = functional.layer_norm(wanted, (64,))
        samples = x.reshape(2, 6, 4, 64).permute(0, 2, 1, 3).reshape(2, 24, 64)[:, mask_y]
        predicted, known = parts["predictor"](parts["encoder"](x, rows, mask_x=mask_x), mask_x=mask_x)
        rebuilt = parts["reconstructor"](known, rows, mask_y=mask_y)
        losses = [
            functional.mse_loss(wanted, predicted),
            functional.mse_loss(functional.layer_norm(samples, (64,)), rebuilt),
        ]

    options = {"dim": 64, "summaries": 2, "depth": 2, "heads": 4, "patches": 4}
    task = AlignAndReconstruct("eegpt_large", options, predictor_depth=1, reconstructor_depth=2, visible=2)
    batch = {"signal": SIGNAL, "sensors": electrodes(NAMES)}
    made = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    variables, ledger = fill(PRETRAINING_KEYS, arrays(parts), made)
    assert len({row.source for row in ledger if row.target and row.source}) == 2 * (6 + 24) + (7 + 12) + (8 + 24)
    out = jax.jit(task.module().apply)({"params": variables["params"]}, SIGNAL, batch["sensors"], kept, asked)
    close(out["predicted"], predicted, "predicted summaries")
    ours = np.asarray(out["samples"]).transpose(0, 2, 1, 3).reshape(2, 24, 64)[:, mask_y.numpy()]
    close(ours, rebuilt, "reconstructed samples")
    _, metrics, _ = jax.jit(task.loss_of, static_argnums=5)(variables, batch, kept, asked, jax.random.key(0), False)
    close(metrics["alignment"], losses[0], "alignment")
    close(metrics["reconstruction"], losses[1], "reconstruction")


@pytest.mark.parametrize("stride", [64, 32])
def test_braindecode_s_model_is_ours(stride: int) -> None:
    from braindecode_models import braindecode_models

    model = drawn(
        braindecode_models().EEGPT(
            n_chans=len(NAMES),
            n_times=256,
            n_outputs=CLASSES,
            chs_info=[{"ch_name": name} for name in NAMES],
            patch_stride=stride,
            depth=DEPTH,
            chan_proj_type="none",
        )
    )
    patches = 4 if stride == 64 else 7
    encoder = zoo.create("eegpt_large", depth=DEPTH, stride=stride, patches=patches)
    tensors = {name: value for name, value in arrays(model).items() if name != "chans_id"}
    heads = {rule.source for rule in BRAINDECODE_HEAD_KEYS}
    body = {name: value for name, value in tensors.items() if name not in heads}
    variables, count = carried(KEYS, body, encoder, SIGNAL, electrodes(NAMES))
    out = jax.jit(encoder.apply)(variables, SIGNAL, electrodes(NAMES))
    head, more = carried(
        BRAINDECODE_HEAD_KEYS, {name: tensors[name] for name in heads}, encoder.head(CLASSES), out.pooled
    )
    assert count + more == 4 + 12 * DEPTH + 2 + 4
    assert [CHANNELS[row] for row in model.chans_id[0]] == list(NAMES)
    close(out.tokens, model.target_encoder(torch.tensor(SIGNAL), model.chans_id), "tokens")
    close(jax.jit(encoder.head(CLASSES).apply)(head, out.pooled), model(torch.tensor(SIGNAL)), "logits")
