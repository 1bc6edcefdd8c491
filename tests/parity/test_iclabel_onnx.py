"""ICLabel beside mne-icalabel's features and its ONNX and PyTorch files, on components of a real recording.

Needs `pip install mne-icalabel onnx onnxruntime torch`.
"""

from __future__ import annotations

import warnings

import jax
import mne
import numpy as np
import pytest

from zoo.data import bids
from zoo.data.fetch import fetch
from zoo.encoders.iclabel import KEYS, ICLabel
from zoo.evaluate import components
from zoo.weights.keys import fill

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
peer = pytest.importorskip("mne_icalabel.iclabel.features")


@pytest.fixture(scope="module")
def files():
    return fetch("iclabel") / "iclabel" / "network" / "assets"


@pytest.fixture(scope="module")
def recording(faces_eeg):
    """A minute of one person. The file was low-passed at 30 Hz before it was published; the filter here says 100."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = bids.read(bids.recordings(faces_eeg)[0]).crop(60, 120).load_data()
    raw.set_eeg_reference("average", verbose="error").filter(1, 100, verbose="error")
    with raw.info._unlock():
        raw.info["lowpass"] = 100.0
    return raw


@pytest.fixture(scope="module")
def fitted(recording):
    ica = mne.preprocessing.ICA(15, method="infomax", fit_params={"extended": True}, random_state=0, verbose="error")
    return ica.fit(recording, verbose="error")


@pytest.fixture(scope="module")
def variables(files):
    """From the ONNX file, whose tensors carry PyTorch's names."""
    graph = onnx.load(files / "ICLabelNet.onnx").graph
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    model = ICLabel()
    filled, ledger = fill(KEYS, tensors, jax.eval_shape(model.init, jax.random.key(0), *model.example()))
    assert len(ledger) == len(tensors) == 20
    return filled


def theirs(inst, ica):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        topography, spectrum, lags = peer.get_iclabel_features(inst, ica)
    return topography[:, :, 0].transpose(2, 0, 1), spectrum[0, :, 0].T, lags[0, :, 0].T


def onnx_probabilities(files, topography, spectrum, lags):
    copies = (topography, -topography, topography[:, :, ::-1], -topography[:, :, ::-1])
    given = {
        "topo": np.concatenate(copies)[:, None],
        "psds": np.tile(spectrum, (4, 1))[:, None, None],
        "autocorr": np.tile(lags, (4, 1))[:, None, None],
    }
    return onnxruntime.InferenceSession(files / "ICLabelNet.onnx").run(None, given)[0]


def test_probabilities_of_real_components_are_those_of_the_onnx_network(files, recording, fitted, variables):
    names, ours = components.label_components(recording, fitted, variables)
    np.testing.assert_allclose(ours, onnx_probabilities(files, *theirs(recording, fitted)), atol=1e-5)
    assert len(set(names)) >= 3


@pytest.mark.parametrize("piece", ["stretch", "short", "epochs", "rate 200", "odd rate", "rate 500"])
def test_features_are_those_of_mne_icalabel(recording, fitted, piece):
    inst = {
        "stretch": lambda: recording,
        "short": lambda: recording.copy().crop(0, 4),
        "epochs": lambda: mne.make_fixed_length_epochs(
            recording.copy().crop(0, 20), 2.0, preload=True, verbose="error"
        ),
        "rate 200": lambda: recording.copy().crop(0, 8).resample(200, verbose="error"),
        "odd rate": lambda: recording.copy().crop(0, 8).resample(251, verbose="error"),
        "rate 500": lambda: recording.copy().crop(0, 8).resample(500, verbose="error"),
    }[piece]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ICLabel was not made for this: the recording has a band")
        ours = components.features(inst, fitted, squeeze_again=True)
    for mine, their in zip(ours, theirs(inst, fitted), strict=True):
        np.testing.assert_allclose(mine, their, atol=1e-5)


def test_an_electrode_under_the_head_is_squeezed_again_and_again(recording, fitted):
    low = recording.copy()
    low.info["chs"][0]["loc"][:3] = (0.0, -0.0005, -0.1)
    upstream = theirs(low, fitted)[0]
    np.testing.assert_allclose(components.features(low, fitted, squeeze_again=True).topography, upstream, atol=1e-5)
    assert np.abs(components.features(low, fitted).topography[1:] - upstream[1:]).max() > 1e-3


def test_the_file_of_pytorch_gives_the_same_variables(files, variables):
    torch = pytest.importorskip("torch")
    tensors = torch.load(files / "ICLabelNet.pt", weights_only=True)
    again, ledger = fill(KEYS, {name: tensor.numpy() for name, tensor in tensors.items()}, variables)
    assert len(ledger) == 40
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
