"""What the compiled GPU kernels of attention would do on an A100, by a model of it, without a GPU.

    python -m benchmarks.a100 [--dtype bfloat16] [--json a100.json]

Every row is modelled, not measured: `sassmodel` walks the hot loop of a kernel's machine code for
sm_80 (see `tools.py` for where it is found; expect 10% of error, and less between two tiles of a
kernel). Triton's kernels are compiled for it, the CUDA kernels are those of the native module.
TFLOP/s count the products that the mathematics needs, 2 B H M N D operations each, so products that
a kernel makes again lower them. `binding` is the pipe that bounds the loop. A pass has a row for
each kernel, as if it were the whole pass, and one for all of them, whose time is the sum. M = N =
4096. Of a CUDA kernel the same loop serves causal problems; its tiles that raise the top of the
softmax, few, leave that loop.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from unittest import mock

import torch

import scm_kernels
from benchmarks import offline, offline_cuda, tools
from benchmarks.cases import HEAD_DIMS
from benchmarks.common import report, with_progress
from scm_kernels import _cuda
from scm_kernels.attention import triton
from scm_kernels.attention.triton_backward_config import atomic_row

LENGTH = 4096
CLOCK, PROCESSORS = 1.41e9, 108  # Hz, multiprocessors
# pass: (products that the mathematics needs, cotangents of out and t_out, gradients)
PASSES = {
    "forward": (6, None, ""),
    "forward, tq tk": (5, None, ""),
    "forward, tq tv": (5, None, ""),
    "forward, tk tv": (5, None, ""),
    "forward, tq": (4, None, ""),
    "forward, tk": (4, None, ""),
    "forward, tv": (3, None, ""),
    "forward, no tangent": (2, None, ""),
    "backward, out": (5, (True, False), "qkv"),
    "backward, both": (12, (True, True), "qkv"),
    "backward, both, atomics": (12, (True, True), "qkv"),
    "backward, both, six": (15, (True, True), "qkvabc"),
    "backward, out, mask": (3, (True, False), "m"),
    "backward, both, mask": (10, (True, True), "m"),
}
_ROWS, _SHARED = (1, 1, LENGTH, LENGTH), (1, 1, 1, LENGTH)
MASKS = {  # their shapes, and dtypes where these are not that of q
    "": {},
    "padding": {"attn_mask": (_SHARED, torch.bool)},
    "rows": {"attn_mask": (_ROWS, torch.bool)},
    "bias": {"attn_mask": (_ROWS, None)},
    "bias and tangent": {"attn_mask": (_ROWS, None), "t_attn_mask": (_ROWS, None)},
}
TANGENTS = {  # of a pass that has not all of them
    "forward, tq tk": "qk",
    "forward, tq tv": "qv",
    "forward, tk tv": "kv",
    "forward, tq": "q",
    "forward, tk": "k",
    "forward, tv": "v",
    "forward, no tangent": "",
}
# TFLOP/s of FlashAttention-2's own forward without a causal mask, by the same model, on which these
# two are its fixed points (measured ones are 180 to 195, and 215 to 230).
FLASH_ATTENTION_2 = {64: 189.0, 128: 223.0}
BLOCK_M, BLOCK_N, STAGES = 64, 32, 2  # of the CUDA kernels: csrc/cuda/attention_kind.cuh
DETAILS = ("tile", "warps", "stages", "registers", "local B", "shared KiB", "blocks", "binding")


@dataclass(frozen=True)
class Problem:
    """One row of the list: a pass of attention."""

    name: str
    dtype: torch.dtype
    d: int
    causal: bool = False
    backend: str = "triton"
    mask: str = ""  # one of MASKS

    def launches(self, target: str = "sm_80") -> list[offline.Launch] | list[offline_cuda.Launch]:
        """The kernels of this pass, compiled for the target."""
        _, cotangents, wanted = PASSES[self.name]
        shape, tangents = (1, 1, LENGTH, self.d), TANGENTS.get(self.name, "qkv")
        x = [torch.zeros(shape, dtype=self.dtype, requires_grad=c in wanted) for c in "qkvabc"]
        inputs = [
            *x[:3],
            *(y if c in tangents else None for y, c in zip(x[3:], "qkv", strict=True)),
        ]
        masks = {
            name: torch.empty(shape, dtype=dtype or self.dtype, requires_grad="m" in wanted)
            for name, (shape, dtype) in MASKS[self.mask].items()
        }
        gpu = offline_cuda.gpu() if self.backend == "cuda" else offline.gpu(target)
        atomics = {triton.ATOMICS: "1" if "atomics" in self.name else "0"}
        with mock.patch.dict(os.environ, atomics), gpu as launches:
            outputs = scm_kernels.attention_jvp(*inputs, **masks, is_causal=self.causal)
            if cotangents is not None:
                launches.clear()
                used = [y for y, use in zip(outputs, cotangents, strict=True) if use]
                leaves = [y for y in (*x, *masks.values()) if y.requires_grad]
                torch.autograd.grad(used, leaves, [torch.zeros_like(y) for y in used])
        return launches


def problems(dtypes: list[torch.dtype]) -> list[Problem]:
    """The rows of Triton's tables for these dtypes and D = 64 to 128, without a mask."""
    return [
        Problem(name, dtype, d, causal)
        for dtype in dtypes
        for name in PASSES
        if name not in TANGENTS and "mask" not in name
        for d in HEAD_DIMS
        for causal in (False, True)
        if "atomics" not in name or atomic_row("sm_80", dtype, d) is not None
    ]


def cuda_problems(dtypes: list[torch.dtype]) -> list[Problem]:
    """Every CUDA kernel of attention."""
    names = ("forward", *TANGENTS)
    return [
        Problem(name, dtype, d, backend="cuda")
        for dtype in dtypes
        for name in names
        for d in HEAD_DIMS
    ]


def processes() -> ProcessPoolExecutor:
    """Compilers are single-threaded; and autograd does not survive a fork."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def table(problem: Problem) -> list[dict]:
    """A row for each kernel of a pass whose time goes to products, and one for all of them."""
    return list(_rows(problem))


def _rows(problem: Problem) -> Iterator[dict]:
    needed = 2 * PASSES[problem.name][0] * problem.d  # operations for a row and a key
    efficiency = tools.tool("sassmodel").A100["efficiency"]
    total = 0.0

    def row(kernel: str, cycles: float, **details) -> dict:
        rate = needed * CLOCK * PROCESSORS * efficiency / cycles / 1e12
        return _row(problem, kernel, rate, **details)

    for launch in problem.launches():
        estimate = model(launch)
        if estimate is None:
            continue
        (rows, keys, stages), timing = _tile(launch), estimate["timing"]
        cycles = timing["cycles_per_block_iter"] / (rows * keys)
        total += cycles
        details = {
            "tile": f"{rows}x{keys}",
            "warps": launch.threads // 32,
            "stages": stages,
            "registers": estimate["regs"],
            "local B": launch.spilled(),
            "shared KiB": round(estimate["smem"] / 1024),
            "blocks": estimate["occupancy"]["blocks"],
            "binding": timing["binding"],
        }
        yield row(launch.name.removeprefix("attention_").removesuffix("_kernel"), cycles, **details)
    if problem.backend == "triton":  # a pass of several kernels
        yield row("all", total)


def _row(problem: Problem, kernel: str, rate: float, **details) -> dict:
    about = {"pass": problem.name, "D": problem.d, "causal": problem.causal}
    about["dtype"] = str(problem.dtype).removeprefix("torch.")
    about |= {"backend": problem.backend, "kernel": kernel}
    about |= {"TFLOP/s": rate, "figures": "modelled"}
    return about | {name: details.get(name) for name in DETAILS}


def others() -> list[dict]:
    """Rows of another's kernels, to compare with."""
    name = "forward, no tangent"
    return [
        _row(Problem(name, torch.bfloat16, d, backend="FlashAttention-2"), "forward", rate)
        for d, rate in FLASH_ATTENTION_2.items()
    ]


def _tile(launch: offline.Launch | offline_cuda.Launch) -> tuple[int, int, int]:
    """Rows, keys, stages."""
    if isinstance(launch, offline_cuda.Launch):
        return BLOCK_M, BLOCK_N, STAGES
    meta = launch.constants["META"]
    return meta.BLOCK_M, meta.BLOCK_N, launch.metadata.num_stages


def model(launch: offline.Launch | offline_cuda.Launch) -> dict | None:
    """sassmodel's view of a kernel; None where no loop has products."""
    cubin = launch.cubin if isinstance(launch, offline_cuda.Launch) else launch.code("cubin")
    estimate = tools.tool("sassmodel").analyse(
        cubin, launch.name, threads=launch.threads, smem=launch.shared
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
    if _cuda.built():
        chosen += cuda_problems(dtypes)
    else:
        print("no rows of CUDA kernels: the native module was built without them")
    with processes() as pool:
        futures = [pool.submit(table, problem) for problem in chosen]
        lines = [line for future in with_progress(futures) for line in future.result()]
    lines += others()
    report("attention on an A100, MODELLED from the compiled kernels", lines, options.json)


if __name__ == "__main__":
    main()
