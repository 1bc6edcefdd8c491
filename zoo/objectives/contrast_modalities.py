"""Contrast between modalities: EEG, MEG and fMRI of the same moment find each other in one space.

An encoder and a linear map for each modality; every pair of modalities is contrasted both ways (Radford et al.,
2103.00020; with `kind` "siglip" Zhai et al., 2303.15343), with a factor of cosines, and for SigLIP an offset, of its
own, over the whole batch on all devices. A batch is

    {"eeg": {"signal" [B, C, T], "sensors"}, "meg": {...}, "fmri": {...}, "stimulus" [B], "subject" [B], ...}

whose row i answers the same stimulus in every modality. Rows of the same stimulus are no wrong answers to each other.

    task = ContrastModalities({"eeg": Modality("labram_base"), "fmri": Modality("regions_base")})
    module = task.module()
    vectors = module.apply(variables, "eeg", signal, sensors, method="embed")        # [B, F], of length one

`parts` embeds the batch a share at a time and again in the backward pass, so that beside vectors of the whole batch no
more than a share's activations are held (GradCache, Gao et al., 2101.06983). `train.accumulate` would instead make
smaller batches to look in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.parameters import dense, partitioned
from zoo.layers.quantizers import unit
from zoo.objectives.contrast import MAX_SCALE, searched
from zoo.registry import create, entry
from zoo.types import AnyArray, Array, Batch, Sensors, Variables


@dataclass(frozen=True)
class Modality:
    """What reads a modality.

    Attributes:
        model: registered encoder
        options: replacements for its options
    """

    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ContrastModalities:
    """The task. A frozen dataclass: it is its own configuration.

    Attributes:
        modalities: name, as in the batch, → what reads it; two or more
        features: F of the space they share
        kind: clip (softmax over the batch, both ways) or siglip (every pair of rows by itself)
        temperature: 1 / the factor of cosines at first
        parts: shares of the batch that are embedded one after another
        dtype: compute dtype of encoders that have the option; parameters and statistics stay float32
        remat: what encoders that have the option recompute in the backward pass: none, full or dots
    """

    modalities: Mapping[str, Modality] = field(default_factory=dict)
    features: int = 512
    kind: Literal["clip", "siglip"] = "clip"
    temperature: float = 0.07
    parts: int = 1
    dtype: str = "float32"
    remat: str = "none"

    def modality_encoder(self, name: str) -> Encoder:
        """The encoder of a modality. Raises ZooError for a model that is none."""
        of = self.modalities[name]
        # An encoder that has no such option computes in float32 and recomputes nothing.
        has: Any = getattr(entry(of.model).constructor, "__dataclass_fields__", ())
        given: dict[str, Any] = {"dtype": jnp.dtype(self.dtype), "remat": self.remat}
        encoder = create(of.model, **{option: given[option] for option in given if option in has}, **of.options)
        if not isinstance(encoder, Encoder):
            raise ZooError(
                f"task.modalities.{name}.model: {of.model} is not an encoder of signals, such as labram_tiny"
            )
        return encoder

    def module(self) -> Modalities:
        """Encoders, maps and factors. Raises ZooError for fewer than two modalities."""
        if len(self.modalities) < 2:
            raise ZooError(f"task.modalities: got {', '.join(self.modalities) or 'none'}, wanted two or more")
        encoders = {name: self.modality_encoder(name) for name in sorted(self.modalities)}
        return Modalities(encoders, self.features, self.kind, self.temperature)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Variables for the shapes of `batch`, boxed with logical axis names.

        Raises ZooError where the batch lacks a modality, or does not divide into `parts`.
        """
        lacking = [name for name in self.modalities if name not in batch]
        if lacking:
            raise ZooError(f"{type(self).__name__}: got batches without {', '.join(lacking)}; data.paired names them")
        if self.parts < 1 or len(batch["stimulus"]) % self.parts:
            raise ZooError(f"task.parts: got {self.parts}, wanted a divisor of the batch of {len(batch['stimulus'])}")
        params, dropout = jax.random.split(key)
        return self.module().init({"params": params, "dropout": dropout}, self._given(batch), batch["stimulus"])

    def loss(
        self, variables: Variables, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Mapping[str, Array], Variables]:
        """The mean over pairs of modalities of their contrast, in nats; of no parts about ln B at first with clip.

        Metrics, of modalities a and b: a_b_retrieval, the share of rows whose vector of b is the nearest to theirs of
        a, in the whole batch; a_b_scale, the factor; weight, the rows that are there in two modalities or more.
        """
        vectors, new = self._vectors(variables, self._given(batch), key, train)
        valid = {name: jnp.asarray(batch[name]["sensors"].valid).any(1) for name in self.modalities}
        value, metrics = self.module().apply(variables, vectors, valid, batch["stimulus"], method="contrast")
        there = jnp.stack(list(valid.values())).sum(0) > 1
        return value, {**metrics, "weight": there.sum().astype(jnp.float32)}, new

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: encoders, maps, and products of every pair of rows."""
        examples, total = len(batch["stimulus"]), 0.0
        for name in self.modalities:
            encoder = self.modality_encoder(name)
            each = encoder.flops(*batch[name]["signal"].shape[1:]) + 2 * encoder.features * self.features
            total += examples * each
        searches = math.comb(len(self.modalities), 2) * (2 if self.kind == "clip" else 1)
        return total + searches * 2.0 * examples**2 * self.features

    def check_modality(self, name: str, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when the encoder of a modality cannot take a recording of this rate and these channels."""
        if name not in self.modalities:
            raise ZooError(f"task.modalities: got data of {name!r}, wanted {', '.join(self.modalities)}")
        self.modality_encoder(name).check_recording(rate_hz, kinds, names)

    def _given(self, batch: Batch) -> dict[str, dict[str, Any]]:
        """What the encoder of each modality is called with."""
        given = {}
        for name in self.modalities:
            given[name] = {part: batch[name][part] for part in ("signal", "sensors")}
            if self.modality_encoder(name).subjects:
                given[name]["subject"] = batch["subject"]
        return given

    def _vectors(
        self, variables: Variables, given: Mapping[str, Any], key: Array, train: bool
    ) -> tuple[dict[str, Array], Variables]:
        """Vectors [B, F] of every modality, and the collections after them; all parts of a batch in turn."""
        module = self.module()
        state: Variables
        params, state = variables["params"], {name: each for name, each in variables.items() if name != "params"}

        def embed(state: Variables, inputs: tuple[Array, Mapping[str, Any]]) -> tuple[Variables, dict[str, Array]]:
            drawing = jax.random.fold_in(key, inputs[0])
            vectors, new = module.apply(
                {"params": params, **state},
                inputs[1],
                train=train,
                mutable=list(state) if train else [],
                rngs={"dropout": drawing, "noise": drawing},
                method="embed_all",
            )
            return {**state, **new}, vectors

        if self.parts == 1:
            state, vectors = embed(state, (jnp.zeros((), jnp.int32), given))
        else:
            shares = jax.tree.map(lambda leaf: _share_out(jnp.asarray(leaf), self.parts), given)
            turns = jnp.arange(self.parts), shares
            state, found = jax.lax.scan(jax.checkpoint(embed, prevent_cse=False), state, turns)
            vectors = {name: each.swapaxes(0, 1).reshape(-1, each.shape[-1]) for name, each in found.items()}
        return vectors, state if train else {}


class Modalities(nn.Module):
    """Encoders of modalities, a linear map of each into the space they share, and what the contrast of pairs learns."""

    encoders: Mapping[str, Encoder]
    features: int
    kind: str = "clip"
    temperature: float = 0.07

    def setup(self) -> None:
        if self.kind not in ("clip", "siglip"):
            raise ZooError(f"Modalities kind: got {self.kind!r}, wanted 'clip' or 'siglip'")
        self.maps = {name: dense(self.features, ("embed", None)) for name in self.encoders}
        pairs = (math.comb(len(self.encoders), 2),)
        first = nn.initializers.constant(-math.log(self.temperature))
        self.log_scale = self.param("log_scale", partitioned(first, None), pairs)
        if self.kind == "siglip":
            self.offset = self.param("offset", partitioned(nn.initializers.constant(-10.0), None), pairs)

    def __call__(self, given: Mapping[str, Any], stimulus: Int[AnyArray, " B"]) -> Float[Array, ""]:
        """modality → what its encoder is called with, by name → the loss."""
        valid = {name: jnp.asarray(each["sensors"].valid).any(1) for name, each in given.items()}
        return self.contrast(self.embed_all(given), valid, stimulus)[0]

    def embed(
        self,
        modality: str,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B F"]:
        """Vectors of length one of a modality's windows."""
        whose = {} if subject is None else {"subject": subject}
        pooled = self.encoders[modality](signal, sensors, train=train, **whose).pooled
        return unit(self.maps[modality](pooled.astype(jnp.float32)))

    def embed_all(self, given: Mapping[str, Any], *, train: bool = False) -> dict[str, Array]:
        """modality → what its encoder is called with, by name → its vectors."""
        return {name: self.embed(name, **each, train=train) for name, each in given.items()}

    def contrast(
        self,
        vectors: Mapping[str, Float[AnyArray, "B F"]],
        valid: Mapping[str, Bool[AnyArray, " B"]],
        stimulus: Int[AnyArray, " B"],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """(the mean over pairs of modalities; metrics: retrieval both ways and the factor of each pair)."""
        losses: list[Array] = []
        metrics: dict[str, Array] = {}
        scales = jnp.minimum(jnp.exp(self.log_scale), MAX_SCALE)
        for index, (one, other) in enumerate(itertools.combinations(sorted(vectors), 2)):
            there = valid[one] & valid[other]
            count = jnp.maximum(there.sum(), 1)
            offset = self.offset[index] if self.kind == "siglip" else None
            ways = []
            for a, b in ((one, other), (other, one)):
                nats, rank = searched(vectors[a], vectors[b], scales[index], offset, valid=there, segment=stimulus)
                ways.append(jnp.sum(nats, where=there) / count)
                metrics[f"{a}_{b}_retrieval"] = jnp.sum(rank < 1, where=there) / count
            # Pairs of rows taken each by itself cost the same from either side.
            losses.append(0.5 * (ways[0] + ways[1]) if self.kind == "clip" else ways[0])
            metrics[f"{one}_{other}_scale"] = scales[index]
        return jnp.stack(losses).mean(), metrics


def _share_out(leaf: Float[Array, "B ..."] | Int[Array, "B ..."] | Bool[Array, "B ..."], parts: int) -> Array:
    """[B, …] → [parts, B / parts, …], every device's own rows divided evenly among them."""
    divided = leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
    return nn.with_logical_constraint(divided, (None, "batch", *(None,) * (leaf.ndim - 1)))
