"""Named preprocessing recipes: what is done to a recording between its file and the shards.

A recipe is applied by `zoo.data.signals.process`, in this order: keep the channels of `kinds`, canonical
names, bad channels, notch, band-pass, reference, resample, scale, clip; `zoo.data.prepare` then cuts
records and drops those above `reject`.

`RECIPES` holds the published recipe of each model as far as its paper or official code states it. What
belongs to a single window (BIOT's and TFM's percentile per sample, BrainOmni's mean and deviation per
sensor group, the baseline of brainmagick) is done where the window is cut, not here. Not expressible here,
because it needs other input than the recording: DeWave and GLIM (eye fixations of ZuCo), NeuroBridge
(whitening with the covariance of training trials), RBTransformer (differential entropy), MVCNet (Euclidean
alignment across trials), the bipolar montage of EEGDM and BIOT.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from zoo.errors import ZooError
from zoo.sensors import KINDS

Reference = Literal["", "average"]
Scale = Literal["fixed", "zscore", "robust", "percentile95"]
SensorNames = Literal["by_name", "nearest", "none"]
Bads = Literal["mark", "interpolate"]
DType = Literal["float32", "float16"]

_CHOICES = {
    "reference": get_args(Reference),
    "scale": get_args(Scale),
    "sensor_names": get_args(SensorNames),
    "bads": get_args(Bads),
    "dtype": get_args(DType),
}


@dataclass(frozen=True)
class Window:
    """One record per event instead of continuous segments.

    Attributes:
        events: labels of the events that get a record; a record's label is an index into this tuple
        tmin: seconds from the event's onset to the first sample
        tmax: seconds from the event's onset to the end (exclusive)
    """

    events: tuple[str, ...]
    tmin: float
    tmax: float


@dataclass(frozen=True)
class Recipe:
    """How a recording becomes records; ZooError where a field makes no sense.

    Attributes:
        name: what the recipe is called
        source: where it was published
        kinds: kinds of channels to keep (`zoo.sensors.KINDS`); the others are dropped, and counted
        highpass_hz: lower edge of the band, Hz; None leaves the low end as recorded
        lowpass_hz: upper edge of the band, Hz; None leaves the high end as recorded
        butterworth_order: 0 filters with MNE's linear-phase FIR; n with a Butterworth of that order run forward
            and backward
        notch_hz: frequencies to remove, Hz: the line frequency and its harmonics where the recording
            was made
        reference: "" as recorded, or "average": subtract the mean of the good channels of each kind
            (EEG, sEEG, ECoG)
        rate_hz: sampling rate of the records, Hz; None keeps the file's
        scale: "fixed" divides by `unit`; the others work on each channel over the whole recording:
            "zscore" to mean 0 and deviation 1, "robust" to median 0 and interquartile range 1,
            "percentile95" divides by the 95th percentile of the magnitude
        unit: SI value (V, T, T/m) that "fixed" stores as 1.0
        clip: largest magnitude kept, in stored units; None keeps all
        reject: records with a larger magnitude are left out, in stored units; None keeps all
        sensor_names: how channels get canonical names: "by_name", "nearest" electrode by position, or "none"
        bads: bad channels are "mark"ed (stored, `valid` False) or "interpolate"d
        segment_seconds: length of a record of continuous signal, s; the last one of a recording is shorter
        window: None for continuous segments
        dtype: "float32" or "float16", as stored
    """

    name: str
    source: str = ""
    kinds: tuple[str, ...] = ("eeg",)
    highpass_hz: float | None = None
    lowpass_hz: float | None = None
    butterworth_order: int = 0
    notch_hz: tuple[float, ...] = ()
    reference: Reference = ""
    rate_hz: float | None = None
    scale: Scale = "fixed"
    unit: float = 1.0
    clip: float | None = None
    reject: float | None = None
    sensor_names: SensorNames = "by_name"
    bads: Bads = "mark"
    segment_seconds: float = 4.0
    window: Window | None = None
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                self._wrong(field, getattr(self, field), f"one of {', '.join(map(repr, choices))}")
        for kind in self.kinds:
            if kind not in KINDS:
                self._wrong("kinds", kind, f"among {', '.join(KINDS)}")
        if not self.kinds:
            self._wrong("kinds", self.kinds, "at least one kind")
        for field in ("highpass_hz", "lowpass_hz", "rate_hz", "unit", "clip", "reject", "segment_seconds"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                self._wrong(field, value, "above 0")
        if any(hz <= 0 for hz in self.notch_hz):
            self._wrong("notch_hz", self.notch_hz, "above 0")
        if self.butterworth_order < 0:
            self._wrong("butterworth_order", self.butterworth_order, "0 or more")
        if self.highpass_hz and self.lowpass_hz and self.highpass_hz >= self.lowpass_hz:
            self._wrong("highpass_hz", self.highpass_hz, f"below lowpass_hz {self.lowpass_hz}")
        if self.rate_hz and self.lowpass_hz and self.lowpass_hz >= self.rate_hz / 2:
            self._wrong("lowpass_hz", self.lowpass_hz, f"below half of rate_hz {self.rate_hz}")
        if self.window and not (self.window.events and self.window.tmin < self.window.tmax):
            self._wrong("window", self.window, "at least one event, and tmin below tmax")

    def _wrong(self, field: str, got: object, wanted: str) -> None:
        raise ZooError(f"recipe {self.name!r}: {field} is {got!r}, wanted {wanted}")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; equal recipes give equal dictionaries."""
        plain: dict[str, Any] = {}
        for field, value in asdict(self).items():
            plain[field] = list(value) if isinstance(value, tuple) else value
        if self.window:
            plain["window"]["events"] = list(self.window.events)
        return plain


_MICROVOLT = 1e-6
_ALL = (
    Recipe(name="raw", source="nothing but float32, in SI units", kinds=KINDS, sensor_names="none"),
    Recipe(
        name="labram",
        source="LaBraM, ICLR 2024",
        highpass_hz=0.1,
        lowpass_hz=75.0,
        notch_hz=(50.0,),
        rate_hz=200.0,
        unit=100 * _MICROVOLT,
    ),
    Recipe(
        name="neurorvq",
        source="NeuroRVQ, arXiv 2510.13068; the unit is ours, the paper gives none",
        highpass_hz=0.5,
        lowpass_hz=44.5,
        butterworth_order=3,
        notch_hz=(50.0, 60.0, 100.0),
        rate_hz=200.0,
        unit=100 * _MICROVOLT,
        clip=5.0,  # 500 µV
    ),
    Recipe(
        name="cbramod",
        source="CBraMod, ICLR 2025",
        highpass_hz=0.3,
        lowpass_hz=75.0,
        notch_hz=(60.0,),
        rate_hz=200.0,
        unit=100 * _MICROVOLT,
        reject=1.0,  # 100 µV
        segment_seconds=30.0,
    ),
    Recipe(
        name="eegpt",
        source="EEGPT, NeurIPS 2024",
        reference="average",
        rate_hz=256.0,
        unit=1e-3,
    ),
    Recipe(
        name="reve",
        source="REVE, NeurIPS 2025",
        highpass_hz=0.5,
        lowpass_hz=99.5,
        rate_hz=200.0,
        scale="zscore",
        clip=15.0,
        sensor_names="none",  # electrodes are known by position alone
    ),
    Recipe(name="biot", source="BIOT, NeurIPS 2023", rate_hz=200.0, scale="percentile95"),
    Recipe(name="tfm", source="TFM-Tokenizer, arXiv 2502.16060", rate_hz=200.0, scale="percentile95"),
    Recipe(
        name="brainomni",
        source="BrainOmni, NeurIPS 2025, arXiv 2505.18185",
        kinds=("eeg", "mag", "grad"),
        highpass_hz=0.1,
        lowpass_hz=96.0,
        rate_hz=256.0,
        sensor_names="none",  # sensors are known by position, orientation and kind
        segment_seconds=10.0,
    ),
    Recipe(name="meg_gpt", source="MEG-GPT, arXiv 2510.18080", kinds=("roi",), rate_hz=250.0, scale="zscore"),
    Recipe(
        name="du_in",
        source="Du-IN, NeurIPS 2024, arXiv 2405.11459",
        kinds=("seeg",),
        rate_hz=1000.0,
        scale="zscore",
    ),
    Recipe(
        name="barista",
        source="BaRISTA, NeurIPS 2025, arXiv 2512.12135; the scale is ours, the paper's card gives none",
        kinds=("seeg", "ecog"),
        rate_hz=2048.0,
        scale="zscore",
        segment_seconds=3.0,
    ),
    Recipe(
        name="eegdm",
        source="EEGDM, 2025; its staged mu-law is the model's first step",
        highpass_hz=0.1,
        lowpass_hz=75.0,
        notch_hz=(50.0,),
        rate_hz=200.0,
        unit=100 * _MICROVOLT,
        segment_seconds=5.0,
    ),
    Recipe(
        name="neurobolt",
        source="NeuroBOLT, NeurIPS 2024, arXiv 2410.05341",
        rate_hz=200.0,
        unit=100 * _MICROVOLT,
        segment_seconds=16.0,
    ),
    Recipe(
        name="brainmagick",
        source="Decoding speech perception from non-invasive brain recordings, 2023",
        kinds=("eeg", "mag", "grad"),
        rate_hz=120.0,
        scale="robust",
        clip=20.0,
        sensor_names="none",
    ),
    Recipe(
        name="meg_image",
        source="Brain decoding: toward real-time reconstruction of visual perception, ICLR 2024",
        kinds=("mag", "grad"),
        rate_hz=120.0,
        scale="robust",
        clip=20.0,
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def recipe(name: str) -> Recipe:
    """The recipe of that name; ZooError with the nearest right one."""
    from difflib import get_close_matches

    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name, RECIPES, n=1, cutoff=0.0)
    raise ZooError(f"no recipe is called {name!r}; the nearest is {near[0]!r}, all are: {', '.join(RECIPES)}")
