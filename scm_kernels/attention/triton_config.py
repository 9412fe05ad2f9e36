"""Tiles of the Triton kernels of attention: one row for each kind of problem, with its reason."""

from dataclasses import dataclass
from functools import cache

import torch


@cache
def parts(features: int, widest: int = 256) -> tuple[tuple[int, int], ...]:
    """(first column, width) of each part of a head dimension: powers of two, 16 at least.

    What a product costs is the sum of the widths: 72 = 64 + 16 wastes 10%, one tile of 128 44%.
    """
    rest, start, result = -(-features // 16) * 16, 0, []
    while rest:
        width = min(widest, 1 << (rest.bit_length() - 1))
        result.append((start, width))
        start, rest = start + width, rest - width
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut and compiled. `maxnreg`: where ptxas would otherwise give up at 32."""

    block_m: int  # rows
    block_n: int  # keys
    warps: int
    stages: int  # tiles of keys in flight, the one at work included
    maxnreg: int | None = None
    rest: int = 16
    masked: int = 32
    widest_d: int = 256  # parts of D are at most as wide: each is loaded into registers once
    widest_e: int = 256

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def forward_tiles(dtype, d: int, e: int) -> Tiles:
    """The row of the table for a head dimension."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2)
    if max(d, e) > 64:
        return Tiles(128, 32, 8, 3, widest_d=32, widest_e=64)
    return Tiles(64, 64, 4, 2)
