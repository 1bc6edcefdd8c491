"""HiSTN: a filter over time a channel, then graphs of channels, of regions, and of the head.

Source: Kuang, Song and Michoski, "Emotion Classification from Multi-Channel EEG Signals Using HiSTN: A Hierarchical
Graph-based Spatial-Temporal Approach", 2408.15255, and the authors' code (Apache-2.0, Keras, its `HST_model`:
github.com/dykuang/EEG-based-affective-computing).

Input: EEG of DREAMER's 14 electrodes at 128 Hz, 1 s, each channel of a recording divided by its largest magnitude.
Labels are five steps of a scale, taught with soft labels (`zoo.objectives.supervised.ordinal_labels`, spread .5) and
judged by `zoo.evaluate.votes.neighbours`.

The limits of weights are those that Keras' `max_norm` keeps along a kernel's first axis: the norm of the late filters
over time, and each single weight of what has one row (the mixture of filters, the mixtures of a region's channels).
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.encoders.windowed import Windowed, all_there
from zoo.errors import ZooError
from zoo.layers.convolution import limited
from zoo.layers.max_norm import MaxNormHead
from zoo.layers.parameters import dense, partitioned
from zoo.layers.temporal_filters import GLOROT, average_pool, batch_norm, filtered
from zoo.registry import Card, register
from zoo.types import AnyArray, Array, Encoded, Sensors

EPSILON, MOMENTUM = 1e-3, 0.99
HOPS = 2
LATE, NODE = 5, 5
"""Samples of the filters after the first, and of those of a region's channels."""
DREAMER = ("AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4")
"""The electrodes in the order that makes regions: front left, back left, back right, front right."""
Edges = tuple[tuple[int, int], ...]
_CHAIN: Edges = ((0, 1), (1, 2))
REGIONS: tuple[Edges, ...] = (((0, 2), (1, 2), (1, 3), (2, 3)), _CHAIN, _CHAIN, ((3, 1), (2, 1), (2, 0), (1, 0)))
"""Neighbours in each region; the last mirrors the first."""


class HiSTN(Windowed):
    """HiSTN; tokens are all its signals over time, [channels, regions, head] by D, pooled their mean.

    regions          for each region, neighbours among its channels; regions follow each other in `channels`, and each
                     is a neighbour of the next, the last of the first
    filters, width   filters over time and their samples
    dropout          of what enters the graphs, and of what enters the classifier
    """

    channels: int | tuple[str, ...] = DREAMER
    samples: int = 128
    regions: tuple[Edges, ...] = REGIONS
    filters: int = 8
    width: int = 64
    dropout: float = 0.5

    TAKES: ClassVar[tuple[str, ...]] = ("eeg",)

    @property
    def sampling_rate(self) -> float:
        """Hz."""
        return 128.0

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.count + len(self.regions) + 1

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
        """signal [B, C, T] → tokens [B, (T − 4) / 2, C + regions + 1]. A channel that is not valid is silence.

        Raises ZooError for another montage or T, for a mask, and where regions do not hold the channels.
        """
        signal = self.window(signal, sensors, mask)
        self.refuse_unless_positive((self.samples - LATE + 1) // 2)
        sizes = self._sizes()
        x = self._filtered(signal, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(average_pool(x, 2, 2))

        def propagated(x: Array, name: str, polynomials: Float[np.ndarray, "G K N N"]) -> Array:
            """x_n → Σ_m (Σ_k weight_k T_k)_mn x_m, in each of G graphs."""
            uniform = nn.initializers.uniform(2.0)
            weights = self.param(
                name, partitioned(lambda *given: uniform(*given) - 1, None, None), polynomials.shape[:2]
            )
            return x @ jnp.einsum("gk,gkmn->mn", weights, polynomials)

        nodes = propagated(x, "node_hops", self._node_polynomials())
        kernel = self.param("node_filters", partitioned(GLOROT, None, None), (NODE, self.count))
        nodes = filtered(jnp.pad(nodes, ((0, 0), (NODE // 2, NODE // 2), (0, 0))), kernel)
        mixtures = [
            limited(self.param(f"node_mix{region}", partitioned(GLOROT, None, None), (size, size))[None], 1.0, (0,))[0]
            for region, size in enumerate(sizes)
        ]
        nodes = nodes @ jax.scipy.linalg.block_diag(*mixtures)
        nodes = nn.elu(batch_norm(train, EPSILON, MOMENTUM, "node_norm")(nodes))

        before, after = self._gathered(x, "before", sizes), self._gathered(nodes, "after", sizes)
        regions = propagated(before, "region_hops", chebyshev(ring(len(sizes)))[None]) + after
        whole = (len(sizes),)
        head = self._gathered(before, "head_before", whole) + self._gathered(after, "head_after", whole)
        tokens = jnp.concatenate([x + nodes, regions, head], axis=-1)
        return all_there(tokens, tokens.mean(1))

    @nn.nowrap
    def head(self, classes: int) -> nn.Module:
        """A linear map, not limited, after dropout."""
        return MaxNormHead(classes, 0.0, self.dropout, kernel_init=GLOROT, bias_init=nn.initializers.zeros)

    @nn.nowrap
    def flops(self, channels: int, samples: int) -> float:
        """Operations of one example's forward pass in matmuls and convolutions, a multiply-add counting two.

        As published: every filter on every channel.
        """
        late = samples - LATE + 1
        graphs = late // 2 * (2 * sum(size**2 for size in self._sizes()) + NODE * channels)
        return 2.0 * (samples * channels * self.filters * (self.width + 1) + late * LATE * channels + graphs)

    def _filtered(self, signal: Array, train: bool) -> Array:
        """[B, C, T] → [B, T − 4, C]: filters over time, one sum of them a channel, another filter."""
        temporal = self.param("temporal", partitioned(GLOROT, None, None), (self.width, self.filters))
        mix = self.param("mix", partitioned(GLOROT, None, None), (self.filters, self.count))
        kernel = temporal @ limited(mix[None], 1.0, (0,))[0]
        around = ((self.width - 1) // 2, self.width // 2)
        x = filtered(jnp.pad(signal.swapaxes(1, 2), ((0, 0), around, (0, 0))), kernel)
        x = nn.elu(batch_norm(train, EPSILON, MOMENTUM, "norm1")(x))
        late = self.param("late", partitioned(GLOROT, None, None), (LATE, self.count))
        return nn.elu(batch_norm(train, EPSILON, MOMENTUM, "norm2")(filtered(x, limited(late, 1.0, (0,)))))

    def _gathered(self, x: Array, name: str, sizes: tuple[int, ...]) -> Array:
        """[B, T, N] → [B, T, groups]: a mean of each group's signals, weighed by what a softmax makes of their own."""
        level, signals, start = x.mean(1), [], 0
        for group, size in enumerate(sizes):
            part = slice(start, start + size)
            logits = dense(size, (None, None), bias=True, init=GLOROT, name=f"{name}{group}")(level[:, part])
            signals.append(jnp.einsum("btn,bn->bt", x[..., part], nn.softmax(logits)))
            start += size
        return jnp.stack(signals, axis=-1)

    def _node_polynomials(self) -> Float[np.ndarray, "G K N N"]:
        """Chebyshev polynomials of every region's graph, each on its own block of the channels."""
        out = np.zeros((len(self.regions), HOPS + 1, self.count, self.count), np.float32)
        start = 0
        for region, (edges, size) in enumerate(zip(self.regions, self._sizes(), strict=True)):
            out[region, :, start : start + size, start : start + size] = chebyshev(adjacency(edges, size))
            start += size
        return out

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Channels of each region."""
        sizes = tuple(1 + max(map(max, edges)) for edges in self.regions)
        if sum(sizes) != self.count or len(sizes) < 2:
            raise ZooError(f"HiSTN: regions of {sizes} channels hold {sum(sizes)}, wanted {self.count}")
        return sizes


def adjacency(edges: Edges, nodes: int) -> Float[np.ndarray, "N N"]:
    """1 between neighbours."""
    matrix = np.zeros((nodes, nodes))
    for one, other in edges:
        matrix[one, other] = matrix[other, one] = 1
    return matrix


def ring(nodes: int) -> Float[np.ndarray, "N N"]:
    """Each a neighbour of the next, the last of the first."""
    return adjacency(tuple((node, (node + 1) % nodes) for node in range(nodes)), nodes)


def chebyshev(neighbours: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "K N N"]:
    """T_0 to T_2 of the graph's Laplacian, scaled to [−1, 1] by its largest eigenvalue."""
    laplacian = np.diag(neighbours.sum(1)) - neighbours
    scaled = 2 * laplacian / np.linalg.eigvalsh(laplacian).max() - np.eye(len(laplacian))
    polynomials = [np.eye(len(laplacian)), scaled]
    for _ in range(HOPS - 1):
        polynomials.append(2 * scaled @ polynomials[-1] - polynomials[-2])
    return np.stack(polynomials).astype(np.float32)


_PAIR: Edges = ((0, 1),)

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "histn_tiny": (
        {"channels": 8, "samples": 64, "regions": (_PAIR,) * 4, "filters": 4, "width": 16},
        343,
        "its definition in float64, written out in its test",
    ),
    "histn_base": ({}, 1_081, "its definition in float64, written out in its test; the authors' count"),
}
"""Options, parameters without the classifier, evidence. base is the authors', tiny is ours."""

for _name, (_options, _parameters, _evidence) in VARIANTS.items():
    register(
        _name,
        HiSTN,
        _options,
        Card(
            title=f"HiSTN, {_parameters:,} parameters without its classifier",
            paper="Kuang, Song, Michoski. Emotion Classification from Multi-Channel EEG Signals Using HiSTN: A "
            "Hierarchical Graph-based Spatial-Temporal Approach. 2024, arXiv 2408.15255",
            code="github.com/dykuang/EEG-based-affective-computing",
            licence="Apache-2.0",
            inputs="EEG [B, 14, 128] at 128 Hz, DREAMER's electrodes by region, divided by the largest magnitude",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
