"""BrainOmni, with its tokenizer in it, against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/OpenTSLab/BrainOmni (which imports einx and
vector_quantize_pytorch).
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
# Their quantizer asks it whether there are several processes; it does not install without a CUDA compiler.
deepspeed, communication = ModuleType("deepspeed"), ModuleType("deepspeed.comm")
communication.is_initialized = lambda: False  # type: ignore[attr-defined]
communication.ReduceOp = SimpleNamespace(SUM=None)  # type: ignore[attr-defined]
deepspeed.comm = communication  # type: ignore[attr-defined]
sys.modules.setdefault("deepspeed", deepspeed)
sys.modules.setdefault("deepspeed.comm", communication)
peer = peer_or_skip("BrainOmni", "brainomni.model")

import zoo  # noqa: E402
from zoo.encoders.brainomni import CODE_HEAD_KEYS, HEAD_KEYS, keys  # noqa: E402
from zoo.types import Sensors  # noqa: E402
from zoo.weights.keys import below, fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, CHANNELS, WINDOW = 2, 7, 256
TOKENIZER = {"window": WINDOW, "filters": 4, "dim": 32, "heads": 4, "latents": 5, "codes": 20, "levels": 3}
OURS = {"tokenizer_options": TOKENIZER, "depth": 3, "dropout": 0.0}
THEIRS = {
    "window_length": WINDOW,
    "n_filters": 4,
    "ratios": [8, 4, 2],
    "kernel_size": 5,
    "last_kernel_size": 5,
    "n_dim": 32,
    "n_neuro": 5,
    "n_head": 4,
    "dropout": 0.0,
    "codebook_dim": 32,
    "codebook_size": 20,
    "num_quantizers": 3,
    "rotation_trick": True,
    "quantize_optimize_method": "ema",
    "overlap_ratio": 0.25,
    "lm_depth": 3,
    "lm_dropout": 0.0,
    "mask_ratio": 0.5,
    "num_quantizers_used": 3,
}


def recording() -> tuple[np.ndarray, Sensors]:
    """Three EEG channels, two magnetometers and two gradiometers, in their units; the last window is not whole."""
    rng = np.random.default_rng(0)
    kind = np.broadcast_to(np.array([0, 0, 0, 1, 1, 2, 2], np.int32), (BATCH, CHANNELS))
    size = np.array([2e-5, 1e-12, 1e-11])[kind][..., None]
    signal = (np.cumsum(rng.normal(size=(BATCH, CHANNELS, 2 * WINDOW)), -1) * size).astype(np.float32)
    position = rng.normal(size=(BATCH, CHANNELS, 3)) * 0.1
    orientation = np.where((kind > 0)[..., None], rng.normal(size=position.shape), np.nan)
    places = (position.astype(np.float32), orientation.astype(np.float32))
    return signal, Sensors(*places, kind, np.full_like(kind, -1), np.ones(kind.shape, bool))


def prepared(signal: np.ndarray, sensors: Sensors) -> tuple[Any, Any, Any]:
    """What their preprocessing would give their model (`factory/utils.py`), in float64."""
    signal, kind = signal.astype(np.float64), np.asarray(sensors.kind)
    position = np.concatenate([sensors.position, np.nan_to_num(sensors.orientation)], -1).astype(np.float64)
    for row in range(BATCH):
        for index, floor in enumerate((1e-5, 1e-13, 1e-13)):
            group = signal[row, kind[row] == index]
            group = group - group.mean(0)
            signal[row, kind[row] == index] = group / (group.std() + floor)
        for group in (kind[row] == 0, kind[row] > 0):
            place = position[row, group, :3] - position[row, group, :3].mean(0)
            position[row, group, :3] = place / np.sqrt(3 * np.square(place).sum(1).mean())
    return tuple(torch.tensor(each) for each in (signal.astype(np.float32), position.astype(np.float32), kind))


@pytest.mark.parametrize("dim", [32, 48])
def test_features_logits_and_codes_are_the_authors(dim):
    """With and without a projection from the tokenizer's features."""
    torch.manual_seed(0)
    model = peer.BrainOmni(**THEIRS, lm_dim=dim, lm_head=4).eval()
    classifier = torch.nn.Sequential(
        torch.nn.Dropout(), torch.nn.Linear(5 * dim, dim), torch.nn.SELU(), torch.nn.Linear(dim, 3)
    ).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
        for layer in model.tokenizer.quantizer.rvq.layers:
            layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape) / 6)
            layer._codebook.inited.fill_(1)
    signal, sensors = recording()
    given = prepared(signal, sensors)
    with torch.no_grad():
        features = model.encode(*given)
        logits = classifier(features.mean(2).flatten(1)).numpy()
        hidden = np.random.default_rng(1).random(features.shape[:3]) < 0.5
        quantized = model.tokenizer.tokenize(*given, 0.25)[0]
        x = torch.where(torch.tensor(hidden)[..., None], model.mask_token, quantized)
        x = model.projection(x + model.tokenizer.encoder.neuros[:, None])
        for block in model.blocks:
            x = block(x)
        codes = model.predict_head(x).numpy()

    encoder = zoo.create("brainomni_base", **OURS, dim=dim, heads=4)
    head = encoder.head(3)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors |= {f"class_head.{name}": tensor.numpy() for name, tensor in classifier.state_dict().items()}

    def init(key: Any) -> Any:
        made = nn.unbox(encoder.init(key, signal, sensors, mask=hidden))
        own = head.init(key, np.zeros((1, encoder.features), np.float32))["params"]
        code = {"head": {"kernel": np.zeros((dim, 60)), "bias": np.zeros(60)}}
        params = {"encoder": made["params"], "head": own, "codes": code}
        return {"params": params, "tokenizer": {"encoder": made["tokenizer"]}}

    rules = (*below(keys(3, dim != 32), "encoder"), *below(HEAD_KEYS, "head"), *below(CODE_HEAD_KEYS, "codes"))
    filled: Any = fill(rules, tensors, jax.eval_shape(init, jax.random.key(0)))[0]
    variables = {name: filled[name]["encoder"] for name in ("params", "tokenizer")}
    seen = jax.jit(lambda: encoder.apply(variables, signal, sensors))()
    near(seen.tokens, features.numpy().reshape(seen.tokens.shape))
    near(head.apply({"params": filled["params"]["head"]}, seen.pooled), logits)
    tokens = jax.jit(lambda: encoder.apply(variables, signal, sensors, mask=hidden))().tokens
    last = filled["params"]["codes"]["head"]
    near(tokens @ last["kernel"] + last["bias"], codes.reshape(*tokens.shape[:2], -1))


def near(ours: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
