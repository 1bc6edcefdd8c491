"""Canonical electrode names: what a channel is called, and where it sits."""

from __future__ import annotations

import mne
import numpy as np
import pytest

from zoo.data.electrodes import attach_template_positions, canonical_names, plain_name
from zoo.data.readers import discover, read
from zoo.errors import ZooError
from zoo.sensors import LABRAM_NAMES, NAME_INDEX, NAMES


def recording(names: list[str], kinds: str | list[str] = "eeg", montage: str = "") -> mne.io.BaseRaw:
    info = mne.create_info(names, 100.0, kinds)
    raw = mne.io.RawArray(np.zeros((len(names), 10)), info, verbose="ERROR")
    return raw.set_montage(montage) if montage else raw


def positions(raw: mne.io.BaseRaw) -> np.ndarray:
    return np.array([channel["loc"][:3] for channel in raw.info["chs"]])


def test_table_holds_the_10_05_system_and_labrams_list_first():
    template = mne.channels.make_standard_montage("colin27_1005").ch_names
    assert {name.upper() for name in template} <= set(NAMES)
    assert len(LABRAM_NAMES) == 136
    assert NAMES[:136] == LABRAM_NAMES
    assert len(set(NAMES)) == len(NAMES) == len(NAME_INDEX)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Fp1", "FP1"),
        ("EEG FP1-REF", "FP1"),
        ("EEG T3-LE", "T3"),
        ("Fc5.", "FC5"),
        ("Cz..", "CZ"),
        ("P7-O1", "P7-O1"),
    ],
)
def test_plain_name(name, plain):
    assert plain_name(name) == plain


def test_by_name_keeps_other_kinds_unnamed():
    raw = recording(["EEG Fp1-REF", "HEOG", "t5"], ["eeg", "eog", "eeg"])
    assert canonical_names(raw, "by_name") == ("FP1", "", "T5")
    assert canonical_names(raw, "none") == ("", "", "")


def test_unknown_channel_is_named_with_the_nearest_name():
    with pytest.raises(ZooError, match=r"'Fp11' .* nearest name: FP1"):
        canonical_names(recording(["Fp1", "Fp11"]), "by_name")


def test_unknown_policy():
    with pytest.raises(ZooError, match="wanted by_name, nearest or none"):
        canonical_names(recording(["Cz"]), "by name")  # type: ignore[arg-type]


def test_biosemi_names_are_refused_by_name_and_found_by_position(faces_eeg):
    raw = read(discover(faces_eeg)[0]).raw
    with pytest.raises(ZooError, match="ABCD"):
        canonical_names(raw, "by_name")
    name = dict(zip(raw.ch_names, canonical_names(raw, "nearest"), strict=True))
    # BioSemi's own correspondence of its 128-channel cap with the 10-20 system.
    known = {
        "A1": "CZ",
        "A19": "PZ",
        "A23": "OZ",
        "C21": "FZ",
        "C17": "FPZ",
        "D19": "C3",
        "B22": "C4",
        "D23": "T7",
    }
    assert {channel: name[channel] for channel in known} == known
    assert set(name.values()) <= set(LABRAM_NAMES)


@pytest.mark.parametrize("montage", ["biosemi64", "easycap-M1"])
def test_nearest_gives_a_drawn_cap_its_own_names(montage):
    shared = [n for n in mne.channels.make_standard_montage(montage).ch_names if n.upper() in LABRAM_NAMES[:90]]
    raw = recording(shared, montage=montage)
    assert canonical_names(raw, "nearest") == tuple(name.upper() for name in shared)


def test_nearest_gives_a_real_head_its_own_names_in_any_number():
    names = [
        "Fp1",
        "Fp2",
        "F3",
        "F4",
        "C3",
        "C4",
        "P3",
        "P4",
        "O1",
        "O2",
        "F7",
        "F8",
        "T7",
        "T8",
        "P7",
        "P8",
        "Cz",
    ]
    raw = recording(names, montage="colin27_1005")
    upper = tuple(name.upper() for name in names)
    assert canonical_names(raw, "nearest") == upper
    assert canonical_names(raw.copy().pick(names[:4]), "nearest") == upper[:4]


def test_nearest_wants_positions_within_reach():
    with pytest.raises(ZooError, match=r"'Cz' \(1 of 1\) has no position"):
        canonical_names(recording(["Cz"]), "nearest")
    raw = recording(["Cz"], montage="colin27_1005")
    raw.info["chs"][0]["loc"][:3] = 0.0, 0.03, -0.1  # below the head
    with pytest.raises(ZooError, match="degrees from the nearest 10-10 electrode"):
        canonical_names(raw, "nearest")


def test_template_positions_only_where_names_are_known_and_nothing_is_placed():
    raw = recording(["EEG Cz-REF", "CB1"])
    attach_template_positions(raw)
    template = positions(recording(["Cz"], montage="colin27_1005"))
    np.testing.assert_allclose(positions(raw)[0], template[0])
    assert np.isnan(positions(raw)[1]).all()

    for names in (["Cz", "X1"], [f"{bank}{i}" for bank in "ABCD" for i in range(1, 33)]):
        raw = recording(names)
        attach_template_positions(raw)
        assert np.isnan(positions(raw)).all()

    placed = recording(["Cz", "Pz"], montage="biosemi32")
    before = positions(placed)
    attach_template_positions(placed)
    np.testing.assert_array_equal(positions(placed), before)
