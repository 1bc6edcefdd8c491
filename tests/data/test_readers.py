"""Readers: every kind of file, what is kept of it, and what is said of a bad one."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest

from zoo.data.fetch import fetch
from zoo.data.readers import Reading, discover, read
from zoo.errors import ZooError

RATE = 100


def noise(channels: int, seconds: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(channels, RATE * seconds))


def write_edf(path: Path, names: list[str], events: list[tuple] = []) -> Path:  # noqa: B006
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = [
        edfio.EdfSignal(row, RATE, label=name, physical_dimension="uV")
        for row, name in zip(noise(len(names)), names, strict=True)
    ]
    edfio.Edf(signals, annotations=[edfio.EdfAnnotation(*event) for event in events] or None).write(path)
    return path


def read_one(path: Path, **how: Path) -> Reading:
    (source,) = discover(path, **how)
    return read(source)


def positions(raw: mne.io.BaseRaw) -> np.ndarray:
    return np.array([channel["loc"][:3] for channel in raw.info["chs"]])


# Recordings that MNE reads


def test_edf_keeps_signal_kinds_and_events_and_gets_template_positions(tmp_path):
    file = write_edf(tmp_path / "a.edf", ["EEG Cz-REF", "Pz", "EOG left"], [(2.0, None, "beep"), (3.0, 1.5, "tone")])
    reading = read_one(file)
    assert reading.kinds == ("eeg", "eeg", "eog")
    assert reading.raw.info["sfreq"] == RATE
    np.testing.assert_allclose(reading.raw.get_data(), noise(3) * 1e-6, atol=1e-10)
    events = reading.raw.annotations
    assert list(zip(events.onset, events.duration, events.description, strict=True)) == [
        (2.0, 0.0, "beep"),
        (3.0, 1.5, "tone"),
    ]
    assert np.isfinite(positions(reading.raw)[:2]).all()


def test_fif_keeps_sensors_bads_and_makes_events_of_triggers(tmp_path):
    types = ["mag", "grad", "eeg", "stim"]
    info = mne.create_info(["MEG 1", "MEG 2", "E 1", "STI 014"], RATE, types)
    for i in range(3):
        info["chs"][i]["loc"][:3] = 0.01 * i, 0.05, 0.06
    info["bads"] = ["MEG 2"]
    signal = noise(4) * 1e-6
    signal[3] = 0
    signal[3, 120:130], signal[3, 300:310] = 5, 7
    raw = mne.io.RawArray(signal, info, first_samp=1000, verbose="ERROR")
    raw.save(tmp_path / "a_raw.fif", verbose="ERROR")

    reading = read_one(tmp_path / "a_raw.fif")
    assert reading.kinds == tuple(types)
    assert reading.raw.info["bads"] == ["MEG 2"]
    np.testing.assert_allclose(positions(reading.raw)[:3], positions(raw)[:3], atol=1e-6)
    found = mne.events_from_annotations(reading.raw, {"5": 5, "7": 7}, verbose="ERROR")[0]
    assert (found[:, [0, 2]] - [reading.raw.first_samp, 0]).tolist() == [[120, 5], [300, 7]]


def test_brainvision_units_and_markers(tmp_path):
    (noise(2).T * 10).astype("<i2").tofile(tmp_path / "a.eeg")
    (tmp_path / "a.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
        "MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=2\n"
        f"SamplingInterval={1_000_000 // RATE}\n[Binary Infos]\nBinaryFormat=INT_16\n"
        "[Channel Infos]\nCh1=Fz,,0.5,µV\nCh2=Oz,,0.5,mV\n"
    )
    (tmp_path / "a.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\n"
        "DataFile=a.eeg\n[Marker Infos]\nMk1=Stimulus,S  3,201,1,0\n"
    )
    raw = read_one(tmp_path / "a.vhdr").raw
    stored = np.trunc(noise(2) * 10)
    np.testing.assert_allclose(raw.get_data(), stored * [[0.5e-6], [0.5e-3]], atol=1e-12)
    assert (raw.annotations.onset[0], raw.annotations.description[0]) == (2.0, "Stimulus/S  3")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 100), r"truncated: \d+ bytes, wanted \d+"),
        (lambda file: os.truncate(file, 300), "not a valid EDF header"),
        (lambda file: file.write_bytes(b"hello" * 100), "not a valid EDF header"),
        (lambda file: write_edf(file, ["Cz", "Cz"]), "channel names occur more than once"),
        (
            lambda file: write_edf(file, ["Cz"], [(60.0, None, "late")]),
            "events beyond the end of the recording",
        ),
        (lambda file: file.rename(file.with_suffix(".set")), "cannot be read as mne: "),
        (lambda file: file.rename(file.with_suffix(".xyz")), "cannot be read as mne: Unsupported file type"),
    ],
)
def test_a_bad_file_is_named_with_its_cause(tmp_path, damage, cause):
    damage(write_edf(tmp_path / "a.edf", ["Cz", "Pz"]))
    (file,) = tmp_path.iterdir()
    with pytest.raises(ZooError, match=f"^{file.name}: {cause}"):
        read_one(file)


def test_a_truncated_bdf_is_named(tmp_path):
    file = tmp_path / "a.bdf"
    edfio.Bdf([edfio.BdfSignal(noise(1)[0], RATE, label="Cz", physical_dimension="uV")]).write(file)
    assert read_one(file).raw.n_times == 5 * RATE
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ZooError, match=r"^a.bdf: truncated"):
        read_one(file)


def test_other_warnings_of_a_reader_are_passed_on_with_the_file_name(tmp_path):
    file = write_edf(tmp_path / "a.edf", ["Cz"], [(4.0, 9.0, "long")])
    with pytest.warns(RuntimeWarning, match=r"^a.edf: Limited 1 annotation"):
        raw = read_one(file).raw
    assert raw.annotations.onset.tolist() == [4.0]


# BIDS


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter="\t")
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A small BIDS folder: one person, one run, 3 EEG channels (one bad) and an EOG channel."""
    folder = tmp_path / "sub-01/ses-a/eeg"
    stem = "sub-01_ses-a_task-odd_run-2"
    names = ["E1", "E2", "E3", "X1"]
    write_edf(folder / f"{stem}_eeg.edf", names)
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.7.0"}')
    (folder / f"{stem}_eeg.json").write_text(json.dumps({"TaskName": "odd", "PowerLineFrequency": 60}))
    write_table(tmp_path / "participants.tsv", [{"participant_id": "sub-01", "sex": "F", "age": 30}])
    write_table(
        folder / f"{stem}_channels.tsv",
        [
            {"name": name, "type": "EOG" if name == "X1" else "EEG", "units": "µV", "status": status}
            for name, status in zip(names, ("good", "bad", "good", "good"), strict=True)
        ],
    )
    write_table(folder / f"{stem}_events.tsv", [{"onset": 1.5, "duration": 0.2, "trial_type": "rare", "value": 2}])
    write_table(
        folder / "sub-01_ses-a_space-CapTrak_electrodes.tsv",
        [{"name": f"E{i}", "x": 0.01 * i, "y": 0.02, "z": 0.09} for i in (1, 2, 3)],
    )
    (folder / "sub-01_ses-a_space-CapTrak_coordsystem.json").write_text(
        json.dumps({"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "m"})
    )
    return tmp_path


def edit(root: Path, table: str, change) -> None:
    (file,) = root.rglob(f"*_{table}.tsv")
    with file.open(newline="") as open_file:
        rows = list(csv.DictReader(open_file, delimiter="\t"))
    write_table(file, change(rows))


def test_bids_tables_are_kept(dataset):
    (source,) = discover(dataset)
    assert source.id == "sub-01_ses-a_task-odd_run-2_eeg"
    assert (source.subject, source.session, source.task, source.run) == ("01", "a", "odd", "2")
    reading = read(source)
    assert reading.kinds == ("eeg", "eeg", "eeg", "eog")
    assert reading.raw.info["bads"] == ["E2"]
    assert reading.raw.info["line_freq"] == 60
    assert reading.raw.info["subject_info"]["sex"] == 2
    assert reading.raw.annotations.onset.tolist() == [1.5]
    assert list(reading.raw.annotations.description) == ["rare"]
    np.testing.assert_allclose(positions(reading.raw)[:3, 0], [0.01, 0.02, 0.03], atol=1e-6)


@pytest.mark.parametrize(
    ("table", "change", "cause"),
    [
        ("events", lambda rows: [{**rows[0], "onset": 99.0}], "events beyond the end of the recording"),
        ("electrodes", lambda rows: rows[:-1], r"electrode 'E3' \(1 in all\) is missing in electrodes.tsv"),
        ("channels", lambda rows: rows[:-1], r"channel 'X1' \(1 in all\) is missing in channels.tsv"),
    ],
)
def test_bids_tables_that_do_not_fit(dataset, table, change, cause):
    edit(dataset, table, change)
    with pytest.raises(ZooError, match=rf"^sub-01_ses-a_task-odd_run-2_eeg.edf: {cause}"):
        read_one(dataset)


def test_a_file_or_person_of_a_bids_folder_keeps_its_tables(dataset):
    for part in ("sub-01", "sub-01/ses-a/eeg/sub-01_ses-a_task-odd_run-2_eeg.edf"):
        assert read_one(dataset / part).raw.info["bads"] == ["E2"]


def test_bids_leaves_out_what_is_no_recording(dataset):
    eeg = dataset / "sub-01/ses-a/eeg"
    write_edf(dataset / "sub-emptyroom/ses-1/eeg/sub-emptyroom_ses-1_task-noise_eeg.edf", ["E1"])
    write_edf(dataset / "derivatives/p/sub-01/eeg/sub-01_task-odd_eeg.edf", ["E1"])
    (eeg / "sub-01_ses-a_task-odd_desc-x_ica.fif").write_bytes(b"")
    bold = dataset / "sub-01/func/sub-01_task-rest_bold.nii.gz"
    bold.parent.mkdir()
    bold.write_bytes(b"")
    assert len(discover(dataset)) == 1
    assert [source.format for source in discover(dataset, mask=bold)] == ["nifti", "bids"]


def test_faces_eeg(faces_eeg):
    sources = discover(faces_eeg)
    assert [(s.subject, s.task, s.format) for s in sources] == [
        ("s01", "faceO", "bids"),
        ("s02", "faceO", "bids"),
    ]
    assert sources[0].id == "sub-s01_task-faceO_eeg"
    for source, minutes in zip(sources, (18.65, 20.02), strict=True):
        reading = read(source)
        assert reading.kinds == ("eeg",) * 128
        assert reading.raw.info["sfreq"] == 256
        assert reading.raw.times[-1] / 60 == pytest.approx(minutes, abs=0.01)
        assert np.isfinite(positions(reading.raw)).all()
        assert 1e-6 < np.median(reading.raw.get_data().std(axis=1)) < 1e-4, "volts"
        with open(next(faces_eeg.rglob(f"{source.id[:-4]}_events.tsv")), encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert Counter(reading.raw.annotations.description) == Counter(row["trial_type"] for row in rows)
        assert Counter(reading.raw.annotations.description)["face-upright"] in range(190, 210)


# Discovery


def test_a_folder_gives_its_recordings_and_nothing_else(tmp_path):
    for name in ("b/sub-02_run-1.edf", "a/sub-01_run-1.edf"):
        write_edf(tmp_path / name, ["Cz"])
    for name in (
        "a/x-epo.fif",
        "a/y_raw-1.fif",
        "a/z_ica.fif",
        "a/notes.txt",
        "a/no_sidecar.mat",
        "a/k.vmrk",
    ):
        (tmp_path / name).write_bytes(b"")
    found = discover(tmp_path)
    assert [source.id for source in found] == ["sub-01_run-1", "sub-02_run-1"]
    assert [(source.subject, source.run) for source in found] == [("01", "1"), ("02", "1")]


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path):
    for person in ("anna", "bert"):
        write_edf(tmp_path / "subjects" / person / "rest.edf", ["Cz"])
    found = discover(tmp_path)
    assert [source.id for source in found] == ["subjects_anna_rest", "subjects_bert_rest"]
    assert [source.subject for source in found] == ["anna", "bert"]


def test_two_files_of_one_name(tmp_path):
    write_edf(tmp_path / "a.edf", ["Cz"])
    (tmp_path / "a.vhdr").write_bytes(b"")
    with pytest.raises(ZooError, match=r"a.edf and a.vhdr: two recordings of one name"):
        discover(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ZooError, match="no such file or folder"):
        discover(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="holds no recording"):
        discover(tmp_path)


# The other samples


@pytest.mark.filterwarnings("ignore:.*Other is not an MNE-Python coordinate frame:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*channels without locations:RuntimeWarning")
def test_ecog_grip():
    reading = read_one(fetch("ecog_grip"))
    assert Counter(reading.kinds) == {"ecog": 6, "dbs": 3, "misc": 1}
    assert (reading.raw.info["sfreq"], reading.raw.n_times) == (1000, 19_001)
    assert np.isfinite(positions(reading.raw)[:9]).all()


def test_hcp_rest_rois():
    sources = discover(fetch("hcp_rest_rois"))
    assert len({source.subject for source in sources}) == len(sources) == 12
    shapes = Counter()
    for source in sources:
        reading = read(source)
        assert set(reading.kinds) == {"roi"}
        shapes[(len(reading.kinds), reading.raw.n_times, round(1 / reading.raw.info["sfreq"], 6))] += 1
    assert shapes == {(94, 1200, 0.72): 7, (94, 355, 2.0): 5}


@pytest.mark.slow
def test_speech_ieeg():
    from zoo.data import matrices

    sources = discover(fetch("speech_ieeg"))
    assert [source.run for source in sources] == [f"{i:02d}" for i in range(1, 11)]
    for i, source in enumerate(sources):
        reading = read(source)
        assert reading.kinds == ("seeg",) * 10
        assert reading.raw.ch_names[0] == "F7"
        assert 50 < reading.raw.n_times / reading.raw.info["sfreq"] < 90
        spectrogram = matrices.load(source.path, f"out.aud[{i}]")
        assert spectrogram.shape == (128, reading.raw.n_times)
    assert matrices.load(sources[0].path, "out.script[0]").startswith("IT IS")


@pytest.mark.slow
def test_rest_fmri_surface():
    sources = discover(fetch("rest_fmri_surface"))
    assert [source.id[-2:] for source in sources] == ["lh", "rh"]
    reading = read(sources[0])
    assert reading.kinds == ("vertex",) * 10_242
    assert (reading.raw.n_times, reading.raw.info["sfreq"]) == (652, pytest.approx(1 / 1.4))
