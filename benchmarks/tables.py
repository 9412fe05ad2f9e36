"""Measured rows as text: a block for each case while it runs, Markdown tables of the whole."""

from collections import defaultdict
from collections.abc import Iterator

from benchmarks.cases import Case
from benchmarks.common import table
from benchmarks.providers import EAGER, OURS, SDPA

KINDS = {
    "attention": "Attention",
    "tangent": "The tangent and the loss of sCM",
    "block": "A DiT block: batch x tokens x width x depth x heads",
    "step": "A training step of a DiT: batch x tokens x width x depth x heads",
}
RUNS = {
    "forward": "with its tangent",
    "absent": "with a tangent of q alone",
    "out": "with its tangent, and gradient through out",
    "both": "with its tangent, and all gradients",
    "tangent": "normalised tangent",
    "loss": "loss",
    "loss, backward": "loss and gradient",
    "jvp": "with its tangent",
    "sCM": "tangent, loss, gradient, Adam",
}


def block(case: Case, rows: list[dict], known: set[tuple[str, str]]) -> str:
    """What one case gave, a line a provider; a reason stands in the place of figures.

    A provider whose reason is `known`, since an earlier block had it, is left out.
    """
    texts = []
    for row in rows:
        if (row["provider"], row["reason"]) in known:
            continue
        spread = f"{_number(row['p20 ms'])} to {_number(row['p80 ms'])}" if row["p50 ms"] else ""
        cells = {
            "provider": row["provider"],
            "p50 ms": _number(row["p50 ms"]),
            "p20 to p80": spread,
            row["unit"] or "rate": _number(row["rate"]),
            "of limit": _number(row["of limit"]),
            "eager / this": _number(row["eager / this"]),
            "this / SDPA": _number(row["this / SDPA"]),
            "peak MB": _megabytes(row),
        }
        texts.append((cells, row["reason"]))
    known |= {(row["provider"], row["reason"]) for row in rows if row["reason"] is not None}
    if not texts:
        return f"{case.label}: nothing to measure, for the reasons above\n"
    names = max((cells for cells, _ in texts), key=lambda cells: "rate" not in cells)
    aligned = [dict(zip(names, cells.values(), strict=True)) for cells, _ in texts]
    head, *lines = table(aligned).splitlines()
    reasons = [f"  {reason}" if reason else "" for _, reason in texts]
    body = "\n".join(line + reason for line, reason in zip(lines, reasons, strict=True))
    limit = next((f"limit: {_limit(row)}" for row in rows if row["limit"]), "nothing measured")
    least = next((row["arithmetic"] for row in rows if row["arithmetic"]), None)
    over = f"; arithmetic over SDPA: {least:.3g}" if least else ""
    return f"{case.label} ({limit}{over})\n{head}\n{body}\n"


def _limit(row: dict) -> str:
    return f"{row['limit']}, {row['limit p50 ms']:.3g} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _megabytes(row: dict) -> str:
    return "-" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:.3g}"


def markdown(about: dict, rows: list[dict]) -> str:
    """A table for each kind of case, and under them why a cell has no figure."""
    lines = ["# Measured", "", f"{heading(about)}. Medians in ms.", ""]
    for kind, title in KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            lines += [f"## {title}", "", *_table(mine), ""]
    lines += ["## Without a figure", "", *_reasons(rows)]
    return "\n".join(lines).rstrip() + "\n"


def heading(about: dict) -> str:
    """The machine in a line."""
    cpu, others = about["kind"] == "cpu", about.get("cores taken")
    processors = f", {about['threads']} threads on {about['cpus']} cores" if cpu else ""
    noise = "" if others is None else f"; other processes took up to {others:.2g} of its cores"
    return (
        f"{about['device']}{processors}, {about['driver']}, PyTorch {about['torch']}, "
        f"commit {about['commit']}, {about['date']}{noise}"
    )


def _table(rows: list[dict]) -> Iterator[str]:
    """Medians in ms of each provider, and how the best of ours compares."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["p50 ms"] is not None))
    fused, columns = SDPA in names, ["", "shape", "dtype", *names, "eager / ours", "of limit"]
    columns += ["ours / SDPA (arithmetic)"] if fused else []
    columns += ["peak MB, eager", "peak MB, ours"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    order = list(RUNS)
    for rows_of_case in sorted(by_case(rows).values(), key=lambda x: order.index(x[0]["run"])):
        cells = {row["provider"]: row for row in rows_of_case}
        eager, ours = _first(rows_of_case, EAGER), best_of_ours(rows_of_case)
        first = rows_of_case[0]
        shape = f"{first['model']} {'x'.join(map(str, first['shape']))}"
        line = [RUNS[first["run"]], shape, first["dtype"]]
        line += [_number(cells[name]["p50 ms"]) if name in cells else "-" for name in names]
        line += [_number(ours.get("eager / this")), _number(ours.get("of limit"))]
        if fused:
            least = ours.get("arithmetic")
            ratio = _number(ours.get("this / SDPA"))
            line.append(f"{ratio} ({least:.3g})" if least else ratio)
        line += [_megabytes(row) if row else "-" for row in (eager, ours)]
        yield "| " + " | ".join(line) + " |"


def _first(rows: list[dict], name: str) -> dict:
    return next((row for row in rows if row["provider"].startswith(name)), {})


def best_of_ours(rows: list[dict]) -> dict:
    """The row of the fastest of our backends; {} where none has a time."""
    mine = [row for row in rows if row["provider"].startswith(OURS) and row["p50 ms"] is not None]
    return min(mine, key=lambda row: row["p50 ms"], default={})


def by_case(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of the same inputs and run together, in their order."""
    cases = defaultdict(list)
    for row in rows:
        cases[case_key(row)].append(row)
    return cases


def case_key(row: dict) -> tuple:
    names = ("kind", "run", "model", "dtype", "masked")
    return (*(row[name] for name in names), tuple(row["shape"]))


def _reasons(rows: list[dict]) -> Iterator[str]:
    """Each reason once, with the cases that it is about where they are not all of a provider's."""
    where, tried = defaultdict(list), defaultdict(int)
    for row in rows:
        tried[row["provider"]] += 1
        if row["reason"] is not None:
            shape = f"{row['run']} {'x'.join(map(str, row['shape']))} {row['dtype']}"
            where[row["provider"], row["reason"]].append(shape)
    for (provider, reason), cases in where.items():
        place = "" if len(cases) == tried[provider] else f" ({'; '.join(cases)})"
        yield f"- {provider}: {reason}{place}"
