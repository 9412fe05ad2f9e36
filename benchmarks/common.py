"""What the measurements share: interleaved timing, the machine in words, a table, a JSON file."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch


def wall(run: Callable[[], object]) -> float:
    """Milliseconds of one call, by the clock on the wall."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def interleaved(
    providers: dict[str, Callable[[], object]],
    repeats: int,
    timer: Callable[[Callable[[], object]], float] = wall,
    warm_up: bool = True,
) -> dict[str, dict]:
    """Milliseconds of each provider, taken in turns so that the machine's noise hits all alike."""
    times = {name: [] for name in providers}
    for run in providers.values() if warm_up else ():
        run()
    for _ in range(repeats):
        for name, run in providers.items():
            times[name].append(timer(run))
    return {name: _quantiles(values) for name, values in times.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


def with_progress(cases: Sequence) -> Iterator:
    """The cases, with a count of them on stderr while they run."""
    for i, case in enumerate(cases):
        print(f"\r{i + 1}/{len(cases)}", end="", file=sys.stderr, flush=True)
        yield case
    print("\r", end="", file=sys.stderr)


def machine() -> dict[str, object]:
    """Where a figure comes from."""
    describe = ("git", "describe", "--always", "--dirty")
    return {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": output_of(*describe, cwd=Path(__file__).parent) or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def output_of(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; "" where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(title: str, rows: list[dict], json_path: str | None) -> None:
    """Print rows as a table under the machine they were taken on, and write them if asked."""
    about = machine()
    print(title)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    if json_path is not None:
        Path(json_path).write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


def table(rows: list[dict]) -> str:
    """Rows that have the same keys, in columns under them."""
    texts = [[_text(value) for value in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for cells in (header, *texts)
    )


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
