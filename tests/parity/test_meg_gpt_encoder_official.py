"""MEG-GPT in its released configuration against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/OHBA-analysis/MEG-GPT (whose decoder imports einops).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
ROOT = Path(os.environ.get("BRAIN_ZOO_PEERS", "")) / "MEG-GPT"
if "BRAIN_ZOO_PEERS" not in os.environ or not ROOT.exists():
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with MEG-GPT", allow_module_level=True)
sys.path.insert(0, str(ROOT))
# Their packages import the training loop, which the layers do not need.
for name in ("meg_gpt", "meg_gpt.models", "meg_gpt.configs"):
    package = ModuleType(name)
    package.__path__ = [str(ROOT / name.replace(".", "/"))]  # type: ignore[attr-defined]
    sys.modules.setdefault(name, package)
configs = ModuleType("meg_gpt.configs.config")
configs.Label = SimpleNamespace  # type: ignore[attr-defined]
sys.modules.setdefault("meg_gpt.configs.config", configs)
sys.modules["meg_gpt.configs"].Label = SimpleNamespace  # type: ignore[attr-defined]
embeddings = pytest.importorskip("meg_gpt.models.embeddings")
decoder = pytest.importorskip("meg_gpt.models.decoder.transformer_decoder")

import zoo  # noqa: E402
from zoo.encoders.meg_gpt import CODE_HEAD_KEYS, KEYS  # noqa: E402
from zoo.weights.keys import below, fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SESSIONS, CHANNELS = 621, 52


class Theirs(torch.nn.Module):
    """Their embedding, decoder and head as `MEGGPT` puts them together."""

    def __init__(self) -> None:
        super().__init__()
        label = SimpleNamespace(label_dim=66, n_classes=SESSIONS, name="session_labels")
        none = [None] * 5
        self.input_embedding_layer = embeddings.InputEmbeddingLayer(
            256, 66, 100, CHANNELS, 256, 256, "absolute", 256, [label]
        )
        self.transformer_decoder = decoder.TransformerDecoder(
            4, 256, 256, CHANNELS, [25, 20, 10, 8, 16], [4, 4, 8, 8, 1], [100, 25, 20, 10, 8], [1, 4, 4, 8, 8],
            [0] * 5, none, [8, *none[1:]], [False] * 5, [False] * 5, none, None, 0.1, 0.1, 0.0, 1024, "gelu", 0.2,
            "layer",
        )  # fmt: skip
        self.prediction_head = torch.nn.Linear(256, 66)

    def forward(self, codes: Any, labels: Any) -> Any:
        return self.transformer_decoder(self.input_embedding_layer(codes, [labels]))


def test_tokens_and_logits_are_the_authors():
    torch.manual_seed(0)
    model = Theirs().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    codes, who = rng.integers(0, 66, (2, CHANNELS, 100)), np.array([3, 620])
    with torch.no_grad():
        labels = torch.tensor(np.broadcast_to(who[:, None], (2, 101)).copy())
        tokens = model(torch.tensor(codes.transpose(0, 2, 1).copy()), labels)
        logits = model.prediction_head(tokens).numpy().transpose(0, 2, 1, 3)
    encoder = zoo.create("meg_gpt_base", subjects=SESSIONS)
    made = jax.eval_shape(lambda: encoder.init(jax.random.key(0), codes, subject=who, method="read"))["params"]
    own = {"head": {"kernel": np.zeros((256, 66), np.float32), "bias": np.zeros(66, np.float32)}}
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    rules = (*below(KEYS, "encoder"), *below(CODE_HEAD_KEYS, "codes"))
    params: Any = fill(rules, tensors, {"params": {"encoder": made, "codes": own}})[0]["params"]
    params = jax.tree.map(jnp.asarray, params)
    ours = jax.jit(lambda: encoder.apply({"params": params["encoder"]}, codes, subject=who, method="read"))()
    near(ours, tokens.numpy().transpose(0, 2, 1, 3))
    near(np.asarray(ours) @ params["codes"]["head"]["kernel"] + params["codes"]["head"]["bias"], logits)


def near(ours: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
