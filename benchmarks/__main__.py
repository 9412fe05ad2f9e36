"""Attention with its tangent, the sCM tangent, a DiT block and a training step, measured.

    python -m benchmarks [--quick | --full] [--shapes MODEL ...] [--device cuda|cpu] [--out DIR]
    python -m benchmarks compare OLD.json NEW.json

All who can do the work do it in turns in one process, with the device's limit (a GEMM or a copy) in
the same turns; one whose values leave the error budget gets no speed. Prints tables, and writes
results.json, results.csv, tables.md and plots to benchmarks/results/DEVICE.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, files, tables
from benchmarks.compare import compare
from benchmarks.device import about
from benchmarks.providers import ours
from benchmarks.suite import Effort, disturbance, effort_of, not_begun, quietest


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scales = made.add_mutually_exclusive_group()
    for name, text in {
        "tiny": "seconds: whether everything works",
        "quick": "at most two minutes on two cores",
        "full": "every shape, dtype and pass: for a GPU or a patient person",
    }.items():
        scales.add_argument(f"--{name}", dest="scale", action="store_const", const=name, help=text)
    made.set_defaults(scale="default")
    names = ", ".join(cases.MODELS)
    made.add_argument(
        "--shapes",
        nargs="+",
        choices=cases.MODELS,
        default=(),
        metavar="MODEL",
        help=f"attention alone, at the shapes of these models: {names}",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cuda", "cpu"), default=device)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    made.add_argument("--patience", type=float, help="seconds that a call may take to be measured")
    made.add_argument(
        "--quiet",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="how long in all to repeat what other processes disturbed, for the quietest turns",
    )
    made.add_argument("--out", type=Path, help="folder of the results")
    return made


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["compare"]:
        paths = argparse.ArgumentParser(prog="python -m benchmarks compare")
        paths.add_argument("old", type=_results)
        paths.add_argument("new", type=_results)
        chosen = paths.parse_args(arguments[1:])
        return compare(chosen.old, chosen.new)
    made = parser()
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: PyTorch sees no GPU here")
    if options.threads < 1:
        made.error(f"--threads: got {options.threads}, expected at least 1")
    torch.set_num_threads(options.threads)
    effort = effort_of(options.scale, options.device)
    if options.patience is not None:
        effort = replace(effort, patience=options.patience)
    known = about(options.device) | {"scale": options.scale}
    place = options.out or files.folder(known)
    try:  # before anything is measured
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        made.error(f"--out: got {place}, expected a folder that can be written to ({error})")
    print(tables.heading(known))
    for name, reason in ours(options.device).items():
        print(f"ours ({name}): {reason or 'available'}")
    print(f"results go to {place}; a reason for no figure is printed once\n", flush=True)
    chosen = cases.select(options.scale, options.device, tuple(options.shapes))
    rows = run(chosen, options.device, effort, 60 * options.quiet)
    known["cores taken"] = disturbance(rows) if options.device == "cpu" else None
    for path in files.write(place, known, rows):
        print(f"wrote {path}")
    return 0


def _results(name: str) -> Path:
    """The path of a results.json."""
    path = Path(name)
    try:
        files.read(path)
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"got {name}, expected a results.json ({type(error).__name__}: {error})"
        ) from error
    return path


def run(chosen: list[cases.Case], device: str, effort: Effort, quiet: float) -> list[dict]:
    """The rows of all cases, each printed as it is done; of some when interrupted (Ctrl-C)."""
    rows, known, over, start = [], set(), None, time.perf_counter()
    total = effort.total + quiet
    for case in tqdm(chosen, file=sys.stderr, leave=False, disable=None):
        if time.perf_counter() - start > total:
            over = f"the {total:g} s of this scale were over"
        try:
            new = not_begun(case, over) if over else quietest(case, device, effort, start + quiet)
        except KeyboardInterrupt:
            over = "interrupted"
            new = not_begun(case, over)
        rows += new
        with tqdm.external_write_mode():
            print(tables.block(case, new, known), flush=True)
    print(f"{len(chosen)} cases in {time.perf_counter() - start:.0f} s")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
