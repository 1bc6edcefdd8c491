"""`zoo embed`: a recording's windows as features of a trained encoder, with their times.

    zoo embed sub-01_eeg.edf --model runs/quickstart --out features.npz

    found = zoo.embed.embed("sub-01_eeg.edf", "runs/quickstart", hop=1.0)
    found.features, found.start_seconds                         # [N, D], [N]

The recording goes through the recipe that the weights know (or one that is named), is cut into windows, one every hop,
and what lies after the last whole window is left out. Bad channels are marked, not dropped.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.readers import discover, read
from zoo.data.recipes import RECIPES, Recipe
from zoo.data.recipes import recipe as recipe_called
from zoo.data.signals import Processed, process
from zoo.data.store import write_file
from zoo.encoders.adapted import Adapted
from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.layers.channel_adapter import ChannelAdapter
from zoo.sensors import KINDS, NAME_INDEX
from zoo.tokenizers.tokenizer import Tokenizer
from zoo.types import Sensors, Variables
from zoo.weights.files import fingerprint
from zoo.weights.folder import COLLECTION, Weights
from zoo.weights.load import load_weights

CHANNELS = ("identity", "interpolate")
ENDINGS = (".npz", ".parquet")


@dataclass(frozen=True)
class Options:
    """A recording → features: `zoo embed FILE --model NAME [OPTIONS]`; FILE may be a folder or a sample's name too.

    NAME is that of published weights (`zoo list`), a run's folder, an exported folder, or hf:owner/repository.

    Attributes:
        out: file to write, .npz or .parquet; by default the recording's name with .npz, here
        window: length of a window in seconds; by default what the weights were trained on
        hop: seconds from one window to the next; by default a window
        recipe: start from a named recipe (--recipe NAME) in place of the weights' own, and replace fields of it
        channels: identity, or interpolate: spherical splines lead to the channels that the model wants
        tokens: write the tokens of every window too (.npz only)
        subject: index of the person, for models with a layer for each
        tokenizer: weights of the tokenizer that the model reads through, where it came without
        batch_size: windows at a time
    """

    out: Path | None = None
    window: float | None = None
    hop: float | None = None
    recipe: Recipe = RECIPES["raw"]
    channels: str = "identity"
    tokens: bool = False
    subject: int | None = None
    tokenizer: str = ""
    batch_size: int = 32


@dataclass(frozen=True)
class Embedding:
    """Features of N windows.

    features        [N, D] float32, the pooled vector of each
    recording       [N] name of the recording it is of
    start_seconds, stop_seconds
                    [N] float64, from the first sample of that recording
    channels        names of the channels that were read, as in the file
    rate_hz         of what was read, after the recipe
    tokens, valid   [N, n, D] float32 and [N, n] bool, where they were asked for
    model           name of the weights, and weights_sha256 of their names, shapes and values
    """

    features: np.ndarray
    recording: np.ndarray
    start_seconds: np.ndarray
    stop_seconds: np.ndarray
    channels: tuple[str, ...]
    rate_hz: float
    model: str
    weights_sha256: str
    recipe: Recipe
    tokens: np.ndarray | None = None
    valid: np.ndarray | None = None

    def write(self, path: str | Path) -> Path:
        """Writes .npz (everything, under these names; `recipe` as JSON) or .parquet (a row a window, the rest as
        metadata), whole or not at all. Raises ZooError for another ending, and for tokens in .parquet."""
        path = Path(path)
        check_ending(path, self.tokens is not None)
        content = io.BytesIO()
        if path.suffix == ".npz":
            np.savez(content, **self._arrays())
        else:
            self._write_parquet(content)
        write_file(path, content.getvalue())
        return path

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            "features": self.features,
            "recording": self.recording,
            "start_seconds": self.start_seconds,
            "stop_seconds": self.stop_seconds,
            "channels": np.array(self.channels),
            "rate_hz": self.rate_hz,
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "recipe": json.dumps(self.recipe.to_json()),
        }
        return arrays if self.tokens is None else {**arrays, "tokens": self.tokens, "valid": self.valid}

    def _write_parquet(self, sink: io.BytesIO) -> None:
        arrow, parquet = _arrow(), importlib.import_module("pyarrow.parquet")
        arrays = self._arrays()
        features = arrays.pop("features")
        columns = {name: arrays.pop(name) for name in ("recording", "start_seconds", "stop_seconds")}
        digits = len(str(features.shape[1] - 1))
        columns |= {f"feature_{column:0{digits}d}": features[:, column] for column in range(features.shape[1])}
        arrays["channels"] = json.dumps(list(self.channels))
        table = arrow.table(columns).replace_schema_metadata({name: str(value) for name, value in arrays.items()})
        parquet.write_table(table, sink)


def run(file: str, weights: Weights, chosen: Options) -> Embedding:
    """`zoo embed`: checks where it will write, embeds, writes and says what."""
    from zoo.batches import find_source

    out = chosen.out or Path(f"{Path(file).name.partition('.')[0]}.npz")
    check_ending(out, chosen.tokens)
    if out.exists():
        raise ZooError(f"{out}: exists; choose another file with --out")
    found = embed(
        find_source(file),
        weights,
        window=chosen.window,
        hop=chosen.hop,
        recipe=chosen.recipe,
        channels=chosen.channels,
        tokens=chosen.tokens,
        subject=chosen.subject,
        tokenizer=chosen.tokenizer,
        batch_size=chosen.batch_size,
    )
    found.write(out)
    count, features = found.features.shape
    seconds = found.stop_seconds[0] - found.start_seconds[0]
    print(f"{out}: {count} windows of {seconds:g} s of {len(found.channels)} channels, {features} features each")
    return found


def embed(
    file: str | Path,
    model: str | Path | Weights,
    *,
    window: float | None = None,
    hop: float | None = None,
    recipe: str | Recipe = "",
    channels: str = "identity",
    tokens: bool = False,
    subject: int | None = None,
    tokenizer: str | Path = "",
    batch_size: int = 32,
) -> Embedding:
    """Features of the windows of a recording, or of all recordings of a folder, which must have the same channels.

    model  what `zoo.load` takes, or what `zoo.weights.load.load_weights` gave; the other arguments are those of
           `Options`; recipe may be a name, or `dataclasses.replace(recipe, sensor_names="nearest")` of one

    Raises ZooError: weights that are no encoder's, or lack their tokenizer; no recipe or no window known or given; a
    recording of another rate, of channels that the model does not take, naming those it wants, or too short.
    """
    weights = model if isinstance(model, Weights) else load_weights(model)
    encoder, variables = _encoder(weights, tokenizer)
    steps = known_recipe(weights, recipe)
    seconds = window if window is not None else weights.window_seconds
    if seconds is None:
        raise ZooError(f"{weights.name}: no window is known that it was trained on; wanted one, in seconds (--window)")
    if seconds <= 0 or (hop is not None and hop <= 0) or batch_size < 1:
        raise ZooError(f"embed: got window {seconds:g} s, hop {hop} s, batch_size {batch_size}; wanted more than none")
    if (encoder.subjects > 0) != (subject is not None) or not 0 <= (subject or 0) < max(encoder.subjects, 1):
        wanted = f"0 to {encoder.subjects - 1}" if encoder.subjects else "none: it has no layer for each"
        raise ZooError(f"{weights.name}: got subject {subject}, wanted {wanted}")
    adapter = _adapter(encoder, channels)
    compute = jax.jit(lambda *given: _encode(encoder, adapter, subject, tokens, *given))

    parts: list[dict[str, np.ndarray]] = []
    names: tuple[str, ...] = ()
    for source in discover(file):
        processed = process(read(source), steps, source.path.name)
        own = processed.montage.names
        if parts and own != names:
            raise ZooError(f"{source.path.name}: its channels are not those of {parts[0]['recording'][0]}")
        names = own
        sensors = _sensors(processed)
        taking = Adapted(encoder, adapter)
        taking.check_recording(processed.rate_hz, processed.montage.kinds, processed.montage.canonical)
        taking.check_positions(sensors)
        starts, size = _cut(source.path.name, processed, seconds, hop)
        rows = _batches(compute, variables, processed.signal, sensors, starts, size, batch_size)
        rows["recording"] = np.array([source.id] * len(starts))
        rows["start_seconds"] = starts / processed.rate_hz
        rows["stop_seconds"] = (starts + size) / processed.rate_hz
        parts.append(rows)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    sha256 = fingerprint({name: np.asarray(leaf) for name, leaf in flat.items()})
    return Embedding(
        channels=names, rate_hz=processed.rate_hz, model=weights.name, weights_sha256=sha256, recipe=steps, **joined
    )


def check_ending(path: Path, tokens: bool) -> None:
    """Raises ZooError for a file that an embedding cannot be written to."""
    if path.suffix not in ENDINGS:
        raise ZooError(f"{path}: wanted a file that ends in {' or '.join(ENDINGS)}")
    if path.suffix == ".parquet":
        if tokens:
            raise ZooError(f"{path}: a table has no place for tokens; write .npz")
        _arrow()


def _arrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ZooError("pyarrow writes .parquet and is not installed: pip install 'brain-zoo[parquet]'") from error


def _encoder(weights: Weights, tokenizer: str | Path) -> tuple[Encoder, Variables]:
    """The encoder and all its variables."""
    module = weights.module
    if isinstance(module, Tokenizer):
        raise ZooError(f"{weights.name}: a tokenizer gives codes (`zoo tokenize`), wanted an encoder's weights")
    if not isinstance(module, Encoder):
        raise ZooError(f"{weights.name}: {type(module).__name__} encodes no windows of recordings")
    return module, with_tokenizer(weights, tokenizer)


def with_tokenizer(weights: Weights, tokenizer: str | Path = "") -> Variables:
    """All variables of a model, those of its tokenizer from other weights where it came without them.

    Raises ZooError for a tokenizer that is lacking, or that is given and is not.
    """
    if not weights.lacks:
        if tokenizer:
            raise ZooError(f"{weights.name}: it lacks no tokenizer, got {tokenizer}")
        return weights.variables
    if not tokenizer:
        raise ZooError(f"{weights.name}: it reads through a tokenizer that it came without: name one (--tokenizer)")
    return {**weights.variables, COLLECTION: load_weights(tokenizer).variables}


def known_recipe(weights: Weights, recipe: str | Recipe = "") -> Recipe:
    """The recipe given, or of that name, or else the weights' own. Raises ZooError where there is none."""
    chosen = recipe_called(recipe) if isinstance(recipe, str) and recipe else recipe or weights.recipe
    if not isinstance(chosen, Recipe):
        raise ZooError(f"{weights.name}: no recipe is known that its recordings went through; name one (--recipe)")
    return chosen


def _adapter(encoder: Encoder, channels: str) -> ChannelAdapter:
    if channels not in CHANNELS:
        raise ZooError(f"channels: got {channels!r}, wanted one of {', '.join(CHANNELS)}")
    if channels == "identity":
        return ChannelAdapter("identity")
    if not isinstance(encoder.montage, tuple):
        raise ZooError(f"{type(encoder).__name__}: it wants no channels by name that could be interpolated")
    return ChannelAdapter("interpolate", outputs=encoder.montage)


def _sensors(processed: Processed) -> Sensors:
    """Of one window, on the host."""
    montage = processed.montage
    return Sensors(
        position=montage.position[None],
        orientation=montage.orientation[None],
        kind=np.array([[KINDS.index(kind) for kind in montage.kinds]], np.int32),
        name=np.array([[NAME_INDEX.get(name, -1) for name in montage.canonical]], np.int32),
        valid=~np.isin(montage.names, processed.bads)[None],
    )


def _cut(file: str, processed: Processed, seconds: float, hop: float | None) -> tuple[np.ndarray, int]:
    """(first sample of every window, samples of a window)."""
    rate, samples = processed.rate_hz, processed.signal.shape[1]
    size = max(round(seconds * rate), 1)
    step = size if hop is None else max(round(hop * rate), 1)
    if samples < size:
        raise ZooError(f"{file}: {samples / rate:g} s are too short for a window of {seconds:g} s")
    return np.arange(0, samples - size + 1, step), size


def _batches(
    compute: Any,
    variables: Variables,
    signal: np.ndarray,
    sensors: Sensors,
    starts: np.ndarray,
    size: int,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """What `_encode` gives, of every window."""
    batch_size = min(batch_size, len(starts))
    many = jax.tree.map(lambda leaf: np.repeat(leaf, batch_size, axis=0), sensors)
    parts: list[Mapping[str, np.ndarray]] = []
    for first in range(0, len(starts), batch_size):
        # The last batch is filled up with its first window, so that every batch has one shape.
        chosen: Sequence[int] = [*starts[first : first + batch_size]]
        filled = [*chosen, *[chosen[0]] * (batch_size - len(chosen))]
        windows = np.stack([signal[:, start : start + size] for start in filled]).astype(np.float32)
        found = jax.device_get(compute(variables, windows, many))
        parts.append({name: value[: len(chosen)] for name, value in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _encode(
    encoder: Any,
    adapter: ChannelAdapter,
    subject: int | None,
    tokens: bool,
    variables: Variables,
    signal: jax.Array,
    sensors: Sensors,
) -> dict[str, jax.Array]:
    """Features of a batch of windows, and tokens where they are wanted."""
    whose = {} if subject is None else {"subject": jnp.full(len(signal), subject, jnp.int32)}
    given: Any = adapter.apply({}, signal, sensors)
    encoded: Any = encoder.apply(variables, *given, **whose)
    found = {"features": encoded.pooled.astype(jnp.float32)}
    return {**found, "tokens": encoded.tokens.astype(jnp.float32), "valid": encoded.valid} if tokens else found
