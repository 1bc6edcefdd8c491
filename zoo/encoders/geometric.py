"""Geometric learning on EEG: an attention denoiser, and graphs of windows whose edges flow by their curvature.

Source: "Geometric Machine Learning on EEG Signals", arXiv 2502.05334. It has no code and leaves sizes open; those here
are ours, but for the chain itself: a denoised window's spectrum, a Laplacian eigenmap of a neighbour graph of windows,
discrete Ricci flow of its edges, and a graph convolutional network (Kipf and Welling, 1609.02907) that names the nodes.

The denoiser reads each channel alone, so channels may come in any number and order; what trains it is in
`zoo.objectives.geometric`. Graphs are numpy's, on the host:

    lengths = neighbour_lengths(log_power(windows))        # [N, N], 0 where there is no edge
    features = eigenmap(affinity(lengths))                 # [N, 16]
    graph = affinity(ricci_flow(lengths))                  # the same edges, other weights
    logits = GraphConvolutions(classes=2).apply(variables, features, propagation(graph))

An eigenmap places all its nodes at once: nodes that a classifier is later tested on shape those it learns from.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.csgraph
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder, blank
from zoo.errors import ZooError
from zoo.layers.mlp import GeluMLP
from zoo.layers.multi_head import MultiHead, multi_head_flops
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, norm, partitioned
from zoo.objectives.signal import standardised_where
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

Matrix = Float[np.ndarray, "N N"]


class GeometricDenoiser(Encoder):
    """Self-attention over the patches of each channel's window.

    samples  T of its windows, each channel of which is standardised
    rate     sampling rate in Hz
    patch    samples a token
    dim      features
    depth    blocks
    heads    attention heads
    hidden   width of the MLP
    dtype    compute dtype; parameters, statistics and softmax stay float32
    """

    samples: int = 512
    rate: float = 512.0
    patch: int = 16
    dim: int = 128
    depth: int = 2
    heads: int = 8
    hidden: int = 512
    dtype: DTypeLike = jnp.float32

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return self.rate

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B _"] | Bool[AnyArray, "B _ _"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T], any unit → Encoded, N = C·T/patch tokens, channel by channel; pooled is their valid mean.

        Raises ZooError for a mask, and for windows of another length.
        """
        if mask is not None:
            raise ZooError("GeometricDenoiser hides no tokens: it takes no mask")
        signal = self.present(signal, sensors)
        count, channels, samples = signal.shape
        if samples != self.samples or samples % self.patch:
            raise ZooError(
                f"GeometricDenoiser wants windows of {self.samples} samples, a multiple of {self.patch}, got {samples}"
            )
        standard = standardised_where(signal, sensors.valid, axes=(2,))[0]
        patches = standard.reshape(count * channels, -1, self.patch)
        bias = like_torch_bias(self.patch)
        x = dense(self.dim, (None, "embed"), bias=True, init=LIKE_TORCH, bias_init=bias, name="embed_patch")(patches)
        init = partitioned(nn.initializers.normal(0.02), None, "embed")
        x = (x + self.param("embed_time", init, (samples // self.patch, self.dim))).astype(self.dtype)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.hidden, self.dtype, name="blocks")
        x = norm("layer", epsilon=1e-5, name="norm")(blocks(x, None)[0].astype(jnp.float32))
        tokens = x.reshape(count, -1, self.dim)
        valid = jnp.repeat(jnp.asarray(sensors.valid), samples // self.patch, axis=1)
        share = valid / jnp.maximum(valid.sum(1, keepdims=True), 1)
        return Encoded(tokens=tokens, pooled=jnp.einsum("bnd,bn->bd", tokens, share), valid=valid)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls, a multiply-add counting two."""
        tokens = samples // self.patch
        block = multi_head_flops(tokens, tokens, self.dim, self.dim, self.dim) + 4.0 * tokens * self.dim * self.hidden
        return channels * (2.0 * samples * self.dim + self.depth * block)

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """One window of one channel."""
        return blank(1, self.samples)


class Block(nn.Module):
    """x += attention(norm x), x += mlp(norm x); the body of a scan."""

    heads: int
    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], _: None) -> tuple[Float[Array, "B N D"], None]:
        normed = norm("layer", epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        x = x + MultiHead(self.heads, dtype=self.dtype, name="attention")(normed, normed)
        normed = norm("layer", epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        return x + GeluMLP(x.shape[-1], self.hidden, self.dtype, name="mlp")(normed), None


class GraphConvolutions(nn.Module):
    """Two layers of P·X·W (1609.02907, equation 9), ReLU and dropout between: nodes [N, F] → logits [N, K].

    The matrix P is `propagation`'s. In training the stream "dropout" is drawn from.
    """

    classes: int
    hidden: int = 64
    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, nodes: Float[AnyArray, "N F"], propagation: Float[AnyArray, "N N"], *, train: bool = False
    ) -> Float[Array, "N K"]:
        x = jnp.asarray(nodes, jnp.float32)
        for name, features in (("hidden", self.hidden), ("logits", self.classes)):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            init = nn.initializers.glorot_uniform()
            x = jnp.asarray(propagation, jnp.float32) @ dense(features, (None, None), bias=True, init=init, name=name)(
                x
            )
            x = nn.relu(x) if name == "hidden" else x
        return x


def log_power(windows: Float[np.ndarray, "N C T"], floor: float = 1e-12) -> Float[np.ndarray, "N F"]:
    """Logarithm of each frequency's power, mean over channels, without the zeroth: the features of a node."""
    power = np.square(np.abs(np.fft.rfft(np.asarray(windows, np.float64), norm="ortho")))
    return np.log(power.mean(1)[:, 1:] + floor)


def neighbour_lengths(features: Float[np.ndarray, "N F"], neighbours: int = 10) -> Matrix:
    """Distances to the nearest nodes, of either to the other; 0 is no edge. Raises ZooError for too few nodes."""
    if len(features) <= neighbours:
        raise ZooError(f"a graph of {neighbours} neighbours wants more nodes than that, got {len(features)}")
    squares = np.square(features).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0))
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :neighbours]
    edges = np.zeros(distance.shape, bool)
    np.put_along_axis(edges, nearest, True, axis=1)
    # Nodes that coincide are still joined.
    return np.where(edges | edges.T, np.maximum(distance, 1e-9), 0.0)


def affinity(lengths: Matrix) -> Matrix:
    """exp(−(length / median length)²) of every edge, 0 elsewhere."""
    edges = lengths > 0
    return np.where(edges, np.exp(-np.square(lengths / np.median(lengths[edges]))), 0.0)


def eigenmap(weights: Matrix, features: int = 16) -> Float[np.ndarray, "N D"]:
    """Eigenvectors of I − D^-½ W D^-½ for its least eigenvalues, the first left out (Belkin and Niyogi, 2003).

    Signs are such that each vector's largest number is positive. Raises ZooError for too few nodes.
    """
    if len(weights) <= features:
        raise ZooError(f"an eigenmap into {features} features wants more nodes than that, got {len(weights)}")
    vectors = np.linalg.eigh(np.eye(len(weights)) - _scaled(weights))[1][:, 1 : features + 1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    return vectors * np.sign(largest)


def propagation(weights: Matrix) -> Matrix:
    """D^-½ (W + I) D^-½, D the sums of W + I."""
    return _scaled(weights + np.eye(len(weights)))


def ollivier_curvature(lengths: Matrix, laziness: float = 0.5) -> Matrix:
    """κ = 1 − W₁(m_x, m_y) / d(x, y) of every edge, 0 elsewhere (Ollivier, Journal of Functional Analysis 256, 2009).

    A walker at x stays with probability `laziness`, else goes to any neighbour alike. d is the shortest path; W₁ is
    exact, by a linear programme an edge: milliseconds each. Positive inside clusters, negative on bridges.
    """
    distance = scipy.sparse.csgraph.shortest_path(scipy.sparse.csr_matrix(lengths), directed=False)
    edges = lengths > 0
    walk = laziness * np.eye(len(lengths)) + (1 - laziness) * edges / np.maximum(edges.sum(1, keepdims=True), 1)
    curvature = np.zeros_like(lengths)
    for x, y in zip(*np.nonzero(np.triu(edges)), strict=True):
        here, there = np.nonzero(walk[x])[0], np.nonzero(walk[y])[0]
        cost = transport_cost(walk[x, here], walk[y, there], distance[np.ix_(here, there)])
        curvature[x, y] = curvature[y, x] = 1 - cost / distance[x, y]
    return curvature


def transport_cost(
    ours: Float[np.ndarray, " N"], theirs: Float[np.ndarray, " M"], distance: Float[np.ndarray, "N M"]
) -> float:
    """Least Σ plan·distance over plans whose rows sum to `ours` and whose columns sum to `theirs`."""
    rows, columns = distance.shape
    sums = scipy.sparse.vstack(
        [
            scipy.sparse.kron(scipy.sparse.eye(rows), np.ones((1, columns))),
            scipy.sparse.kron(np.ones((1, rows)), scipy.sparse.eye(columns)),
        ]
    )
    # One of the sums follows from the others.
    wanted = np.concatenate([ours, theirs])[:-1]
    found = scipy.optimize.linprog(distance.ravel(), A_eq=sums.tocsr()[:-1], b_eq=wanted, method="highs")
    return float(found.fun)


def ricci_flow(lengths: Matrix, rate: float = 0.5, iterations: int = 20, laziness: float = 0.5) -> Matrix:
    """length ← length · (1 − rate · κ), the total kept, `iterations` times: bridges grow, clusters draw together."""
    total = lengths.sum()
    for _ in range(iterations):
        lengths = lengths * (1 - rate * ollivier_curvature(lengths, laziness))
        lengths = lengths * (total / lengths.sum())
    return lengths


def _scaled(weights: Matrix) -> Matrix:
    root = 1 / np.sqrt(np.maximum(weights.sum(1), 1e-12))
    return root[:, None] * weights * root


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "geometric_tiny": (
        {"samples": 128, "rate": 128.0, "dim": 64, "heads": 4, "hidden": 128},
        68_672,
        "trained on a toy: mixtures of waves and artefacts",
    ),
    "geometric_base": ({}, 403_072, "its layers are those of geometric_tiny"),
}
"""Options, parameters (denoiser without its last map), evidence. Both are ours: the paper gives no sizes."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        GeometricDenoiser,
        _options,
        Card(
            title=f"attention denoiser of single channels, {_parameters / 1e3:.0f} k parameters",
            paper="Geometric Machine Learning on EEG Signals. arXiv 2502.05334",
            code="none published",
            licence="Apache-2.0, ours",
            inputs="any channels [B, C, 512] at 512 Hz, any unit (tiny: 128 samples at 128 Hz)",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
