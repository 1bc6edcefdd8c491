"""VQ-NSP against its authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/935963004/LaBraM (which imports timm 0.4.12 and einops).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("LaBraM", "modeling_vqnsp")

from zoo.sensors import LABRAM_NAMES  # noqa: E402
from zoo.tokenizers.labram_vqnsp import KEYS, LaBraMVQNSP  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("CZ", "FP1", "O2", "T3")
CODES, WIDTH, PATCHES = 50, 64, 3


def official() -> Any:
    """The base model with few codes, every parameter and every code drawn anew."""
    torch.manual_seed(0)
    model = peer.vqnsp_encoder_base_decoder_3x200x12(n_code=CODES, code_dim=WIDTH, quantize_kmeans_init=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantize."):
                parameter += (0.2 if "conv" in name else 0.05) * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any, Any, np.ndarray]:
    """Their model, ours, our variables, a signal."""
    model = official()
    ours = LaBraMVQNSP(codes=CODES, code_dim=WIDTH, kmeans=0)
    signal = np.random.default_rng(0).normal(size=(2, len(NAMES), 200 * PATCHES)).astype(np.float32)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), signal, electrodes(NAMES))
    tensors = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    variables, rows = fill(KEYS, tensors, shapes)
    assert len({row.source for row in rows if row.target}) == 15 * 13 + 12 + 2 * 3 + 2 * 2 + 2 + 3 * 4 + 3
    return model, ours, jax.tree.map(jnp.asarray, variables), signal


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"largest error {error:.1e}")
    assert error < tolerance


def test_a_step_of_training_is_theirs(both: Any) -> None:
    model, ours, variables, signal = both
    rows = torch.tensor([0] + [1 + LABRAM_NAMES.index(name) for name in NAMES])
    given = torch.tensor(signal, requires_grad=True)
    patches = given.reshape(2, len(NAMES), PATCHES, 200)

    # In evaluation first: there their codes do not move.
    model.eval()
    quantized, codes, commitment = model.encode(patches, rows)
    amplitude, phase = model.decode(quantized, rows)
    loss, log = model(given, rows)
    (gradient,) = torch.autograd.grad(loss, given)

    def forward(signal: Any) -> Any:
        out = ours.apply(variables, signal, electrodes(NAMES))
        return sum(ours.loss_weights[name] * value for name, value in out.losses.items()), out

    (our_loss, out), our_gradient = jax.value_and_grad(forward, has_aux=True)(jnp.asarray(signal))
    np.testing.assert_array_equal(out.codes[..., 0], codes.reshape(2, -1))
    assert len(np.unique(out.codes)) > 5
    close(out.quantized, quantized.permute(0, 2, 3, 1).reshape(2, -1, WIDTH))
    close(out.losses["commitment"], commitment)
    close(out.losses["amplitude"], log["val/rec_loss"])
    close(out.losses["phase"], log["val/rec_angle_loss"])
    close(our_loss, loss)
    close(our_gradient, gradient, 5e-5)  # it has passed fifteen layers twice
    spectra = ours.apply(variables, out.quantized, electrodes(NAMES), False, method="_spectra")
    close(spectra[0], amplitude)
    close(spectra[1], phase)

    model.train()
    model(given, rows)
    rngs = {"codes": jax.random.key(0)}
    _, new = ours.apply(variables, signal, electrodes(NAMES), train=True, mutable=["codebooks"], rngs=rngs)
    close(new["codebooks"]["quantizer"]["embedding"], model.quantize.embedding.weight)
