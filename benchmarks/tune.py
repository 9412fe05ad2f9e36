"""Rows for the tables of the Triton kernels of attention: candidates, the fastest first.

    python -m benchmarks.tune [--head-dim 64] [--dtype bfloat16] [--causal] [--length 4096]

On a GPU the speeds are measured, on any other machine modelled for an A100, as the table says;
there a candidate that spills says how much. A row is copied into `triton_config.py` by hand, with
its reason: nothing is tuned while a program runs.
"""

import argparse
import itertools

import torch

import scm_kernels
from benchmarks import a100
from benchmarks.common import report, with_progress
from scm_kernels import _backends
from scm_kernels.attention import triton_forward
from scm_kernels.attention.triton_config import Row


def candidates(d: int) -> list[Row]:
    """The forward's rows that are worth a trial."""
    tiles = [(64, 64, 4), (64, 32, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)]
    widths = [(16, 16), (16, 32), (32, 32), (32, 64), (64, 32), (64, 64)]
    return [
        Row(d, block_m, block_n, warps, stages, widest=w, widest_e=e, rest=rest)
        for (block_m, block_n, warps), stages, (w, e), rest in itertools.product(
            tiles, (2, 3), widths, (16, 32)
        )
    ]


def trial(row: Row, problem: a100.Problem, length: int) -> dict:
    """A line of the table: the candidate and its speed, or why it has none."""
    before = triton_forward.forward_row
    triton_forward.forward_row = lambda *_: row
    _backends.forget()
    result = {"TFLOP/s": None, "local B": None}
    try:
        speed = measured if torch.cuda.is_available() else modelled
        result |= speed(problem, length)
    except Exception as error:  # a candidate may ask for more than there is, in many ways
        result["reason"] = str(error).splitlines()[0][:60]
    finally:
        triton_forward.forward_row = before
        _backends.forget()
    return result | {"row": repr(row)}


def modelled(problem: a100.Problem, length: int) -> dict:
    (launch,) = problem.launches()
    rate = a100.table(problem)[-1]["TFLOP/s"]
    return {"TFLOP/s": rate, "local B": launch.spilled(), "figures": "modelled"}


def measured(problem: a100.Problem, length: int) -> dict:
    from triton.testing import do_bench

    x = [
        torch.randn(1, 16, length, problem.d, device="cuda", dtype=problem.dtype) for _ in range(6)
    ]
    with scm_kernels.backend("triton"):
        ms = do_bench(lambda: scm_kernels.attention_jvp(*x, is_causal=problem.causal))
    work = 12 * 16 * length**2 * problem.d / (2 if problem.causal else 1)
    return {"TFLOP/s": work / ms / 1e9, "figures": f"measured, {torch.cuda.get_device_name()}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--length", type=int, default=4096, help="of a measurement; the model's is 4096"
    )
    parser.add_argument("--most", type=int, help="try so many candidates alone")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    problem = a100.Problem(
        "forward", getattr(torch, options.dtype), options.head_dim, options.causal
    )
    rows = candidates(options.head_dim)[: options.most]
    table = [trial(row, problem, options.length) for row in with_progress(rows)]
    table.sort(key=lambda line: -(line["TFLOP/s"] or 0))
    columns = ("TFLOP/s", "local B", "figures", "row", "reason")
    table = [{name: line.get(name) for name in columns} for line in table]
    report(f"forward, D = {options.head_dim}, {options.dtype}", table, options.json)


if __name__ == "__main__":
    main()
