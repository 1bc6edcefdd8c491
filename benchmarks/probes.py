"""Encoders on `faces_eeg`: checkerboards, faces and houses, within a person and from one person to the other.

    python benchmarks/probes.py --folder runs/probes --json runs/probes.json          # everything; goes on where it was
    python benchmarks/probes.py --rows "eegnet" --seconds 600
    python benchmarks/probes.py --share 0.6 --rows "eegnet" --set '{"channel_dropout": 0.5}'   # to choose settings

A row is a decoder: shrinkage LDA on the windows themselves, an encoder trained from labels alone, or a linear probe of
one that was pretrained without labels and is frozen. All are scored in the folds of `zoo.evaluate.probe`, balanced
accuracy with 95 % intervals over trials, chance .333. Within a person: five contiguous fifths of the recording, each
predicted from the others. Across: each person predicted from the other. Settings of encoders, `probe_contenders.py`,
were chosen on the first 60 % of each recording, which is what `--share 0.6` shows.

Recordings: average reference, 0.5–40 Hz, each channel to median 0 and interquartile range 1.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Before this file's own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.probe_contenders import CONTENDERS, RATE_HZ, SECOND, SETTINGS, Contender
from zoo.errors import ZooError
from zoo.terminal import parse

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {
    "checker": ("checker-left", "checker-right"),
    "face": ("face-upright", "face-inverted"),
    "house": ("house-upright", "house-inverted"),
}


NEIGHBOURHOOD = 0.02
"""Metres, the deviation of a site's weights."""


@dataclass(frozen=True)
class Options:
    """Trains and scores every row, and prints balanced accuracies beside shrinkage LDA's.

    Attributes:
        rows: which; names of the table, or of registered encoders that are not in it; the table's unless given
        encoders: also every registered encoder of EEG called *_tiny
        share: of each recording's trials, the first ones, that take part
        folds: blocks of time a person's trials are divided into
        seconds: a row that takes longer is given up
        set: settings of the estimator to replace, as JSON
        folder: of prepared recordings and runs
        json: read figures from here, go on with what is missing, and write after every row
    """

    rows: tuple[str, ...] = ()
    encoders: bool = False
    share: float = 1.0
    folds: int = 5
    seconds: float = 3600.0
    set: str = "{}"
    folder: Path = Path("runs/probes")
    json: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["row"]:
            name, out, *rest = arguments[1:]
            options = parse(Options, rest, prog="benchmarks/probes.py")
            Path(out).write_text(json.dumps(scored(name, options)))
            return 0
        options = parse(Options, arguments, prog="benchmarks/probes.py")
        figures: dict[str, Any] = {}
        if options.json and options.json.exists():
            figures = json.loads(options.json.read_text())
        for name in wanted(options):
            recipe = described(name, options)
            if figures.get(name, {}).get("recipe") == recipe:
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            figures[name] = {"recipe": recipe, **apart(name, options, arguments)}
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    show({name: figures[name] for name in wanted(options)}, options)
    return 0


def wanted(options: Options) -> tuple[str, ...]:
    """Names of rows; ZooError where one is none."""
    import zoo
    from zoo.encoders.encoder import Encoder

    names = dict.fromkeys(options.rows or CONTENDERS)
    for name in names:
        if name not in CONTENDERS and name not in zoo.list_models():
            raise ZooError(f"--rows: {name!r} is neither a registered encoder nor among {', '.join(CONTENDERS)}")
    if options.encoders:
        for name in zoo.list_models("_tiny"):
            encoder = zoo.create(name)
            if isinstance(encoder, Encoder) and "eeg" in encoder.TAKES:
                names[name] = None
    if not 0 < options.share <= 1:
        raise ZooError(f"--share: got {options.share}, wanted more than 0 and at most 1")
    settings_of(contender(next(iter(names))), options)
    return tuple(names)


def contender(name: str) -> Contender:
    """What a row is; a registered encoder that the table has not gets what the table's get."""
    return CONTENDERS.get(name) or Contender(name, window=SECOND, by_person=True, settings=SETTINGS)


def settings_of(what: Contender, options: Options) -> dict[str, Any]:
    """Those of the row with the command's in place. Raises ZooError for what is no JSON object."""
    try:
        return {**what.settings, **json.loads(options.set)}
    except (json.JSONDecodeError, TypeError):
        raise ZooError(f"--set: wanted a JSON object such as '{{\"epochs\": 20}}', got {options.set!r}") from None


def described(name: str, options: Options) -> dict[str, Any]:
    """What a row's figures depend on, as JSON gives it back."""
    what = contender(name)
    plain = {
        **dataclasses.asdict(what),
        "settings": settings_of(what, options),
        "share": options.share,
        "folds": options.folds,
    }
    back: dict[str, Any] = json.loads(json.dumps(plain))
    return back


def apart(name: str, options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """The figures of a row, from a process of its own, or why there are none."""
    options.folder.mkdir(parents=True, exist_ok=True)
    out = options.folder / "row.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__)), "row", name, str(out), *arguments]
    before = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=options.seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {options.seconds:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"failed": said[-1] if said else f"ended with {done.returncode}"}
    return {**json.loads(out.read_text()), "seconds": time.monotonic() - before}


def scored(name: str, options: Options) -> dict[str, Any]:
    """The figures of a row."""
    from zoo.evaluate.baseline import lda_baseline
    from zoo.evaluate.probe import compare, cross_validate
    from zoo.evaluate.supervised import SupervisedEstimator, as_features

    what = contender(name)
    if what.pretraining:
        return pretrained(name, what, options)
    if not what.model:
        windows, trials = cut(what, what.rate_hz or RATE_HZ, options)
        return {"parameters": 0, **lda_baseline(windows.signal, windows.rate_hz, trials, folds=options.folds).to_json()}

    import zoo
    from zoo.registry import parameter_count

    rate_hz = what.rate_hz or zoo.create(what.model).sampling_rate or RATE_HZ
    windows, trials = cut(what, rate_hz, options)
    known = type(zoo.create(what.model)).__dataclass_fields__
    _, channels, samples = windows.signal.shape
    sizes = {"channels": channels, "samples": samples}
    made = {**{field: size for field, size in sizes.items() if field in known}, **what.options}
    names, places, valid = electrodes(windows)
    estimator = SupervisedEstimator(
        what.model, names, rate_hz, options=made, positions=places, valid=valid, **settings_of(what, options)
    )
    result = cross_validate(as_features(windows.signal, windows.subject), trials, estimator, folds=options.folds)
    baseline = lda_baseline(windows.signal, rate_hz, trials, folds=options.folds)
    return {
        "parameters": parameter_count(zoo.create(what.model, **made)),
        **result.to_json(),
        "LDA on these windows": baseline.to_json(),
        "difference": {where: each._asdict() for where, each in compare(result, baseline).items()},
    }


def cut(what: Contender, rate_hz: float, options: Options) -> tuple[Any, Any]:
    """Windows and trials, of the first `share` of each recording's."""
    from zoo.data.fetch import fetch
    from zoo.data.prepare import prepare
    from zoo.data.recipes import Recipe
    from zoo.data.store import Dataset
    from zoo.data.windows import event_windows
    from zoo.evaluate.probe import Trials

    recipe = Recipe(
        name="probes",
        highpass_hz=0.5,
        lowpass_hz=min(40.0, 0.45 * rate_hz),
        reference="average",
        rate_hz=rate_hz,
        scale="robust",
        clip=10.0,
        sensor_names="nearest",
    )
    folder = options.folder / f"prepared_{rate_hz:g}"
    prepare(fetch("faces_eeg"), folder, recipe)
    windows = event_windows(Dataset.open(folder), CLASSES, *what.window)
    kept = np.sort(np.concatenate([rows[: round(options.share * len(rows))] for rows in _by_recording(windows)]))
    fields = {field.name: getattr(windows, field.name) for field in dataclasses.fields(windows)}
    per_window = {name: value[kept] for name, value in fields.items() if isinstance(value, np.ndarray)}
    windows = dataclasses.replace(windows, **per_window)
    if what.sites:
        windows = averaged(windows, what.sites)
    if what.by_person:
        windows = dataclasses.replace(windows, signal=by_person(windows.signal, windows.subject))
    return windows, Trials.of(windows)


def averaged(windows: Any, sites: int) -> Any:
    """Windows of so many sites. Electrodes that are not valid count nowhere, and are no site."""
    _, places, valid = electrodes(windows)
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    chosen = [int(np.flatnonzero(valid)[0])]
    while len(chosen) < sites:
        chosen.append(int(np.where(valid, apart[chosen].min(0), -1).argmax()))
    weights = np.exp(-0.5 * (apart[chosen] / NEIGHBOURHOOD) ** 2) * valid
    weights /= weights.sum(1, keepdims=True)
    sensors = {name: values[:, chosen] for name, values in windows.sensors.items()}
    return dataclasses.replace(windows, signal=np.float32(weights) @ windows.signal, sensors=sensors)


def by_person(signal: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """[N, C, T] with mean 0 and deviation 1 over each person's windows at every channel and time."""
    out = np.empty_like(signal)
    for person in np.unique(subject):
        rows = signal[subject == person]
        deviation = rows.std(0)
        out[subject == person] = (rows - rows.mean(0)) / np.where(deviation == 0, 1, deviation)
    return out


def _by_recording(windows: Any) -> list[np.ndarray]:
    """Indices of each recording's windows in time order, which is theirs."""
    return [np.flatnonzero(windows.recording == each) for each in np.unique(windows.recording)]


def electrodes(windows: Any) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Names [C], mean places [C, 3] and which are valid in every recording [C]; the montage is the same in all."""
    from zoo.sensors import NAMES

    sensors = windows.sensors
    names = tuple(str(NAMES[each]) if each >= 0 else "" for each in sensors["name"][0])
    return names, np.asarray(sensors["position"]).mean(0), np.asarray(np.all(sensors["valid"], axis=0))


def pretrained(name: str, what: Contender, options: Options) -> dict[str, Any]:
    """A linear probe of the encoder after `zoo train` of its configuration, with that of random weights beside it."""
    if options.share < 1:
        raise ZooError(f"{name}: its probe is of whole recordings, wanted --share 1")
    config, *more = what.pretraining
    run = f"pretrained_{what.model}"
    given = [f"--name={run}", f"--runs={options.folder}", f"--data.prepared={options.folder / 'pretraining'}", *more]
    given.append(f"--probe.folds={options.folds}")
    program = "import sys; from zoo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "train", str(ROOT / config), *given], stdout=sys.stderr)
    if done.returncode:
        raise ZooError(f"zoo train {config} {' '.join(given)}: ended with {done.returncode}")
    found = json.loads((options.folder / run / "evaluation.json").read_text())
    import zoo
    from zoo.registry import parameter_count

    return {
        "parameters": parameter_count(zoo.load(options.folder / run)[0]),
        **found["pretrained probe"],
        "random weights": found["random-weights probe"],
        "LDA on these windows": found["shrinkage LDA"],
    }


def show(rows: Mapping[str, Mapping[str, Any]], options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    part = "" if options.share == 1 else f", first {options.share:.0%} of each recording"
    table = Table(title=f"balanced accuracy [95 %], chance .333{part}")
    headings = ("decoder", "parameters", "within a person", "across people", "across − LDA, same windows", "minutes")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "decoder" else "right")
    for name, figures in rows.items():
        if "failed" in figures:
            table.add_row(name, "", figures["failed"], *[""] * 3)
            continue
        lines = {name: figures}
        if "random weights" in figures:
            lines[f"  {name.partition(',')[0]}, random weights"] = figures["random weights"]
        for line, each in lines.items():
            cells = [interval(each[where]["mean"]["balanced_accuracy"]) for where in ("within", "across")]
            gain = interval(each["difference"]["across"], "+") if "difference" in each else ""
            count = f"{each['parameters']:,}" if each.get("parameters") else ""
            minutes = f"{each['seconds'] / 60:.1f}" if "seconds" in each else ""
            table.add_row(line, count, *cells, gain, minutes)
    Console(width=140).print(table)


def interval(each: Mapping[str, float], sign: str = "") -> str:
    return f"{each['value']:{sign}.3f} [{each['low']:{sign}.3f}, {each['high']:{sign}.3f}]"


if __name__ == "__main__":
    sys.exit(main())
