"""Rows for the tables of the Triton kernels of attention: candidates, the fastest first.

    python -m benchmarks.tune [--kernel keys --through both] [--head-dim 64] [--dtype bfloat16]
                              [--causal] [--length 4096] [--most 20] [--json tune.json]

On a GPU a call that launches the kernel is measured, on any other machine the kernel is modelled
for an A100, as the table says; a candidate that spills says how much. TFLOP/s count the products
that the mathematics of the pass needs, as if the kernel were all of it. A row is copied into
`triton_config.py` or `triton_backward_config.py` by hand, with its reason: nothing is tuned while a
program runs.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from unittest import mock

import torch

import scm_kernels
from benchmarks import a100, offline
from benchmarks.common import report, with_progress
from scm_kernels import _backends, _triton
from scm_kernels.attention import triton_backward_plan, triton_forward
from scm_kernels.attention.triton_config import Row

KERNELS = ("forward", "keys", "queries")
SHAPE = (2, 16)  # batch and heads of a measurement


def candidates(kernel: str, d: int) -> list[Row]:
    """The rows that are worth a trial."""
    if kernel == "forward":
        tiles = [(64, 64, 4), (64, 32, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)]
        widths = [(16, 16), (16, 32), (32, 32), (32, 64), (64, 32), (64, 64), (256, 256)]
        return [
            Row(d, block_m, block_n, warps, stages, widest=w, widest_e=e, rest=rest)
            for (block_m, block_n, warps), stages, (w, e), rest in itertools.product(
                tiles, (2, 3), widths, (16, 32)
            )
        ]
    # (what it sums for, what it walks along, warps)
    tiles = [(64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 16, 4), (128, 32, 4)]
    tiles += [(128, 16, 8), (128, 32, 8), (128, 64, 8), (128, 128, 8)]
    rows = []
    for (tall, narrow, warps), stages in itertools.product(tiles, (2, 3, 4)):
        block_m, block_n = (narrow, tall) if kernel == "keys" else (tall, narrow)
        row = Row(d, block_m, block_n, warps, stages)
        rows += [row, replace(row, step=32), replace(row, step=128)] if d % 64 else [row]
    return rows


class Pass:
    """What launches a kernel: the pass of `a100`, and the gradients that are asked for."""

    def __init__(self, kernel: str, through: str, dtype: torch.dtype, d: int, causal: bool):
        self.kernel, self.through, self.d, self.causal = kernel, through, d, causal
        name = "forward" if kernel == "forward" else f"backward, {through}"
        self.problem = a100.Problem(name, dtype, d, causal)
        self.wanted = {"forward": (), "keys": (1, 2), "queries": (0,)}[kernel]

    def rows(self, row: Row) -> mock._patch:
        """A patch of the table, by which the kernel has this row."""
        if self.kernel == "forward":
            return mock.patch.object(triton_forward, "forward_row", return_value=row)
        real = triton_backward_plan.backward_row

        def chosen(architecture, kernel, through, *rest):
            mine = kernel == self.kernel and through == self.through
            return row if mine else real(architecture, kernel, through, *rest)

        return mock.patch.object(triton_backward_plan, "backward_row", chosen)

    def launches(self, target: str) -> list[offline.Launch]:
        """The kernel, compiled for the target."""
        launches = self.problem.launches(target)
        return [launch for launch in launches if self.kernel in launch.name]

    def call(self, length: int) -> Callable[[], object]:
        """What launches it on the GPU."""
        shape, dtype = (*SHAPE, length, self.d), self.problem.dtype
        x = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(6)]
        for i in self.wanted:
            x[i].requires_grad_()
        if self.kernel == "forward":
            return lambda: scm_kernels.attention_jvp(*x, is_causal=self.causal)
        outputs = scm_kernels.attention_jvp(*x, is_causal=self.causal)
        outputs = outputs[: 1 + (self.through == "both")]
        leaves, seeds = [x[i] for i in self.wanted], [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def trial(row: Row, tried: Pass, length: int) -> dict:
    """A line of the table: the candidate and its speed, or why it has none."""
    result = {"TFLOP/s": None, "local B": None}
    _backends.forget()
    try:
        with tried.rows(row):
            speed = measured if torch.cuda.is_available() else modelled
            result |= speed(tried, length)
    except Exception as error:  # a candidate may ask for more than there is, in many ways
        result["reason"] = str(error).splitlines()[0][:60]
    finally:
        _backends.forget()
    return result | {"row": written(row)}


def written(row: Row) -> str:
    """As a table has it: without what a row has anyway."""
    values = [(f, getattr(row, f.name)) for f in fields(row)]
    positional = [str(x) for _, x in values[:5]]
    named = [f"{f.name}={x}" for f, x in values[5:] if x != f.default]
    return f"Row({', '.join(positional + named)})"


def modelled(tried: Pass, length: int) -> dict:
    (line,) = (x for x in a100.table(tried.problem) if tried.kernel in x["kernel"])
    return {"TFLOP/s": line["TFLOP/s"], "local B": line["local B"], "figures": "modelled"}


def measured(tried: Pass, length: int) -> dict:
    from triton.testing import do_bench

    target = _triton.architecture(torch.device("cuda", torch.cuda.current_device()))
    spilled = sum(launch.spilled() for launch in tried.launches(target))
    with scm_kernels.backend("triton"):
        ms = do_bench(tried.call(length))
    products = a100.PASSES[tried.problem.name][0]
    work = 2 * products * SHAPE[0] * SHAPE[1] * length**2 * tried.d / (2 if tried.causal else 1)
    figures = f"measured, {torch.cuda.get_device_name()}"
    return {"TFLOP/s": work / ms / 1e9, "local B": spilled, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="forward", choices=KERNELS)
    parser.add_argument("--through", default="both", choices=("out", "both"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--length", type=int, default=4096, help="of a measurement; the model's is 4096"
    )
    parser.add_argument("--most", type=int, help="try so many candidates alone")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    tried = Pass(options.kernel, options.through, dtype, options.head_dim, options.causal)
    rows = candidates(options.kernel, options.head_dim)[: options.most]
    table = [trial(row, tried, options.length) for row in with_progress(rows)]
    table.sort(key=lambda line: -(line["TFLOP/s"] or 0))
    columns = ("TFLOP/s", "local B", "figures", "row", "reason")
    table = [{name: line.get(name) for name in columns} for line in table]
    through = "" if options.kernel == "forward" else f" through {options.through}"
    report(
        f"{options.kernel}{through}, D = {options.head_dim}, {options.dtype}", table, options.json
    )


if __name__ == "__main__":
    main()
