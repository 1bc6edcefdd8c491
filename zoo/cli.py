"""The `zoo` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.data.recipes import RECIPES, Recipe, recipe
from zoo.errors import ZooError

HELP = """\
usage: zoo COMMAND …

  fetch NAME                 download a sample dataset: checked, cached, licence and citation shown
  prepare SOURCE OUT         recordings → filtered, scaled, sharded dataset
  train CONFIG [OPTIONS]     run a configuration, from where its folder left off
  plan CONFIG --target CHIP  what a run needs and could reach on chips that are not there (exit code 3: does not fit)
  evaluate RUN               probe the newest checkpoint of a run again
  tokenize DATASET OUT       signals → codes, by a trained tokenizer; --decode CODES OUT: back
  generate RUN OUT           new signals from a next-code model, and their spectra beside real ones
  embed FILE                 windows of a recording → features of a trained encoder, with their times
  convert SOURCE OUT         weights of another framework → a folder of ours, every tensor accounted for
  export-program MODEL OUT   a trained model → a program (StableHLO) that is served without the model's code
  list [PATTERN]             models, weights, samples and recipes whose name holds PATTERN
  info NAME                  parameters, inputs and paper of a model, or of published weights; what a dataset holds

`zoo COMMAND --help` tells more. Bad input gives one line and exit code 2; a run whose other processes were lost ends
with 4, one that hangs with 5, and goes on by the same command.
"""
INTERRUPTED = 130


@dataclass(frozen=True)
class Prepare:
    """Recordings → dataset. `zoo prepare SOURCE OUT [--recipe NAME] [OPTIONS]`; SOURCE is a file, folder or sample.

    Attributes:
        recipe: start from a named recipe (--recipe NAME) and replace fields of it
        jobs: recordings at a time, one process each; -1 for all cores
        dask: address of a Dask scheduler to run on instead
        skip_bad: leave out files that cannot be read, and list them
        split: how the dataset is divided by default
        parcellation: atlas image or surface labels, for volumes and surfaces
        mask: brain mask, for volumes
    """

    recipe: Recipe = RECIPES["raw"]
    jobs: int = 1
    dask: str = ""
    skip_bad: bool = False
    split: str = "by_time"
    parcellation: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Tokenize:
    """Signals → codes: `zoo tokenize DATASET --tokenizer NAME OUT [OPTIONS]`; and back: `--decode CODES OUT`.

    DATASET is a prepared dataset's folder. NAME is a run's folder, published weights (`zoo list`), an exported folder,
    or a registered tokenizer that is fitted and not trained (mu_law, quantile): it is fitted to the training part.

    Attributes:
        step: step of the run; by default its newest checkpoint
        window_seconds: length of a record; by default the run's, or 1 s
        batch_size: windows at a time
        options: options of a fitted tokenizer, as NAME VALUE pairs
    """

    step: int | None = None
    window_seconds: float | None = None
    batch_size: int = 64
    options: Mapping[str, int | float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code.

    0, 2 for bad input, 3 for a plan that does not fit, 4 for a run that lost another process, 5 for one that hangs, 130
    when interrupted.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from zoo import __version__

        print(__version__)
        return 0
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
            raise ZooError(f"no command is called {command!r}; the nearest is {near!r}")
        return COMMANDS[command](rest) or 0
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return INTERRUPTED


def fetch(arguments: Sequence[str]) -> None:
    """zoo fetch NAME"""
    name = _words(arguments, "zoo fetch NAME", 1)[0]
    from zoo.data.fetch import fetch as fetch_sample

    print(fetch_sample(name))


def prepare(arguments: Sequence[str]) -> None:
    """zoo prepare SOURCE OUT [--recipe NAME] [--recipe.FIELD VALUE …] [OPTIONS]"""
    from zoo.terminal import parse

    words, options = _split_words(arguments)
    name = _taken(options, "--recipe", "zoo prepare")
    base = recipe(name) if name else RECIPES["raw"]
    chosen = parse(Prepare, options, prog="zoo prepare SOURCE OUT", default=Prepare(recipe=base))
    source, out = _words(words, "zoo prepare SOURCE OUT [--recipe NAME]", 2)

    from zoo.batches import find_source
    from zoo.data.prepare import prepare as prepare_recordings

    prepare_recordings(
        find_source(source),
        Path(out),
        chosen.recipe,
        jobs=chosen.jobs,
        dask=chosen.dask,
        skip_bad=chosen.skip_bad,
        split=chosen.split,
        parcellation=chosen.parcellation,
        mask=chosen.mask,
    )


def train(arguments: Sequence[str]) -> int:
    """zoo train CONFIG [--profile] [--resume | --no-resume] [--stopped-code N] [OPTIONS]

    N is the exit code of a run that was asked to end before its last step, 0 unless given: a scheduler that would take
    0 for done wants another, see configs/launch.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ZooError("usage: zoo train CONFIG [OPTIONS]; `zoo train CONFIG --help` lists the options")
    file, *options = arguments
    stopped_code = _taken(options, "--stopped-code", "zoo train") or "0"
    if not (stopped_code.isdigit() and int(stopped_code) < 256):
        raise ZooError(f"zoo train: --stopped-code {stopped_code}: wanted 0 to 255")
    short = {"--profile": "--train.profile", "--resume": "--train.resume", "--no-resume": "--train.no-resume"}
    from zoo.run import train as run
    from zoo.train.stop import Stopped

    try:
        run(Path(file), [short.get(each, each) for each in options])
    except Stopped as stopped:
        print(stopped)
        return int(stopped_code)
    return 0


def plan(arguments: Sequence[str]) -> int:
    """zoo plan CONFIG --target CHIP:SHAPE [OPTIONS]"""
    from zoo.plan.command import run

    return run(arguments)


def evaluate(arguments: Sequence[str]) -> None:
    """zoo evaluate RUN"""
    from zoo.run import evaluate as run

    run(Path(_words(arguments, "zoo evaluate RUN", 1)[0]))


def tokenize(arguments: Sequence[str]) -> None:
    """zoo tokenize DATASET --tokenizer NAME OUT [OPTIONS], or zoo tokenize --decode CODES OUT"""
    from zoo.terminal import parse

    usage = "zoo tokenize DATASET --tokenizer NAME OUT, or zoo tokenize --decode CODES OUT"
    rest = list(arguments)
    back = "--decode" in rest
    if back:
        rest.remove("--decode")
    name = "" if back else _taken(rest, "--tokenizer", "zoo tokenize")
    words, options = _split_words(rest)
    chosen = parse(Tokenize, options, prog="zoo tokenize")
    path, out = _words(words, usage, 2)
    if back:
        from zoo.detokenize import rebuild

        rebuild(path, out, batch_size=chosen.batch_size)
        return
    if not name:
        raise ZooError(f"usage: {usage}; got no --tokenizer")
    from zoo.tokenize import tokenize as run

    run(
        path,
        name,
        out,
        options=chosen.options,
        step=chosen.step,
        window_seconds=chosen.window_seconds,
        batch_size=chosen.batch_size,
    )


def generate(arguments: Sequence[str]) -> None:
    """zoo generate RUN OUT [OPTIONS]"""
    from zoo.generate import Options
    from zoo.generate import generate as run
    from zoo.terminal import parse

    words, options = _split_words(arguments)
    chosen = parse(Options, options, prog="zoo generate RUN OUT")
    path, out = _words(words, "zoo generate RUN OUT", 2)
    run(Path(path), Path(out), chosen)


def embed(arguments: Sequence[str]) -> None:
    """zoo embed FILE --model NAME [--recipe NAME] [--recipe.FIELD VALUE …] [OPTIONS]"""
    from zoo.embed import Options, known_recipe, run
    from zoo.terminal import parse
    from zoo.weights.load import load_weights

    words, rest = _split_words(arguments)
    options = [part for each in rest for part in (each.split("=", 1) if each.startswith("--") else [each])]
    model = _taken(options, "--model", "zoo embed")
    weights = load_weights(model) if model else None
    base = known_recipe(weights, _taken(options, "--recipe", "zoo embed")) if weights else RECIPES["raw"]
    chosen = parse(Options, options, prog="zoo embed FILE --model NAME", default=Options(recipe=base))
    file = _words(words, "zoo embed FILE --model NAME", 1)[0]
    if weights is None:
        raise ZooError("zoo embed: wanted --model NAME: published weights, a run's folder or an exported one")
    run(file, weights, chosen)


def convert(arguments: Sequence[str]) -> None:
    """zoo convert SOURCE OUT --arch NAME [OPTIONS], or zoo convert WEIGHTS OUT"""
    from zoo.terminal import parse
    from zoo.weights.convert import Options
    from zoo.weights.convert import convert as run

    words, options = _split_words(arguments)
    chosen = parse(Options, options, prog="zoo convert SOURCE OUT")
    source, out = _words(words, "zoo convert SOURCE OUT --arch NAME", 2)
    run(source, out, chosen)


def export_program(arguments: Sequence[str]) -> None:
    """zoo export-program MODEL OUT [OPTIONS]"""
    from zoo.export_command import Options
    from zoo.export_command import run as export
    from zoo.terminal import parse

    words, options = _split_words(arguments)
    chosen = parse(Options, options, prog="zoo export-program MODEL OUT")
    model, out = _words(words, "zoo export-program MODEL OUT", 2)
    export(model, out, chosen)


def list_names(arguments: Sequence[str]) -> None:
    """zoo list [PATTERN]"""
    pattern = (_words(arguments, "zoo list [PATTERN]", 0, 1) or [""])[0]
    from zoo.data.samples import SAMPLES
    from zoo.layers.mixer import MIXERS, mixer_class
    from zoo.registry import entry, list_models
    from zoo.weights.cards import PRETRAINED

    mixers = {name: _first_line(mixer_class(name).__module__) for name in MIXERS if pattern in name}
    models = {name: entry(name).card.title for name in list_models(pattern)}
    weights = {name: f"trained on {card.about}" for name, card in PRETRAINED.items() if pattern in name}
    samples = {name: sample.about for name, sample in SAMPLES.items() if pattern in name}
    recipes = {name: recipe.source for name, recipe in RECIPES.items() if pattern in name}
    kinds = {"models": models, "weights": weights, "mixers": mixers, "samples": samples, "recipes": recipes}
    for title, names in kinds.items():
        print(f"{title}:")
        for name, about in names.items():
            print(f"  {name:<22} {about}")


def info(arguments: Sequence[str]) -> None:
    """zoo info NAME"""
    name = _words(arguments, "zoo info NAME", 1)[0]
    from zoo.data.about import about, looks_like_dataset

    if looks_like_dataset(name):
        for title, value in about(name).items():
            print(f"{title:<11}{value}")
        return
    from zoo.registry import create, entry, parameter_count
    from zoo.weights.cards import PRETRAINED

    weights = PRETRAINED.get(name)
    found = entry(weights.arch if weights else name)
    options = {**found.options, **(weights.options if weights else {})}
    told = ", ".join(f"{key} {_in_short(value)}" for key, value in options.items()) or "the defaults"
    of_weights: dict[str, Any] = {}
    if weights:
        from zoo.weights.load import where

        of_weights = {
            "trained on": weights.about,
            "classifier": f"{weights.classes} classes" if weights.classes else "none",
            "recipe": weights.recipe or "none",
            "from": where(weights),
            "sha256": weights.sha256,
            "licence": weights.licence,
        }
    for title, value in {
        "model": f"{weights.arch if weights else name}: {found.card.title}",
        "parameters": f"{parameter_count(create(weights.arch if weights else name, **options)):,}",
        "input": found.card.inputs,
        "options": told,
        "evidence": found.card.evidence,
        "paper": found.card.paper,
        "code": f"{found.card.code} ({found.card.licence})",
        **of_weights,
    }.items():
        print(f"{title:<11}{value}")


COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {
    "fetch": fetch,
    "prepare": prepare,
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "generate": generate,
    "embed": embed,
    "convert": convert,
    "export-program": export_program,
    "list": list_names,
    "info": info,
}


def _first_line(module: str) -> str:
    """What a module says that it is."""
    return (sys.modules[module].__doc__ or "").partition("\n")[0]


def _in_short(value: Any) -> str:
    """The value, a tuple of one thing many times as `thing × times`."""
    if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
        return f"{value[0]} × {len(value)}"
    return str(value)


def _taken(arguments: list[str], option: str, command: str) -> str:
    """Takes `option` and the name behind it out of the arguments; "" where it is not there."""
    for at, each in enumerate(arguments):
        if each.startswith(f"{option}="):
            arguments[at : at + 1] = each.split("=", 1)
            break
    if option not in arguments:
        return ""
    at = arguments.index(option)
    if at + 1 == len(arguments):
        raise ZooError(f"{command}: {option} wants a name")
    name = arguments[at + 1]
    del arguments[at : at + 2]
    return name


def _split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the rest."""
    first = next((at for at, each in enumerate(arguments) if each.startswith("-")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _words(arguments: Sequence[str], usage: str, least: int, most: int | None = None) -> list[str]:
    """Exactly the words a command takes; its usage as the error, or as the answer to --help."""
    if any(each in ("-h", "--help") for each in arguments):
        print(f"usage: {usage}")
        raise SystemExit(0)
    if any(each.startswith("-") for each in arguments) or not least <= len(arguments) <= (most or least):
        raise ZooError(f"usage: {usage}; got {' '.join(arguments) or 'nothing'}")
    return list(arguments)
