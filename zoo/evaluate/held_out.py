"""What a trained classifier makes of windows it has not learned from, beside shrinkage LDA on the same windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from zoo.data.windows import Windows, record_windows
from zoo.evaluate.baseline import ShrinkageLDA, window_features
from zoo.evaluate.metrics import Scores, scores
from zoo.evaluate.probe import Trials
from zoo.train.mesh import replicated
from zoo.types import Sensors

if TYPE_CHECKING:
    from zoo.data.store import Dataset
    from zoo.train.mesh import BatchPlacer
    from zoo.train.state import Program
    from zoo.types import Variables


def held_out(program: Program, variables: Variables, dataset: Dataset, place: BatchPlacer) -> dict[str, Scores]:
    """Scores of the run's classifier, and of shrinkage LDA, on each part of the split but the one they learn from.

    Keys are "validation: eegnet_base" and the like. Raises ZooError for a part without labelled windows or, with
    several people, one that lacks a class in a person.
    """
    config, task = program.config, program.task
    predict: Any = task.predict  # type: ignore[attr-defined]
    size = round(config.data.window_seconds * dataset.rate_hz)
    windows = {
        part: record_windows(dataset, records, size, config.probe.classes)
        for part, records in dataset.splits.items()
        if len(records)
    }
    known = windows.pop("train")
    lda = ShrinkageLDA().fit(window_features(known.signal, known.rate_hz), known.label)
    found = {}
    for part, these in windows.items():
        probabilities = {
            "shrinkage LDA": lda.predict_proba(window_features(these.signal, these.rate_hz)),
            config.task.model: over_windows(program, predict, variables, these, place),
        }
        for name, probability in probabilities.items():
            found[f"{part}: {name}"] = scores(
                these.label,
                probability.argmax(1),
                probability,
                these.classes,
                subject=these.subject,
                block=Trials.of(these).blocks,
            )
    return found


def over_windows(
    program: Program,
    function: Any,
    variables: Variables,
    windows: Windows,
    place: BatchPlacer,
) -> np.ndarray:
    """`function(variables, batch)` [b, …] of every window, [N, …] float32, computed on the run's mesh."""
    size = program.config.data.batch_size
    person = windows.person.astype(np.int32)
    with jax.set_mesh(program.mesh), program.context():
        compute = jax.jit(function, out_shardings=replicated(program.mesh))
        parts = []
        for first in range(0, len(windows.label), size):
            # The last batch is filled up with its first window, so that every batch has one shape.
            chosen = np.arange(first, first + size)
            chosen[chosen >= len(windows.label)] = first
            mine = chosen[list(place.rows)]
            of_recording = {name: value[windows.recording[mine]] for name, value in windows.sensors.items()}
            batch = {"signal": windows.signal[mine], "sensors": Sensors(**of_recording), "subject": person[mine]}
            parts.append(np.asarray(jax.device_get(compute(variables, place(batch)))))
    return np.concatenate(parts)[: len(windows.label)].astype(np.float32)
