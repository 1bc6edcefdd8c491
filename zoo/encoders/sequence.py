"""A sequence model over tokens or samples: an embedding, a backbone of any mixers, a read-out.

It serves tests, ablations and the published language models of state-space papers, whose sizes are registered here.
`zoo.encoders.decoding` draws from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.convolution import ShortConvolution
from zoo.layers.mixer import State
from zoo.layers.parameters import dense, partitioned
from zoo.registry import Card, register
from zoo.types import AnyArray, Array


class SequenceModel(nn.Module):
    """Tokens [B, T] int or samples [B, T, F] → logits or predictions [B, T, outputs], float32.

    vocabulary   number of tokens; 0 for samples
    features     F of samples; 0 for tokens
    outputs      width of the read-out; the vocabulary or F unless given
    tied         the read-out is the embedding transposed (tokens only, outputs not given)
    convolution  width of a causal convolution after the embedding, which gives any mixer its nearest past; 0: none
    max_length   rows of a table of learned positions; 0 where mixers know the order themselves
    the others   see `Backbone`
    """

    dim: int = 128
    mixers: tuple[str, ...] = ("softmax",) * 4
    vocabulary: int = 0
    features: int = 0
    outputs: int | None = None
    tied: bool = False
    convolution: int = 0
    max_length: int = 0
    mixer_options: Mapping[str, Mapping[str, Any]] | None = None
    mlp: str = "swiglu"
    mlp_options: Mapping[str, Any] | None = None
    norm: str = "rms"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self._check_options()
        self.embed = self._make_embedding()
        if self.convolution:
            self.convolve = ShortConvolution(self.dim, self.convolution, dtype=self.dtype)
        if self.max_length:
            table = partitioned(nn.initializers.normal(0.02), None, "embed")
            self.positions = self.param("positions", table, (self.max_length, self.dim))
        self.backbone = Backbone(
            self.dim,
            self.mixers,
            self.mixer_options,
            self.mlp,
            self.mlp_options,
            self.norm,
            self.layer_scale,
            self.drop_path,
            self.scan,
            self.remat,
            self.dtype,
        )
        if not self.tied:
            self.read_out = dense(self.outputs or self.vocabulary or self.features, ("embed", None), dtype=self.dtype)

    def __call__(
        self,
        inputs: Int[AnyArray, "B T"] | Float[AnyArray, "B T F"],
        *,
        segment_ids: Int[AnyArray, "B T"] | None = None,
        mask: Bool[AnyArray, "B T"] | None = None,
        train: bool = False,
        intermediates: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Float[Array, "L B T D"]]:
        """Predictions for every place; with `intermediates` also what came out of each of the L layers.

        segment_ids, mask and train as in `zoo.layers.mixer.Mixer`. Learned positions count from the start of the row.
        Raises ZooError for inputs of another kind, or longer than the table of positions.
        """
        ids, there = (None if x is None else jnp.asarray(x) for x in (segment_ids, mask))
        x = nn.with_logical_constraint(self._embedded(inputs, ids, there)[0], ("batch", "tokens", None))
        out = self.backbone(x, segment_ids=ids, mask=there, train=train, intermediates=intermediates)
        return (self._read(out[0]), out[1]) if isinstance(out, tuple) else self._read(out)

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        """The state of `step` before the first place; memories of tokens have room for `capacity`."""
        convolved = self.convolve.initial_state(batch) if self.convolution else ()
        return self.backbone.initial_state(batch, capacity), convolved, jnp.zeros(batch, jnp.int32)

    def prefill(
        self,
        inputs: Int[AnyArray, "B T"] | Float[AnyArray, "B T F"],
        length: Int[AnyArray, " B"] | None = None,
        capacity: int = 2048,
    ) -> tuple[Float[Array, "B T V"], State]:
        """A prompt, of which so many places of each row count (all unless given) → its predictions, the state after it.

        Errors as in a call.
        """
        count = (
            jnp.full(inputs.shape[0], inputs.shape[1], jnp.int32) if length is None else jnp.asarray(length, jnp.int32)
        )
        x, embedded = self._embedded(inputs)
        convolved: Any = ()
        if self.convolution:
            # The last tokens that count, zeros before the first.
            before = jnp.pad(embedded, ((0, 0), (self.convolution - 1, 0), (0, 0)))
            places = count[:, None] + jnp.arange(self.convolution - 1)
            convolved = jnp.take_along_axis(before, places[..., None], axis=1)
        y, memory = self.backbone.prefill(x, None if length is None else count, capacity)
        return self._read(y), (memory, convolved, count)

    @nn.nowrap
    def rows(self, state: State, index: Int[Array, " N"]) -> State:
        """The state of these rows of a batch, to repeat, leave out or reorder sequences."""
        memory, convolved, time = state
        axis = 1 if self.scan else 0  # layers come first where they are scanned
        memory = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis), memory)
        return memory, jax.tree.map(lambda leaf: leaf[index], convolved), time[index]

    def step(
        self, inputs: Int[AnyArray, " B"] | Float[AnyArray, "B F"], state: State
    ) -> tuple[Float[Array, "B V"], State]:
        """One place of each row → its predictions and the new state. NaN past the table of learned positions."""
        self._check_inputs(inputs, axes=1)
        memory, convolved, time = state
        x = self.embed(jnp.asarray(inputs))
        if self.convolution:
            near, convolved = self.convolve.step(x, convolved)
            x = x + near
        if self.max_length:
            x = x + self.positions.at[time].get(mode="fill", fill_value=jnp.nan).astype(x.dtype)
        y, memory = self.backbone.step(x, memory)
        return self._read(y), (memory, convolved, time + 1)

    @nn.nowrap
    def example(self) -> tuple[Array]:
        """The smallest input."""
        return (jnp.zeros((1, 1), jnp.int32) if self.vocabulary else jnp.zeros((1, 1, self.features)),)

    def _embedded(
        self, inputs: AnyArray, segment_ids: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """What the backbone sees [B, T, D], and the embedding alone."""
        self._check_inputs(inputs, axes=2)
        x = embedded = self.embed(jnp.asarray(inputs))
        if self.convolution:
            x = x + self.convolve(x, segment_ids=segment_ids, mask=mask)
        if self.max_length:
            if x.shape[1] > self.max_length:
                raise ZooError(f"SequenceModel: got {x.shape[1]} places, wanted at most max_length {self.max_length}")
            x = x + self.positions[: x.shape[1]].astype(x.dtype)
        return x, embedded

    def _make_embedding(self) -> Any:
        if self.features:
            return dense(self.dim, (None, "embed"), bias=True, dtype=self.dtype)
        init = partitioned(nn.initializers.normal(0.02), "alone", None)
        return nn.Embed(self.vocabulary, self.dim, dtype=self.dtype, embedding_init=init)

    def _read(self, y: Array) -> Array:
        return (self.embed.attend(y) if self.tied else self.read_out(y)).astype(jnp.float32)

    def _check_options(self) -> None:
        if (self.vocabulary > 0) == (self.features > 0):
            raise ZooError(
                f"SequenceModel wants a vocabulary or features, got vocabulary {self.vocabulary}, "
                f"features {self.features}"
            )
        if self.tied and (not self.vocabulary or self.outputs not in (None, self.vocabulary)):
            raise ZooError("SequenceModel: tied: wanted tokens in and out of one vocabulary")

    def _check_inputs(self, inputs: AnyArray, axes: int) -> None:
        integers = jnp.issubdtype(inputs.dtype, jnp.integer)
        wanted = (
            f"integers of {axes} axes" if self.vocabulary else f"floats of {axes + 1} axes, the last {self.features}"
        )
        fits = (
            integers and inputs.ndim == axes
            if self.vocabulary
            else not integers and inputs.ndim == axes + 1 and inputs.shape[-1] == self.features
        )
        if not fits:
            raise ZooError(f"SequenceModel: inputs: got {inputs.dtype} {list(inputs.shape)}, wanted {wanted}")


_LANGUAGE: dict[str, Any] = {"mlp": "none", "tied": True}


def _mamba(dim: int, layers: int) -> dict[str, Any]:
    return {**_LANGUAGE, "dim": dim, "mixers": ("mamba",) * layers, "vocabulary": 50_280}


def _mamba2(dim: int, layers: int) -> dict[str, Any]:
    return {**_LANGUAGE, "dim": dim, "mixers": ("mamba2",) * layers, "vocabulary": 50_288}


_MAMBA = (
    "Gu, Dao. Mamba: Linear-Time Sequence Modeling with Selective State Spaces. arXiv 2312.00752",
    "state-spaces/mamba",
)
_MAMBA2 = ("Dao, Gu. Transformers are SSMs. ICML 2024, arXiv 2405.21060", "state-spaces/mamba")
_COUNT = "parity of the mixer, see tests/parity; shapes: parameter count of the published model"

VARIANTS: dict[str, tuple[dict[str, Any], int, tuple[str, str], str]] = {
    "sequence_tiny": (
        {"dim": 64, "mixers": ("softmax",) * 2, "vocabulary": 256, "mlp": "gelu"},
        132_032,
        ("none: ours, for tests and ablations", "this repository"),
        "trained: benchmarks/mixers.py",
    ),
    "mamba_130m": (_mamba(768, 24), 129_135_360, _MAMBA, _COUNT),
    "mamba_370m": (_mamba(1024, 48), 371_516_416, _MAMBA, _COUNT),
    "mamba_790m": (_mamba(1536, 48), 793_204_224, _MAMBA, _COUNT),
    "mamba_1400m": (_mamba(2048, 48), 1_372_178_432, _MAMBA, _COUNT),
    "mamba_2800m": (_mamba(2560, 64), 2_768_345_600, _MAMBA, _COUNT),
    "mamba2_130m": (_mamba2(768, 24), 128_989_632, _MAMBA2, _COUNT),
    "mamba2_370m": (_mamba2(1024, 48), 368_346_624, _MAMBA2, _COUNT),
    "mamba2_780m": (_mamba2(1536, 48), 780_161_280, _MAMBA2, _COUNT),
    "mamba2_1300m": (_mamba2(2048, 48), 1_343_757_312, _MAMBA2, _COUNT),
    "mamba2_2700m": (_mamba2(2560, 64), 2_702_599_680, _MAMBA2, _COUNT),
}
"""Options, parameters with the tied embedding, paper and code, evidence."""

for _name, (_options, _parameters, (_paper, _code), _evidence) in VARIANTS.items():
    register(
        _name,
        SequenceModel,
        _options,
        Card(
            title=f"Sequence model of {_options['mixers'][0]} mixers, {_parameters / 1e6:.1f} M parameters",
            paper=_paper,
            code=_code,
            licence="Apache-2.0",
            inputs=f"tokens [B, T] of a vocabulary of {_options['vocabulary']:,}",
            parameters=_parameters,
            evidence=_evidence,
        ),
    )
