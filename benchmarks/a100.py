"""What the compiled GPU kernels of attention would do on an A100, by a model of it, without a GPU.

    python -m benchmarks.a100 [--dtype bfloat16] [--json a100.json]

Every row is modelled, not measured: a kernel is compiled for sm_80, and `sassmodel` walks the hot
loop of its machine code (see `offline.py` for where it is found; expect 10% of error, and less
between two tiles of a kernel). TFLOP/s count the products that the mathematics needs, 2 B H M N D
operations each, so products that a kernel makes again lower them. `binding` is the pipe that bounds
the loop. A pass has a row for each kernel, as if it were the whole pass, and one for all of them,
whose time is the sum. M = N = 4096.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

import scm_kernels
from benchmarks import offline
from benchmarks.common import report, with_progress

HEAD_DIMS = (64, 72, 96, 112, 128)
LENGTH = 4096
CLOCK, PROCESSORS = 1.41e9, 108  # Hz, multiprocessors
# pass: (products that the mathematics needs, cotangents of out and t_out, gradients)
PASSES = {
    "forward": (6, None, ""),
    "backward, out": (5, (True, False), "qkv"),
    "backward, both": (12, (True, True), "qkv"),
    "backward, both, six": (15, (True, True), "qkvabc"),
}
DETAILS = ("tile", "warps", "stages", "registers", "local B", "shared KiB", "blocks", "binding")


@dataclass(frozen=True)
class Problem:
    """One row of the list: a pass of attention."""

    name: str
    dtype: torch.dtype
    d: int
    causal: bool = False

    def launches(self, target: str = "sm_80") -> list[offline.Launch]:
        """The kernels of this pass, compiled for the target."""
        _, cotangents, wanted = PASSES[self.name]
        shape = (1, 1, LENGTH, self.d)
        x = [torch.zeros(shape, dtype=self.dtype, requires_grad=c in wanted) for c in "qkvabc"]
        with offline.gpu(target) as launches:
            outputs = scm_kernels.attention_jvp(*x, is_causal=self.causal)
            if cotangents is not None:
                launches.clear()
                used = [y for y, use in zip(outputs, cotangents, strict=True) if use]
                leaves = [y for y in x if y.requires_grad]
                torch.autograd.grad(used, leaves, [torch.zeros_like(y) for y in used])
        return launches


def problems(dtypes: list[torch.dtype]) -> list[Problem]:
    """Every shipped row of the tables for products in half precision."""
    return [
        Problem(name, dtype, d, causal)
        for dtype in dtypes
        for name in PASSES
        for d in HEAD_DIMS
        for causal in (False, True)
    ]


def processes() -> ProcessPoolExecutor:
    """Compilers are single-threaded; and autograd does not survive a fork."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def table(problem: Problem) -> list[dict]:
    """A row for each kernel of a pass whose time goes to products, and one for all of them."""
    return list(_rows(problem))


def _rows(problem: Problem) -> Iterator[dict]:
    needed = 2 * PASSES[problem.name][0] * problem.d  # operations for a row and a key
    efficiency = offline.tool("sassmodel").A100["efficiency"]
    total = 0.0

    def row(kernel: str, cycles: float, **details) -> dict:
        about = {"pass": problem.name, "D": problem.d, "causal": problem.causal}
        about["dtype"] = str(problem.dtype).removeprefix("torch.")
        rate = needed * CLOCK * PROCESSORS * efficiency / cycles / 1e12
        about |= {"backend": "triton", "kernel": kernel, "TFLOP/s": rate, "figures": "modelled"}
        return about | {name: details.get(name) for name in DETAILS}

    for launch in problem.launches():
        estimate = model(launch)
        if estimate is None:
            continue
        meta, timing = launch.constants["META"], estimate["timing"]
        cycles = timing["cycles_per_block_iter"] / (meta.BLOCK_M * meta.BLOCK_N)
        total += cycles
        details = {
            "tile": f"{meta.BLOCK_M}x{meta.BLOCK_N}",
            "warps": launch.metadata.num_warps,
            "stages": launch.metadata.num_stages,
            "registers": estimate["regs"],
            "local B": launch.spilled(),
            "shared KiB": round(estimate["smem"] / 1024),
            "blocks": estimate["occupancy"]["blocks"],
            "binding": timing["binding"],
        }
        yield row(launch.name.removeprefix("attention_").removesuffix("_kernel"), cycles, **details)
    yield row("all", total)


def model(launch: offline.Launch) -> dict | None:
    """sassmodel's view of a kernel; None where no loop has products."""
    estimate = offline.tool("sassmodel").analyse(
        launch.code("cubin"), threads=launch.threads, smem=launch.shared
    )
    if "timing" not in estimate or estimate["hot_loop"]["hmma"] == 0:
        return None
    return estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16"))
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    dtypes = [getattr(torch, name) for name in options.dtype or ["bfloat16", "float16"]]
    chosen = problems(dtypes)
    with processes() as pool:
        futures = [pool.submit(table, problem) for problem in chosen]
        lines = [line for future in with_progress(futures) for line in future.result()]
    report("attention on an A100, MODELLED from the compiled kernels", lines, options.json)


if __name__ == "__main__":
    main()
