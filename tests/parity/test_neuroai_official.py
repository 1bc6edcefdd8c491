"""SimpleConv and the MEG-to-image module against their authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/facebookresearch/neuroai (whose models import torchvision and
exca).
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from braindecode_models import braindecode_models
from electrodes import electrodes

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
if "BRAIN_ZOO_PEERS" not in os.environ:
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with neuroai", allow_module_level=True)
ROOT = Path(os.environ["BRAIN_ZOO_PEERS"]) / "neuroai" / "neuraltrain-repo" / "neuraltrain"
if not ROOT.exists():
    pytest.skip("no neuroai in BRAIN_ZOO_PEERS", allow_module_level=True)
# They look for braindecode's models, and would leave half of them imported where torchaudio is absent.
braindecode_models()
# Without what the packages import for all their other models.
for name, folder in (("neuraltrain", ROOT), ("neuraltrain.models", ROOT / "models")):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [str(folder)]
peer = pytest.importorskip("neuraltrain.models.simpleconv", reason="no torchvision or exca", exc_type=ImportError)

import zoo  # noqa: E402
from zoo.encoders import meg_image, simple_conv  # noqa: E402
from zoo.layers.spatial_attention import flattened, placed, spanning  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("FZ", "F8", "C4", "P4", "OZ", "P3", "C3")
COMMON: dict[str, Any] = {
    "hidden": 320,
    "kernel_size": 3,
    "dilation_period": 5,
    "skip": True,
    "glu": 2,
    "glu_context": 1,
    "gelu": True,
    "batch_norm": True,
    "initial_linear": 270,
}
FOURIER = {"n_freqs": None, "total_dim": 2000, "n_dims": 3}


def drawn(model: Any) -> dict[str, np.ndarray]:
    """The model's tensors, statistics drawn too."""
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor += torch.tensor(rng.normal(size=tensor.shape), dtype=torch.float32)
        elif name.endswith("running_var"):
            tensor *= torch.tensor(rng.uniform(0.5, 2, tensor.shape), dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def given(samples: int) -> tuple[np.ndarray, Any]:
    """A recording whose last channel of the second example is missing."""
    rng = np.random.default_rng(1)
    sensors = electrodes(NAMES)
    position = rng.normal(size=(2, len(NAMES), 3)) * [0.06, 0.07, 0.05] + [0, 0, 0.05]
    sensors.valid[1, -1] = False
    signal = rng.normal(size=(2, len(NAMES), samples)).astype(np.float32)
    return signal, sensors.replace(position=position.astype(np.float32))


def their_positions(sensors: Any, axes: int) -> Any:
    here = placed(sensors)
    place = spanning(flattened(sensors.position) if axes == 2 else sensors.position, here)
    return torch.tensor(np.where(here[..., None], place, -0.1))


def agree(ours: Any, theirs: Any) -> None:
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()
    print(f"largest error {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("subjects", [0, 3])
def test_predicted_sound_is_theirs(subjects):
    torch.manual_seed(0)
    layers = {"n_subjects": subjects, "bias": False} if subjects else None
    config = peer.SimpleConv(
        **COMMON, depth=10, complex_out=True, subject_layers_config=layers, subject_layers_dim="input"
    )
    theirs = config.build(len(NAMES), 1024).eval()
    signal, sensors = given(40)
    encoder = zoo.create("simple_conv_base", subjects=subjects)
    subject = np.array([2, 0]) if subjects else None
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), signal, sensors, subject=subject))
    keys = simple_conv.SUBJECT_KEYS if subjects else simple_conv.KEYS
    variables, ledger = fill(keys, drawn(theirs), shapes)
    encoded = jax.jit(encoder.apply)(variables, signal, sensors, subject=subject)
    with torch.no_grad():
        who = torch.tensor(subject) if subjects else None
        wanted = theirs(torch.tensor(signal), who, their_positions(sensors, 2)).numpy()
    print(len(ledger), "tensors")
    agree(encoded.tokens, wanted.swapaxes(1, 2))
    agree(encoded.pooled, wanted.mean(-1))


@pytest.mark.parametrize(("ours", "aggregate"), [("linear", "linear"), ("attention", "att"), ("mean", "gap")])
def test_the_vector_of_an_image_is_theirs(ours, aggregate):
    torch.manual_seed(0)
    merger = {"n_virtual_channels": 270, "fourier_emb_config": FOURIER, "dropout": 0.2}
    config = peer.SimpleConvTimeAgg(
        **COMMON, depth=4, backbone_out_channels=512, time_agg_out=aggregate, merger_config=merger
    )
    theirs = config.build(len(NAMES), 512).eval()
    signal, sensors = given(256)
    with torch.no_grad():
        # Which also makes the lazy layer.
        theirs(torch.tensor(signal), channel_positions=their_positions(sensors, 3))
    tensors = drawn(theirs)
    with torch.no_grad():
        wanted = theirs(torch.tensor(signal), channel_positions=their_positions(sensors, 3)).numpy()
    if aggregate == "linear":
        assert sum(parameter.numel() for parameter in theirs.parameters()) == 4_170_867
    encoder = zoo.create("meg_image_base", aggregate=ours)
    keys = {"linear": meg_image.KEYS, "attention": meg_image.ATTENTION_KEYS, "mean": meg_image.KEYS[:-2]}[ours]
    variables, ledger = fill(keys, tensors, jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    print(len(ledger), "tensors")
    agree(jax.jit(encoder.apply)(variables, signal, sensors).pooled, wanted)
