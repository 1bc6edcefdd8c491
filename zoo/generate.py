"""`zoo generate`: new signals from a trained next-code model, and how far their spectra are from real ones.

    zoo generate runs/next_code generated/next_code --frames 200

Beside the generated stands a control: codes of real windows, each row's frames in random order. It has the real codes'
frequencies and knows nothing of their order; a model is worth something where it comes nearer to real signals.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError

REAL, REBUILT, GENERATED, SHUFFLED = "real", "real, through the tokenizer", "generated", "codes in random order"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is generated.

    Attributes:
        frames: frames of each example; 0 for as many as a window of the run's data has
        examples: how many, with the channels of as many real windows
        prompt_frames: frames of the real windows that each begins from; 0 draws one frame by how often codes were seen
        temperature: divides logits
        top_k: at most so many codes, the likeliest; 0 for any number
        top_p: from the fewest codes whose probabilities reach it
        seed: of everything that is drawn
        step: of the run; its newest checkpoint by default
    """

    frames: int = 0
    examples: int = 8
    prompt_frames: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    step: int | None = None


def generate(run: Path, out: Path, options: Options = Options()) -> Mapping[str, Mapping[str, float]]:
    """Writes signals, their codes and their figures to the folder `out`; prints and returns the figures.

    signals.npz      generated [E, C, T] float32 and its codes [E, N, Q], the real windows and theirs, valid [E, C],
                     names, rate_hz. Where codes carry no absolute scale, generated signals are standardised
    spectra.png      power spectra
    generated.json   options, and of the generated, the control and the rebuilt: from_real_db and from_rebuilt_db, how
                     far the spectrum is from that of the real windows and from what the tokenizer makes of them (see
                     `spectral_distance`); correlation, the root mean square error of correlations between channels,
                     which rows that are predicted one by one do not have

    Raises ZooError: no finished run of next-code prediction, options out of range, a prompt longer than a window.
    """
    import jax

    from zoo.batches import make_loader, open_dataset
    from zoo.data.store import disk_errors, write_file
    from zoo.encoders.decoding import TopP
    from zoo.objectives.next_code import NextCode
    from zoo.objectives.over_codes import COLLECTION
    from zoo.run import trained_parameters

    config, params, collections = trained_parameters(run, options.step)
    task: Any = config.task
    if not isinstance(task, NextCode):
        raise ZooError(f"{run}: a run of {type(task).__name__}, wanted one of next-code prediction")
    if options.examples < 1 or options.frames < 0 or options.prompt_frames < 0:
        raise ZooError("examples: wanted 1 or more; frames and prompt_frames: wanted 0 or more")
    sampler = TopP(options.top_p, options.temperature, options.top_k)
    dataset = open_dataset(config)
    data = dataclasses.replace(config.data, batch_size=options.examples, mask_patch=0)
    part = "validation" if len(dataset.splits.get("validation", ())) else "train"
    loader = make_loader(dataclasses.replace(config, data=data), dataset, part, range(options.examples), 0)
    batch = next(loader.at(0))
    signal, sensors = batch["signal"], batch["sensors"]

    variables = {"params": params, **collections}
    tokenizer, own = task.frozen[0], variables[COLLECTION]["encoder"]
    samples = signal.shape[-1]
    rows, window = tokenizer.grid(*signal.shape[1:])
    wanted = options.frames or window
    if options.prompt_frames >= window:
        raise ZooError(f"prompt_frames: got {options.prompt_frames}, wanted less than the {window} of a window")
    # Whole windows: what decodes them has been trained on windows, and some take nothing else.
    windows = math.ceil(wanted / window)

    @jax.jit
    def make(variables: Any, key: Any, signal: Any, sensors: Any) -> Any:
        real, _ = task.tokenised(variables, {"signal": signal, "sensors": sensors})
        prompt = None
        if options.prompt_frames:
            first = real.reshape(len(real), rows, window, -1)[:, :, : options.prompt_frames]
            prompt = first.reshape(len(real), -1, real.shape[-1])
        new = task.generate(variables, key, sensors, windows * window, prompt=prompt, rows=rows, sampler=sampler)
        return real, new

    @jax.jit
    def decode(own: Any, codes: Any, sensors: Any) -> Any:
        return tokenizer.apply(own, codes, sensors, method="decode")

    real, new = (np.asarray(each) for each in make(variables, jax.random.key(options.seed), signal, sensors))
    by_window = new.reshape(len(new), rows, windows, window, -1)
    parts = [by_window[:, :, number].reshape(real.shape) for number in range(windows)]
    made = np.concatenate([np.asarray(decode(own, each, sensors)) for each in parts], axis=-1)
    control = decode(own, shuffled(real, np.random.default_rng(options.seed), rows), sensors)
    length = round(wanted * samples / window)
    signals = {
        REAL: signal,
        REBUILT: np.asarray(decode(own, real, sensors)),
        GENERATED: made[..., :length],
        SHUFFLED: np.asarray(control),
    }
    valid = np.asarray(sensors.valid)
    relative = tokenizer.scale(signal, sensors) is not None
    seconds = min(1.0, samples / dataset.rate_hz, length / dataset.rate_hz)
    powers = {
        name: spectra(each, dataset.rate_hz, valid=valid, seconds=seconds, relative=relative)
        for name, each in signals.items()
    }
    figures = {
        name: {
            "from_real_db": spectral_distance(powers[name], powers[REAL]),
            "from_rebuilt_db": spectral_distance(powers[name], powers[REBUILT]),
            "correlation": correlation_error(signals[name], signal, valid),
        }
        for name in (GENERATED, SHUFFLED, REBUILT)
    }
    names = dataset.montages[dataset.recordings[dataset.recording[batch["record"][0]]].montage].names
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    packed = BytesIO()
    np.savez_compressed(
        packed,
        generated=signals[GENERATED].astype(np.float32),
        codes=by_window.reshape(len(new), rows, -1, new.shape[-1])[:, :, :wanted].reshape(len(new), -1, new.shape[-1]),
        real=signal,
        real_codes=real,
        valid=valid,
        names=np.array(names),
        rate_hz=dataset.rate_hz,
    )
    write_file(out / "signals.npz", packed.getvalue())
    plain = {"run": str(run), "options": dataclasses.asdict(options), "figures": figures}
    write_file(out / "generated.json", json.dumps(plain, indent=1).encode())
    plot(powers, out / "spectra.png", relative=relative)
    for name, each in figures.items():
        off = f"{each['from_real_db']:5.2f} dB from real, {each['from_rebuilt_db']:5.2f} dB from rebuilt"
        print(f"{name:<28} spectrum {off}; correlations {each['correlation']:.3f} off")
    return figures


def shuffled(codes: np.ndarray, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Codes [B, N, Q] with the frames of each row in a random order of its own."""
    grid = codes.reshape(len(codes), rows, -1, codes.shape[-1])
    order = rng.permuted(np.broadcast_to(np.arange(grid.shape[2]), grid.shape[:3]), axis=2)
    return np.take_along_axis(grid, order[..., None], axis=2).reshape(codes.shape)


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Power density [F], in squared units per Hz or as a share of the total per Hz, at frequencies [F] in Hz."""

    hz: np.ndarray
    power: np.ndarray


def spectra(
    signal: np.ndarray,
    rate_hz: float,
    *,
    valid: np.ndarray | None = None,
    seconds: float = 1.0,
    relative: bool = False,
) -> Spectrum:
    """The mean over examples and valid channels of Welch's spectra (1967) of signal [B, C, T], without frequency 0.

    Hann windows of `seconds`, or of the whole signal where it is shorter, that overlap by half.
    """
    from scipy.signal import welch

    each = signal.reshape(-1, signal.shape[-1]) if valid is None else signal[np.asarray(valid)]
    hz, power = welch(each, rate_hz, nperseg=min(round(seconds * rate_hz), each.shape[-1]))
    mean = power.mean(0)[1:]
    return Spectrum(hz[1:], mean / (mean.sum() * (hz[1] - hz[0])) if relative else mean)


def spectral_distance(one: Spectrum, other: Spectrum) -> float:
    """Root mean square of 10 log10 of the ratio of powers, in decibels, where the other has power.

    That is over its frequencies from the lowest up to where all but a thousandth of its power is below: what a filter
    has taken away is no part of a signal.
    """
    below = np.cumsum(other.power) - other.power
    kept = below < 0.999 * other.power.sum()
    power = np.interp(other.hz, one.hz, one.power)[kept]
    ratio = np.log10(np.maximum(power, 1e-12 * other.power.max()) / other.power[kept])
    return float(10 * np.sqrt(np.mean(np.square(ratio))))


def correlation_error(one: np.ndarray, other: np.ndarray, valid: np.ndarray) -> float:
    """Root mean square difference of the correlations between valid channels, a mean over examples [B, C, T].

    Channels that do not vary correlate with none. NaN where no example has two valid channels.
    """
    errors = []
    for a, b, there in zip(one, other, valid, strict=True):
        if there.sum() > 1:
            pairs = np.triu_indices(int(there.sum()), 1)
            errors.append(np.sqrt(np.mean(np.square(_correlations(a[there]) - _correlations(b[there]))[pairs])))
    return float(np.mean(errors)) if errors else math.nan


def plot(powers: Mapping[str, Spectrum], out: Path, *, relative: bool) -> None:
    """Writes the spectra, one over another, as a PNG."""
    from zoo.figures import BLUE, GREY, ORANGE, new_figure, save

    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    looks = {REAL: ("black", "-"), REBUILT: (GREY, "-"), GENERATED: (BLUE, "-"), SHUFFLED: (ORANGE, "--")}
    for name, spectrum in powers.items():
        colour, line = looks[name]
        axes.semilogy(spectrum.hz, spectrum.power, line, color=colour, linewidth=1.4, label=name)
    axes.set(xlabel="Hz", ylabel="share of power per Hz" if relative else "power, squared units per Hz")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, out)


def _correlations(signal: np.ndarray) -> np.ndarray:
    centred = signal - signal.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    centred = centred / np.where(length > 0, length, 1)
    return centred @ centred.T
