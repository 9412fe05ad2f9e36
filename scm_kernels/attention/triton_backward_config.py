"""Tiles of the backward kernels of attention in Triton, each with its reason.

Speeds are modelled for an A100 (bfloat16, long sequences); no row has been measured on a GPU. What
decides is registers: of a warp that has 32 rows of the product tile, each operand that it loads
from shared memory serves two tensor core instructions, where with 16 rows it serves one and loads
are the limit. So the tile is as tall as two sums of features beside it permit.
"""

from functools import cache

import torch

from scm_kernels.attention.triton_config import INTERPRETER, Row, family

PADDING = 128  # scratch vectors of rows are multiples of it, and of every BLOCK_M


# By (kernel, what it goes through), in float16 and bfloat16.
_HALF = {
    ("rows", "out"): (Row(256, 32, 16, 8, 1),),
    ("rows", "both"): (Row(256, 32, 16, 8, 1),),
    ("keys", "out"): (
        Row(64, 32, 128, 4, 2),
        Row(128, 32, 64, 4, 3),
        Row(256, 64, 32, 8, 2, step=64),
    ),
    ("keys", "both"): (
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
    ("queries", "both"): (
        Row(64, 128, 16, 4, 2),
        Row(80, 64, 16, 4, 3),
        Row(128, 128, 16, 8, 3, step=32),
        Row(256, 16, 32, 4, 1, step=64),
    ),
    ("queries", "both, dtq"): (
        Row(80, 64, 16, 4, 3),
        Row(128, 128, 16, 8, 3, step=32),
        Row(256, 16, 32, 8, 1, step=64),
    ),
    ("mask", "out"): (Row(128, 64, 32, 4, 2), Row(256, 32, 32, 4, 1)),
    ("mask", "both"): (Row(64, 64, 32, 4, 2), Row(128, 64, 16, 4, 1), Row(256, 16, 16, 4, 1)),
}

_FLOAT = {
    ("rows", "out"): (Row(256, 32, 16, 8, 1),),
    ("rows", "both"): (Row(256, 32, 16, 8, 1),),
    ("keys", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("keys", "both"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "both"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("queries", "both, dtq"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("mask", "out"): (Row(256, 32, 32, 4, 2, widest=16),),
    ("mask", "both"): (Row(256, 32, 32, 4, 2, widest=16),),
}


@cache
def backward_row(
    architecture: str, kernel: str, through: str, dtype: torch.dtype, precision: str, features: int
) -> Row:
    """The row of the table; `features` is the larger of the head dimensions."""
    if family(architecture) == "interpreter":
        return INTERPRETER
    table = _FLOAT if dtype == torch.float32 else _HALF
    return next(row for row in table[kernel, through] if features <= row.most)
