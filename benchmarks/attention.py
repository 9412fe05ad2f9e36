"""Attention with its tangent: ours against eager PyTorch, on the CPU.

    python -m benchmarks.attention [--repeats 9] [--threads 2] [--json attention.json]

Eager is `torch.func.jvp` of PyTorch's MATH attention, and autograd through that; "flash" is
PyTorch's fused CPU backward, which knows the gradient through `out` alone. Rates count 12, 10 and
30 B H M N D operations (6, 5 and 15 matrix products of 2 B H M N D) and stand beside PyTorch's own
GEMM of 1536^3 in the same turn. A row whose values are further from float64's than twice eager's
error gets no speed. One thread is timed by its CPU time, which small shapes need.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels
from benchmarks.common import interleaved, report, with_progress
from scm_kernels.attention import torch_flash
from scm_kernels.attention.problem import Backward

SHAPES = [  # B, H, M = N, D
    (1, 8, 1024, 64),
    (1, 4, 4096, 64),
    (1, 8, 1024, 128),
    (8, 16, 256, 72),
    (64, 4, 64, 32),
    (32, 4, 16, 32),
]


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int, clock) -> dict:
    """One row of the table."""
    b, h, n, d = shape
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(6)]
    square = torch.randn(1536, 1536, dtype=dtype)
    row = {"B H N D": " ".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
    with torch.no_grad():
        passes = {"ours": lambda: _ours(inputs), "eager": lambda: _eager(inputs)}
        times = interleaved({**passes, "GEMM": lambda: square @ square}, repeats, clock)
        right = _agree(passes["ours"](), passes["eager"](), _truth(inputs))
    gradients = {} if n > 2048 else _backward_passes(inputs)  # eager's graph takes gigabytes there
    times |= interleaved(gradients, repeats, clock) if gradients else {}
    ms = {name: value["p50"] for name, value in times.items()}
    work = b * h * n * n * d / 1e6  # per millisecond: 1e9 a second
    rate = 2 * 1536**3 / 1e6 / ms["GEMM"]
    row |= {
        "forward ms": ms["ours"],
        "eager / ours": ms["eager"] / ms["ours"],
        "GFLOP/s": 12 * work / ms["ours"],
        "of GEMM": 12 * work / ms["ours"] / rate,
    }
    row |= {
        "out ms": ms.get("ours out"),
        "flash / ours": ms["flash out"] / ms["ours out"] if gradients else None,
        "both ms": ms.get("ours both"),
        "eager / ours both": ms["eager both"] / ms["ours both"] if gradients else None,
    }
    if not right:
        return {key: value if key in ("B H N D", "dtype") else None for key, value in row.items()}
    return row


def _ours(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with scm_kernels.backend("cpu"):
        return scm_kernels.attention_jvp(*inputs)


def _eager(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, tuple(inputs[:3]), tuple(inputs[3:]))


def _backward_passes(inputs: list[Tensor]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Gradients through out alone, and through both outputs."""
    with scm_kernels.backend("cpu"):
        out, t_out, lse, _ = scm_kernels.attention_jvp(*inputs, return_stats=True)
    eager_out, eager_t_out = _eager(inputs)
    dout, dt_out = torch.randn_like(out), torch.randn_like(out)
    q, k, v = (x.detach() for x in inputs[:3])
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    absent = [None] * 5
    problem = Backward(
        *(q, k, v, *absent, False, q.shape[3] ** -0.5),
        *(out.detach(), None, lse, None, dout, None, *gradients, *absent),
    )

    def grad(outputs, targets, cotangents):
        return lambda: torch.autograd.grad(outputs, targets, cotangents, retain_graph=True)

    return {
        "ours out": grad(out, inputs[:3], dout),
        "eager out": grad(eager_out, inputs[:3], dout),
        "flash out": lambda: torch_flash.backward(problem),
        "ours both": grad((out, t_out), inputs, (dout, dt_out)),
        "eager both": grad((eager_out, eager_t_out), inputs, (dout, dt_out)),
    }


def _truth(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with scm_kernels.backend("reference"):
        return scm_kernels.attention_jvp(*(x.double() for x in inputs))


def _agree(ours, eager, truth) -> bool:
    """Whether ours is at most twice as far from the truth as eager, and a rounding more."""
    for x, y, z in zip(ours, eager, truth, strict=True):
        bound = 2 * (y - z).norm() + 2 * torch.finfo(x.dtype).eps * z.norm()
        if not (x - z).norm() <= bound:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    cases = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    rows = [measure(*case, options.repeats, clock) for case in with_progress(cases)]
    report("attention with tangent, measured", rows, options.json)


if __name__ == "__main__":
    main()
