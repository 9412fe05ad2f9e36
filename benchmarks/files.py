"""What a run leaves behind: results.json, results.csv, tables.md, and the plots."""

import csv
import json
import re
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.tables import markdown

RESULTS = Path(__file__).parent / "results"
# What a row of the CSV says of the machine.
COLUMNS = ("device", "driver", "threads", "torch", "cuda", "triton", "scm_kernels", "commit")


def folder(about: dict) -> Path:
    """Where the results of a device are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    return RESULTS / (f"{name}-{about['threads']}-threads" if about["kind"] == "cpu" else name)


def write(place: Path, about: dict, rows: list[dict]) -> list[Path]:
    """Write all of it; the files' paths."""
    place.mkdir(parents=True, exist_ok=True)
    contents = {
        "results.json": json.dumps({"machine": about, "rows": rows}, indent=1) + "\n",
        "tables.md": markdown(about, rows),
    }
    for name, text in contents.items():
        (place / name).write_text(text)
    known = {name: about[name] for name in (*COLUMNS, "date")}
    with open(place / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*known, *rows[0]])
        writer.writeheader()
        writer.writerows(known | row | {"shape": "x".join(map(str, row["shape"]))} for row in rows)
    return [place / name for name in (*contents, "results.csv")] + draw(place, about, rows)


def read(path: Path) -> tuple[dict, list[dict]]:
    """The machine and the rows of a results.json."""
    data = json.loads(path.read_text())
    return data["machine"], data["rows"]
