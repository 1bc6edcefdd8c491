"""The encoder of TFM's codes against its authors' code, with random weights and with those they give.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/Jathurshan0330/TFM-Tokenizer (which imports
linear-attention-transformer and einops).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
pytest.importorskip("linear_attention_transformer", reason="the package that their layers are of")
if "BRAIN_ZOO_PEERS" not in os.environ:
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with TFM-Tokenizer", allow_module_level=True)
ROOT = Path(os.environ["BRAIN_ZOO_PEERS"]) / "TFM-Tokenizer"
if not ROOT.exists():
    pytest.skip("no TFM-Tokenizer in BRAIN_ZOO_PEERS", allow_module_level=True)

import zoo  # noqa: E402
from zoo.encoders.tfm import HEAD_KEYS, KEYS  # noqa: E402
from zoo.weights.keys import below, fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs() -> Any:
    spec = importlib.util.spec_from_file_location("tfm_token", ROOT / "models" / "tfm_token.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_tfm_token_classifier_64x4(n_classes=6).eval()


def released() -> Any:
    file = ROOT / "pretrained_weigths/single_dataset_settings/TUEV_tfm_tokenizer_2x2x8/tfm_encoder_best_model.pth"
    if not file.exists():
        pytest.skip(f"no {file.name} of TUEV in TFM-Tokenizer")
    model = theirs()
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    return model


def moved() -> Any:
    torch.manual_seed(0)
    model = theirs()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("weights", [moved, released])
def test_features_and_logits_are_the_authors(weights):
    model = weights()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert (len(tensors), sum(tensor.size for tensor in tensors.values())) == (59, 789_014)
    codes = np.random.default_rng(0).integers(0, 8193, (2, 16, 9))  # the last one hides
    with torch.no_grad():
        logits = model(torch.tensor(codes)).numpy()
        hidden = model.masked_prediction(torch.tensor(codes)).numpy()
    encoder, head = zoo.create("tfm_encoder"), zoo.create("tfm_encoder").head(6)
    made = jax.eval_shape(lambda: encoder.init(jax.random.key(0), codes, method="read"))["params"]
    own = jax.eval_shape(lambda: head.init(jax.random.key(0), np.zeros((1, 64), np.float32)))["params"]
    rules = (*below(KEYS, "encoder"), *below(HEAD_KEYS, "head"))
    params: Any = fill(rules, tensors, {"params": {"encoder": made, "head": own}})[0]["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 724_998
    encoded = jax.jit(lambda: encoder.apply({"params": params["encoder"]}, codes, method="read"))()
    near(head.apply({"params": params["head"]}, encoded.pooled), logits)
    near(head.apply({"params": params["head"]}, encoded.tokens.reshape(-1, 64)), hidden.reshape(-1, 6))


def near(ours: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
