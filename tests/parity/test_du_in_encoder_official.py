"""Du-IN's encoder and classifier against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/liulab-repository/Du-IN (which imports einops).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("Du-IN", "models.duin")
settings = peer_or_skip("Du-IN", "params.duin_params")

import zoo  # noqa: E402
from zoo.encoders.du_in import HEAD_KEYS, KEYS, MASK_KEYS  # noqa: E402
from zoo.types import Sensors  # noqa: E402
from zoo.weights.keys import Key, below, fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SUBJECT = np.array([7, 0, 9])
"""Of ten."""


def random(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.eval(), {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def recording() -> tuple[np.ndarray, Sensors, Any, Any]:
    signal = np.random.default_rng(1).standard_normal((3, 16, 4000)).astype(np.float32)
    valid = np.arange(16) < np.array([14, 16, 9])[:, None]
    signal *= valid[..., None]
    nowhere, kind = np.full((3, 16, 3), np.nan, np.float32), np.full((3, 16), 3, np.int32)
    given = torch.tensor(signal.transpose(0, 2, 1).copy()), torch.tensor(np.eye(10, dtype=np.float32)[SUBJECT])
    return signal, Sensors(nowhere, nowhere, kind, np.full_like(kind, -1), valid), *given


def test_tokens_and_logits_are_the_authors():
    model, tensors = random(peer.duin_cls(settings.duin_cls_params().model))
    signal, sensors, series, who = recording()
    seen = []
    model.encoder.register_forward_hook(lambda module, given, out: seen.append(out.detach().numpy()))
    with torch.no_grad():
        wanted = model((series, torch.eye(61)[:3], who))[0].numpy()
    encoder = zoo.create("du_in_encoder_base", sigmoid=True, subjects=10)
    head = encoder.head(61)
    made = jax.eval_shape(
        lambda: {
            "encoder": encoder.init(jax.random.key(0), signal, sensors, subject=SUBJECT),
            "head": head.init(jax.random.key(0), np.zeros((1, 6400), np.float32)),
        }
    )
    made = {name: {part: made[part][name] for part in made if name in made[part]} for name in ("params", "batch_stats")}
    filled: Any = fill((*below(KEYS, "encoder"), *below(HEAD_KEYS, "head")), tensors, made)[0]
    variables = {name: filled[name]["encoder"] for name in filled}
    encoded = jax.jit(lambda: encoder.apply(variables, signal, sensors, subject=SUBJECT))()
    near(encoded.tokens, seen[0])
    near(head.apply({"params": filled["params"]["head"]}, encoded.pooled), wanted)


def test_codes_of_hidden_tokens_are_the_authors():
    """Their prediction is of the mask where it hides, and of its complement elsewhere."""
    model, tensors = random(peer.duin_mae(settings.duin_mae_params().model))
    signal, sensors, series, who = recording()
    mask = np.random.default_rng(2).random((3, 40)) < 0.5
    model.gen_mask = lambda embedded, mask_ratio: torch.tensor(mask)
    with torch.no_grad():
        wanted = model((series, torch.zeros(3, 40, 2048), who))[0].numpy()
    encoder = zoo.create("du_in_encoder_base", subjects=10)
    made = jax.eval_shape(lambda: encoder.init(jax.random.key(0), signal, sensors, subject=SUBJECT, mask=mask))
    code_head = Key("cls_block.cls_head.0.0.weight", "params/code_head"), Key("cls_block.cls_head.0.0.bias", "params/b")
    heads = {"code_head": np.zeros((2048, 160), np.float32), "b": np.zeros(2048, np.float32)}
    made = {**made, "params": {**made["params"], **heads}}
    filled: Any = fill((*KEYS, *MASK_KEYS, *code_head), tensors, made)[0]
    kernel, bias = filled["params"].pop("code_head"), filled["params"].pop("b")

    @jax.jit
    def logits(mask: Any) -> Any:
        return encoder.apply(filled, signal, sensors, subject=SUBJECT, mask=mask).tokens @ kernel.T + bias

    near(np.where(mask[..., None], logits(mask), logits(~mask)), wanted)


def near(ours: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
