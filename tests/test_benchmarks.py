"""The benchmarks: what they compare, refuse, write and flag."""

import copy
import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.suite
from benchmarks import accuracy, cases, compare, network_providers, providers, tables
from benchmarks.__main__ import main
from benchmarks.attention_providers import problem
from benchmarks.cases import Case
from benchmarks.device import peak_bytes
from benchmarks.suite import EFFORTS, effort_of, measure, quietest

ROOT = Path(__file__).parents[1]
CASE = Case("attention", "forward", "sweep", (1, 2, 64, 64, 32), "float32")
# The table of shapes of the specification: B, H, M, N, D, and the dtypes.
SPECIFIED = {
    "edm2": {(32, 21, 256, 256, 64, "float16"), (32, 28, 64, 64, 64, "float16")},
    "dit": {
        (b, 16, n, n, 72, dtype)
        for b in (8, 32)
        for n in (256, 1024)
        for dtype in ("float32", "bfloat16")
    },
    "sana": {(16, 16, 1024, 300, 72, "float32"), (16, 20, 1024, 300, 112, "float32")},
    "wan": {(1, h, 32760, n, 128, "bfloat16") for h in (12, 5) for n in (32760, 512)},
    "cosmos": {
        (b, h, 4080, n, 128, "bfloat16") for b in (1, 4) for h in (16, 40) for n in (4080, 512)
    },
    "flux": {(1, 24, 4608, 4608, 128, "bfloat16")},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder that a tiny run of the command has written."""
    place = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    assert main(["--tiny", "--device", "cpu", "--threads", "1", "--out", str(place)]) == 0
    torch.set_num_threads(threads)
    return place


def rows_of(place) -> list[dict]:
    return json.loads((place / "results.json").read_text())["rows"]


@pytest.mark.parametrize("model", cases.MODELS)
def test_shapes_are_those_of_the_specification(model):
    chosen = cases.select("full", "cpu", (model,))
    assert {(*case.shape, case.dtype) for case in chosen} == SPECIFIED[model]
    assert all(case.masked == (model == "sana") for case in chosen)
    crossed = {case.run for case in chosen if case.shape[2] != case.shape[3]}
    assert crossed <= {"absent"}  # the context has no tangent


def test_a_run_measures_every_kind_of_case(results):
    rows = rows_of(results)
    assert {row["kind"] for row in rows} == {"attention", "tangent", "block", "step"}
    for row in rows:
        assert (row["reason"] is None) == (row["p50 ms"] is not None), row
        if row["p50 ms"] is not None:
            assert row["p20 ms"] <= row["p50 ms"] <= row["p80 ms"]
            assert row["peak bytes"] > 0
            assert row["of limit"] is None or row["of limit"] > 0
    timed = {row["provider"] for row in rows if row["p50 ms"] is not None}
    assert {providers.EAGER, providers.SDPA, "ours (reference)", "eager, two passes"} <= timed


def test_a_run_says_where_its_figures_come_from(results):
    about = json.loads((results / "results.json").read_text())["machine"]
    for name in ("device", "driver", "torch", "commit", "date", "threads", "backends"):
        assert about[name], name
    with open(results / "results.csv", newline="") as file:
        first = next(csv.DictReader(file))
    names = {"device", "driver", "torch", "commit", "dtype", "shape", "of limit", "provider"}
    assert names | {"p20 ms", "p50 ms", "p80 ms", "peak bytes", "reason"} <= set(first)


def test_a_run_writes_tables_and_plots(results):
    assert "eager / ours" in (results / "tables.md").read_text()
    for name in ("time", "memory", "ratio", "step"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_the_pytest_suite_is_not_part_of_the_tests(request):
    assert request.config.getini("testpaths") == ["tests"]


# --- networks -------------------------------------------------------------------------------------

BLOCK, STEP = cases.networks([(2, 64, 64, 1, 2)], [(2, 64, 64, 1, 2)], ("bfloat16",))


@pytest.mark.parametrize("case", [BLOCK, STEP], ids=["block", "step"])
def test_networks_in_half_precision_as_on_a_gpu(case, monkeypatch):
    """Where stock PyTorch needs its norms in float32, all of ours agree with it."""
    stock = network_providers.stock
    monkeypatch.setattr(network_providers, "stock", lambda case, device: stock(case, "cuda"))
    solved = network_providers.problem(case, "cpu")
    for provider in solved.providers:
        if provider.name != providers.COMPILED:
            assert solved.check((provider.values or provider.run)()) is None, provider.name


def test_a_step_does_not_see_the_gradients_of_one_that_failed():
    solved = network_providers.problem(STEP, "cpu")
    step = solved.providers[0].run
    for p in step.network.parameters():
        p.grad = torch.ones_like(p)
    assert solved.check(step.gradients()) is None


# --- providers without a figure -------------------------------------------------------------------


def only(monkeypatch, *chosen: str, run=None) -> None:
    """Leave these providers in the problem, and give them another function."""

    def fewer(case, device):
        made = problem(case, device)
        made.providers = [p for p in made.providers if p.name in chosen]
        for provider in made.providers:
            provider.run = run(provider.run) if run else provider.run
        return made

    monkeypatch.setitem(benchmarks.suite.PROBLEMS, "attention", fewer)


def wrong_tangent(run):
    def slightly_off():
        out, t_out, *rest = run()
        return [out, 1.001 * t_out, *rest]

    return slightly_off


def without_tangent(run):
    return lambda: [run()[0], torch.zeros_like(run()[0])]


def failing(run):
    def fails():
        raise NotImplementedError("no kernel for this shape\nwith a long explanation")

    return fails


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong_tangent, "wrong t_out: mean error"),
        (without_tangent, "wrong t_out"),
        (failing, "NotImplementedError: no kernel for this shape"),
    ],
)
def test_wrong_values_and_errors_get_no_speed_but_a_reason(monkeypatch, run, reason):
    only(monkeypatch, "ours (reference)", run=run)
    (row,) = measure(CASE, "cpu", EFFORTS["tiny"])
    assert row["p50 ms"] is None
    assert row["reason"].startswith(reason)
    assert "\n" not in row["reason"]
    assert row["reason"] in tables.block(CASE, [row], set())


def test_a_failed_compilation_leaves_forward_mode_usable(monkeypatch):
    def leaking(run):
        def fails():
            torch._C._enter_dual_level()
            raise RuntimeError("the compiler failed")

        return fails

    only(monkeypatch, "ours (reference)", run=leaking)
    (row,) = measure(CASE, "cpu", EFFORTS["tiny"])
    assert row["reason"] == "RuntimeError: the compiler failed"
    torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))


@pytest.mark.slow  # it compiles
def test_compiled_eager_has_a_time_but_no_count_of_memory(monkeypatch):
    only(monkeypatch, providers.COMPILED)
    case = Case("attention", "out", "sweep", (1, 2, 64, 64, 32), "float32")
    (row,) = measure(case, "cpu", replace(EFFORTS["tiny"], left_out=(), patience=60.0))
    assert row["reason"] is None
    assert row["p50 ms"] > 0
    assert row["peak bytes"] is None


def test_eager_is_not_tried_where_it_does_not_fit(monkeypatch):
    only(monkeypatch, providers.EAGER, run=failing)
    monkeypatch.setattr(benchmarks.suite, "free_bytes", lambda device: 100_000)
    (row,) = measure(CASE, "cpu", EFFORTS["tiny"])
    assert row["reason"] == "needs some 0.000197 GB, 0.0001 GB are free"


@pytest.mark.parametrize("run", cases.ATTENTION_RUNS)
def test_the_estimate_of_eagers_memory_covers_what_it_takes(run):
    case = Case("attention", run, "sweep", (1, 2, 256, 256, 8), "float32")
    (eager,) = (p for p in problem(case, "cpu").providers if p.name == providers.EAGER)
    assert 0.6 * eager.memory < peak_bytes(eager.run, "cpu") < eager.memory


def test_what_would_take_too_long_is_not_tried(monkeypatch):
    case = Case("attention", "forward", "Wan2.1 1.3B", (1, 1, 32760, 32760, 64), "float32")
    only(monkeypatch, "ours (reference)", run=failing)
    monkeypatch.setattr(benchmarks.suite, "_rate", lambda limit, device: 1e11)
    (row,) = measure(case, "cpu", EFFORTS["tiny"])
    assert row["reason"] == "some 49.5 s a call, more than the 1 s of --patience"


def test_the_reference_is_left_out_only_where_there_is_something_faster(monkeypatch):
    def left_out(**reasons) -> set[str]:
        monkeypatch.setattr(benchmarks.suite, "ours", lambda device: reasons)
        return {name for name, _ in effort_of("quick", "cpu").left_out}

    assert left_out(cpu=None, reference=None) == {providers.COMPILED, "(reference)"}
    assert left_out(cpu="not available: no compiler", reference=None) == {providers.COMPILED}


def test_a_disturbed_case_is_measured_again_and_the_quietest_kept(monkeypatch):
    attempts = [[{"cores taken": taken}] for taken in (0.9, 0.3, 0.5, 0.0)]
    monkeypatch.setattr(benchmarks.suite.time, "sleep", lambda seconds: None)
    for end, kept in ((0.0, 0.9), (math.inf, 0.0)):
        rest = iter(attempts)
        monkeypatch.setattr(benchmarks.suite, "measure", lambda *_, rest=rest: next(rest))
        assert quietest(CASE, "cpu", EFFORTS["tiny"], end) == [{"cores taken": kept}]


def test_what_turns_out_to_take_too_long_gets_no_further_turns(monkeypatch):
    calls = []

    def slow(run):
        return lambda: (calls.append(0), time.sleep(0.02), run())[2]

    only(monkeypatch, "ours (reference)", run=slow)
    monkeypatch.setattr(benchmarks.suite, "_rate", lambda limit, device: 1e15)
    (row,) = measure(CASE, "cpu", replace(EFFORTS["tiny"], patience=0.01))
    assert row["reason"].endswith(" s a call, more than the 0.01 s of --patience")
    assert len(calls) == 2


def test_a_missing_peer_says_why():
    (row,) = (p for p in problem(CASE, "cpu").providers if p.name == "jvp_flash_attention")
    assert row.reason.startswith(("not installed: ", "it has kernels for GPUs only"))


@pytest.mark.parametrize(
    ("factor", "right"), [(1.0, True), (1.0 + 1e-7, True), (1.0 + 1e-5, False), (0.0, False)]
)
def test_the_budget_is_that_of_the_tests(factor, right):
    from budget import assert_within_budget

    torch.manual_seed(0)
    truth = torch.randn(64, 64, dtype=torch.float64)
    lo = truth.float() * (1 + 1e-7)
    actual = (truth * factor).float()
    assert (accuracy.verdict(actual, truth, lo) is None) == right
    try:
        assert_within_budget(actual, truth, lo, magnitude=1.0)
    except AssertionError:
        assert not right
    else:
        assert right


# --- two runs -------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Writes two runs of the same row, the second changed, and compares them: the exit status."""
    about = {"device": "GPU", "threads": 2, "commit": "abc", "date": "2026-11-25"}
    row = {"kind": "attention", "run": "forward", "model": "sweep", "shape": [1, 2, 64, 64, 32]}
    row |= {"dtype": "float32", "masked": False, "provider": "ours (cpu)", "reason": None}
    row |= {"p20 ms": 9.8, "p50 ms": 10.0, "p80 ms": 10.3, "limit p50 ms": 20.0, "cores taken": 0.0}
    other = row | {"provider": "eager"}

    def status(machine=None, **changes) -> int:
        rows = {"old": [row, other], "new": [row | changes, copy.deepcopy(other)]}
        paths = [tmp_path / f"{name}.json" for name in rows]
        for path, lines, extra in zip(paths, rows.values(), ({}, machine or {}), strict=True):
            path.write_text(json.dumps({"machine": about | extra, "rows": lines}))
        return main(["compare", *map(str, paths)])

    return status


def times(factor: float, spread: float = 0.02, limit: float = 20.0) -> dict:
    middle = 10.0 * factor
    low, high = middle * (1 - spread), middle * (1 + spread)
    return {"p20 ms": low, "p50 ms": middle, "p80 ms": high, "limit p50 ms": limit}


def test_compare_flags_a_regression(runs, capsys):
    assert runs(**times(1.2)) == 1
    printed = capsys.readouterr().out
    assert compare.SLOWER in printed
    assert "2 rows in both: 1 SLOWER, 0 LOST, 0 faster, 0 disturbed" in printed


@pytest.mark.parametrize(
    "changes",
    [
        times(1.0),
        times(1.04),  # within the spread of the turns
        times(1.2, spread=0.15),  # turns overlap
        times(1.2, limit=25.0),  # the whole machine is slower
        times(2.0) | {"cores taken": 0.5},  # by other processes
    ],
)
def test_compare_lets_noise_pass(runs, changes, capsys):
    assert runs(**changes) == 0
    assert f"0 {compare.SLOWER}, 0 {compare.LOST}, 0 {compare.FASTER}" in capsys.readouterr().out


def test_compare_tells_what_became_faster(runs, capsys):
    assert runs(**times(0.5)) == 0
    assert "0 SLOWER, 0 LOST, 1 faster, 0 disturbed" in capsys.readouterr().out


def test_compare_flags_a_time_that_was_lost(runs, capsys):
    gone = dict.fromkeys(("p20 ms", "p50 ms", "p80 ms", "limit p50 ms"))
    assert runs(**gone, reason="wrong out: error") == 1
    assert "LOST: wrong out" in capsys.readouterr().out


def test_compare_counts_what_the_new_run_does_not_have(runs, capsys):
    assert runs(shape=[1, 2, 128, 128, 32]) == 0
    assert "1 rows in both" in (printed := capsys.readouterr().out)
    assert "1 of the old without a counterpart" in printed


def test_compare_refuses_two_machines(runs, capsys):
    assert runs(machine={"device": "another GPU"}) == 2
    assert "times cannot be compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--out", "README.md"], "--out: got README.md, expected a folder"),
        (["--threads", "0"], "--threads: got 0, expected at least 1"),
        (["compare", "none.json", "none.json"], "got none.json, expected a results.json"),
        (["compare", "README.md", "README.md"], "got README.md, expected a results.json"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_run_compares_with_itself(results, capsys):
    path = str(results / "results.json")
    assert main(["compare", path, path]) == 0
    assert "0 SLOWER, 0 LOST, 0 faster, 0 disturbed" in capsys.readouterr().out
