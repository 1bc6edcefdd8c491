"""ArtifactGen's networks against their authors' code.

BRAIN_ZOO_PEERS names a folder with a copy of github.com/ahritik/ArtifactGen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from peer_modules import peer_or_skip

torch = pytest.importorskip("torch", reason="PyTorch runs the authors' code")
peer = peer_or_skip("ArtifactGen/src", "models")

from zoo.objectives.artifactgen import (  # noqa: E402
    ADVERSARY_KEYS,
    DENOISER_KEYS,
    ArtifactDiffusion,
    ArtifactGAN,
)
from zoo.weights.keys import fill  # noqa: E402

LABEL = np.array([0, 3, 4], np.int32)


def tensors(**modules: Any) -> dict[str, np.ndarray]:
    return {
        f"{name}.{key}".lstrip("."): value.detach().numpy()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def close(ours: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy()
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error < 1e-5


def test_scores_and_generated_windows() -> None:
    torch.manual_seed(0)
    critic, generator = peer.WGANGPCritic(8, 5), peer.WGANGPGenerator(128, 8, 250, 5)
    task = ArtifactGAN()
    module = task.module(250)
    noise = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), LABEL, noise)
    source = tensors(critic=critic, generator=generator)
    variables, ledger = fill(ADVERSARY_KEYS, source, shapes)
    assert len(ledger) == len(source)
    label = torch.from_numpy(LABEL.astype(np.int64))
    made = generator(torch.from_numpy(noise), label)

    @partial(jax.jit, static_argnames="method")
    def ours(variables: Any, *given: Any, method: str) -> Any:
        return module.apply(variables, *given, method=method)

    close(ours(variables, noise, LABEL, method="generate"), made)
    close(ours(variables, made.detach().numpy(), LABEL, method="score"), critic(made, label))


def test_predicted_noise() -> None:
    torch.manual_seed(0)
    network = peer.UNet1D(num_classes=5).eval()
    task = ArtifactDiffusion("artifactgen_ddpm_released", kind="noise", schedule="linear", skips=False)
    module = task.module()
    signal = np.random.default_rng(0).normal(size=(3, 8, 100)).astype(np.float32)
    step = np.array([0, 17, 999], np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), signal, step, LABEL)
    source = tensors(**{"": network})
    variables, ledger = fill(DENOISER_KEYS, source, shapes)
    assert len(ledger) == len(source)
    with torch.no_grad():
        theirs = network(*(torch.from_numpy(each) for each in (signal, step.astype(np.int64), LABEL.astype(np.int64))))
    close(jax.jit(module.apply)(variables, signal, step, LABEL), theirs)
