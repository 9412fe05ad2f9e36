"""What the device reaches on simple work, measured in the turns of what is compared with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.common import wall


@dataclass(frozen=True)
class Limit:
    """Work that nothing on the device does faster: operations of a GEMM, or bytes of a copy."""

    name: str
    unit: str  # of a rate: 1e9 a second of what `work` counts
    work: float
    run: Callable[[], object]


@cache
def gemm(device: str, dtype: torch.dtype) -> Limit:
    """PyTorch's product of two square matrices; in float32 without TF32, as ours.

    A CPU without instructions for half precision takes many times as long in it as in float32, and
    is no limit: there float32 is.
    """
    size = {"cpu": 1024, "cuda": 4096 if dtype == torch.float32 else 8192}[device]
    if device == "cpu" and _product_ms(torch.float32) < _product_ms(dtype):
        dtype = torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    name = f"GEMM {size}^3 {str(dtype).removeprefix('torch.')}"
    return Limit(name, "GFLOP/s", 2 * size**3, lambda: torch.mm(a, b, out=out))


def _product_ms(dtype: torch.dtype) -> float:
    """Of a small product on the CPU, at best."""
    a = torch.randn(256, 256).to(dtype)
    return min(wall(lambda: a @ a) for _ in range(5))


@cache
def copy(device: str) -> Limit:
    """A copy of a tensor beyond the caches into memory that is there, read and written once."""
    elements = 2 ** {"cpu": 25, "cuda": 28}[device]
    source, target = torch.ones(2, elements, device=device)
    name = f"copy {4 * elements >> 20} MiB"
    return Limit(name, "GB/s", 8 * elements, lambda: target.copy_(source))
