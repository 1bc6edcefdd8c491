"""TFM-Tokenizer against its authors' code, and the weights they give of the encoder that reads its codes.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/Jathurshan0330/TFM-Tokenizer (which imports
linear-attention-transformer and einops).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from zoo.layers.linear_transformer import KEYS as TRANSFORMER_KEYS  # noqa: E402
from zoo.layers.linear_transformer import LinearTransformer  # noqa: E402
from zoo.tokenizers.tfm import KEYS  # noqa: E402
from zoo.types import Sensors  # noqa: E402
from zoo.weights.keys import fill  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

CODES = 300
BATCH, CHANNELS, SAMPLES = 2, 3, 700


def theirs() -> Any:
    spec = importlib.util.spec_from_file_location("tfm_token", ROOT / "models" / "tfm_token.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def carried(model: Any, tokenizer: Any) -> Any:
    """Their parameters and codebook as our variables."""
    state = {name: array(tensor) for name, tensor in model.state_dict().items()}
    variables, _ = fill(KEYS, state, jax.jit(tokenizer.init)(jax.random.key(0), *tokenizer.example()))
    return jax.tree.map(jnp.asarray, variables)


@pytest.fixture(scope="module")
def both() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = theirs().get_tfm_tokenizer_2x2x8(code_book_size=CODES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizer."):
                parameter += 0.05 * torch.randn_like(parameter)
        # Codes as long as what is quantised, and averages as if each had been assigned one vector.
        model.quantizer.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(CODES, 64), dim=-1))
        model.quantizer.ema_w.copy_(model.quantizer.embedding.weight)
        model.quantizer.cluster_size.fill_(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokenizer = zoo.create("tfm_base", codes=CODES, dropout=0.0)
    signal = np.random.default_rng(1).standard_normal((BATCH, CHANNELS, SAMPLES)).astype(np.float32)
    blank, zero = np.zeros((BATCH, CHANNELS, 3), np.float32), np.zeros((BATCH, CHANNELS), np.int32)
    sensors = Sensors(blank, blank, zero, zero, np.ones((BATCH, CHANNELS), bool))
    variables = carried(model, tokenizer)
    normal = signal / (np.quantile(np.abs(signal), 0.95, axis=-1, keepdims=True) + 1e-8)
    given = torch.tensor(normal.reshape(-1, SAMPLES))
    spectrum = torch.stft(
        given,
        n_fft=200,
        hop_length=100,
        onesided=True,
        return_complex=True,
        center=False,
        window=torch.hann_window(200),
    ).abs()[:, :100]
    return model, tokenizer, variables, signal, sensors, given, spectrum


def near(ours: Any, wanted: np.ndarray, bound: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=bound * np.abs(wanted).max())


def test_codes_spectra_and_gradients_are_the_authors(both):
    """Of the whole loss: their quantiser's terms cancel, so that of the spectrum alone is ours."""
    model, tokenizer, variables, signal, sensors, given, spectrum = both
    model.eval()
    estimate, codes, out, inner = model(spectrum, given)
    model.zero_grad()
    error = torch.mean((estimate - spectrum) ** 2)
    (error + model.vec_quantizer_loss(inner, out)[0]).backward()
    wanted = copied_gradients(model, tokenizer)

    @jax.jit
    def found(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = tokenizer.apply({**variables, "params": params}, signal, sensors)
            return out.losses["spectrum"], out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (ours, tokenized), grads = found(variables["params"])
    np.testing.assert_array_equal(tokenized.codes.ravel(), array(codes).ravel())
    near(ours, array(error))
    told = jax.jit(
        lambda variables, codes: tokenizer.apply(
            variables,
            codes,
            method=lambda m, c: m._estimate(m.quantizer.decode(c).reshape(BATCH, CHANNELS, -1, 64), False),
        )
    )(variables, tokenized.codes)
    near(told.reshape(-1, *told.shape[2:]).swapaxes(1, 2), array(estimate))
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        # Float32 through twelve layers: the smallest gradients are sums of large terms.
        np.testing.assert_allclose(leaf, other, atol=5e-5 * np.abs(other).max(), err_msg=jax.tree_util.keystr(path))


def copied_gradients(model: Any, tokenizer: Any) -> Any:
    with torch.no_grad():
        kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
        found = jax.tree.map(np.array, carried(model, tokenizer)["params"])
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return found


def test_a_step_of_training_is_the_authors(both):
    """Both passes of masks that are ours, the second with codes that the first has moved."""
    model, tokenizer, variables, signal, sensors, given, spectrum = both
    key = jax.random.key(5)
    seen = tokenizer.apply({}, 6, method=lambda model, count: model._masks(count), rngs={"noise": key})
    out, new = jax.jit(
        lambda: tokenizer.apply(
            variables, signal, sensors, train=True, mutable=["codebooks"], rngs={"noise": key, "codes": key}
        )
    )()
    model.train()
    with torch.no_grad():
        errors = [
            torch.mean((model(spectrum * torch.tensor(np.array(mask).T), given)[0] - spectrum) ** 2) for mask in seen
        ]
    near(2 * out.losses["spectrum"], array(sum(errors)))
    near(new["codebooks"]["quantizer"]["embedding"], array(model.quantizer.embedding.weight))
    near(new["codebooks"]["quantizer"]["usage"], array(model.quantizer.cluster_size))


def test_the_released_encoder_has_the_shapes_of_these_layers():
    """Its four layers run as the package runs them; its table has a row for each code, and one for the mask."""
    file = ROOT / "pretrained_weigths/single_dataset_settings/TUEV_tfm_tokenizer_2x2x8/tfm_encoder_best_model.pth"
    if not file.exists():
        pytest.skip(f"no {file.name} of TUEV in TFM-Tokenizer")
    state = torch.load(file, weights_only=True, map_location="cpu")
    model = theirs().get_tfm_token_classifier_64x4(n_classes=6)
    model.load_state_dict(state)
    tokenizer = zoo.create("tfm_base")
    assert state["eeg_token_embedding.weight"].shape == (tokenizer.codes + 1, tokenizer.dim)
    x = np.random.default_rng(2).standard_normal((2, 33, 64)).astype(np.float32)
    with torch.no_grad():
        wanted = array(model.eval().LAT(torch.tensor(x)))
    layers = LinearTransformer(depth=4)
    state = {name: array(tensor) for name, tensor in model.LAT.state_dict().items()}
    variables, _ = fill(TRANSFORMER_KEYS, state, jax.eval_shape(layers.init, jax.random.key(0), jnp.asarray(x)))
    near(jax.jit(layers.apply)(variables, jnp.asarray(x)), wanted)
