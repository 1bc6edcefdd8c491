"""GLIM's encoder and aligner against their authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/justin-xzliu/GLIM (which imports timm).
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("GLIM/model", "modules")

from zoo.encoders.glim import KEYS  # noqa: E402
from zoo.objectives.glim import ALIGNER_KEYS, ReadText  # noqa: E402
from zoo.weights.keys import below, fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"channels": 16, "samples": 64, "dim": 32, "queries": 6, "depth": 2, "heads": 4}
ROWS = {name: [str(row) for row in range(count)] for name, count in (("task", 3), ("dataset", 3), ("subject", 31))}


def test_tokens_and_aligned_vectors() -> None:
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict(
        {
            "p_embedder": peer.PromptEmbedder(16, (3, 3, 31), (0.0, 1.0, 1.0), ROWS),
            "eeg_encoder": peer.EEGEncoder(64, 6, 16, 32, 0, 2, 2, num_heads=4),
            "aligner": peer.Aligner(32, 48, 8, 0.0),
        }
    ).eval()
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if name != "eeg_encoder.pos_embed":
                parameter += 0.1 * torch.randn_like(parameter)
    source = {name: value.detach().numpy() for name, value in modules.state_dict().items()}

    rng = np.random.default_rng(0)
    signal = rng.normal(size=(3, 16, 64)).astype(np.float32)
    signal[1, :, 50:] = 0
    prompt = np.array([[0, 0, 0], [1, 2, 7], [2, 1, 30]], np.int32)
    text, valid = rng.normal(size=(3, 5, 48)).astype(np.float32), np.arange(5) < np.array([[5], [3], [4]])
    module = ReadText("glim_base", SMALL).module(48)
    given = signal, electrodes([""] * 16, 3), text, valid, prompt
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)
    variables, ledger = fill([*below(KEYS, "encoder"), *ALIGNER_KEYS], source, shapes)
    assert {row.source for row in ledger} == set(source)

    with torch.no_grad():
        there = torch.from_numpy((np.arange(64) < np.array([[64], [50], [64]])).astype(np.int32))
        told = modules["p_embedder"](torch.from_numpy(prompt))
        tokens, _ = modules["eeg_encoder"](torch.from_numpy(signal.swapaxes(1, 2)), there, told)
        states, eeg = modules["aligner"].embed_eeg(tokens)
        words = modules["aligner"].embed_text(torch.from_numpy(text), torch.from_numpy(valid.astype(np.int32)))

    ours = jax.jit(module.apply)(variables, *given)
    for name, mine, theirs in zip(("states", "eeg", "text"), ours, (states, eeg, words), strict=True):
        error = np.abs(np.asarray(mine) - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        print(f"{name}: relative error {error:.1e}, {len(source)} tensors")
        assert error < 1e-5
