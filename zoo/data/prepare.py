"""Files to shards: `prepare` runs a recipe over every recording of a source.

Each recording ends with its own manifest, `parts/<id>.json`, written last and whole: a run that is killed,
or stopped by a bad file, continues where it was. `index.npz` and `dataset.json` are put together from the
manifests at the end, so a folder with a `dataset.json` is a finished dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from zoo.data.manifests import Outcome, index_of, prepare_recording, source_files
from zoo.data.recipes import Recipe
from zoo.data.splits import FRACTIONS, SPLITS
from zoo.data.store import (
    FORMAT,
    Dataset,
    claim,
    write_records,
)
from zoo.errors import ZooError

if TYPE_CHECKING:
    from rich.console import Console

    from zoo.data.readers import Source

PACKAGES = ("brain-zoo", "mne", "mne-bids", "nibabel", "numpy", "scipy", "array-record")


@dataclass(frozen=True)
class Totals:
    """What a run of `prepare` did.

    files_in         recordings found in the source
    files_out        recordings in the dataset
    reused           of these, prepared by an earlier run
    skipped          (recording, reason) of the files left out with `skip_bad`
    records          records in the dataset
    rejected         records left out because of the recipe's `reject`, or whose event window crosses an end
    dropped_channels channels left out because the recipe does not want their kind
    hours            hours of signal in the dataset's recordings
    bytes            size of the shards
    """

    files_in: int
    files_out: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    records: int
    rejected: int
    dropped_channels: int
    hours: float
    bytes: int

    def __str__(self) -> str:
        lines = [
            f"files in {self.files_in}, out {self.files_out} ({self.reused} from an earlier run), "
            f"skipped {len(self.skipped)}",
            f"records {self.records}, rejected {self.rejected}; dropped channels {self.dropped_channels}",
            f"{self.hours:.2f} hours, {self.bytes / 1e6:.1f} MB",
        ]
        return "\n".join(lines + [f"skipped {name}: {reason}" for name, reason in self.skipped])


def prepare(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    jobs: int = 1,
    dask: str = "",
    skip_bad: bool = False,
    split: str = "by_time",
    fractions: Mapping[str, float] = FRACTIONS,
    parcellation: Path | None = None,
    mask: Path | None = None,
) -> Totals:
    """Prepares every recording of `source` (a file or folder) into the dataset folder `out`.

    jobs          recordings at a time, one process each (−1: all cores); a 20-minute recording of 128
                  channels at 256 Hz takes about 1 GB while it is worked on
    dask          address of a Dask scheduler to run on instead
    skip_bad      leave out files that cannot be read or processed, and list them in `dataset.json`;
                  otherwise the first one stops the run, once those in progress are finished
    split         the default split that is stored: "by_time", "by_subject" or "by_run"
    parcellation, mask  passed to `zoo.data.readers.discover` for volumes

    Raises ZooError: no recordings; a bad file; a folder that holds something else or was prepared with
    another recipe; a full disk; recordings of different rates when the recipe sets none; a split there is
    not enough data for.
    """
    from rich.console import Console

    from zoo.data.readers import discover

    if split not in SPLITS:
        raise ZooError(f"split {split!r}: wanted one of {', '.join(SPLITS)}")
    out = Path(out)
    sources = sorted(discover(source, parcellation=parcellation, mask=mask), key=lambda each: each.id)
    if not sources:
        raise ZooError(f"{source}: no recordings found in it")
    ids = [each.id for each in sources]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ZooError(f"{source}: two recordings are called {twice!r}")
    claim(out, "recipe.json", recipe.to_json(), "zoo prepare", "prepared with another recipe")
    console = Console()
    files = source_files(sources)
    wanted = {"split": {"policy": split, "fractions": dict(fractions)}, "sources": _stamps(files)}
    finished = _finished(out, wanted, skip_bad, console)
    if finished:
        _print(console, f"{out}: already prepared")
        return finished
    for leftover in out.glob("**/*.tmp"):
        leftover.unlink()
    outcomes = _run(sources, files, out, recipe, jobs, dask, skip_bad, console)
    return _assemble(out, recipe, outcomes, wanted, console)


def _stamps(files: Mapping[str, list[Path]]) -> dict[str, dict[str, list[int]]]:
    """Size and time of every file: what tells quickly that nothing has changed."""
    stamps: dict[str, dict[str, list[int]]] = {}
    for name, paths in files.items():
        status = {file.name: file.stat() for file in paths}
        stamps[name] = {file: [each.st_size, each.st_mtime_ns] for file, each in status.items()}
    return stamps


def _finished(out: Path, wanted: Mapping[str, Any], skip_bad: bool, console: Console) -> Totals | None:
    """The totals of a whole dataset made of the same files, else None: there is something to do."""
    if not (out / "dataset.json").exists():
        return None
    try:
        plain = Dataset.read_json(out)
        Dataset.open(out)
    except ZooError as error:
        _print(console, f"{error}: now")
        return None
    split = {field: plain["split"][field] for field in wanted["split"]}
    if plain["sources"] != wanted["sources"] or split != wanted["split"]:
        return None
    skipped = tuple((name, reason) for name, reason in plain["totals"]["skipped"])
    if skipped and not skip_bad:
        return None
    return Totals(**plain["totals"] | {"skipped": skipped, "reused": plain["totals"]["files_out"]})


def _run(
    sources: list[Source],
    files: Mapping[str, list[Path]],
    out: Path,
    recipe: Recipe,
    jobs: int,
    dask: str,
    skip_bad: bool,
    console: Console,
) -> list[Outcome]:
    """All recordings, in parallel; stops handing out work at the first failure that counts."""
    from joblib import Parallel, delayed

    outcomes: list[Outcome] = []

    def stopped() -> bool:
        return any(each.fatal or (each.reason and not skip_bad) for each in outcomes)

    def work() -> Iterator[Any]:
        for source in sources:
            if stopped():
                return
            yield delayed(prepare_recording)(source, files[source.id], out, recipe)

    with _backend(jobs, dask), _progress(sources, console) as advance:
        for outcome in Parallel(return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)(work()):
            outcomes.append(outcome)
            advance(outcome, len(outcomes))
    for outcome in sorted(outcomes, key=lambda each: (not each.fatal, each.id)):
        if outcome.fatal or (outcome.reason and not skip_bad):
            kept = sum(each.manifest is not None for each in outcomes)
            raise ZooError(f"{outcome.reason} ({kept} of {len(sources)} recordings are prepared and kept)")
    return sorted(outcomes, key=lambda each: each.id)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _backend(jobs: int, dask: str) -> Iterator[None]:
    from joblib import parallel_config

    if not dask:
        with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
            yield
        return
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ZooError(f"--dask {dask}: dask.distributed is not installed: pip install 'brain-zoo[dask]'") from error
    try:
        client = Client(dask, timeout="30s")
    except (OSError, ValueError) as error:
        raise ZooError(f"--dask {dask}: no scheduler answers there: {error}") from error
    with client, parallel_config(backend="dask"):
        yield


@contextmanager
def _progress(sources: list[Source], console: Console) -> Iterator[Any]:
    """A bar with the time left on a terminal, a line a recording otherwise; notes are lines in both."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("prepare", total=len(sources))

        def advance(outcome: Outcome, done: int) -> None:
            bar.advance(task)
            if outcome.manifest is None:
                _print(console, f"bad file {outcome.id}: {outcome.reason}")
                return
            for note in outcome.manifest["notes"]:
                _print(console, f"{outcome.id}: {note}")
            if not console.is_terminal:
                how = "was prepared" if outcome.reused else "prepared"
                left = bar.tasks[task].time_remaining
                eta = f", {left:.0f} s left" if left else ""
                _print(console, f"{how} {outcome.id} ({done} of {len(sources)}{eta})")

        yield advance


def _assemble(
    out: Path, recipe: Recipe, outcomes: list[Outcome], wanted: Mapping[str, Any], console: Console
) -> Totals:
    """Puts the manifests together into `index.npz` and `dataset.json`."""
    manifests = [each.manifest for each in outcomes if each.manifest is not None]
    skipped = tuple((each.id, each.reason) for each in outcomes if each.manifest is None)
    if not manifests:
        raise ZooError(f"{out}: none of {len(skipped)} files could be prepared; the first: {skipped[0][1]}")
    by_rate = {manifest["rate_hz"]: manifest["recording"]["id"] for manifest in manifests}
    if len(by_rate) > 1:
        listed = ", ".join(f"{name} {rate:g} Hz" for rate, name in by_rate.items())
        raise ZooError(f"{out}: the recordings differ in sampling rate ({listed}): choose a recipe with rate_hz")
    montages: dict[str, int] = {}
    recordings = []
    for manifest in manifests:
        number = montages.setdefault(json.dumps(manifest["montage"]), len(montages))
        recordings.append(manifest["recording"] | {"montage": number})
    totals = Totals(
        files_in=len(outcomes),
        files_out=len(manifests),
        reused=sum(each.reused for each in outcomes),
        skipped=skipped,
        records=sum(len(manifest["records"]["start"]) for manifest in manifests),
        rejected=sum(manifest["rejected"] for manifest in manifests),
        dropped_channels=sum(manifest["dropped_channels"] for manifest in manifests),
        hours=sum(each["n_samples"] for each in recordings) / next(iter(by_rate)) / 3600,
        bytes=sum(shard["size"] for manifest in manifests for shard in manifest["shards"]),
    )
    index = index_of(manifests)
    plain: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.to_json(),
        "rate_hz": next(iter(by_rate)),
        "classes": list(recipe.window.events) if recipe.window else [],
        "subjects": sorted({each["subject"] for each in recordings}),
        "split": wanted["split"] | {"names": []},
        "totals": asdict(totals),
        "versions": {package: version(package) for package in PACKAGES},
        "sources": wanted["sources"],
        "source_sha256": {manifest["recording"]["id"]: manifest["files"] for manifest in manifests},
        "notes": {manifest["recording"]["id"]: manifest["notes"] for manifest in manifests},
        "montages": [json.loads(montage) for montage in montages],
        "recordings": recordings,
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
    }
    summary = _assign_split(out, plain, index)
    write_records(out, Dataset.FILE, plain, index)
    _print(console, f"{totals}\n{summary}")
    return totals


def _assign_split(out: Path, plain: dict[str, Any], index: dict[str, npt.NDArray[Any]]) -> str:
    """Writes the default split into `plain` and `index`; returns a line about it."""
    wanted = plain["split"]
    split = SPLITS[wanted["policy"]](Dataset(out, plain, index), wanted["fractions"])
    for code, records in enumerate(split.values()):
        index["split"][records] = code
    wanted["names"] = list(split)
    sizes = ", ".join(f"{name} {len(records)}" for name, records in split.items())
    outside = int((index["split"] < 0).sum())
    return f"split {wanted['policy']}: {sizes} records, {outside} in none"
