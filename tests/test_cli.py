"""The command line: what it tells, and how it refuses bad input."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest

from zoo.cli import COMMANDS, main

RATE = 256
CAP = ("Fp1", "Fp2", "C3", "C4", "O1", "O2")
LABRAM = ("--recipe", "labram")


@pytest.fixture
def refused(capfd):
    """Runs a command that must fail; returns the one line it says on stderr."""

    def run(*arguments: str) -> str:
        capfd.readouterr()
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert re.fullmatch(r"zoo: [^\n]+\n", said), said
        return said

    return run


def write_edf(path: Path, names=CAP, events=()) -> Path:
    """Ten seconds of noise."""
    rows = np.random.default_rng(0).normal(0, 20, (len(names), 10 * RATE))
    signals = [
        edfio.EdfSignal(row, RATE, label=name, physical_dimension="uV") for row, name in zip(rows, names, strict=True)
    ]
    path.parent.mkdir(exist_ok=True)
    edfio.Edf(signals, annotations=[edfio.EdfAnnotation(*event) for event in events] or None).write(path)
    return path


def left_in(folder: Path) -> set[str]:
    """Files below a folder."""
    return {each.name for each in folder.rglob("*") if each.is_file()}


# What it tells


def test_help_names_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", ["fetch", "evaluate", "list", "info"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    assert f"usage: zoo {command}" in capsys.readouterr().out


def test_help_of_prepare_lists_its_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--help"])
    assert not end.value.code
    assert "--recipe.rate-hz" in capsys.readouterr().out


def test_help_is_quick_because_nothing_heavy_is_imported():
    heavy = "sorted({'jax', 'mne', 'numpy', 'flax', 'tyro'} & set(sys.modules))"
    code = f"import sys; from zoo.cli import main; main(['--help']); print({heavy}, file=sys.stderr)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stderr == "[]\n"
    assert statistics.median(seconds) < 0.6


def test_list_shows_models_mixers_samples_and_recipes(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("labram_base", "faces_eeg", "hcp_rest_rois", "cbramod"))
    assert re.search(r"^  kda +Kimi delta attention: ", out, re.MULTILINE)
    assert main(["list", "labram_h"]) == 0
    assert re.findall(r"^  (\w+)", capsys.readouterr().out, re.MULTILINE) == ["labram_huge"]


def test_info_says_many_layers_in_short(capsys):
    assert main(["info", "mamba_130m"]) == 0
    assert "mixers mamba × 24, vocabulary 50280" in capsys.readouterr().out


def test_info_prints_parameters_inputs_and_paper(capsys):
    assert main(["info", "labram_base"]) == 0
    out = capsys.readouterr().out
    assert "parameters 5,819,936\n" in out
    assert "EEG [B, C, A·200] at 200 Hz" in out
    assert "ICLR 2024" in out


# Words that are not there


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["trian"], "no command is called 'trian'; the nearest is 'train'"),
        (["info", "labram_bas"], "no model is called 'labram_bas'; the nearest name is 'labram_base'"),
        (["info"], "usage: zoo info NAME; got nothing"),
        (["info", "labram_base", "labram_tiny"], "usage: zoo info NAME; got labram_base labram_tiny"),
        (["fetch", "faces_egg"], "faces_eeg"),
        (["train"], "usage: zoo train CONFIG"),
        (["train", "--train.steps", "3"], "usage: zoo train CONFIG"),
        (["train", "absent.py"], "absent.py: no such configuration file"),
        (["evaluate", "runs/absent"], "runs/absent: not a run's folder"),
        (["prepare", "absent", "out"], "absent: no such file or folder"),
        (["prepare", "absent", "out", "--recipe", "labrum"], "no recipe is called 'labrum'; the nearest is 'labram'"),
        (["prepare", "absent", "out", "--recipe"], "--recipe wants a name"),
        (["prepare", "absent", "out", "--recipe.rate", "3"], "unknown option --recipe.rate; the nearest is --recipe."),
        (["prepare", "absent", "out", "--recipe.rate-hz", "x"], "--recipe.rate-hz"),
        (["prepare", "absent", "out", "--recipe.rate-hz", "-3"], "rate_hz is -3.0, wanted above 0"),
        (["prepare", "absent", "out", "--jobs", "many"], "--jobs"),
        (["prepare", "absent"], "usage: zoo prepare SOURCE OUT"),
    ],
)  # fmt: skip
def test_what_is_not_there_gets_one_line(arguments, cause, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cause in refused(*arguments)
    assert not list(tmp_path.iterdir())


# Recordings that are not right


def test_a_truncated_edf(tmp_path, refused):
    file = write_edf(tmp_path / "in" / "a.edf")
    file.write_bytes(file.read_bytes()[:-1000])
    assert "a.edf: truncated: " in refused("prepare", str(file), str(tmp_path / "out"), *LABRAM)
    assert left_in(tmp_path / "out") == {"recipe.json"}


def test_an_edf_with_an_unknown_channel(tmp_path, refused):
    file = write_edf(tmp_path / "in" / "a.edf", (*CAP, "Wilbur"))
    said = refused("prepare", str(file), str(tmp_path / "out"), *LABRAM)
    assert "a.edf: " in said
    assert "Wilbur" in said
    assert left_in(tmp_path / "out") == {"recipe.json"}


def test_events_beyond_the_end(tmp_path, refused):
    file = write_edf(tmp_path / "in" / "a.edf", events=[(4.0, None, "here"), (11.5, None, "late")])
    said = refused("prepare", str(file), str(tmp_path / "out"), *LABRAM)
    assert "a.edf: events beyond the end" in said
    assert left_in(tmp_path / "out") == {"recipe.json"}


def test_nan_samples(tmp_path, refused):
    samples = np.random.default_rng(0).normal(0, 2e-5, (len(CAP), 10 * RATE))
    samples[2, 512] = np.nan
    raw = mne.io.RawArray(samples, mne.create_info(list(CAP), RATE, "eeg"), verbose="error")
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    said = refused("prepare", str(tmp_path / "a_raw.fif"), str(tmp_path / "out"), *LABRAM)
    assert "a_raw.fif: channel C3 has 1 samples that are NaN or infinite, the first at sample 512 (2.000 s)" in said
    assert left_in(tmp_path / "out") == {"recipe.json"}


def test_a_bad_file_among_good_ones_is_left_out_only_when_asked(tmp_path, refused, capfd):
    for name in "abc":
        write_edf(tmp_path / "in" / f"{name}.edf")
    bad = tmp_path / "in" / "b.edf"
    bad.write_bytes(bad.read_bytes()[:-1000])
    command = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), *LABRAM]
    assert "b.edf: truncated" in refused(*command)
    assert "dataset.json" not in left_in(tmp_path / "out")
    assert main([*command, "--skip-bad"]) == 0
    out = capfd.readouterr().out
    assert "files in 3, out 2" in out
    assert "skipped b: b.edf: truncated" in out
    assert {"dataset.json", "index.npz"} <= left_in(tmp_path / "out")
