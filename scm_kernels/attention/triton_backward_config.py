"""Tiles of the backward kernels of attention in Triton, each with its reason.

Speeds are modelled for an A100 (bfloat16, long sequences); no row has been measured on a GPU. What
decides is registers: of a warp that has 32 rows of the product tile, each operand that it loads
from shared memory serves two tensor core instructions, where with 16 rows it serves one and loads
are the limit. So the tile is as tall as two sums of features beside it permit.
"""

from dataclasses import dataclass
from functools import cache

import torch

from scm_kernels.attention.triton_config import parts
from scm_kernels.attention.triton_tiles import Features

PADDING = 128  # scratch vectors of rows are multiples of it, and of every BLOCK_M


@dataclass(frozen=True, slots=True)
class Row:
    """How a kernel is cut and compiled, for head dimensions up to `most`."""

    most: int
    block_m: int  # rows
    block_n: int  # keys
    warps: int
    stages: int
    step: int = 16  # head dimensions are rounded up to a multiple of it
    widest: int = 256  # of the parts of a head dimension
    maxnreg: int | None = None  # where ptxas would otherwise give up, at 32 registers

    def features(self, width: int) -> Features:
        """A head dimension in parts."""
        rounded = -(-width // self.step) * self.step
        return Features(width, parts(rounded, self.widest))

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# By (kernel, what it goes through), in float16 and bfloat16.
_HALF = {
    ("rows", "out"): (Row(256, 32, 0, 4, 1),),
    ("rows", "t_out"): (Row(256, 32, 0, 4, 1),),
    ("keys", "out"): (
        Row(64, 32, 128, 4, 2),
        Row(128, 32, 64, 4, 3),
        Row(256, 64, 32, 8, 2, step=64),
    ),
    ("keys", "t_out"): (
        Row(64, 16, 128, 4, 2),
        Row(80, 16, 64, 4, 3),
        Row(128, 16, 128, 8, 3, step=32),
        Row(256, 32, 16, 4, 2, step=64, widest=128),
    ),
    ("queries", "out"): (
        Row(96, 128, 32, 4, 2),
        Row(128, 128, 64, 8, 2),
        Row(256, 64, 32, 4, 2, widest=128),
    ),
    ("queries", "t_out"): (
        Row(64, 128, 16, 4, 2),
        Row(80, 64, 16, 4, 3),
        Row(128, 128, 16, 8, 3, step=32),
        Row(256, 16, 32, 4, 1, step=64),
    ),
    ("queries", "t_out, dtq"): (
        Row(80, 64, 16, 4, 3),
        Row(128, 128, 16, 8, 3, step=32),
        Row(256, 16, 32, 8, 1, step=64),
    ),
    ("mask", "out"): (Row(128, 64, 32, 4, 2), Row(256, 32, 32, 4, 1)),
    ("mask", "t_out"): (Row(64, 64, 32, 4, 2), Row(128, 64, 16, 4, 1), Row(256, 16, 16, 4, 1)),
}

_FLOAT = {
    ("rows", "out"): (Row(256, 32, 0, 4, 1),),
    ("rows", "t_out"): (Row(256, 32, 0, 4, 1),),
    ("keys", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("keys", "t_out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "t_out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "t_out, dtq"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("mask", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("mask", "t_out"): (Row(256, 32, 32, 4, 2, widest=16),),
}


@cache
def backward_row(kernel: str, through: str, dtype: torch.dtype, features: int) -> Row:
    """The row of the table; `features` is the larger of the head dimensions."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    return next(row for row in table[kernel, through] if features <= row.most)
