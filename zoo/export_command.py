"""`zoo export-program`: what of a trained model is exported, and the inputs that it is checked with.

zoo export-program runs/quickstart served --channels FP1,FP2,C3,C4 --samples "200*a" --constraints "a <= 16"
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from zoo.embed import with_tokenizer
from zoo.errors import ZooError
from zoo.program import load_program, named, told
from zoo.sensors import KINDS, NAME_INDEX
from zoo.serving import BATCH, PLATFORMS, export_program
from zoo.types import Sensors
from zoo.weights.load import load_weights

EXAMPLE = 2
"""Size of an open axis where the program is checked."""
SIZE = re.compile(r"\d+|((?P<times>\d+)\*)?[ac-z]")
"""A number, or a multiple of any; b is the batch."""
HEAD_RADIUS = 0.09
"""Metres; where sensors are drawn."""


@dataclass(frozen=True)
class Options:
    """A trained model → a program to serve: `zoo export-program MODEL OUT [OPTIONS]`.

    MODEL is the name of published weights (`zoo list`), a run's folder, an exported folder, or hf:owner/repository. OUT
    is a new folder. The program needs JAX to run, and neither the model's code nor its files.

    Attributes:
        channels: their canonical names, with commas between, or how many; by default what the model is made for. A
            letter stands for any number
        kind: kind of the channels; by default the first that the model takes
        samples: of a window; by default those that the model was trained on. A multiple of a letter, such as 200*a,
            stands for any such number
        constraints: what the model wants of the letters, such as "a <= 16"
        batch: examples of a call; by default any number
        method: of the model; encode and decode of a tokenizer
        platforms: that the program can run on: cpu, cuda, rocm, tpu. That of this machine must be among them
        weights: inside: the program holds its parameters; beside: they are a file of their own
        tokenizer: weights of the tokenizer, for an encoder that came without
    """

    channels: str = ""
    kind: str = ""
    samples: str = ""
    constraints: tuple[str, ...] = ()
    batch: str = BATCH
    method: str = "__call__"
    platforms: tuple[str, ...] = PLATFORMS
    weights: str = "inside"
    tokenizer: str = ""


def run(model: str, out: str, chosen: Options) -> None:
    """`zoo export-program`: draws inputs of the shapes that are asked for, exports and says what."""
    weights = load_weights(model)
    variables = with_tokenizer(weights, chosen.tokenizer)
    rate = getattr(weights.module, "sampling_rate", None) or (weights.recipe.rate_hz if weights.recipe else None)
    window = round(weights.window_seconds * rate) if weights.window_seconds and rate else None
    inputs, shapes = drawn_inputs(weights.module, window, chosen)
    head = (weights.module.head(weights.classes), weights.head) if weights.classes else None
    folder = export_program(
        weights.module,
        variables,
        out,
        inputs,
        head=head if chosen.method == "__call__" else None,
        method=chosen.method,
        shapes=shapes,
        constraints=chosen.constraints,
        batch=chosen.batch,
        platforms=chosen.platforms,
        weights=chosen.weights,
        known=weights,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {weights.name} for {', '.join(chosen.platforms)}, {size / 1e6:.1f} MB, equal to the model")
    card = load_program(folder).card
    for each in (*card["inputs"], *card["outputs"]):
        print(f"  {'in ' if each in card['inputs'] else 'out'} {each['name']:<20} {told(each)}")


def drawn_inputs(module: nn.Module, window: int | None, chosen: Options) -> tuple[dict[str, Any], dict[str, str]]:
    """Noise of the shapes that are asked for, sensors at places on a head, and the open shape of each array.

    window  samples, where `chosen` names none
    """
    name = type(module).__name__
    takes = inspect.signature(getattr(module, chosen.method, module.__call__)).parameters
    if not {"signal", "codes"} & set(takes) or "sensors" not in takes:
        raise ZooError(f"{name}: {chosen.method} takes no signal and sensors; zoo.export_program takes any inputs")
    wanted = getattr(module, "montage", None)
    names: tuple[str, ...] = wanted if isinstance(wanted, tuple) else ()
    channels, samples = chosen.channels or str(wanted if isinstance(wanted, int) else len(names) or ""), chosen.samples
    if len(chosen.channels) > 1 and not chosen.channels[0].isdigit():
        names = tuple(each.strip().upper() for each in chosen.channels.split(","))
        channels = str(len(names))
    if names and hasattr(module, "check_sensors"):
        module.check_sensors(names)
    rows, frames = _size(name, "channels", channels), _size(name, "samples", samples or str(window or ""))
    kinds = getattr(module, "TAKES", KINDS)
    kind = chosen.kind or kinds[0]
    if kind not in kinds:
        raise ZooError(f"{name}: kind {kind!r}: takes {', '.join(kinds)}")

    rng = np.random.default_rng(0)
    position = rng.normal(size=(1, rows, 3))
    position /= np.linalg.norm(position, axis=-1, keepdims=True)
    sensors = Sensors(
        position=(HEAD_RADIUS * position).astype(np.float32),
        orientation=np.where(kind in ("mag", "grad"), position, np.nan).astype(np.float32),
        kind=np.full((1, rows), KINDS.index(kind), np.int32),
        name=np.array([[NAME_INDEX.get(each, -1) for each in names or ("",) * rows]], np.int32),
        valid=np.ones((1, rows), bool),
    )
    inputs: dict[str, Any] = {"sensors": sensors}
    shapes = {each: f"{chosen.batch}, {channels}" + ", 3" * (leaf.ndim - 2) for each, leaf in named(inputs).items()}
    if "signal" in takes:
        inputs = {"signal": rng.normal(size=(1, rows, frames)).astype(np.float32), **inputs}
        shapes["signal"] = f"{chosen.batch}, {channels}, {samples or frames}"
    else:
        if not (channels + (samples or str(frames))).isdigit():
            raise ZooError(f"{name}.{chosen.method}: channels {channels}, samples {samples}: wanted numbers for codes")
        tokens, sizes = math.prod(module.grid(rows, frames)), module.code_sizes
        inputs = {"codes": rng.integers(0, sizes, (1, tokens, len(sizes))).astype(np.int32), **inputs}
        shapes["codes"] = f"{chosen.batch}, {tokens}, {len(sizes)}"
    if getattr(module, "subjects", 0) and "subject" in takes:
        inputs["subject"] = np.zeros(1, np.int32)
        shapes["subject"] = chosen.batch
    size = int(chosen.batch) if chosen.batch.isdigit() else 1
    return jax.tree.map(lambda leaf: np.repeat(leaf, size, axis=0), inputs), shapes


def _size(name: str, what: str, text: str) -> int:
    """The number, or for an open axis that which it is checked with."""
    found = SIZE.fullmatch(text)
    if not found:
        listed = "names with commas between, " if what == "channels" else ""
        raise ZooError(
            f"{name}: --{what} {text!r}: wanted {listed}a number, or for any a letter but b, as in a or 200*a"
        )
    return int(text) if text.isdigit() else int(found["times"] or 1) * EXAMPLE
