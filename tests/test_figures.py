"""The figures of README.md and benchmarks/README.md are those of the stored runs."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from examples.digits.config import RunConfig

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "benchmarks"
MAIN, DETAILS = ((folder / "README.md").read_text() for folder in (ROOT, PLACE))


def table(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    body = text.partition(f"\n| {head} | ")[2].split("\n\n")[0]
    return [cells(row) for row in body.splitlines()[2:]]


def cells(row: str) -> list[str]:
    return row.strip("| ").split(" | ")


def stored(file: str) -> list[dict]:
    return json.loads((PLACE / "results" / file).read_text())["rows"]


def test_all_links_lead_somewhere():
    for folder, text in (ROOT, MAIN), (PLACE, DETAILS):
        links = re.findall(r"\]\((?!http)([^)]+)\)", text)
        assert len(links) > 5
        assert [link for link in links if not (folder / link).exists()] == []


def test_tables_of_attention():
    """Rows of benchmarks/README.md are those of runs, and README's are cut from them."""
    written = set()
    for folder in {(PLACE / file).parent for file in re.findall(r"\]\((.*tables.md)\)", DETAILS)}:
        results = json.loads((folder / "results.json").read_text())
        text = tables.markdown(results["machine"], results["rows"])
        assert (folder / "tables.md").read_text() == text
        written.update(text.splitlines())
    rows, main = (re.findall(r"^\| with .* \|$", x, re.MULTILINE) for x in (DETAILS, MAIN))
    assert len(rows) > 10
    assert len(main) > 4
    assert set(rows) <= written
    for what, shape, dtype, _device, eager, ours, ratio, *memory in map(cells, main):
        (row,) = (row for row in map(cells, rows) if row[:3] == [what, shape, dtype])
        place = row.index(ratio)
        assert [eager, ours] == [row[3], row[place - 1]]
        assert memory == row[-2:]


def test_the_table_of_graphs():
    times = {
        (row["shape"], row["kind"], name): f"{row[f'{name} ms']:.3f} ({row[f'{name} TFLOP/s']:.0f})"
        for row in stored("nvidia-h200/graphs.json")
        for name in ("triton", "cuda")
    }
    columns = ("", "triton"), ("", "cuda"), ("causal", "cuda"), ("q", "cuda")
    rows = table(DETAILS, "B x H x N x D")
    assert len(rows) == 6
    for shape, *row in rows:
        assert row == [times[(shape.split()[0], *column)] for column in columns]


def test_the_modelled_table():
    rates = {
        (row["D"], row["pass"], row["backend"]): f"{row['TFLOP/s']:.0f}"
        for row in stored("a100.json")
        if row["dtype"] == "bfloat16" and not row["causal"]
        if row["kernel"] == "all" or row["backend"] == "cuda"  # which has one kernel a pass
    }
    columns = [("forward", "cuda"), ("forward", "triton")]
    columns += [(f"backward, {kind}", "triton") for kind in ("out", "both", "both, six")]
    rows = table(DETAILS, "D")
    assert len(rows) == 5
    for features, *row in rows:
        assert row == [rates[(int(features), *column)] for column in columns]


def test_the_table_of_memory():
    rows = table(DETAILS, "pass")
    assert len(rows) == 3
    for row, run in zip(rows, stored("memory.json"), strict=True):
        kept, peak = (f"{run[f'{kind} MB']:.0f} MB" for kind in ("kept", "peak"))
        assert row[1:] == [kept, f"{run['kept / forward']:.3g}", peak]


def test_the_table_of_host_times():
    times = {row["call"]: row["host us"] for row in stored("amd-epyc-2-threads/host.json")}
    for call, alone, graph in table(DETAILS, "a call of")[:3]:
        name = call.strip("`")
        kept = times.get(f"{name}, graph kept")
        assert alone == f"{times[name]:.0f} us"
        assert graph == ("-" if kept is None else f"{kept:.0f} us")


@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_digits(seed):
    """Which are of the settings as they are."""
    run = json.loads((ROOT / f"examples/digits/results/seed-{seed}.json").read_text())
    assert run["config"] == json.loads(json.dumps(RunConfig(seed=seed).to_dict()))
    cells = [f"{row['frechet']:.3f} +/- {row['noise']:.3f}" for row in run["rows"]]
    ratio = run["two_steps_against_teacher"]
    cells.append(f"{ratio['frechet_ratio']:.2f} +/- {ratio['frechet_ratio_noise']:.2f}")
    assert " | ".join([f"\n| {seed}", *cells]) + " |\n" in MAIN
