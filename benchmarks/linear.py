"""A linear layer on a dual tensor: three GEMMs (PyTorch), two (ours), or one over stacked rows.

    python -m benchmarks.linear [--repeats 20] [--json linear.json]

Ours calls `F.linear` twice. Stacking costs a copy of both inputs and one of the result, which a
faster GEMM has to earn back: the last column says whether it does.
"""

import argparse

import torch
import torch.nn.functional as F

import scm_kernels
from benchmarks.common import interleaved, report, with_progress

SHAPES = [(512, 64, 64), (4096, 384, 1536), (1024, 1152, 4608)]  # rows, features in, features out


def measure(rows: int, inputs: int, outputs: int, dtype: torch.dtype, repeats: int) -> dict:
    """One row of the table: milliseconds of each, and the ratios to ours."""
    x, tx = torch.randn(2, rows, inputs, dtype=dtype)
    w, b = torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)

    def stacked() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([x, tx]) @ w.mT
        return y[:rows] + b, y[rows:]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w, b)

    times = interleaved(
        {
            "torch jvp": lambda: torch.func.jvp(layer, (x,), (tx,)),
            "our jvp": lambda: scm_kernels.jvp(layer, (x,), (tx,)),
            "two GEMMs": lambda: (F.linear(x, w, b), F.linear(tx, w)),
            "stacked GEMM": stacked,
        },
        repeats,
    )
    row = {"rows": rows, "in": inputs, "out": outputs, "dtype": str(dtype).removeprefix("torch.")}
    row |= {f"{name} ms": value["p50"] for name, value in times.items()}
    row["torch / our jvp"] = times["torch jvp"]["p50"] / times["our jvp"]["p50"]
    row["stacked / two"] = times["stacked GEMM"]["p50"] / times["two GEMMs"]["p50"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    cases = [(*shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    rows = [measure(*case, options.repeats) for case in with_progress(cases)]
    report("linear layer with tangent, measured", rows, options.json)


if __name__ == "__main__":
    main()
