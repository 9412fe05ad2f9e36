"""Two runs of the benchmarks side by side: what became slower beyond the noise that they measured.

    python -m benchmarks compare OLD.json NEW.json

The noise of a row is the spread of its turns, (p80 - p20) / p50, in the worse of the two runs, or
what the limit that was taken in the same turns lost between them, if that is more. A row is slower
when its turns are apart (p20 of the new above p80 of the old) and its median grew by more than the
noise; it is lost when it had a time and has a reason instead. Either makes the exit status 1. Where
other processes took the cores of a CPU in either run, a change of a time says nothing: the row is
disturbed (--quiet measures it again).
"""

from collections import Counter
from pathlib import Path

from benchmarks.common import table
from benchmarks.files import read
from benchmarks.suite import QUIET, disturbance
from benchmarks.tables import case_key

SLOWER, FASTER, SAME, LOST, DISTURBED = "SLOWER", "faster", "same", "LOST", "disturbed"


def judge(old: dict, new: dict) -> dict | None:
    """A row of both runs: ratio of the medians, the noise, a verdict; None without an old time."""
    if old["p50 ms"] is None:
        return None
    if new["p50 ms"] is None:
        return {"ratio": None, "noise": None, "verdict": f"{LOST}: {new['reason']}"}
    ratio = new["p50 ms"] / old["p50 ms"]
    limit = new["limit p50 ms"] / old["limit p50 ms"]
    spread = max((row["p80 ms"] - row["p20 ms"]) / row["p50 ms"] for row in (old, new))
    verdict, noise = SAME, max(spread, limit - 1)
    if ratio < 1:
        noise = max(spread, 1 / limit - 1)
    if new["p20 ms"] > old["p80 ms"] and ratio > 1 + noise:
        verdict = SLOWER
    elif new["p80 ms"] < old["p20 ms"] and 1 / ratio > 1 + noise:
        verdict = FASTER
    if verdict != SAME and disturbance([old, new]) > QUIET:
        verdict = DISTURBED
    return {"ratio": ratio, "noise": noise, "verdict": verdict}


def compare(old_path: Path, new_path: Path) -> int:
    """Print every row that is not the same, and a count; the exit status."""
    (old_about, old_rows), (new_about, new_rows) = read(old_path), read(new_path)
    for name in ("device", "threads"):
        if old_about[name] != new_about[name]:
            print(f"{name}: {old_about[name]} and {new_about[name]}: times cannot be compared")
            return 2
    news = {(*case_key(row), row["provider"]): row for row in new_rows}
    judged = []
    for old in old_rows:
        new = news.get((*case_key(old), old["provider"]))
        judgement = None if new is None else judge(old, new)
        if judgement is not None:
            shape = "x".join(map(str, old["shape"]))
            names = {name: old[name] for name in ("kind", "run", "model")}
            names |= {"shape": shape, "dtype": old["dtype"], "provider": old["provider"]}
            judged.append(names | {"old ms": old["p50 ms"], "new ms": new["p50 ms"]} | judgement)
    changed = [row for row in judged if row["verdict"] != SAME]
    counts = Counter(row["verdict"].partition(":")[0] for row in judged)
    print(f"old: {old_about['commit']}, {old_about['date']}; ", end="")
    print(f"new: {new_about['commit']}, {new_about['date']}; {new_about['device']}")
    if changed:
        print(table(changed))
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in (SLOWER, LOST, FASTER, DISTURBED))
    gone = sum(row["p50 ms"] is not None for row in old_rows) - len(judged)
    print(f"{len(judged)} rows in both: {kinds}; {gone} of the old without a counterpart")
    return 1 if counts[SLOWER] + counts[LOST] else 0
