"""`zoo plan`: what a run will need and could reach on chips that are not there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.terminal import parse

USAGE = "zoo plan CONFIG --target CHIP:SHAPE [--slices N] [--search N] [--json F] [--save F] [options of CONFIG]"
DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Options:
    """Options of `zoo plan` itself; all others are the configuration's.

    Attributes:
        target: chip and shape: v5e:16x16, v5p:8x8x8, cpu:1
        slices: how many of it, joined by a network (--mesh.slice must be as many)
        channels: of an example, where no prepared dataset tells
        search: how many combinations of mesh, remat and micro-batches to compile and rank; 0 takes CONFIG's
        json: file for the plan as JSON
        save: file for the compiled step (a pickle of `jax.experimental.serialize_executable`)
    """

    target: str = ""
    slices: int = 1
    channels: int = 0
    search: int = 0
    json: Path | None = None
    save: Path | None = None


OWN = ("--target", "--slices", "--channels", "--search", "--json", "--save")


def run(arguments: Sequence[str]) -> int:
    """Prints the plan; returns 3 where the step does not fit, after naming the largest buffers."""
    if any(each in ("-h", "--help") for each in arguments):
        parse(Options, ["--help"], prog=USAGE)
    if not arguments or arguments[0].startswith("-"):
        raise ZooError(f"usage: {USAGE}")
    own, others = _split(arguments[1:])
    options = parse(Options, own, prog="zoo plan CONFIG")
    if not options.target:
        raise ZooError("zoo plan: wanted --target, such as v5p:8x8x8")
    from zoo.plan.target import prepare, target

    if not options.target.startswith("cpu:"):
        prepare()
    from zoo.plan.buffers import Buffers
    from zoo.plan.hlo import Hlo
    from zoo.plan.plan import DoesNotFit, plan, table, to_json
    from zoo.train.config import load_config

    config = load_config(Path(arguments[0]), others)
    chips = target(options.target, options.slices)
    if options.search:
        return _search(config, chips, options)
    try:
        found, compiled = plan(config, chips, options.channels)
    except DoesNotFit as error:
        print(f"zoo plan: {error}")
        for buffer in error.buffers:
            print(f"  {buffer}")
        return DOES_NOT_FIT
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(to_json(found), indent=1) + "\n")
    if options.save:
        from jax.experimental.serialize_executable import serialize

        options.save.write_bytes(pickle.dumps(serialize(compiled)))
    if not found.fits:
        for buffer in Buffers(Hlo(compiled.as_text())).largest():
            print(f"  {buffer}")
    return 0 if found.fits else DOES_NOT_FIT


def _search(config: Any, chips: Any, options: Options) -> int:
    from zoo.plan.plan import table, to_json
    from zoo.plan.search import ranked, search

    tried = []
    for each in search(config, chips, options.channels, options.search):
        tried.append(each)
        seconds = each.plan.bound_seconds if each.plan else None
        told = each.why_not or ("fits" if seconds is None else f"{seconds * 1e3:.3g} ms at best")
        print(f"{' '.join(each.options)}: {told}", flush=True)
    best = ranked(tried)
    if options.json:
        rows = [{"options": each.options, **to_json(each.plan)} for each in best if each.plan]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not best:
        print(f"zoo plan: none of {len(tried)} combinations fits {options.target}")
        return DOES_NOT_FIT
    assert best[0].plan is not None
    print(f"\nbest of {len(best)} that fit: {' '.join(best[0].options)}\n{table(best[0].plan)}")
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of `zoo plan`, each with its value, and the configuration's."""
    own: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for each in rest:
        name, _, value = each.partition("=")
        if name not in OWN:
            others.append(each)
        elif value:
            own += [name, value]
        else:
            own += [name, *[given for given in [next(rest, None)] if given is not None]]
    return own, others
