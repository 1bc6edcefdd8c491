"""What tasks over the codes of a trained tokenizer share: the tokenizer, frozen, and one linear head for all codebooks.

The tokenizer's variables, parameters and codebooks alike, lie in a collection of their own, `tokenizer`: no optimiser
sees them, no step changes them, checkpoints keep them, and the encoder of a finished run carries them along.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Bool, Float, Int

from zoo.data.codes import CodeDataset
from zoo.encoders.codes import COLLECTION, CodeEncoder, TokenizedEncoder
from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.mixer import State
from zoo.layers.parameters import dense
from zoo.objectives.train_tokenizer import TrainTokenizer
from zoo.registry import create, entry, list_models, load
from zoo.tokenizers.stretches import grid_of, tokenised
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Batch, Encoded, Sensors, Variables

T = TypeVar("T", bound="CodeTask")

LOGITS = 2**25
"""Logits that a device makes at a time: 128 MiB."""


@dataclass(frozen=True)
class CodeTask:
    """The tokenizer and the encoder of a task.

    Attributes:
        tokenizer: folder of the run that trained the tokenizer, or of codes that `zoo tokenize` made with it, which is
            where the levels of a fitted one are (mu_law, quantile). Its variables are kept by this run; what it is, is
            read from there again whenever this run is loaded. `zoo plan` also takes a registered tokenizer's name
        model: registered encoder, of codes (codes_tiny) or, where a task can, of signals (labram_tiny)
        stretch: samples that the tokenizer reads at a time, each stretch of a window by itself; 0 for whole windows
        options: replacements for its options; an encoder of codes gets `code_sizes` and, where rows are no channels,
            place "index" from the tokenizer
        dtype: compute dtype of the encoder; parameters and statistics stay float32
        remat: what the encoder recomputes in the backward pass: none, full or dots
    """

    tokenizer: str = ""
    model: str = "codes_tiny"
    stretch: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    remat: str = "none"

    @cached_property
    def frozen(self) -> tuple[Tokenizer, Variables]:
        """The tokenizer and its variables, on the host. Raises ZooError where `tokenizer` is not such a run."""
        if not self.tokenizer:
            raise ZooError("task.tokenizer: got nothing, wanted the folder of a run that trained a tokenizer")
        folder = Path(self.tokenizer)
        if not folder.exists() and self.tokenizer in list_models():
            raise ZooError(
                f"task.tokenizer: {self.tokenizer} is not trained, wanted the folder of a run that trained one (only "
                "`zoo plan` takes a name)"
            )
        with jax.ensure_compile_time_eval():
            module, variables = _of_codes(folder) if (folder / CodeDataset.FILE).exists() else load(folder)
            variables = jax.tree.map(np.asarray, variables)
        if not isinstance(module, Tokenizer):
            raise ZooError(f"task.tokenizer: the run in {folder} trained {type(module).__name__}, no tokenizer")
        return module, variables

    def using(self: T, tokenizer: Tokenizer, variables: Variables) -> T:
        """The task with this tokenizer in place of a run's."""
        task = dataclasses.replace(self)
        # Where `cached_property` looks; the field `tokenizer` stays what a configuration can hold.
        task.__dict__["frozen"] = tokenizer, variables
        return task

    def planned(self: T) -> T:
        """The task to plan with: where its tokenizer is only named, one of that name with zeros for its variables."""
        if Path(self.tokenizer).exists() or self.tokenizer not in list_models():
            return self
        tokenizer = TrainTokenizer(self.tokenizer).module()
        keys = {"params": jax.random.key(0), "codes": jax.random.key(0)}
        shapes = jax.eval_shape(tokenizer.init, keys, *tokenizer.example())
        return self.using(tokenizer, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nn.unbox(shapes)))

    @property
    def reads_codes(self) -> bool:
        """Whether the encoder reads codes; else it reads the signal."""
        constructor: Any = entry(self.model).constructor
        return issubclass(constructor, CodeEncoder)

    def encoder(self) -> Any:
        """The encoder of signals, with the tokenizer in it where it reads codes: what a probe and `zoo.load` use."""
        reader = self.reader()
        return TokenizedEncoder(self.frozen[0], reader, self.stretch) if self.reads_codes else reader

    def reader(self) -> Any:
        """The encoder alone, of codes or of signals."""
        tokenizer, options = self.frozen[0], dict(self.options)
        if self.reads_codes:
            options = {"code_sizes": tokenizer.code_sizes, **options}
            if not tokenizer.CHANNEL_ROWS and options.setdefault("place", "index") != "index":
                raise ZooError(
                    f"task.options: place {options['place']!r}: the rows of {type(tokenizer).__name__} are not "
                    "channels, wanted 'index'"
                )
        # An encoder that has no such option is what the option's default says.
        has: Any = entry(self.model).constructor
        if self.dtype != "float32" or "dtype" in has.__dataclass_fields__:
            options.setdefault("dtype", jnp.dtype(self.dtype))
        if self.remat != "none" or "remat" in has.__dataclass_fields__:
            options.setdefault("remat", self.remat)
        encoder = create(self.model, **options)
        if not hasattr(encoder, "check_sensors"):
            raise ZooError(f"task.model: {self.model} is no encoder of codes or signals, such as codes_tiny")
        return encoder

    def module(self) -> CodePredictor:
        """Encoder and head."""
        return CodePredictor(self.reader(), self.frozen[0].code_sizes)

    def tokenised(self, variables: Variables, batch: Batch) -> tuple[Int[Array, "B N Q"], int]:
        """The batch's codes and the number of rows of their grid."""
        signal, kept = batch["signal"], variables[COLLECTION]["encoder"]
        codes = tokenised(self.frozen[0], kept, signal, batch["sensors"], self.stretch)
        return codes, self.grid(*signal.shape[1:])[0]

    def grid(self, channels: int, samples: int) -> tuple[int, int]:
        """(rows, frames) of a window's codes. Raises ZooError where the tokenizer cannot cut it."""
        return grid_of(self.frozen[0], channels, samples, self.stretch)

    def kept(self) -> Variables:
        """The collection of the tokenizer's variables, under the name that `zoo.load` gives to the encoder."""
        return {COLLECTION: {"encoder": jax.tree.map(jnp.asarray, self.frozen[1])}}

    def flops(self, batch: Batch) -> float:
        """Operations of one forward pass over `batch`: the tokenizer's, the encoder's and the head's."""
        return self.tokenizer_flops(batch) + self.model_flops(batch)

    def tokenizer_flops(self, batch: Batch) -> float:
        """Those of the tokenizer."""
        examples, channels, samples = batch["signal"].shape
        length = self.stretch or samples
        return examples * samples / length * self.frozen[0].flops(channels, length)

    def model_flops(self, batch: Batch) -> float:
        """Those of encoder and head, run once."""
        examples, channels, samples = batch["signal"].shape
        encoder = self.reader()
        rows, frames = self.grid(channels, samples)
        reading = encoder.flops(rows, frames) if self.reads_codes else encoder.flops(channels, samples)
        return examples * (reading + 2 * rows * frames * encoder.dim * sum(self.frozen[0].code_sizes))

    def check_recording(self, rate_hz: float, kinds: Sequence[str], names: Sequence[str]) -> None:
        """Raises ZooError when tokenizer or encoder cannot take a recording of this rate and these channels."""
        tokenizer = self.frozen[0]
        tokenizer.check_recording(rate_hz, kinds, names)
        if tokenizer.CHANNEL_ROWS or not self.reads_codes:
            self.reader().check_sensors(names)

    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError when tokenizer or encoder must know where these sensors are, and does not."""
        tokenizer = self.frozen[0]
        tokenizer.check_positions(sensors)
        if self.reads_codes:
            self.reader().check_positions(sensors)


class CodePredictor(nn.Module):
    """An encoder and one linear head for all codebooks: logits [..., Q, K], −inf beyond a codebook's own codes."""

    encoder: nn.Module
    sizes: tuple[int, ...]

    def setup(self) -> None:
        # Logits begin near zero: every code about as likely as any other.
        self.head = dense(sum(self.sizes), ("embed", None), bias=True, init=nn.initializers.truncated_normal(0.02))

    def __call__(self, *given: Any, **options: Any) -> Float[Array, "B N Q K"]:
        """What the encoder takes → logits of the codes of every token."""
        encoded: Encoded = self.encoder(*given, **options)
        return self._logits(encoded.tokens)

    def guesses(
        self, *given: Any, wanted: Int[Array, "B N Q"], groups: int = 1, **options: Any
    ) -> tuple[Float[Array, "B N Q"], Bool[Array, "B N Q"]]:
        """What the encoder takes, and the code wanted of every token → its nats, and whether it is the likeliest.

        Logits are made some tokens at a time, on the devices that hold these. groups: how many stretches of the tokens
        lie on devices each by itself, the rows of an encoder that runs along them.
        """
        encoded: Encoded = self.encoder(*given, **options)
        head = nn.unbox(self.head.variables["params"])

        def grouped(x: Array) -> Array:
            return x.reshape(len(x), groups, -1, x.shape[-1])

        axes: Any = ("batch", None, "tokens", None)
        found = on_devices(
            partial(code_guesses, self.sizes),
            (grouped(encoded.tokens), grouped(wanted), head["kernel"], head["bias"]),
            (axes, axes, (None, None), (None,)),
            (axes, axes),
        )
        nats, right = (x.reshape(wanted.shape) for x in found)
        return nats, right

    def prefill(
        self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, rows: int, capacity: int
    ) -> tuple[Float[Array, "B R Q K"], State]:
        """The first frames → logits of the frame after them, and the state."""
        encoder: Any = self.encoder
        tokens, state = encoder.prefill(codes, sensors, rows, capacity)
        return self._logits(tokens[:, :, -1]), state

    def step(
        self, codes: Int[AnyArray, "B R Q"], sensors: Sensors, state: State
    ) -> tuple[Float[Array, "B R Q K"], State]:
        """One frame of every row → logits of the next, and the new state."""
        encoder: Any = self.encoder
        tokens, state = encoder.step(codes, sensors, state)
        return self._logits(tokens), state

    def _logits(self, tokens: Array) -> Array:
        logits = self.head(tokens.astype(jnp.float32))
        most, parts, first = max(self.sizes), [], 0
        for size in self.sizes:
            own = logits[..., first : first + size]
            parts.append(jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, most - size)], constant_values=-jnp.inf))
            first += size
        return jnp.stack(parts, axis=-2)


def code_guesses(
    sizes: Sequence[int],
    tokens: Float[Array, "*lead D"],
    wanted: Int[Array, "*lead Q"],
    kernel: Float[Array, "D K"],
    bias: Float[Array, " K"],
    most: int = LOGITS,
) -> tuple[Float[Array, "*lead Q"], Bool[Array, "*lead Q"]]:
    """Nats of the wanted codes by a linear head, and which are the likeliest; where −1 is wanted they mean nothing.

    sizes  of the codebooks, whose logits lie side by side; K is their sum
    most   logits that are made at a time, and again for the gradient
    """
    count, books = math.prod(wanted.shape[:-1]), len(sizes)
    block = max(1, min(count, most // sum(sizes)))
    turns = -(-count // block)

    def turn(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        tokens, wanted = part
        logits = tokens.astype(jnp.float32) @ kernel + bias
        nats, right, first = [], [], 0
        for book, size in enumerate(sizes):
            own, code = logits[:, first : first + size], jnp.maximum(wanted[:, book], 0)
            nats.append(jax.nn.logsumexp(own, axis=1) - jnp.take_along_axis(own, code[:, None], axis=1)[:, 0])
            right.append(own.argmax(1) == wanted[:, book])
            first += size
        return None, (jnp.stack(nats, axis=-1), jnp.stack(right, axis=-1))

    def parts(x: Array) -> Array:
        flat = x.reshape(count, x.shape[-1])
        return jnp.pad(flat, ((0, turns * block - count), (0, 0))).reshape(turns, block, -1)

    again = jax.checkpoint(turn, prevent_cse=False) if turns > 1 else turn
    _, found = jax.lax.scan(again, None, (parts(tokens), parts(wanted)))
    nats, right = (x.reshape(-1, books)[:count].reshape(wanted.shape) for x in found)
    return nats, right


def prediction_sums(
    nats: Float[Array, "*lead Q"],
    right: Bool[Array, "*lead Q"],
    codes: Int[Array, "*lead Q"],
    where: Bool[Array, "*lead"],
) -> tuple[Float[Array, " Q"], Float[Array, " Q"], Float[Array, " Q"]]:
    """Over the tokens `where`, of each codebook: nats of cross-entropy, right guesses, codes that count (not −1)."""
    counted = where[..., None] & (codes >= 0)
    lead = tuple(range(codes.ndim - 1))
    return (
        jnp.sum(nats, axis=lead, where=counted),
        jnp.sum(right & counted, axis=lead).astype(jnp.float32),
        jnp.sum(counted, axis=lead).astype(jnp.float32),
    )


def code_counts(codes: Int[Array, "*lead Q"], sizes: Sequence[int]) -> Float[Array, "Q K"]:
    """How often each code of each codebook occurs, −1 not counted; K is the largest codebook's size."""
    flat = codes.reshape(-1, len(sizes))
    books = jnp.broadcast_to(jnp.arange(len(sizes)), flat.shape)
    zero = jnp.zeros((len(sizes), max(sizes)))
    return zero.at[books, jnp.maximum(flat, 0)].add((flat >= 0).astype(jnp.float32))


def _of_codes(folder: Path) -> tuple[Tokenizer, Variables]:
    """The tokenizer that made the codes in `folder`."""
    codes = CodeDataset.open(folder)
    return TrainTokenizer(**codes.tokenizer).module(), unflatten_dict(codes.variables(), sep="/")
