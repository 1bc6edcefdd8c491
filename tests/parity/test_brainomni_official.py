"""BrainTokenizer against its authors' code: github.com/OpenTSLab/BrainOmni, whose root is on the path."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
# Their quantizer asks it whether there are several processes; it does not install without a CUDA compiler.
deepspeed, communication = ModuleType("deepspeed"), ModuleType("deepspeed.comm")
communication.is_initialized = lambda: False  # type: ignore[attr-defined]
communication.ReduceOp = SimpleNamespace(SUM=None)  # type: ignore[attr-defined]
deepspeed.comm = communication  # type: ignore[attr-defined]
sys.modules.setdefault("deepspeed", deepspeed)
sys.modules.setdefault("deepspeed.comm", communication)
peer = pytest.importorskip(
    "braintokenizer.model",
    reason="no package: PYTHONPATH=BrainOmni of the authors' code; it imports einx and vector_quantize_pytorch",
)
losses = pytest.importorskip("model_utils.loss")

from zoo.tokenizers.brainomni import BrainTokenizer  # noqa: E402
from zoo.types import Sensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, CHANNELS, WINDOW = 2, 7, 256
OURS = {"window": WINDOW, "filters": 4, "dim": 32, "heads": 4, "latents": 5, "codes": 20, "levels": 3}
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
}


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def linear(module: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(module.weight).T, "bias": array(module.bias)}


def split(weight: Any, bias: Any, heads: int = 4) -> dict[str, np.ndarray]:
    kernel = array(weight).T
    return {"kernel": kernel.reshape(len(kernel), heads, -1), "bias": array(bias).reshape(heads, -1)}


def merge(module: Any, heads: int = 4) -> dict[str, np.ndarray]:
    kernel = array(module.weight).T
    return {"kernel": kernel.reshape(heads, -1, kernel.shape[1]), "bias": array(module.bias)}


def convolution(module: Any) -> dict[str, np.ndarray]:
    inner = module.conv.conv
    direction = array(inner.weight_v).transpose(2, 1, 0)
    return {"direction": direction, "length": array(inner.weight_g).ravel(), "bias": array(inner.bias)}


def transposed(module: Any) -> dict[str, np.ndarray]:
    inner = module.convtr.convtr
    direction = array(inner.weight_v).transpose(2, 0, 1)
    return {"direction": direction, "length": array(inner.weight_g).ravel(), "bias": array(inner.bias)}


def unit(module: Any) -> dict[str, Any]:
    inner, outer = module.block[1], module.block[3]
    return {"in": convolution(inner), "out": convolution(outer), "shortcut": convolution(module.shortcut)}


def recurrence(module: Any) -> dict[str, np.ndarray]:
    def stacked(name: str) -> np.ndarray:
        return np.stack([array(getattr(module.lstm, f"{name}_l{layer}")).T for layer in range(2)])

    return {
        "input": stacked("weight_ih"),
        "recurrent": stacked("weight_hh"),
        "input_bias": stacked("bias_ih"),
        "recurrent_bias": stacked("bias_hh"),
    }


def encoder(layers: Any) -> dict[str, Any]:
    units = {f"unit{stage}": unit(layers[1 + 3 * stage]) for stage in range(3)}
    downs = {f"down{stage}": convolution(layers[3 + 3 * stage]) for stage in range(3)}
    ends = {"first": convolution(layers[0]), "lstm": recurrence(layers[10]), "last": convolution(layers[12])}
    return {**units, **downs, **ends}


def decoder(layers: Any) -> dict[str, Any]:
    ups = {f"up{stage}": transposed(layers[3 + 3 * stage]) for stage in range(3)}
    units = {f"unit{stage}": unit(layers[4 + 3 * stage]) for stage in range(3)}
    ends = {"first": convolution(layers[0]), "lstm": recurrence(layers[1]), "last": convolution(layers[12])}
    return {**units, **ups, **ends}


def copied(model: Any) -> dict[str, Any]:
    sensors, latents, channels = model.sensor_embed, model.encoder, model.decoder.forwardsolution
    both, sides = channels.kv, (slice(0, 32), slice(32, 64))
    from_key, from_value = (split(both.weight[side], both.bias[side]) for side in sides)
    books = [each._codebook.embed for each in model.quantizer.rvq.layers]
    params = {
        "sensor_embedding": {
            "place_in": linear(sensors.pos_embedding_layer[0]),
            "place_out": linear(sensors.pos_embedding_layer[2]),
            "kind": array(sensors.sensor_embedding_layer.weight),
            "in": linear(sensors.aggregate_mlp.layer[0]),
            "out": linear(sensors.aggregate_mlp.layer[2]),
            "norm": {"scale": array(sensors.norm.weight)},
        },
        "encoder": encoder(latents.seanet_encoder.model),
        "decoder": decoder(model.decoder.seanet_decoder.model),
        "neurons": array(latents.neuros),
        "to_key": split(latents.k_proj.weight, latents.k_proj.bias),
        "to_value": split(latents.backwardsolution.v.weight, latents.backwardsolution.v.bias),
        "to_latents": merge(latents.backwardsolution.proj),
        "from_key": from_key,
        "from_value": from_value,
        "to_channels": merge(channels.proj),
    }
    embedding = np.stack([array(each) for each in books])
    return {"params": params, "codebooks": {"embedding": embedding}}


def recording() -> tuple[np.ndarray, Sensors]:
    """Three EEG channels, two magnetometers and two gradiometers, in their units."""
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


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    """Their model in evaluation, and our variables, with all parameters and codes moved from where they begin."""
    torch.manual_seed(0)
    model = peer.BrainTokenizer(**THEIRS).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))
        for layer in model.quantizer.rvq.layers:
            layer._codebook.embed.copy_(torch.randn(layer._codebook.embed.shape) / 6)
            layer._codebook.inited.fill_(1)
    signal, sensors = recording()
    made = nn.unbox(BrainTokenizer(**OURS).init(jax.random.key(0), signal, sensors))
    ours = copied(model)
    assert jax.tree.map(np.shape, ours["params"]) == jax.tree.map(np.shape, made["params"])
    codebooks = {**made["codebooks"]["quantizer"]["book"], **ours["codebooks"], "ready": np.ones(3, bool)}
    variables = {"params": ours["params"], "codebooks": {"quantizer": {"book": codebooks}}}
    return model, jax.tree.map(jnp.asarray, variables)


def test_windows_reconstructions_and_losses_are_the_authors(both):
    model, variables = both
    signal, sensors = recording()
    out = BrainTokenizer(**OURS).apply(variables, signal, sensors)
    theirs = model.visualize(*prepared(signal, sensors))
    standard = BrainTokenizer(**OURS).apply(variables, out.codes, sensors, method="decode")
    drawn = array(theirs["x_rec"])
    np.testing.assert_allclose(standard.reshape(drawn.shape), drawn, atol=1e-5 * np.abs(drawn).max())
    amplitude, phase = losses.get_frequency_domain_loss(theirs["x_rec"], theirs["x"])
    terms = {
        "waveform": losses.get_time_loss(theirs["x_rec"], theirs["x"]),
        "correlation": torch.exp(-losses.get_pcc(theirs["x_rec"], theirs["x"])),
        "amplitude": amplitude,
        "phase": phase,
    }
    for name, term in terms.items():
        np.testing.assert_allclose(out.losses[name], term.item(), rtol=1e-4 if name == "phase" else 1e-5, err_msg=name)


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_codes_and_features_are_the_authors(both, overlap):
    model, variables = both
    signal, sensors = recording()
    ours = BrainTokenizer(**OURS, overlap=overlap).apply(variables, signal, sensors)
    feature, codes = model.tokenize(*prepared(signal, sensors), overlap_ratio=overlap)
    np.testing.assert_array_equal(ours.codes.reshape(codes.shape), array(codes))
    np.testing.assert_allclose(ours.quantized.reshape(feature.shape), array(feature), atol=1e-6)


def test_commitment_and_gradients_are_the_authors(both):
    """Of encoder, residual codes in training, and decoder: all of their forward pass but what it draws."""
    model, variables = both
    signal, sensors = recording()
    given, place, kind = prepared(signal, sensors)
    for layer in model.quantizer.rvq.layers:
        layer._codebook.cluster_size.fill_(1e3)  # so that none is replaced
    embedding = model.sensor_embed(place, kind)
    quantized, _, commitment = model.quantizer.train()(model.encoder(model.unfold(given), embedding))
    (model.decoder(quantized, embedding).square().mean() + commitment).backward()
    tokenizer = BrainTokenizer(**OURS, restart_below=0.0)

    def loss(params: Any) -> Any:
        def forward(self: BrainTokenizer) -> Any:
            embedding = self.sensor_embedding(sensors)
            windows, _ = self._windowed(signal, sensors)
            found = self.quantizer(self._latents(windows, embedding, jnp.asarray(sensors.valid)), train=True)
            term = found.losses["commitment"]
            return jnp.square(self._drawn(found.quantized, embedding)).mean() + term, term

        draws = {"codes": jax.random.key(0)}
        given = {**variables, "params": params}
        return tokenizer.apply(given, method=forward, mutable=["codebooks"], rngs=draws)[0]

    gradients, term = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_allclose(term, commitment.item(), rtol=1e-5)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    ours = dict(jax.tree_util.tree_leaves_with_path(gradients))
    for path, theirs in jax.tree_util.tree_leaves_with_path(copied(model)["params"]):
        # Biases of keys have none but rounding.
        largest = max(np.abs(theirs).max(), 1e-4)
        np.testing.assert_allclose(ours[path], theirs, atol=1e-4 * largest, err_msg=jax.tree_util.keystr(path))
