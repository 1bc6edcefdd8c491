"""The kernels' benchmark: its check, its counts, its command line and what it reads from the TPU compiler's dump."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are scripts, not installed

from benchmarks import aot, kernel_contenders, kernel_peers, kernels, sparse
from benchmarks.kernel_cases import FAMILIES, Case, counts, draw, parse_shape
from benchmarks.kernel_tables import Row
from benchmarks.kernels import find_overtakings, main, take_turns
from zoo.errors import ZooError

WIDE = {"B": 1, "T": 1, "H": 1, "K": 128, "V": 128}
RESULTS = {"select_blocks": {"blocks"}, "nearest_code": {"codes"}, "code_statistics": {"counts", "sums"}}
TINY = {
    "linear_attention": "B1,T70,H2,K8,V8",
    "delta_rule": "B1,T70,H2,K8,V8",
    "linear_scan": "B1,T70,D8",
    "selective_scan": "B1,T70,D8,N4",
    "nearest_code": "N40,D8,M16",
    "code_statistics": "N40,D8,M16",
} | dict.fromkeys(sparse.LETTERS, "B1,T70,H2,G1,K8,V8")


@pytest.mark.parametrize(
    ("op", "gate", "forward", "backward", "moved"),
    [
        ("linear_attention", "none", 98_304, 245_760, 1_024),
        ("linear_attention", "head", 98_304, 245_760, 1_024),
        ("linear_attention", "scalar", 98_304, 245_760, 1_028),
        ("linear_attention", "channel", 98_304, 245_760, 1_536),
        ("delta_rule", "none", 180_224, 442_368, 1_026),
        ("delta_rule", "scalar", 180_224, 442_368, 1_030),
        ("delta_rule", "channel", 180_224, 442_368, 1_538),
    ],
)
def test_counts_are_those_of_the_published_table(op, gate, forward, backward, moved):
    case = Case(op, WIDE, gate, "bfloat16")
    assert counts(case, "forward", op).flops == forward
    assert counts(case, "forward_backward", op).flops == forward + backward
    assert counts(case, "forward", op).bytes == moved


@pytest.mark.parametrize(
    ("op", "gate", "flops"),
    [
        ("linear_attention", "none", 65_536),
        ("linear_attention", "channel", 81_920),
        ("delta_rule", "scalar", 114_688),
        ("delta_rule", "channel", 131_072),
    ],
)
def test_a_step_moves_its_state_in_and_out(op, gate, flops):
    work = counts(Case(op, WIDE | {"T": 4096}, gate, "bfloat16"), "step", op)
    assert (work.flops, work.bytes) == (flops, 131_072)


def test_counts_grow_with_tokens_and_share_few_heads():
    case = Case("linear_attention", WIDE, "none", "bfloat16")
    larger = replace(case, sizes={"B": 2, "T": 5, "H": 4, "G": 1, "K": 128, "V": 128})
    assert counts(larger, "forward", "linear_attention").flops == 40 * 98_304
    # a quarter of q and k (512 bytes) and all of v and out (512 bytes) for each token and head
    assert counts(larger, "forward", "linear_attention").bytes == 40 * (512 / 4 + 512)


def test_counts_of_both_directions_and_of_softmax():
    case = Case("linear_attention", WIDE | {"T": 1024}, "none", "bfloat16", causal=False)
    assert counts(case, "forward", "linear_attention").flops == 1024 * 4 * 128 * 128
    decayed = replace(case, gate="scalar")
    assert counts(decayed, "forward", "linear_attention").flops == 1024 * 2 * 98_304
    assert counts(case, "forward", "dot_product_attention").flops == 2 * 256 * 1024**2
    causal = replace(case, causal=True)
    assert counts(causal, "forward", "dot_product_attention").flops == 256 * 1024**2


def test_counts_of_the_scans():
    sizes = {"B": 2, "T": 10, "D": 4}
    assert counts(Case("linear_scan", sizes, "channel", "bfloat16"), "forward", "linear_scan").bytes == 80 * 8
    selective = counts(Case("selective_scan", sizes | {"N": 16}, "channel", "bfloat16"), "forward", "selective_scan")
    assert selective.flops == 80 * 9 * 16
    assert selective.bytes == 80 * 6 + 20 * 2 * 16 * 2  # u, delta, out; B and C once a token


def test_counts_of_sparse_attention_are_those_of_the_keys_that_are_seen():
    sizes = {"B": 1, "T": 65536, "H": 1, "K": 128, "V": 128}
    case = Case("sparse_attention", sizes, "none", "bfloat16")
    per_key = 2 * 256 * 65536
    assert counts(case, "forward", "sparse_attention").flops == 512 * per_key
    assert counts(case, "forward", "dot_product_attention").flops == 32768 * per_key
    assert counts(replace(case, mask="segments"), "forward", "pieces").flops == 512 * per_key
    native = counts(replace(case, op="native_sparse_attention"), "forward", "native_sparse_attention").flops
    assert native == (2048 + 1024 + 512 + 2048 / 2) * per_key  # scored only: keys, no values
    step = counts(replace(case, op="native_sparse_attention"), "step", "native_sparse_attention").flops
    assert step == 2 * 256 * (4096 + 1024 + 512 + 4096 / 2)


def test_letters_of_a_shape_in_any_order():
    assert parse_shape("linear_attention", "V5,K4,H3,T2,B1") == {"B": 1, "T": 2, "H": 3, "K": 4, "V": 5}
    assert parse_shape("delta_rule", "B1,T2,H6,G3,K4,V5")["G"] == 3
    for op, family in FAMILIES.items():
        for shape, _ in (*family.DEFAULTS[op], *family.QUICK[op]):
            parse_shape(op, shape)


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("linear_attention", "B1,T8,H2,K4", "B H K T V|B T H K V"),
        ("linear_attention", "B1,T8,H2,K4,V4,V4", "once"),
        ("linear_attention", "B1,T8,H2,K4,V0", "with its size"),
        ("linear_attention", "B1 T8 H2 K4 V4", "with its size"),
        ("linear_attention", "B1,T8,H4,G3,K4,V4", "H=4 is no multiple of G=3"),
        ("linear_scan", "B1,T8,H2,K4,V4", "B T D"),
    ],
)
def test_a_wrong_shape_is_one_line(op, shape, message, capsys):
    with pytest.raises(ZooError, match=message):
        parse_shape(op, shape)
    assert main(["--op", op, "--shape", shape]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--op linear_scan --gate head", "--gate"),
        ("--op delta_rule --no-causal", "--no-causal"),
        ("--quick --shape B1,T8,H2,K4,V4", "--quick"),
        ("--mode step --implementation xla", "--mode step"),
        ("--shape B1,T8,H2,K4,V4 --sweep-t 8,x --against reference", "--sweep-t"),
        ("--shape B1,T8,H2,K4,V4 --sweep-t 8,16", "two contenders"),
        ("--sweep-t 8,16 --against reference", "one --shape"),
        ("--repeats 1", "--repeats"),
        ("--json nowhere/out.json", "nowhere is not a folder"),
        ("--target v5e --against reference", "--target"),
        ("--op delta_rule --quick --against dot_product_attention", "serves linear_attention"),
        ("--op delta_rule --gate scalar --quick --against tokamax", "--gate channel"),
        ("--speed", "unknown option --speed"),
        ("--op moba --gate head", "--gate: moba has no decay"),
        ("--op select_blocks --mode forward_backward", "select_blocks has forward"),
        ("--op sparse_attention --quick --mask causal --against pieces", "--mask window or segments"),
        ("--op sparse_attention --quick --window 500 --against pieces", "a multiple of --window 500"),
        ("--op nearest_code --quick --metric cosine --against argmin", "--metric l2"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(options, message, capsys):
    assert main(options.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_not_installed_is_one_line(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(name="tokamax")

    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    assert main(["--target", "v5e", "--quick"]) == 2
    assert "pip install 'brain-zoo[aot]'" in capsys.readouterr().err
    case = Case("delta_rule", WIDE, "channel", "float32", bounded=True)
    monkeypatch.setattr(kernel_peers.importlib, "import_module", missing)
    with pytest.raises(ZooError, match=r"pip install tokamax==0\.0\.17"):
        kernel_peers.tokamax(case)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("linear_attention", "--gate scalar --against reference dot_product_attention"),
        ("linear_attention", "--gate head --no-causal --mode forward"),
        ("linear_attention", "--gate channel --mode step"),
        ("delta_rule", "--gate channel --dtype bfloat16 --implementation xla pallas --mode forward"),
        ("delta_rule", "--mode step"),
        ("linear_scan", ""),
        ("linear_scan", "--mode step"),
        ("selective_scan", "--mode forward"),
        ("selective_scan", "--mode step"),
        ("sparse_attention", "--mask segments --window 35 --against pieces dot_product_attention"),
        ("sparse_attention", "--mask window --window 35 --against pieces --mode forward"),
        ("sparse_attention", "--mask longformer --window 8 --mode forward"),
        ("sparse_attention", "--mask blocks --block-size 16 --mode forward step"),
        ("compressed_attention", "--stride 4 --mode forward"),
        ("select_blocks", "--stride 4 --block-size 8 --chosen 4"),
        ("selected_attention", "--block-size 8 --chosen 4 --mode forward_backward"),
        ("native_sparse_attention", "--stride 4 --block-size 8 --chosen 4 --window 12 --mode forward step"),
        ("moba", "--block-size 8 --chosen 4 --mode forward step"),
        ("local_latent_attention", "--window 12 --mode forward"),
        ("global_latent_attention", "--stride 4 --block-size 8 --chosen 4 --mode forward"),
        ("nearest_code", "--against argmin"),
        ("code_statistics", "--against reference"),
    ],
)
def test_every_mode_measures_and_writes_json(op, options, tmp_path):
    out = tmp_path / "out.json"
    command = f"--op {op} --shape {TINY[op]} --repeats 2 --json {out} {options}"
    assert main(command.split()) == 0
    written = json.loads(out.read_text())
    assert written["op"] == op
    for row in written["rows"]:
        if row["contender"] == "pallas":
            assert "needs a TPU" in row["problem"] or "not" in row["problem"]
            assert row["quartiles"] == []
            continue
        low, median, high = row["quartiles"]
        assert 0 < low <= median <= high
        assert row["problem"] == ""
        assert row["flops_per_second"] > 0
        assert row["temporary_bytes"] >= 0
        assert set(row["errors"]) >= RESULTS.get(op, {"out"})
        assert ("d_" in "".join(row["errors"])) == (row["mode"] == "forward_backward")


def test_all_gradients_are_checked():
    case = Case("linear_attention", parse_shape("linear_attention", TINY["linear_attention"]), "channel", "float32")
    errors = kernel_contenders.check(kernel_contenders.implementation(case, "xla"), case, "forward_backward")
    wanted = {"out", "final_state", "d_q", "d_k", "d_v", "d_log_decay", "d_initial_state"}
    assert set(errors) == wanted
    assert all(0 < error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_contender_one_percent_off_gets_no_speed(dtype, monkeypatch, tmp_path, capsys):
    right = kernel_contenders.implementation

    def off(case, name):
        contender = right(case, name)
        return replace(contender, call=lambda arrays: jax.tree.map(lambda x: x * 1.01, contender.call(arrays)))

    monkeypatch.setattr(kernel_contenders, "implementation", off)
    out = tmp_path / "out.json"
    command = f"--shape {TINY['linear_attention']} --mode forward --dtype {dtype} --json {out}"
    assert main(command.split()) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failed"]
    assert row["quartiles"] == []
    assert row["flops_per_second"] is None
    assert "out is off by" in capsys.readouterr().out


def test_a_wrong_gradient_alone_gets_no_speed(monkeypatch, tmp_path):
    right = kernel_contenders.implementation

    def off(case, name):
        contender = right(case, name)

        @jax.custom_vjp
        def scaled(x):
            return x

        scaled.defvjp(lambda x: (x, None), lambda _, d: (1.01 * d,))
        return replace(contender, call=lambda arrays: contender.call(arrays | {"k": scaled(arrays["k"])}))

    monkeypatch.setattr(kernel_contenders, "implementation", off)
    out = tmp_path / "out.json"
    assert main(f"--shape {TINY['linear_attention']} --mode forward_backward --json {out}".split()) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert "d_k is off" in row["problem"]
    assert "d_q" not in row["problem"]


def test_nan_at_full_size_gets_no_speed(monkeypatch, tmp_path):
    right = kernel_contenders.implementation

    def breaks_when_long(case, name):
        contender = right(case, name)

        def call(arrays):
            scale = float("nan") if arrays["q"].shape[1] > 300 else 1.0
            return jax.tree.map(lambda x: x * scale, contender.call(arrays))

        return replace(contender, call=call)

    monkeypatch.setattr(kernel_contenders, "implementation", breaks_when_long)
    out = tmp_path / "out.json"
    assert main(f"--shape B1,T320,H1,K8,V8 --mode forward --json {out}".split()) == 1
    assert "not finite" in json.loads(out.read_text())["rows"][0]["problem"]


def test_a_program_too_large_for_the_machine_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "free_bytes", lambda: 100)
    out = tmp_path / "out.json"
    assert main(f"--shape {TINY['linear_attention']} --mode forward --json {out}".split()) == 0
    assert "are free" in json.loads(out.read_text())["rows"][0]["problem"]


def test_contenders_take_turns():
    calls = []
    seconds = take_turns([(calls.append, ("A",)), (calls.append, ("B",))], repeats=3)
    assert "".join(calls) == "AB" * (kernels.WARM_UP + 3)
    assert [len(each) for each in seconds] == [3, 3]


def test_a_program_that_does_not_compile_ahead_is_a_failed_row(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem\nmore")

    monkeypatch.setattr(aot, "prepare", lambda dump: None)
    monkeypatch.setattr(aot, "compile_ahead", refuse)
    out = tmp_path / "out.json"
    assert main(f"--shape {TINY['linear_attention']} --target v5e --json {out}".split()) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["forward", "forward_backward"]
    assert {row["problem"] for row in rows} == {"RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"}


def test_a_program_without_kernels_is_not_taken_for_pallas(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "prepare", lambda dump: None)
    monkeypatch.setattr(aot, "compile_ahead", lambda *arguments: aot.Compiled(1.0, 2, []))
    out = tmp_path / "out.json"
    main(f"--shape {TINY['linear_attention']} --target v5e --implementation pallas xla --json {out}".split())
    problems = {row["contender"]: row["problem"] for row in json.loads(out.read_text())["rows"]}
    assert "does not serve" in problems["pallas"]
    assert problems["xla"] == ""


def test_gates_come_at_three_strengths_and_only_forget():
    case = Case("linear_attention", {"B": 1, "T": 4096, "H": 3, "K": 2, "V": 2}, "scalar", "float32")
    decay = draw(case, case.shapes())["log_decay"]
    assert decay.max() < 0
    strong, middle, weak = decay.mean((0, 1))
    assert strong / middle == pytest.approx(10, rel=0.1)
    assert middle / weak == pytest.approx(10, rel=0.1)


def test_the_overtaking_is_interpolated_in_log_time():
    def sweep(*ratios):
        for time, ratio in zip((100, 400, 1600), ratios, strict=True):
            first, other = (Row("", time, "none", "float32", "forward", name) for name in ("ours", "theirs"))
            first.quartiles, first.ratio, other.quartiles, other.ratio = [1.0] * 3, 1.0, [1.0] * 3, ratio
            yield [first, other]

    assert find_overtakings(list(sweep(0.25, 0.5, 2.0))) == ["ours and theirs: the first is faster from T ≈ 800 on"]
    assert find_overtakings(list(sweep(2.0, 0.5, 0.25))) == ["ours and theirs: the first is slower from T ≈ 200 on"]
    assert "from the shortest T on" in find_overtakings(list(sweep(2.0, 3.0, 4.0)))[0]
    assert "up to the longest T" in find_overtakings(list(sweep(0.1, 0.2, 0.3)))[0]


def test_a_sweep_replaces_the_length(tmp_path):
    out = tmp_path / "out.json"
    command = "--shape B1,T7,H1,K8,V8 --mode forward --repeats 2 --against dot_product_attention --sweep-t 32,64"
    assert main([*command.split(), "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [row["time"] for row in written["rows"]] == [32, 32, 64, 64]
    assert len(written["overtakings"]) >= 1


@pytest.fixture
def dump(tmp_path):
    """What the TPU compiler writes about a program with one kernel and one fusion, shortened."""
    call = (
        "%{0} = f32[256,128]{{1,0:T(8,128)S(1)}} custom-call(%x.1, %y.1), "
        'custom_call_target="tpu_custom_call", backend_config={{}}'
    )
    bundles = "Schedule analysis:\n\ttotal scheduled bundles:    {}\n\tempty scheduled bundles:    6\n\t  87.00 {}\n"
    unit = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    use = f"== CAPACTIY:\n{unit}\n    4     3     4     2     1     3     3     1     1     2\n== UTILIZATION:\n"
    fusion = "%sine_add_fusion = f32[256,128]{1,0:T(8,128)} fusion(%my_kernel.2), kind=kLoop"
    for name, number, total, line, lines in (
        ("TLP", 71, 168, call.format("my_kernel.2"), "0 0 0 0 0 0 1 0 1 0\n"),
        (
            "my_kernel.2",
            69,
            93,
            call.format("my_kernel.2"),
            "4 0 0 0 0 0 2 0 1 0\n0 0 0 0 0 3 0 0 1 0\n0 0 0 0 0 0 0 0 0 2",
        ),
        ("sine_add_fusion", 64, 40, fusion, "0 0 0 0 0 0 0 0 1 0\n"),
    ):
        stem = tmp_path / f"1795160460728177005-{name}"
        Path(f"{stem}-{number}-final_hlo-static-per-bundle-utilization.txt").write_text(use + lines)
        Path(f"{stem}-{number + 1}-schedule-analysis_final_bundles.txt").write_text(bundles.format(total, line))
    return tmp_path


def test_only_kernels_are_read_from_the_dump(dump):
    assert aot.read_dump(dump) == [aot.Kernel("my_kernel.2", bundles=93, spills=2, fills=1)]


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
def test_tokamax_passes_the_check():
    case = Case("delta_rule", {"B": 1, "T": 128, "H": 2, "K": 64, "V": 64}, "channel", "float32", bounded=True)
    errors = kernel_contenders.check(kernel_peers.tokamax(case), case, "forward_backward")
    assert not kernel_contenders.failures(errors, "float32")
