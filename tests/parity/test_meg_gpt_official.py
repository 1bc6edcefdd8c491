"""MEG-GPT's tokenizers against their authors' code and weights.

BRAIN_ZOO_PEERS names a folder with copies of github.com/OHBA-analysis/EphysTokenizer (which imports pytorch_lightning,
omegaconf and pqdm) and /MEG-GPT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
if "BRAIN_ZOO_PEERS" not in os.environ:
    pytest.skip("no package: BRAIN_ZOO_PEERS, a folder with EphysTokenizer and MEG-GPT", allow_module_level=True)
PEERS = Path(os.environ["BRAIN_ZOO_PEERS"])
sys.path.insert(0, str(PEERS / "EphysTokenizer"))
peer = pytest.importorskip("ephys_tokenizer.models", reason="no EphysTokenizer in BRAIN_ZOO_PEERS")

import zoo  # noqa: E402
from zoo.tokenizers.meg_gpt import KEYS, refactored  # noqa: E402
from zoo.types import Sensors  # noqa: E402
from zoo.weights.files import read  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, CHANNELS, SAMPLES, TAU = 2, 3, 60, 0.3


def sensors(examples: int, channels: int) -> Sensors:
    blank, none = np.full((examples, channels, 3), np.nan, np.float32), np.zeros((examples, channels), np.int32)
    return Sensors(blank, blank, none, none, np.ones((examples, channels), bool))


def made(vocabulary: int, units: int, wave: int, padding: str) -> Any:
    options = {"n_channels": CHANNELS, "sequence_length": SAMPLES, "n_tokens": vocabulary, "rnn_n_units": units}
    options |= {"token_dim": wave, "token_kernel_padding": padding, "token_kernel_bias": True, "token_groups": 1}
    return peer.EphysTokenizer(SimpleNamespace(config_class=SimpleNamespace(rnn_type="gru", rnn_n_layers=1, **options)))


def copied(values: dict[str, Any]) -> dict[str, Any]:
    """Their parameters, or the gradients of them, where ours have them."""
    values = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in values.items()}
    recurrent, choice = "encoder_layer.rnn_layers.0.", "token_weights_layer."
    return {
        "recurrent": {
            "input_kernel": values[recurrent + "weight_ih_l0"].T,
            "state_kernel": values[recurrent + "weight_hh_l0"].T,
            "input_bias": values[recurrent + "bias_ih_l0"],
            "state_bias": values[recurrent + "bias_hh_l0"],
        },
        "logits": {"kernel": values[choice + "dense_layer.weight"].T, "bias": values[choice + "dense_layer.bias"]},
        "norm": {"scale": values[choice + "norm_layer.weight"], "bias": values[choice + "norm_layer.bias"]},
        "wave_kernel": values["decoder_layer.token_basis_layer.weight"].transpose(2, 1, 0),
        "wave_bias": values["decoder_layer.token_basis_layer.bias"],
    }


def signal(samples: int = SAMPLES) -> np.ndarray:
    """Standardised waves in noise."""
    rng = np.random.default_rng(0)
    waves = np.sin(
        rng.uniform(0.1, 0.6, (BATCH, CHANNELS, 1)) * np.arange(samples) + rng.uniform(0, 6, (1, CHANNELS, 1))
    )
    noisy = waves + 0.4 * rng.normal(size=waves.shape)
    return ((noisy - noisy.mean(-1, keepdims=True)) / noisy.std(-1, keepdims=True)).astype(np.float32)


def difference(ours: Any, theirs: Any) -> float:
    """Largest, as a share of the largest of theirs."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def their_tokens(model: Any, x: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    loss, rebuilt, weights = model(torch.tensor(x.transpose(0, 2, 1)))
    return loss, rebuilt, weights.argmax(-1).numpy().transpose(0, 2, 1).reshape(BATCH, -1)


@pytest.mark.parametrize("padding", ["causal", "same"])
def test_training_and_use_are_the_authors(padding):
    torch.manual_seed(0)
    model = made(24, 16, 7, padding)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * torch.randn(tensor.shape)
    ours = zoo.create("ephys_tokenizer", vocabulary=24, units=16, wave=7, padding=padding, first_tau=TAU, last_tau=TAU)
    x, where = signal(), sensors(BATCH, CHANNELS)
    params = copied(dict(model.named_parameters()))

    loss, rebuilt, codes = their_tokens(model.eval(), x)
    out = ours.apply({"params": params, "schedule": {"step": jnp.int32(0)}}, x, where)
    np.testing.assert_array_equal(out.codes[..., 0], codes)
    assert difference(out.reconstruction, rebuilt.detach().numpy().transpose(0, 2, 1)) < 1e-5
    assert difference(out.losses["waveform"], loss.detach().numpy()) < 1e-5

    model.train()
    model.token_weights_layer.temperature = TAU
    loss, rebuilt, codes = their_tokens(model, x)
    loss.backward()

    def trained(params: Any) -> Any:
        out, _ = ours.apply(
            {"params": params, "schedule": {"step": jnp.int32(0)}}, x, where, train=True, mutable=["schedule"]
        )
        return out.losses["waveform"], out

    (value, out), gradient = jax.value_and_grad(trained, has_aux=True)(params)
    np.testing.assert_array_equal(out.codes[..., 0], codes)
    assert difference(out.reconstruction, rebuilt.detach().numpy().transpose(0, 2, 1)) < 1e-5
    assert difference(value, loss.detach().numpy()) < 1e-5
    theirs = copied({name: tensor.grad for name, tensor in model.named_parameters()})
    worst = jax.tree.map(difference, gradient, theirs)
    assert max(jax.tree.leaves(worst)) < 1e-5


def test_released_weights_give_the_authors_codes_and_signal():
    path = PEERS / "MEG-GPT/models/tokenizer/model_state.pt"
    if not path.exists():
        pytest.skip(f"no {path.name} of MEG-GPT in BRAIN_ZOO_PEERS")
    model = made(128, 128, 10, "causal").eval()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    ours, x, where = zoo.create("ephys_tokenizer"), signal(), sensors(BATCH, CHANNELS)
    filled, _ = fill(KEYS, read(path), ours.init(jax.random.key(0), *ours.example()))
    variables = jax.tree.map(jnp.asarray, filled)
    with torch.no_grad():
        _, rebuilt, codes = their_tokens(model, x)
    out = ours.apply(variables, x, where)
    np.testing.assert_array_equal(out.codes[..., 0], codes)
    theirs = rebuilt.numpy().transpose(0, 2, 1)
    assert difference(out.reconstruction, theirs) < 1e-5
    # They are trained: far more of the signal is explained than by the best token alone.
    assert 1 - np.square(theirs - x).sum() / np.square(x).sum() > 0.9


def test_a_refactored_vocabulary_is_the_authors():
    torch.manual_seed(0)
    model = made(24, 16, 7, "causal").eval()
    ours, x, where = zoo.create("ephys_tokenizer", vocabulary=24, units=16, wave=7), signal(), sensors(BATCH, CHANNELS)
    variables = {"params": copied(dict(model.named_parameters())), "schedule": {"step": jnp.int32(0)}}
    codes = np.asarray(ours.apply(variables, x, where, method="encode"))
    # Of the first example alone, so that the second has tokens never seen.
    module = SimpleNamespace(
        config=SimpleNamespace(n_tokens=24, training=SimpleNamespace(batch_size=1)),
        tokenize_data=lambda *_, **__: [codes[:1]],
    )
    peer.EphysTokenizerModule.refactor_vocab(module, None)
    ours, variables = refactored(ours, variables, np.bincount(codes[:1].ravel(), minlength=24))
    assert ours.code_sizes == (len(module.vocab["token_order"]) + 1,)
    wanted = module.vocab["label_map"][codes]
    assert (wanted[1] == 0).any()
    frequency = np.append(-1, module.vocab["total_token_counts"])
    again = np.asarray(ours.apply(variables, x, where, method="encode"))
    # Tokens of the same frequency may stand in either order.
    np.testing.assert_array_equal(frequency[again], frequency[wanted])


@pytest.mark.parametrize(("name", "size"), [("mu_law", 256), ("mu_law", 54), ("quantile", 108)])
def test_fixed_levels_are_the_authors(name, size):
    rng = np.random.default_rng(0)
    training, new = (rng.normal(size=(1, 1, 4000)) for _ in range(2))
    options: dict[str, Any] = {"vocabulary": size}
    if name == "mu_law":
        options["mu"] = size - 1.0
        config = SimpleNamespace(n_tokens=size, mu=size - 1, normalization="max_abs")
        model = peer.MuTransformTokenizer.__new__(peer.MuTransformTokenizer)
        largest = np.abs(training).max()
        model.vocab = {"data_range": (-largest, largest)}
    else:
        config = SimpleNamespace(n_tokens=size, standardize=False)
        model = peer.StandardQuantileTokenizer.__new__(peer.StandardQuantileTokenizer)
    model.config, model.n_tokens = config, size
    if name == "mu_law":
        edges, centres = model.get_bins(), model.get_bins_average()
    else:
        edges = model.get_bins(training.reshape(-1, 1))
        centres = model.get_bins_average(edges)
    ours = zoo.create(name, **options)
    variables = ours.fit(training)
    worst = {
        key: difference(variables["levels"][key], value) for key, value in (("edges", edges), ("centres", centres))
    }
    assert max(worst.values()) < 2e-6  # the outermost edge stands 1e-6 within
    codes = np.asarray(ours.apply(variables, new, sensors(1, 1), method="encode"))[..., 0]
    wanted = np.digitize(new, edges).reshape(1, -1)
    # A sample nearer to an edge than float32 tells may fall on either side.
    near = np.abs(new.reshape(1, -1, 1) - edges).min(-1) < 1e-6 * np.abs(edges).max()
    np.testing.assert_array_equal(codes[~near], wanted[~near])
    assert near.mean() < 0.01
