"""An encoder of codes: what a tokenizer made of a signal, as a grid of rows and frames, through any mixers.

    tokenizer, variables = zoo.load("runs/tokenizer")
    encoder = zoo.create("codes_tiny", code_sizes=tokenizer.code_sizes)
    encoded = encoder.apply(own, tokenizer.apply(variables, signal, sensors, method="encode"), sensors)

A token is the sum of the embeddings of its Q codes, of its row (an electrode, a position in the head, or a number) and
of its frame, as in LaBraM (ICLR 2024, §2.2), MEG-GPT (2510.18080) and BERT (1810.04805) before them. Two codes are not
a tokenizer's: NONE, where it has no code, and HIDDEN, which stands in for a code that is to be predicted.

Reading both ways, all tokens of the grid are one sequence, row by row. With `causal` every row is a sequence of its
own, in which no frame sees a later one (MEG-GPT as released: its attention over channels is off), or, `interleaved`,
all are one, frame by frame, so that rows see each other's past; either way the encoder can be run a frame at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped

from zoo.encoders.labram import ROWS, electrode_rows
from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.mixer import Mixer, State, create_mixer, mixer_class
from zoo.layers.parameters import dense, partitioned
from zoo.registry import Card, register
from zoo.sensors import KINDS, LABRAM_NAMES
from zoo.tokenizers.stretches import tokenised
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import AnyArray, Array, Encoded, Sensors

NONE, HIDDEN = -1, -2
"""Codes that are not a tokenizer's."""
COLLECTION = "tokenizer"
"""Where an encoder that tokenises keeps the variables of its tokenizer: all of them, parameters too."""
HEAD_RADIUS = 0.1
"""Metres; brings sensor positions to about one."""

PLACES = ("name", "position", "index")
TIMES = ("sinusoidal", "learned", "none")


class CodeEncoder(nn.Module):
    """The encoder.

    code_sizes   codes of each of the Q codebooks: the tokenizer's
    causal       see above; mixers that can only be one way are that
    interleaved  see above
    place        how rows are told apart. name: by LaBraM's electrode table. position: by an MLP of position and
                 orientation in the head and a table of kinds. index: by their number, for latents and fixed montages
    rows         rows of the table of `index`
    time         how frames are: by sinusoids (1706.03762, §3.5), by a learned table, or not at all, where mixers know
                 the order themselves
    frames       rows of the learned table
    code_width   0 adds the embeddings of the Q codes; else each has so many numbers, side by side, and a linear map
                 makes D of them
    table_std    spread of each embedding; those of Q codes that are added are √Q smaller. That of sinusoids, so that
                 none drowns another
    the others   see `Backbone`
    """

    code_sizes: tuple[int, ...] = (256,)
    dim: int = 128
    mixers: tuple[str, ...] = ("softmax",) * 2
    causal: bool = False
    interleaved: bool = False
    place: str = "name"
    rows: int = 64
    time: str = "sinusoidal"
    frames: int = 256
    code_width: int = 0
    table_std: float = 0.7
    mixer_options: Mapping[str, Mapping[str, Any]] | None = None
    mlp: str = "gelu"
    mlp_options: Mapping[str, Any] | None = None
    norm: str = "rms"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @property
    def features(self) -> int:
        """D of its pooled vector."""
        return self.dim

    def setup(self) -> None:
        for name, options in (("place", PLACES), ("time", TIMES)):
            if getattr(self, name) not in options:
                raise ZooError(f"CodeEncoder {name}: got {getattr(self, name)!r}, wanted one of {options}")
        if self.interleaved and not self.causal:
            raise ZooError("CodeEncoder interleaved: got an encoder that looks both ways, wanted a causal one")
        if not self.code_sizes or min(self.code_sizes) < 1:
            raise ZooError(f"CodeEncoder code_sizes: got {self.code_sizes}, wanted the size of each codebook")
        init = nn.initializers.normal(self.table_std)
        count, codes = len(self.code_sizes), sum(self.code_sizes) + 2 * len(self.code_sizes)
        width = self.code_width or self.dim
        of_code = nn.initializers.normal(self.table_std if self.code_width else self.table_std / count**0.5)
        self.embed_code = self.param("embed_code", partitioned(of_code, None, "embed"), (codes, width))
        if self.code_width:
            self.join = dense(self.dim, (None, "embed"), dtype=self.dtype)
        if self.place == "position":
            self.place_in = dense(self.dim, (None, "mlp"), bias=True)
            self.place_out = dense(self.dim, ("mlp", "embed"))
            self.embed_kind = self.param("embed_kind", partitioned(init, None, "embed"), (len(KINDS), self.dim))
        else:
            shape = ROWS if self.place == "name" else self.rows, self.dim
            self.embed_row = self.param("embed_row", partitioned(init, None, "embed"), shape)
        if self.time == "learned":
            self.embed_frame = self.param("embed_frame", partitioned(init, None, "embed"), (self.frames, self.dim))
        self.backbone = Backbone(
            self.dim,
            self.mixers,
            self._mixer_options(),
            self.mlp,
            self.mlp_options,
            self.norm,
            self.layer_scale,
            self.drop_path,
            remat=self.remat,
            dtype=self.dtype,
        )

    def __call__(
        self,
        codes: Int[AnyArray, "B N Q"],
        sensors: Sensors,
        *,
        rows: int | None = None,
        mask: Bool[AnyArray, "B N"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """codes [B, N, Q] on a grid of `rows` (the channels unless given) → Encoded, N tokens, row by row.

        mask [B, N] bool: True where all codes of a token are hidden. A token all of whose codes are NONE is not valid:
        it is not seen, and not in `pooled`, the mean of the valid tokens. `train` draws drop-path from the "dropout"
        stream. Raises ZooError where N tokens do not make so many rows, or there are more rows or frames than tables
        have.
        """
        codes = jnp.asarray(codes)
        valid = (codes != NONE).any(-1)
        if mask is not None:
            codes = jnp.where((valid & mask)[..., None], HIDDEN, codes)
        x = self._embedded(codes, sensors, rows, 0)
        grid = x.shape[:3]
        x = nn.with_logical_constraint(self._as_sequences(x), ("batch", "tokens", None))
        there = self._as_sequences(valid.reshape(*grid, 1))[..., 0]
        mixed: Any = self.backbone(x, mask=there, train=train)
        tokens = self._as_grid(mixed, grid).reshape(*valid.shape, self.dim)
        pooled = jnp.sum(tokens, axis=1, where=valid[..., None], dtype=jnp.float32)
        return Encoded(tokens, (pooled / jnp.maximum(valid.sum(1), 1)[:, None]).astype(tokens.dtype), valid)

    def prefill(
        self, codes: Int[AnyArray, "B N Q"], sensors: Sensors, rows: int | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B R A D"], State]:
        """The first frames → their tokens, and the state after them, with room for `capacity` frames in all."""
        x = self._embedded(jnp.asarray(codes), sensors, rows, 0)
        flat = self._as_sequences(x)
        tokens, memory = self.backbone.prefill(flat, None, capacity * (x.shape[1] if self.interleaved else 1))
        return self._as_grid(tokens, x.shape[:3]), (memory, jnp.asarray(x.shape[2], jnp.int32))

    def step(
        self, codes: Int[AnyArray, "B R Q"], sensors: Sensors, state: State
    ) -> tuple[Float[Array, "B R D"], State]:
        """One frame of every row → its tokens and the new state. NaN past the table of learned frames."""
        memory, time = state
        x = self._embedded(jnp.asarray(codes), sensors, codes.shape[1], time)[:, :, 0]
        if self.interleaved:

            def turn(encoder: CodeEncoder, memory: State, token: Array) -> tuple[State, Array]:
                out, memory = encoder.backbone.step(token, memory)
                return memory, out

            over_rows = nn.scan(turn, variable_broadcast=True, split_rngs={"params": False}, in_axes=1, out_axes=1)
            memory, tokens = over_rows(self, memory, x)
        else:
            tokens, memory = self.backbone.step(x.reshape(-1, self.dim), memory)
        return tokens.reshape(x.shape), (memory, time + 1)

    @nn.nowrap
    def flops(self, rows: int, frames: int) -> float:
        """Operations of one example's forward pass, a multiply-add counting two.

        Those of the matrices, and of the scores and means of attention with as many tokens as `compared` says; what
        the states of other mixers cost besides is left out.
        """
        params: Any = jax.eval_shape(self.init, jax.random.key(0), *self.example())["params"]
        matrices = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params["backbone"])) if leaf.ndim > 2)
        length = frames if self.causal and not self.interleaved else rows * frames
        options = self._mixer_options()
        each = sum(compared(create_mixer(name, self.dim, **options[name]), length) for name in self.mixers)
        join = self.code_width * len(self.code_sizes) * self.dim
        return float(2 * rows * frames * (matrices + join + 2 * each * self.dim))

    @nn.nowrap
    def example(self) -> tuple[Array, Sensors]:
        """The smallest input, one token of one electrode."""
        blank, one = jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32)
        codes = jnp.zeros((1, 1, len(self.code_sizes)), jnp.int32)
        return codes, Sensors(blank, blank, one, one, jnp.ones((1, 1), bool))

    @nn.nowrap
    def check_sensors(self, names: Sequence[str]) -> None:
        """Raises ZooError for a canonical name (upper case, "" for none) that its rows cannot be told apart by."""
        for name in names if self.place == "name" else ():
            if name not in LABRAM_NAMES[: ROWS - 1]:
                raise ZooError(
                    f"CodeEncoder place 'name': no electrode is called {name!r}; a recipe's sensor_names='nearest' "
                    "maps by position, and place 'position' or 'index' need no names"
                )
        if self.place == "index" and len(names) > self.rows:
            raise ZooError(f"CodeEncoder place 'index': got {len(names)} channels, wanted at most rows {self.rows}")

    @nn.nowrap
    def check_positions(self, sensors: Sensors) -> None:
        """Raises ZooError for valid channels, on the host, of no known position where rows are told apart by it."""
        unknown = np.asarray(sensors.valid) & ~np.isfinite(np.asarray(sensors.position)).all(-1)
        if self.place == "position" and unknown.any():
            raise ZooError(
                f"CodeEncoder place 'position': got {unknown.sum()} channels of no known position, wanted none; place "
                "'name' or 'index' need no positions"
            )

    def _embedded(
        self, codes: Array, sensors: Sensors, rows: int | None, first: Array | int
    ) -> Float[Array, "B R A D"]:
        """Tokens before the first layer; `first` is the number of the first frame."""
        batch, tokens, books = codes.shape
        rows = sensors.valid.shape[1] if rows is None else rows
        if books != len(self.code_sizes):
            raise ZooError(f"CodeEncoder: got codes of {books} codebooks, wanted {len(self.code_sizes)}")
        if tokens % rows:
            raise ZooError(f"CodeEncoder: got {tokens} tokens, wanted a multiple of the {rows} rows")
        if self.place != "index" and rows != sensors.valid.shape[1]:
            raise ZooError(f"CodeEncoder place {self.place!r}: got {rows} rows that are not channels, wanted 'index'")
        sizes = jnp.asarray(self.code_sizes)
        begins = jnp.cumsum(sizes + 2) - sizes - 2
        row = begins + jnp.where(codes >= 0, codes, sizes - 1 - codes)
        # Made whole before rows are taken of it: from a split table XLA would copy the batch to every device.
        table = nn.with_logical_constraint(self.embed_code, (None, None)).astype(self.dtype)
        each = jnp.take(table, row.reshape(batch, rows, tokens // rows, books), axis=0)
        x = self.join(each.reshape(*each.shape[:3], -1)) if self.code_width else each.sum(-2)
        place = self._places(sensors, rows)[:, :, None].astype(self.dtype)
        return x + place + self._times(first, x.shape[2]).astype(self.dtype)

    @nn.nowrap
    def _as_sequences(self, x: Shaped[Array, "B R A F"]) -> Shaped[Array, "S T F"]:
        """The sequences that mixers see: all, each row, or all frame by frame."""
        batch, rows, frames, width = x.shape
        if self.interleaved:
            return x.swapaxes(1, 2).reshape(batch, -1, width)
        return x.reshape(batch * rows, frames, width) if self.causal else x.reshape(batch, -1, width)

    @nn.nowrap
    def _as_grid(self, x: Shaped[Array, "S T F"], grid: Sequence[int]) -> Shaped[Array, "B R A F"]:
        """Sequences on their grid (B, R, A) again."""
        batch, rows, frames = grid
        if self.interleaved:
            return x.reshape(batch, frames, rows, -1).swapaxes(1, 2)
        return x.reshape(batch, rows, frames, -1)

    def _places(self, sensors: Sensors, rows: int) -> Float[Array, "_ R D"]:
        """Embeddings of rows. Of a valid channel that nothing is known of it is NaN, and so is the loss."""
        if self.place == "index":
            if rows > self.rows:
                raise ZooError(f"CodeEncoder place 'index': got {rows} rows, wanted at most {self.rows}")
            return self.embed_row[None, :rows]
        if self.place == "name":
            index = electrode_rows(sensors)
            table = nn.with_logical_constraint(self.embed_row, (None, None))
            place = jnp.where((index > 0)[..., None], jnp.take(table, index, axis=0), jnp.nan)
        else:
            where = jnp.concatenate([sensors.position / HEAD_RADIUS, jnp.nan_to_num(sensors.orientation)], axis=-1)
            place = self.place_out(nn.gelu(self.place_in(where))) + jnp.take(self.embed_kind, sensors.kind, axis=0)
        return jnp.where(sensors.valid[..., None], place, 0.0)

    def _times(self, first: Array | int, frames: int) -> Float[Array, "A _"]:
        index = first + jnp.arange(frames)
        if self.time == "none":
            return jnp.zeros((frames, 1))
        if self.time == "learned":
            if frames > self.frames:
                raise ZooError(f"CodeEncoder: got {frames} frames, wanted at most {self.frames}")
            return self.embed_frame.at[index].get(mode="fill", fill_value=jnp.nan)
        rate = 10_000.0 ** (-jnp.arange(0, self.dim, 2) / self.dim)
        angle = index[:, None] * rate
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, : self.dim]

    @nn.nowrap
    def _mixer_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Those given; the direction, for mixers that have two; no rotary positions where rows follow one another."""
        options = {name: dict(each) for name, each in (self.mixer_options or {}).items()}
        for name in self.mixers:
            mixer = mixer_class(name)
            own = options.setdefault(name, {})
            if len(mixer.ways) > 1:
                own.setdefault("causal", self.causal)
            if not self.causal and "rotary" in mixer.__dataclass_fields__:
                own.setdefault("rotary", False)
        return options


def compared(mixer: Mixer, length: int) -> float:
    """How many tokens, or what stands for them, attention compares each of `length` tokens with; 0 without attention.

    As if every token saw all that its mixer lets any see, past and future alike.
    """
    if not type(mixer).__module__.startswith("zoo.attention"):
        return 0.0
    seen: Any = mixer
    if "selected_blocks" in mixer.__dataclass_fields__:
        return min(float(length), length / seen.stride + seen.selected_blocks * seen.block_size + seen.window)
    return float(min(length, getattr(mixer, "window", length)))


class TokenizedEncoder(nn.Module):
    """A tokenizer and an encoder of its codes, together an encoder of signals.

    Its parameters are the encoder's; the tokenizer's variables, in the collection `tokenizer`, are only read. `stretch`
    as in `tokenised`.
    """

    tokenizer: Tokenizer
    encoder: CodeEncoder
    stretch: int = 0

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)

    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        *,
        mask: Bool[AnyArray, "B N"] | None = None,
        train: bool = False,
    ) -> Encoded:
        """signal [B, C, T] as the tokenizer takes it → Encoded, a token for each of its tokens; mask [B, N] hides."""
        tokenizer = self.tokenizer.clone(parent=None)
        codes = tokenised(tokenizer, self.variables[COLLECTION], signal, sensors, self.stretch)
        rows = tokenizer.grid(signal.shape[1], self.stretch or signal.shape[2])[0]
        return self.encoder(codes, sensors, rows=rows, mask=mask, train=train)


_NEAR: dict[str, Any] = {"causal": True, "time": "none", "mixer_options": {"sliding_window": {"window": 128}}}

_LONG: dict[str, Any] = {"dim": 2048, "mixers": (*("retention",) * 3, "softmax") * 4}
_NIGHT: dict[str, Any] = {
    "causal": True,
    "interleaved": True,
    "time": "none",
    "dim": 4096,
    "mixers": ("native_sparse",) * 32,
    "mixer_options": {"native_sparse": {"heads": 32, "kv_heads": 2}},
    "mlp": "swiglu",
    "mlp_options": {"hidden": 14_336},
}

VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "codes_tiny": ({}, 444_672, "both ways"),
    "codes_small": ({"dim": 256, "mixers": ("softmax",) * 6}, 4_828_672, "both ways"),
    "codes_1b": (_LONG, 1_007_663_104, "both ways, for windows of tens of thousands of tokens"),
    "next_codes_tiny": ({**_NEAR, "mixers": ("sliding_window",) * 2}, 444_672, "causal"),
    "next_codes_small": ({**_NEAR, "dim": 256, "mixers": ("sliding_window",) * 5}, 4_040_448, "causal"),
    "next_codes_7b": (_NIGHT, 6_961_512_448, "causal over all channels, for hundreds of thousands of tokens"),
}
"""Options, parameters with a codebook of 256 codes, direction. All are ours; the last has MEG-GPT's width and depth."""

for _name, (_options, _parameters, _direction) in VARIANTS.items():
    register(
        _name,
        CodeEncoder,
        _options,
        Card(
            title=f"Encoder of a tokenizer's codes, {_direction}, {_parameters / 1e6:.1f} M parameters",
            paper="none: ours, after LaBraM (ICLR 2024), BERT (1810.04805) and MEG-GPT (2510.18080)",
            code="this repository",
            licence="Apache-2.0",
            inputs="codes [B, N, Q] of any tokenizer, row by row, and the sensors they came from",
            parameters=_parameters,
            evidence="invariances and streaming: tests/encoders/test_codes_encoder.py; trained: tests/objectives",
        ),
    )
