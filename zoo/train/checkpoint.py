"""Checkpoints through Orbax: asynchronous, newest and best kept, restored onto any mesh and number of hosts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from zoo.data.store import write_json
from zoo.errors import ZooError

FILES = "files.json"
"""In a finished checkpoint: its files and their sizes, so that a missing one is named before anything is read."""


class Damaged(ZooError):
    """A checkpoint that cannot be read."""


def set_aside(folder: Path, step: int) -> Path:
    """Renames the checkpoint of `step` in `folder`, so that it is no longer one, and says what it is called now."""
    taken = sum(1 for _ in folder.glob(f"{step}.damaged*"))
    aside = folder / f"{step}.damaged{taken or ''}"
    with contextlib.suppress(FileNotFoundError):  # another process has seen it too
        (folder / str(step)).rename(aside)
    return aside


def set_damaged_aside(folder: Path) -> list[str]:
    """Sets aside the newest checkpoints in `folder` whose files are not what was written, up to the first sound one.

    Returns a line for each. To be called before any process opens the folder. A checkpoint whose list of files is
    missing, because its process ended just then, is judged when it is restored.
    """
    said = []
    for step in sorted((int(each.name) for each in folder.glob("[0-9]*") if each.name.isdigit()), reverse=True):
        wrong = _wrong_file(folder / str(step))
        if wrong is None:
            break
        said.append(f"{wrong}; this checkpoint is set aside as {set_aside(folder, step)}")
    return said


class Checkpoints:
    """The checkpoints in `folder`. Only finished ones count: Orbax writes to a temporary name and renames at the end.

    A checkpoint is a `zoo.train.state.State`; its loss is the validation loss by which the best are kept. With
    `keep_last` 0 they are only read: another process may be writing there, and nothing of its is removed.
    """

    def __init__(self, folder: Path, keep_last: int = 0, keep_best: int = 0) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder = folder
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=keep_last > 0,
        )
        self._saving: int | None = None

    @property
    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, in order."""
        return sorted(each.step for each in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Begins to save; returns once the state is copied off the device. Raises ZooError when the disk is full."""
        if step in self.steps:
            return
        metrics = None if loss is None else {"loss": loss}
        self.wait()
        with self._disk_errors():
            self._check_room(state)
            self._checkpointer.save_async(step, state, force=True, metrics=metrics)
        self._saving = step

    def wait(self) -> None:
        """Returns when every save has finished."""
        with self._disk_errors():
            self._checkpointer.wait()
        self.list_files()

    def list_files(self) -> None:
        """Writes down the files of the checkpoint last begun, once it is finished; to be called now and then."""
        if self._saving is None or self._checkpointer.is_saving_in_progress():
            return
        if jax.process_index() == 0:
            saved = self.folder / str(self._saving)
            sizes = {str(file.relative_to(saved)): file.stat().st_size for file in saved.rglob("*") if file.is_file()}
            write_json(saved / FILES, sizes)
        self._saving = None

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of `step` laid out as `abstract`, whatever layout it was written from.

        Raises Damaged when the checkpoint cannot be read, ZooError when it is of another model or optimiser.
        """
        self._check_tree(step, abstract)
        return self._load(step, abstract)

    def load(self, step: int) -> dict[str, Any]:
        """Everything of `step` but the optimiser's moments, as nested dictionaries of arrays on the first device."""
        from orbax.checkpoint import v1 as ocp

        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def wanted(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

        abstract = {
            name: jax.tree.map(
                (lambda _: ocp.PLACEHOLDER) if name == "optimizer" else wanted,
                part,
                is_leaf=lambda leaf: hasattr(leaf, "shape"),
            )
            for name, part in self._metadata(step).items()
        }
        return self._load(step, abstract)

    def close(self) -> None:
        """Waits, then lets go."""
        self.wait()
        with self._disk_errors():
            self._checkpointer.close()

    def _load(self, step: int, abstract: Any) -> Any:
        try:
            return self._checkpointer.load(step, abstract)
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean the same to the reader
            raise self._damaged(step, error) from error

    def _metadata(self, step: int) -> Any:
        self._check_files(step)
        try:
            found = self._checkpointer.metadata(step).metadata
        except Exception as error:
            raise self._damaged(step, error) from error
        if found is None:
            raise self._damaged(step, ValueError("its arrays are not described"))
        return found

    def _check_files(self, step: int) -> None:
        wrong = _wrong_file(self.folder / str(step))
        if wrong is not None:
            raise Damaged(f"{wrong}; {self._instead(step)}")

    def _damaged(self, step: int, error: Exception) -> Damaged:
        said = next(iter(str(error).strip().splitlines()), "")[:200]
        return Damaged(
            f"{self.folder / str(step)}: cannot read this checkpoint ({type(error).__name__}: {said}); "
            f"{self._instead(step)}"
        )

    def _instead(self, step: int) -> str:
        earlier = [each for each in self.steps if each < step]
        return f"remove its folder to go on from {f'step {earlier[-1]}' if earlier else 'the start'}"

    def _check_tree(self, step: int, abstract: Any) -> None:
        """Compares names and shapes before any array is read, so that a changed model is named as such."""
        have, want = _shapes(self._metadata(step)), _shapes(abstract)
        wrong = [
            f"{name}: checkpoint {have.get(name, 'nothing')}, run {want.get(name, 'nothing')}"
            for name in sorted(have.keys() | want.keys())
            if have.get(name) != want.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ZooError(
                f"{self.folder / str(step)}: written by another model or optimiser; {'; '.join(wrong[:3])}{more}"
            )

    def _check_room(self, state: Any) -> None:
        """Sees a full disk before a part of a checkpoint is on it."""
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ZooError(f"{self.folder}: the disk is full: a checkpoint takes {needed:,} bytes, {free:,} are free")

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if any(sign in str(error) for sign in ("No space left", "Disk quota")):
                raise ZooError(f"{self.folder}: the disk is full, the checkpoint was not written") from error
            raise


def _wrong_file(saved: Path) -> str | None:
    """The first file of a checkpoint that is missing or not as long as it was written, and how."""
    if not (saved / FILES).is_file():  # the process ended between the checkpoint and its list
        return None
    try:
        sizes = json.loads((saved / FILES).read_text())
    except ValueError:
        return f"{saved / FILES}: this file of the checkpoint is cut short"
    for name, size in sizes.items():
        file = saved / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"has {file.stat().st_size} bytes, wanted {size}" if file.is_file() else "is missing"
            return f"{file}: this file of the checkpoint {found}"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
