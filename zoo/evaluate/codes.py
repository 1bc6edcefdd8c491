"""What tokenizers are judged by: how their codes are used, what they cost, and how near the rebuilt signal is.

    used = usage(codes, tokenizer.code_sizes)                # per codebook: perplexity, share of live codes
    told = entropy(codes, tokenizer.code_sizes, label)       # classes weighing the same; what codes tell of the class
    near = reconstruction(signal, rebuilt, rate, valid)      # R², and by band: spectrum, waveform, phase

All of it works on host arrays, in float64. Intervals are 95 % bootstrap intervals over windows, as in
`zoo.evaluate.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import signal as filters

from zoo.errors import ZooError
from zoo.evaluate.metrics import Interval, draw_weights, percentile_interval

BANDS = {"delta": (1.0, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0), "gamma": (30.0, 80.0)}
"""Hz, of electric and magnetic signals; the last ends at the Nyquist frequency where that is lower."""
BOLD_BANDS = {"slow-5": (0.01, 0.027), "slow-4": (0.027, 0.073), "slow-3": (0.073, 0.198), "slow-2": (0.198, 0.25)}
"""Hz, of fMRI (Zuo et al., NeuroImage 2010)."""
FILTER_ORDER = 4
"""Butterworth, run forwards and backwards."""
POWER_FLOOR = 1e-6
"""Added to power before its logarithm, as a share of the original's mean power at one frequency."""
PERMUTATIONS = 100


@dataclass(frozen=True)
class CodeUsage:
    """Of Q codebooks, each with its own size.

    counts       Q arrays [size]: tokens of each code
    entropy      [Q] bits a token
    perplexity   [Q] 2 to the entropy: as many codes used evenly would have it
    live         [Q] share of codes that occur
    """

    counts: tuple[np.ndarray, ...]
    entropy: np.ndarray
    perplexity: np.ndarray
    live: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Without the counts."""
        return {name: getattr(self, name).tolist() for name in ("entropy", "perplexity", "live")}


@dataclass(frozen=True)
class CodeEntropy:
    """Bits a token of Q codebooks, every class of windows weighing the same.

    balanced     [Q] entropy of the mean over classes of p(code | class)
    within       [Q] mean over classes of the entropy of p(code | class)
    information  [Q] balanced − within: mutual information of a token's code and its window's class
    chance       [Q] that of labels dealt anew to the windows, mean of 100 deals: counts alone give that much
    """

    balanced: np.ndarray
    within: np.ndarray
    information: np.ndarray
    chance: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in asdict(self).items()}


@dataclass(frozen=True)
class BandScores:
    """In one band of frequencies; each the mean over windows but `explained`.

    spectrum   correlation of log power over the band's frequencies and the window's channels
    waveform   correlation of the band-passed signals over time, mean of channels
    phase      mean absolute angle (radians, 0 to π) between their analytic signals, weighed by the original's
               amplitude; chance, and where the rebuilt signal is still, is π/2
    explained  share of the band-passed signal's square that is explained
    """

    spectrum: Interval
    waveform: Interval
    phase: Interval
    explained: Interval


@dataclass(frozen=True)
class Reconstruction:
    """How near a rebuilt signal is to the original.

    r2                  1 − Σ(x − x̂)² / Σ(x − x̄)², x̄ the mean of each channel and window
    variance_explained  percent, 100 (1 − Σ(x − x̂)² / Σx²): the measure of 2602.16626
    bands               by name
    """

    windows: int
    r2: Interval
    variance_explained: Interval
    bands: Mapping[str, BandScores]

    def to_json(self) -> dict[str, Any]:
        bands = {
            name: {measure: value._asdict() for measure, value in vars(band).items()}
            for name, band in self.bands.items()
        }
        overall = {name: getattr(self, name)._asdict() for name in ("r2", "variance_explained")}
        return {"windows": self.windows, **overall, "bands": bands}


def usage(codes: np.ndarray, sizes: Sequence[int]) -> CodeUsage:
    """Counts over all tokens of codes [..., Q]; −1, a token that is not there, does not count.

    Raises ZooError for codes out of range or where a codebook has no token.
    """
    return usage_of([each.sum(0) for each in _counts(np.asarray(codes).reshape(1, -1, np.shape(codes)[-1]), sizes)])


def usage_of(counts: Sequence[np.ndarray]) -> CodeUsage:
    """The same of tokens that are counted already, an array [size] for each codebook."""
    for book, each in enumerate(counts):
        if not each.sum():
            raise ZooError(f"usage: codebook {book} has no token, wanted at least one")
    bits = np.array([_bits(each) for each in counts])
    return CodeUsage(tuple(counts), bits, 2**bits, np.array([(each > 0).mean() for each in counts]))


def entropy(codes: np.ndarray, sizes: Sequence[int], label: np.ndarray, *, seed: int = 0) -> CodeEntropy:
    """Entropy of codes [B, N, Q] of windows with class label [B], and what codes tell of the class.

    Raises ZooError for codes out of range, shapes that disagree, or a class without a token.
    """
    codes, label = np.asarray(codes), np.asarray(label)
    if codes.ndim != 3 or label.shape != codes.shape[:1]:
        raise ZooError(f"entropy: got codes {codes.shape} and labels {label.shape}, wanted [B, N, Q] and [B]")
    classes = label == np.unique(label)[:, None]
    rng = np.random.default_rng(seed)
    deals = [classes] + [classes[:, rng.permutation(len(label))] for _ in range(PERMUTATIONS)]
    rows = []
    for book, counts in enumerate(_counts(codes, sizes)):
        if not (classes @ counts).sum(1).all():
            raise ZooError(f"entropy: codebook {book} has no token in one class, wanted at least one in each")
        parts = np.array([_balanced(deal.astype(np.float64) @ counts) for deal in deals])
        information = parts[:, 0] - parts[:, 1]
        rows.append((*parts[0], information[0], information[1:].mean()))
    return CodeEntropy(*np.array(rows).T)


def bits_per_second(sizes: Sequence[int], tokens: int, seconds: float) -> float:
    """What tokens of these codebooks cost, all codes alike: tokens · Σ log2(size) / seconds."""
    return float(tokens * np.log2(np.asarray(sizes, np.float64)).sum() / seconds)


def reconstruction(
    signal: np.ndarray,
    rebuilt: np.ndarray,
    rate: float,
    valid: np.ndarray | None = None,
    *,
    bands: Mapping[str, tuple[float, float]] = BANDS,
    block: np.ndarray | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Compares rebuilt [B, C, T] with signal [B, C, T], sampled at `rate` Hz, over channels valid [B, C].

    Windows without a valid channel are left out, and so are bands that lie above the Nyquist frequency or hold fewer
    than two frequencies of a window's spectrum. A correlation with something constant is 0. `block` [B]: windows that
    the bootstrap draws together, such as those of a person. Raises ZooError when shapes disagree, a sample that counts
    is not finite or the signal does not vary.
    """
    signal, rebuilt = np.asarray(signal, np.float64), np.asarray(rebuilt, np.float64)
    valid = np.ones(signal.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if signal.ndim != 3 or signal.shape != rebuilt.shape or valid.shape != signal.shape[:2]:
        raise ZooError(f"reconstruction: got {signal.shape}, {rebuilt.shape}, valid {valid.shape}; wanted [B, C, T]")
    keep = valid.any(1)
    signal, rebuilt, valid = (each[keep] for each in (signal, rebuilt, valid))
    if not valid.any() or not np.isfinite(signal[valid]).all() or not np.isfinite(rebuilt[valid]).all():
        raise ZooError("reconstruction: wanted a valid channel and finite samples in all of them")
    signal, rebuilt = (np.where(valid[..., None], each, 0) for each in (signal, rebuilt))
    centred = signal - signal.mean(-1, keepdims=True)
    if not centred.any():
        raise ZooError("reconstruction: the signal does not vary")
    blocks = None if block is None else np.asarray(block)[keep]
    weights = draw_weights(np.zeros(len(signal), int), blocks, np.random.default_rng(seed))
    error = _square(signal - rebuilt)
    square = _share(error, _square(signal), weights)
    frequencies = np.fft.rfftfreq(signal.shape[-1], 1 / rate)
    scores = {}
    for name, (low, high) in bands.items():
        inside = (frequencies >= low) & (frequencies < high)
        if low < rate / 2 and inside.sum() >= 2:
            scores[name] = _band(signal, rebuilt, valid, rate, (low, high), inside, weights)
    return Reconstruction(
        windows=len(signal),
        r2=_share(error, _square(centred), weights),
        variance_explained=Interval(*(100 * each for each in square)),
        bands=scores,
    )


def _counts(codes: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Per codebook, how often each window of codes [B, N, Q] holds each code: [B, size]."""
    if codes.shape[-1] != len(sizes):
        raise ZooError(f"got codes of {codes.shape[-1]} codebooks, wanted {len(sizes)}")
    counts = []
    for book, size in enumerate(sizes):
        own = codes[..., book]
        if own.min(initial=0) < -1 or own.max(initial=0) >= size:
            raise ZooError(f"got codes {own.min()} to {own.max()} of codebook {book}, wanted -1 to {size - 1}")
        place = np.arange(len(own))[:, None] * size + own
        counts.append(np.bincount(place[own >= 0], minlength=len(own) * size).reshape(len(own), size))
    return counts


def _bits(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _balanced(counts: np.ndarray) -> tuple[float, float]:
    """(entropy of the mean, mean of the entropies) of the classes' counts [K, M]; classes without a token apart."""
    shares = counts[counts.any(1)]
    shares = shares / shares.sum(1, keepdims=True)
    return _bits(shares.mean(0)), float(np.mean([_bits(each) for each in shares]))


def _band(
    signal: np.ndarray,
    rebuilt: np.ndarray,
    valid: np.ndarray,
    rate: float,
    band: tuple[float, float],
    inside: np.ndarray,
    weights: np.ndarray,
) -> BandScores:
    floor = POWER_FLOOR * filters.periodogram(signal, rate, "hann")[1][valid].mean()

    def log_power(signal: np.ndarray) -> np.ndarray:
        power = filters.periodogram(signal, rate, "hann")[1][..., inside]
        return np.log(power + floor).reshape(len(valid), -1)

    spectrum = _correlation(log_power(signal), log_power(rebuilt), np.repeat(valid, inside.sum(), axis=1))
    one, two = (_band_passed(each, rate, band) for each in (signal, rebuilt))
    waveform = np.mean(_correlation(one, two, np.ones(one.shape, bool)), axis=1, where=valid)
    a, b = (filters.hilbert(each) for each in (one, two))
    still = np.abs(b) <= 1e-9 * np.abs(one).max()
    angle = np.where(still, np.pi / 2, np.abs(np.angle(a * b.conj())))
    size = np.abs(a) * valid[..., None]
    phase = (angle * size).sum((1, 2)) / np.maximum(size.sum((1, 2)), 1e-300)
    return BandScores(
        spectrum=_mean(spectrum, weights),
        waveform=_mean(waveform, weights),
        phase=_mean(phase, weights),
        explained=_share(_square(one - two), _square(one), weights),
    )


def _band_passed(signal: np.ndarray, rate: float, band: tuple[float, float]) -> np.ndarray:
    low, high = band
    edges, kind = ((low, high), "bandpass") if high < rate / 2 else (low, "highpass")
    sections = filters.butter(FILTER_ORDER, edges, kind, fs=rate, output="sos")
    padding = min(int(rate / low), signal.shape[-1] - 1)
    # Mirrored about its ends and not through them: then a fast wave's last sample does not move slow ones.
    return filters.sosfiltfilt(sections, signal, padtype="even", padlen=padding)


def _correlation(a: np.ndarray, b: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is counted; 0 where either is constant."""

    def centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        apart = np.where(counted, values - values.mean(-1, keepdims=True, where=counted), 0)
        size = (apart**2).sum(-1)
        return apart, np.where(size > 1e-20 * (values**2).sum(-1, where=counted), size, 0)

    (a, size_a), (b, size_b) = centred(a), centred(b)
    size = np.sqrt(size_a * size_b)
    return np.where(size > 0, (a * b).sum(-1) / np.where(size > 0, size, 1), 0)


def _square(signal: np.ndarray) -> np.ndarray:
    """Of each window."""
    return (signal**2).sum((1, 2))


def _share(error: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> Interval:
    """1 − Σ error / Σ whole over windows [B]; NaN in draws where whole is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = 1 - (weights @ error) / (weights @ whole)
    return percentile_interval(1 - error.sum() / whole.sum(), draws)


def _mean(values: np.ndarray, weights: np.ndarray) -> Interval:
    return percentile_interval(values.mean(), weights @ values / weights.sum(1))
