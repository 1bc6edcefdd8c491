"""NeuroBOLT against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/soupeeli/NeuroBOLT (which imports timm 0.4.12, einops and
linear-attention-transformer).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_module

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
pytest.importorskip("linear_attention_transformer", reason="the package that their layers are of")
if "BRAIN_ZOO_PEERS" not in os.environ:
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with NeuroBOLT", allow_module_level=True)
ROOT = Path(os.environ["BRAIN_ZOO_PEERS"]) / "NeuroBOLT"
if not ROOT.exists():
    pytest.skip("no NeuroBOLT in BRAIN_ZOO_PEERS", allow_module_level=True)

import zoo  # noqa: E402
from zoo.encoders.neurobolt import HEAD_KEYS, KEYS, VANDERBILT  # noqa: E402
from zoo.sensors import LABRAM_NAMES  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DEPTH, REGIONS = 1, 3


def official() -> Any:
    return peer_module(ROOT, "models.model")


def test_the_whole_model_is_the_authors_and_has_their_count() -> None:
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    torch.manual_seed(0)
    model = official().NeuroBOLTransformer(
        num_roi=REGIONS, depth=DEPTH, num_heads=10, qk_norm=norm, norm_layer=norm, init_values=0.1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    signal = np.random.default_rng(0).normal(size=(2, 26, 3200)).astype(np.float32)
    encoder, sensors = zoo.create("neurobolt_base", labram={"depth": DEPTH}), electrodes(VANDERBILT)
    head = encoder.head(REGIONS)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = {name: tensors.pop(name) for name in ("head.weight", "head.bias")}
    variables, rows = fill(KEYS, tensors, jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    of_head = jax.eval_shape(head.init, jax.random.key(0), np.zeros((1, 200), np.float32))
    mapped, more = fill(HEAD_KEYS, heads, of_head)
    assert len({row.source for row in (*rows, *more) if row.target}) == 17 + 17 * DEPTH + 16 + 1 + 4 * 13 + 2

    given = torch.tensor(signal).reshape(2, 26, 16, 200)
    channels = torch.tensor([0] + [1 + LABRAM_NAMES.index(name) for name in VANDERBILT])
    out = jax.jit(encoder.apply)(variables, signal, sensors)
    theirs = model(given, input_chans=channels).detach().numpy()
    error = np.abs(np.asarray(jax.jit(head.apply)(mapped, out.pooled)) - theirs).max() / np.abs(theirs).max()
    print(f"regions: largest error {error:.1e}")
    assert error < 1e-5
