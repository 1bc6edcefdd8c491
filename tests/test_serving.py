"""Exported programs: what the model gives, for any batch, without the model's code; or one line that says why not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_encoders
import test_tokenizers
from jax import export
from quick import init, run

import zoo
from zoo.cli import main
from zoo.encoders.encoder import LinearHead
from zoo.errors import ZooError
from zoo.export_command import Options, drawn_inputs
from zoo.layers.mixer import create_mixer
from zoo.program import CARD, PROGRAM, WEIGHTS, card_sha256, named
from zoo.sensors import KINDS, NAMES
from zoo.weights.folder import restored

ENCODERS = {case.name: case for case in test_encoders.CASES}
TOKENIZERS = {case.name: case for case in test_tokenizers.CASES}
LEVELS = zoo.create("mu_law", vocabulary=16)


def small(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A small model, its variables, and inputs of three examples."""
    case, cases = (ENCODERS[name], test_encoders) if name in ENCODERS else (TOKENIZERS[name], test_tokenizers)
    module: Any = zoo.create(name, **case.options)
    signal, sensors = cases.batch(case, 3)
    inputs = {"signal": signal, "sensors": sensors}
    if getattr(module, "subjects", 0):
        inputs["subject"] = np.arange(3, dtype=np.int32) % module.subjects
    return module, init(module, signal, sensors, **{k: v for k, v in inputs.items() if k == "subject"}), inputs


def close(found: dict[str, Any], wanted: Any) -> None:
    """Sums are taken in another order for another batch."""
    arrays = named(wanted)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        if jnp.issubdtype(array.dtype, jnp.inexact):
            scale = np.abs(np.nan_to_num(np.asarray(array, np.float32))).max()
            np.testing.assert_allclose(found[name], array, atol=1e-5 * scale, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def rows(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[list(index)], tree)


@pytest.fixture(scope="module")
def eegnet(tmp_path_factory):
    module, variables, inputs = small("eegnet_tiny")
    folder = zoo.export_program(module, variables, tmp_path_factory.mktemp("served") / "eegnet", inputs)
    return folder, module, variables, inputs


class Centred(nn.Module):
    """A signal without its mean, times a parameter."""

    @nn.compact
    def __call__(self, signal: Any, sensors: Any) -> Any:
        gain = self.param("gain", nn.initializers.constant(3.0), ())
        return {"centred": gain * (signal - signal.mean(-1, keepdims=True)), "there": sensors.valid}


@pytest.fixture
def centred(tmp_path):
    """A folder of a small program for windows of any length up to 8, with its variable beside it, to spoil."""
    inputs = {"signal": np.zeros((2, 3, 4), np.float32), "sensors": sensors(2, 3)}
    options = {"shapes": {"signal": "b, 3, t"}, "weights": "beside", "constraints": ["t <= 8"]}
    return zoo.export_program(Centred(), {"params": {"gain": np.float32(3)}}, tmp_path / "centred", inputs, **options)


def sensors(batch: int, channels: int) -> Any:
    return rows(test_tokenizers.batch(TOKENIZERS["mu_law"], 1)[1], *[0] * batch)


def test_a_program_gives_what_the_model_gives_for_any_batch(eegnet):
    folder, module, variables, inputs = eegnet
    program = zoo.load_program(folder)
    for index in ((0, 1, 2), (1,), (2, 0, 1, 1, 0)):
        given = rows(inputs, *index)
        close(program(**given), run(module, variables, given["signal"], given["sensors"]))
    close(program(*inputs.values()), run(module, variables, *inputs.values()))


def test_its_card_says_what_goes_in_and_comes_out(eegnet):
    folder, module, _, _ = eegnet
    card = json.loads((folder / CARD).read_text())
    rows = {each["name"]: each for each in card["inputs"] + card["outputs"]}
    assert rows["signal"] == {"name": "signal", "shape": "b, 4, 32", "dtype": "float32"}
    assert rows["sensors.position"]["unit"] == "m, head coordinates"
    assert rows["pooled"]["shape"] == f"b, {module.features}"
    assert card["model"] == "eegnet_tiny"
    assert zoo.create(card["model"], **restored(card["options"])) == module
    assert card["recording"]["channels"] == list(module.montage)
    assert card["recording"]["kinds"] == ["eeg"]
    assert [each["signal"] for each in card["checked"]["sizes"]] == [[3, 4, 32], [1, 4, 32]]
    assert card["checked"]["channels"] == card["recording"]["channels"]
    assert card["checked"]["kinds"] == ["eeg"] * 4
    assert 0 <= card["checked"]["largest_difference"] < 1e-5
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert (card["versions"]["jax"], card["calling_convention_version"]) == (
        jax.__version__,
        export.maximum_supported_calling_convention_version,
    )


def test_a_fresh_process_runs_it_without_the_models_code(eegnet, tmp_path):
    folder, module, variables, inputs = eegnet
    np.savez(tmp_path / "in.npz", **named(inputs))
    code = f"""
import sys
import numpy as np
import zoo
given = dict(np.load("in.npz"))
program = zoo.load_program({str(folder)!r})
sensors = {{name.removeprefix("sensors."): array for name, array in given.items() if "." in name}}
np.savez("out.npz", **program(signal=given["signal"], sensors=sensors))
ours = [name for name in sys.modules if name.startswith("zoo.")]
models = ("registry", "encoders", "tokenizers", "layers", "attention", "state_space", "objectives", "train")
print([name for name in ours if name.split(".")[1] in models])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    close(dict(np.load(tmp_path / "out.npz")), run(module, variables, *inputs.values()))


def test_jax_alone_reads_it(eegnet):
    folder, module, variables, inputs = eegnet
    program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    close(program.call(named(inputs)), run(module, variables, *inputs.values()))


def test_variables_beside_the_program_and_windows_of_any_length(centred):
    assert {each.name for each in centred.iterdir()} == {CARD, PROGRAM, WEIGHTS}
    program = zoo.load_program(centred)
    assert [each["signal"] for each in program.card["checked"]["sizes"]] == [[2, 3, 4], [1, 3, 4], [2, 3, 8]]
    for samples in (2, 7):
        signal = np.random.default_rng(samples).normal(size=(4, 3, samples)).astype(np.float32)
        close(program(signal, sensors(4, 3)), Centred().apply({"params": {"gain": 3.0}}, signal, sensors(4, 3)))


def test_halves_of_a_tokenizer(tmp_path):
    signal, given = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4), sensors(2, 3)
    variables = LEVELS.fit(signal)
    inputs = {"signal": signal, "sensors": given}
    encode = zoo.load_program(zoo.export_program(LEVELS, variables, tmp_path / "encode", inputs, method="encode"))
    codes = encode(signal[::-1], given)["output"]
    np.testing.assert_array_equal(codes, LEVELS.apply(variables, signal[::-1], given, method="encode"))
    inputs = {"codes": codes, "sensors": given}
    decode = zoo.load_program(zoo.export_program(LEVELS, variables, tmp_path / "decode", inputs, method="decode"))
    close(decode(**inputs), LEVELS.apply(variables, codes, given, method="decode"))


def test_wrong_inputs_are_refused_in_one_line(centred):
    program, signal, three = zoo.load_program(centred), np.zeros((2, 3, 4), np.float32), sensors(2, 3)
    for given, named_, says in (
        ((signal,), {}, r"^Centred: takes signal, sensors; got ndarray$"),
        ((signal, three), {"mask": signal}, "takes signal, sensors; got ndarray, Sensors, mask="),
        ((signal, three), {"signal": signal}, "takes signal, sensors; got ndarray, Sensors, signal="),
        ((signal[:, :2], three), {}, r"signal: got float32 \[2, 2, 4\], wanted float32 \[b, 3, t\]"),
        ((signal[0], three), {}, r"signal: got float32 \[3, 4\], wanted float32 \[b, 3, t\]"),
        ((signal.astype(int), three), {}, r"signal: got int32 \[2, 3, 4\], wanted float32"),
        (("text", three), {}, "signal: "),
        ((signal, {"kind": three.kind}), {}, r"input sensors has no position, wanted float32 \[b, 3, 3\]"),
        ((signal[:1], three), {}, r"sizes that do not agree: signal \[1, 3, 4\] for \[b, 3, t\], sensors.position \[2"),
        ((np.zeros((2, 3, 9), np.float32), three), {}, r"signal \[2, 3, 9\] for \[b, 3, t\], .*, t <= 8$"),
    ):
        with pytest.raises(ZooError, match=says) as refused:
            program(*given, **named_)
        assert "\n" not in str(refused.value)


def spoil(folder: Path, **values: Any) -> None:
    """Another card, which says that it is whole."""
    card = json.loads((folder / CARD).read_text()) | values
    (folder / CARD).write_text(json.dumps({**card, "sha256": card_sha256(card)}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda folder: (folder / CARD).unlink(), f"no {CARD} in it: not an exported program"),
        (lambda folder: (folder / CARD).write_text("{"), "not the card of a program"),
        (lambda folder: (folder / CARD).write_text("[1]"), "not the card of a program"),
        (
            lambda folder: (folder / CARD).write_text((folder / CARD).read_text().replace("float32", "float64")),
            "it says other than what was exported",
        ),
        (lambda folder: spoil(folder, format=2), "format 2, wanted 1"),
        (lambda folder: spoil(folder, program={}), "not the card of a program: KeyError"),
        (lambda folder: (folder / PROGRAM).unlink(), f"no {PROGRAM} in it: not a whole program"),
        (lambda folder: (folder / PROGRAM).write_bytes((folder / PROGRAM).read_bytes()[:-9]), "damaged, cut short"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: its sha256 is e3b0c442"),
        (
            lambda folder: spoil(folder, calling_convention_version=1),
            r"with calling convention 1; jax \S+ reads \d+ to \d+",
        ),
        (lambda folder: spoil(folder, platforms=["tpu"]), "made for tpu; this process computes on cpu"),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(how, says, centred):
    how(centred)
    with pytest.raises(ZooError, match=says) as refused:
        zoo.load_program(centred)
    assert "\n" not in str(refused.value)


def test_another_file_in_the_programs_place_is_refused(centred):
    from hashlib import sha256

    other = b"not a program" * 9
    (centred / PROGRAM).write_bytes(other)
    spoil(centred, program={"sha256": sha256(other).hexdigest()})
    with pytest.raises(ZooError, match=f"{PROGRAM}: no program that this JAX can read: [^\n]+$"):
        zoo.load_program(centred)


def test_what_reads_and_writes_programs_is_asked_for_where_it_is_not_there(centred, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.export.serialization", None)
    with pytest.raises(ZooError, match=r"centred: [^\n]+: pip install 'brain-zoo\[serving\]'$"):
        zoo.load_program(centred)
    with pytest.raises(ZooError, match=r"^export-program: [^\n]+: pip install 'brain-zoo\[serving\]'$"):
        zoo.export_program(Few(), {}, tmp_path / "out", {"x": np.ones((2, 3), np.float32)}, batch="2")


class Fickle(nn.Module):
    """Another function each time it is traced."""

    def __call__(self, x: Any, sensors: Any = None) -> Any:
        TRACED.append(x)
        return x + len(TRACED)


class Odd(nn.Module):
    """Is one thing for some batches and another for others, which JAX cannot tell from the symbol."""

    def __call__(self, x: Any) -> Any:
        return x if x.shape[0] % 2 == 0 else -x


class Few(nn.Module):
    """Asks for what only a number can tell."""

    def __call__(self, x: Any) -> Any:
        return x if x.shape[0] < 3 else -x


TRACED: list[Any] = []


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path):
    x = {"x": np.ones((2, 3), np.float32)}
    out = tmp_path / "out"
    for module, inputs, options, says in (
        (Fickle(), x, {}, r"the program's output is \S+ \(relative\) off the model's; not written"),
        (Odd(), x, {}, r"the program's output is 2.0e\+00 \(relative\) off the model's"),
        (Few(), x, {}, r"^Few: cannot be exported with x \[b, 3\]: "),
        (Few(), {"y": 1}, {}, r"Few.__call__: takes x; got y"),
        (Few(), x, {"method": "draw"}, r"Few.draw: takes nothing; got x"),
        (Few(), x, {"platforms": ("tpu",)}, "platforms tpu: wanted cpu, where"),
        (
            Few(),
            x,
            {"platforms": ("cpu", "abacus")},
            r"platforms cpu, abacus: wanted cpu, where .* of cpu, cuda, rocm, tpu",
        ),
        (Few(), x, {"weights": "away"}, "weights 'away': wanted inside or beside"),
        (Few(), x, {"shapes": {"z": "b"}}, "a shape of z, which is no input; those are x"),
        (Few(), x, {"shapes": {"x": "b, 4"}}, r"x: shape 'b, 4', the input has \[2, 3\]"),
        (Few(), x, {"shapes": {"x": "b, ("}}, "shapes {'x': 'b, \\('}"),
    ):
        with pytest.raises(ZooError, match=says) as refused:
            zoo.export_program(module, {}, out, inputs, **options)
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.iterdir())
    zoo.export_program(Few(), {}, out, x, batch="2")
    np.testing.assert_array_equal(zoo.load_program(out)(x["x"])["output"], x["x"])
    with pytest.raises(ZooError, match="exists and is not empty"):
        zoo.export_program(Few(), {}, out, x, batch="2")


def test_the_command_exports_a_trained_model_with_its_classifier(tmp_path, capsys):
    case = ENCODERS["eegnet_tiny"]
    module: Any = zoo.create(case.name, **case.options)
    signal, given = test_encoders.batch(case, 3)
    variables = init(module, signal, given)
    head, weights = LinearHead(2), None
    weights = init(head, np.zeros((1, module.features), np.float32))
    zoo.export(module, variables, tmp_path / "trained", classes=2, head=weights)
    arguments = ["export-program", str(tmp_path / "trained"), str(tmp_path / "served")]
    assert main([*arguments, "--samples", "33"]) == 2
    assert capsys.readouterr().err.startswith("zoo: EEGNet: cannot be exported with signal [b, 4, 33]")
    for more, says in (
        ([], "--samples '': wanted a number, or for any a letter but b"),
        (["--samples", "32", "--channels", "FP1,XX"], "wanted channels FP1, FP2, F3, F4 in this order"),
        (["--samples", "32", "--channels", "2-"], "--channels '2-': wanted names with commas between, a number"),
        (["--samples", "32", "--kind", "mag"], "kind 'mag': takes eeg"),
        (["--samples", "32", "--method", "encode"], "encode"),
    ):
        assert main([*arguments, *more]) == 2
        assert says in capsys.readouterr().err
    assert main([*arguments, "--samples", "32", "--platforms", "cpu", "--weights", "beside"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'served'}: trained for cpu" in said
    assert re.search(r"^  in  signal +float32 \[b, 4, 32\]$", said, re.MULTILINE)
    assert re.search(r"^  out logits +float32 \[b, 2\]$", said, re.MULTILINE)
    found = zoo.load_program(tmp_path / "served")(signal, given)
    out = run(module, variables, signal, given)
    close({"logits": found["logits"]}, {"logits": run(head, weights, out.pooled)})


def test_inputs_are_drawn_as_the_options_say():
    tokenizer = zoo.create("braintokenizer_tiny", window=32)
    inputs, shapes = drawn_inputs(tokenizer, None, Options(channels="c", kind="grad", samples="32*a", method="encode"))
    assert inputs["signal"].shape == (1, 2, 64)
    assert shapes["signal"] == "b, c, 32*a"
    assert shapes["sensors.position"] == shapes["sensors.orientation"] == "b, c, 3"
    assert shapes["sensors.valid"] == "b, c"
    np.testing.assert_allclose(np.linalg.norm(inputs["sensors"].orientation, axis=-1), 1, rtol=1e-6)
    assert (inputs["sensors"].kind == KINDS.index("grad")).all()

    codes, shapes = drawn_inputs(LEVELS, 4, Options(channels="FP1, o2,C3", batch="5", method="decode"))
    LEVELS.check_codes(codes["codes"], 3)
    assert codes["codes"].shape == (5, 12, 1)
    assert (shapes["codes"], shapes["sensors.name"]) == ("5, 12, 1", "5, 3")
    assert [NAMES[each] for each in codes["sensors"].name[4]] == ["FP1", "O2", "C3"]

    encoder: Any = zoo.create("simple_conv_tiny", subjects=2)
    assert drawn_inputs(encoder, 12, Options(channels="4"))[1]["subject"] == "b"
    for options, says in (
        (Options(channels="b"), "--channels 'b': wanted names .* a letter but b"),
        (Options(channels="3", samples="200+a"), "--samples '200.a'"),
        (Options(channels="c", samples="9", method="decode"), "channels c, samples 9: wanted numbers for codes"),
        (Options(channels="3", samples="9", kind="eye"), "kind 'eye': takes eeg"),
        (Options(channels="3", samples="9", method="grid"), "grid takes no signal and sensors"),
    ):
        with pytest.raises(ZooError, match=says):
            drawn_inputs(LEVELS, None, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENCODERS, *TOKENIZERS])
def test_every_model_can_be_exported_for_any_batch(name, tmp_path):
    module, variables, inputs = small(name)
    program = zoo.load_program(zoo.export_program(module, variables, tmp_path / name, inputs, weights="beside"))
    two = rows(inputs, 2, 1)
    positional = {"subject": two["subject"]} if "subject" in two else {}
    close(program(**two), run(module, variables, two["signal"], two["sensors"], **positional))


@pytest.mark.slow
def test_an_encoder_for_windows_of_any_length(tmp_path):
    module, variables, inputs = small("labram_tiny")
    options = {"shapes": {"signal": "b, 3, 40*a"}, "constraints": ["a <= 16"]}
    program = zoo.load_program(zoo.export_program(module, variables, tmp_path / "any", inputs, **options))
    for patches in (1, 5):
        signal = np.random.default_rng(patches).normal(size=(3, 3, 40 * patches)).astype(np.float32)
        close(program(signal, inputs["sensors"]), run(module, variables, signal, inputs["sensors"]))
    for samples, says in ((60, r"signal \[3, 3, 60\] for \[b, 3, 40\*a\]"), (680, "a <= 16$")):
        with pytest.raises(ZooError, match=says):
            program(np.zeros((3, 3, samples), np.float32), inputs["sensors"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["native_sparse", "moba", "gla", "deltanet", "mamba", "s4d"])
@pytest.mark.parametrize("batch", ["2", "b"])
def test_what_has_kernels_can_be_exported(name, batch, tmp_path):
    mixer, x = create_mixer(name, 64), np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    variables = init(mixer, jnp.asarray(x))
    program = zoo.load_program(zoo.export_program(mixer, variables, tmp_path / name, {"x": x}, batch=batch))
    close(program(x), run(mixer, variables, jnp.asarray(x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_halves_of_a_tokenizer_can_be_exported(name, tmp_path):
    module, variables, inputs = small(name)
    encode = zoo.load_program(zoo.export_program(module, variables, tmp_path / "encode", inputs, method="encode"))
    codes = encode(**inputs)["output"]
    given = {"codes": codes, "sensors": inputs["sensors"]}
    decode = zoo.load_program(zoo.export_program(module, variables, tmp_path / "decode", given, method="decode"))
    close(decode(**given), run(module, variables, codes, inputs["sensors"], method="decode"))
