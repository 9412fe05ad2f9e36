"""Tiles of the backward kernels of attention in Triton, each with its reason. Those of float32
are in `triton_backward_float.py`.

Speeds are modelled for an A100 (bfloat16, M = N = 4096) and count all products that a kernel makes;
those of "hopper" are measured. What decides is registers: 255 a thread hold two sums of features
and about four tiles of scores. A warp with 32 rows of a product uses each operand that it loads
from shared memory twice; with 16 rows once, and then loads, not tensor cores, are the limit. So
tiles are tall in what they sum for and narrow in what they walk along. Of rows within 5% of each
other the one with smaller blocks is here, which the model flatters less. Masks take registers too:
one that all rows share has rows of its own where the others would spill (`padded`).
"""

from functools import cache

import torch

from scm_kernels.attention import triton_backward_float as float32
from scm_kernels.attention.triton_config import INTERPRETER, Row, family

PADDING = 128  # scratch vectors of rows are multiples of it, and of every BLOCK_M

# Of the queries' kernel through both outputs, where registers or shared memory are short.
_LITTLE_ROOM = (
    Row(80, 64, 16, 4, 3),
    Row(128, 16, 32, 4, 2, step=32),
    Row(256, 16, 16, 4, 1, step=64),
)

# By (kernel, through which outputs), in float16 and bfloat16. "both, dtq" is the queries' kernel
# with a second sum.
_HALF = {
    ("rows", "out"): float32.ROWS,
    ("rows", "both"): float32.ROWS,
    ("keys", "out"): (
        Row(64, 32, 128, 4, 2, padded=False),  # 32 rows a warp: 203 TFLOP/s, 64 keys give 153
        Row(80, 32, 64, 4, 3, padded=True),  # 147
        Row(112, 16, 64, 4, 3, padded=True),  # 146 at 96 features
        Row(128, 128, 64, 8, 1, padded=True),  # 122, where 64 rows in flight give 103
        Row(128, 32, 64, 4, 3),  # sums take 128 registers a thread with 16 rows a warp: 151
        Row(256, 64, 32, 8, 2, step=64),  # fewer keys than rows: warps share out the features. 101
    ),
    ("keys", "both"): (
        Row(64, 16, 64, 4, 3, causal=True),  # 168: the next row would spill under a causal mask
        Row(64, 16, 128, 4, 2, padded=False),  # 32 rows a warp; 16 for four tiles of scores: 213
        Row(80, 16, 64, 4, 3),  # two parts of features take more addresses: 148
        Row(112, 16, 128, 8, 2, step=32, padded=True),
        Row(128, 16, 128, 8, 3, step=32),  # eight warps share the loads of queries: 181
        Row(256, 32, 16, 4, 2, step=64, widest=128),  # 73
    ),
    ("queries", "out"): (
        Row(80, 128, 32, 4, 2),  # 32 rows a warp: 216 at 64 and at 96 features
        Row(96, 128, 32, 4, 2, padded=False),
        Row(128, 128, 16, 4, 3),  # the same with 16 keys: 208, where 64 keys of 8 warps give 182
        Row(256, 64, 32, 4, 2, widest=128),  # 91
    ),
    ("queries", "both"): (
        Row(64, 128, 16, 4, 2),  # 32 rows a warp; 16 keys for four tiles of scores: 211
        Row(80, 64, 16, 4, 3),  # 146
        Row(128, 128, 16, 8, 3, step=32),  # 169
        Row(256, 16, 32, 4, 1, step=64),  # 55
    ),
    ("queries", "both, dtq"): (
        Row(80, 64, 16, 4, 3),  # 175 at 64 features: 32 rows a warp and two sums do not fit
        Row(128, 128, 16, 8, 3, step=32),  # 176
        Row(256, 16, 32, 8, 1, step=64),  # 51
    ),
    ("mask", "out"): (
        Row(64, 64, 32, 4, 2),  # no sums of features: room for both operands
        Row(128, 64, 16, 4, 2),  # 32 keys would spill
        Row(256, 32, 32, 4, 1),
    ),
    ("mask", "both"): (
        Row(64, 64, 16, 4, 2),
        Row(128, 16, 32, 4, 2),  # four tensors of rows are loaded for each tile too: few rows. 66
        Row(256, 16, 16, 4, 1),
    ),
}

# On an AMD GPU: two sums, or one beside a mask; 477 registers at 128 features.
_AMD_QUERIES = (Row(128, 128, 16, 4, 1), Row(256, 32, 16, 4, 1))

# What differs elsewhere, by `triton_config.family`.
_ELSEWHERE = {
    # Measured on an H200 (ms of a kernel at B = 2, H = 16, M = N = 4096): operands are in shared
    # memory, whose loads run far ahead, and a product has 64 rows or more a group of four warps.
    # At 72 features, and of the keys' kernels at 96, no other tile was faster either.
    "hopper": {
        ("keys", "out"): (
            Row(80, 64, 64, 4, 3),  # 0.66 at 64; 128 keys give 0.72
            Row(96, 64, 128, 8, 3),
            Row(128, 32, 64, 4, 3, step=128, padded=True),
            Row(128, 64, 128, 8, 4, step=128, causal=False),  # 1.11 at 128; would spill if causal
            Row(128, 64, 128, 8, 2, step=128),  # 1.38
            _HALF["keys", "out"][-1],
        ),
        ("queries", "out"): (
            Row(64, 64, 128, 4, 3, padded=False),  # 0.43; 64 keys give 0.46
            Row(80, 64, 64, 4, 3),
            Row(96, 128, 64, 8, 3),
            Row(128, 128, 64, 8, 3, step=128),  # 0.79 at 128; two parts of 64 give 0.86
            _HALF["queries", "out"][-1],
        ),
        ("keys", "both"): (
            Row(64, 64, 128, 8, 3, causal=False, padded=False),  # 1.67; would spill if causal
            Row(64, 32, 64, 4, 3),  # 1.78
            Row(80, 32, 128, 8, 3),
            Row(96, 32, 128, 8, 3, causal=False),
            Row(96, 32, 128, 8, 2),
            Row(128, 32, 128, 8, 3, step=128, causal=False),  # 2.82 at 128; would spill if causal
            Row(128, 16, 128, 8, 3, step=128),  # 4.17
            _HALF["keys", "both"][-1],
        ),
        ("queries", "both"): (
            Row(64, 128, 64, 8, 3, padded=False),  # 1.06; 16 keys give 1.67
            Row(64, 64, 32, 4, 3, padded=True),
            Row(96, 128, 32, 8, 3),
            Row(128, 128, 32, 8, 3, step=128),  # 2.24 at 128; two parts of 64 give 2.37
            _HALF["queries", "both"][-1],
        ),
        ("queries", "both, dtq"): (
            Row(64, 128, 64, 8, 3, padded=False),  # 1.17; 16 keys give 1.76
            Row(64, 64, 32, 4, 3, padded=True),
            Row(80, 128, 32, 8, 3, step=32, padded=True),  # in parts of 64 and 16 it would spill
            Row(96, 128, 32, 8, 3, padded=False),
            *_HALF["queries", "both, dtq"][1:],  # 32 keys would spill
        ),
    },
    "small": {  # the same as far as 99 KiB hold it
        ("keys", "out"): (
            Row(64, 32, 128, 4, 2),
            Row(128, 32, 64, 4, 3),
            Row(256, 32, 16, 4, 2, step=64),
        ),
        ("keys", "both"): (
            Row(64, 16, 64, 4, 3, causal=True),
            Row(64, 16, 128, 4, 2),
            Row(80, 16, 64, 4, 3),
            Row(128, 32, 16, 4, 2, step=32),
            Row(256, 16, 16, 4, 1, step=64),
        ),
        ("queries", "out"): (
            Row(96, 128, 32, 4, 2),
            Row(128, 128, 16, 4, 3),
            Row(256, 32, 32, 4, 2),
        ),
        ("queries", "both"): (
            *_HALF["queries", "both"][:2],
            Row(128, 64, 16, 4, 2, step=32),
            Row(256, 16, 16, 4, 1, step=64),
        ),
        ("queries", "both, dtq"): _LITTLE_ROOM,
    },
    "tensor memory": {  # 512 columns of it hold the sums and scores of 64 keys, not those of 128
        ("keys", "out"): (
            Row(64, 32, 128, 4, 2),
            Row(80, 32, 64, 4, 2),
            Row(128, 32, 64, 4, 3),
            _HALF["keys", "out"][-1],
        ),
        ("keys", "both"): (
            Row(64, 16, 64, 4, 2, step=32),
            Row(96, 16, 64, 8, 2, step=128, dtype=torch.float16),  # parts would spill
            Row(96, 16, 64, 8, 2, step=128, padded=True),  # and here too
            Row(96, 16, 32, 4, 2, step=32),  # two parts of features: 64 keys would spill
            Row(128, 16, 64, 8, 2, step=32),
            Row(256, 32, 16, 4, 1, step=64, widest=128),
        ),
        ("queries", "both"): (
            *_HALF["queries", "both"][:2],
            Row(96, 64, 16, 4, 2, step=32, padded=True),  # 128 rows would spill
            *_HALF["queries", "both"][2:],
        ),
        ("queries", "both, dtq"): (
            _HALF["queries", "both, dtq"][0],
            Row(96, 64, 16, 4, 2, step=32, padded=True),
            *_HALF["queries", "both, dtq"][1:],
        ),
    },
    # Tall tiles in what they sum for, until they take the 512 registers a thread of four warps:
    # eight have 256. Loads that run ahead stay in registers too, and in shared memory besides.
    "amd": {
        ("keys", "out"): (
            Row(64, 32, 128, 4, 2),
            Row(128, 16, 128, 4, 1),  # 32 rows would spill scalar registers at 72 features
            Row(256, 16, 64, 4, 1),
        ),
        ("keys", "both"): (
            Row(64, 32, 128, 4, 1),
            Row(80, 32, 128, 4, 1, causal=False),  # conditions of a causal mask would spill
            Row(96, 16, 128, 4, 1, step=32),
            Row(112, 16, 64, 4, 1),  # three parts of features: 128 keys would spill if causal
            Row(128, 16, 128, 4, 1, widest=64),  # undivided features would spill under a mask
            Row(256, 16, 32, 4, 1),
        ),
        ("queries", "out"): (
            Row(64, 128, 32, 4, 2),
            Row(96, 128, 32, 4, 1),  # conditions of a causal mask would spill
            Row(128, 128, 16, 4, 2),  # 32 keys would spill
            Row(256, 64, 16, 4, 1),
        ),
        ("queries", "both"): (
            Row(96, 128, 16, 4, 2),
            Row(128, 128, 16, 4, 1),  # tiles in flight would spill
            Row(256, 64, 16, 4, 1),
        ),
        ("queries", "both, dtq"): _AMD_QUERIES,
        ("mask", "out"): (Row(128, 64, 16, 4, 2), Row(256, 32, 16, 4, 1)),
        ("mask", "both"): (
            # With two parts of features, addresses alone take more than the 102 scalar registers:
            # up to 14 of them go to lanes of a vector register.
            Row(112, 32, 16, 4, 1),
            Row(128, 32, 16, 8, 1),
            Row(256, 32, 16, 4, 1),
        ),
    },
}

# Under a mask that differs between rows: its tile, element by element and in two layouts, takes the
# registers and the shared memory of half of the others.
_MASKED = {
    ("keys", "out"): (
        Row(80, 16, 64, 4, 3),
        Row(128, 16, 64, 4, 3, step=64),  # several parts of features would spill
        Row(256, 32, 16, 4, 2, step=64),
    ),
    ("keys", "both"): (
        Row(64, 32, 32, 4, 2),  # 100
        Row(128, 32, 16, 4, 2, step=32),
        Row(256, 16, 16, 4, 1, step=64),
    ),
    ("queries", "out"): (
        Row(64, 64, 32, 4, 3),
        Row(112, 64, 16, 4, 3),  # several parts of features take more addresses
        Row(128, 64, 32, 4, 3),
        Row(256, 32, 32, 4, 2),
    ),
    ("queries", "both"): _LITTLE_ROOM,
    ("queries", "both, dtq"): (
        Row(64, 32, 32, 4, 3),  # 120; with two tiles in flight it would spill
        Row(80, 16, 32, 4, 3, step=32, dtype=torch.float16),  # or it spills
        _LITTLE_ROOM[0],
        Row(128, 16, 32, 4, 3, step=32),  # 91
        _LITTLE_ROOM[2],
    ),
}
# And where that differs, by family.
_MASKED_ELSEWHERE = {
    "hopper": {
        ("queries", "both, dtq"): (
            Row(64, 64, 16, 4, 3),
            Row(96, 16, 32, 4, 2, step=32),
            Row(112, 16, 16, 4, 2, step=32, dtype=torch.float16),  # or it spills
            *_LITTLE_ROOM[1:],
        ),
    },
    "tensor memory": {
        ("queries", "both"): (
            Row(64, 64, 16, 4, 3),
            Row(80, 64, 16, 4, 1),  # with tiles in flight it would spill
            Row(96, 16, 32, 4, 2, step=32),
            Row(112, 16, 16, 4, 2, step=32),  # under a mask's tangent 32 keys would spill
            *_LITTLE_ROOM[1:],
        ),
        ("queries", "both, dtq"): (
            Row(64, 64, 16, 4, 2),
            Row(80, 64, 16, 4, 1),
            Row(96, 16, 32, 4, 3, step=32),
            Row(128, 16, 16, 4, 2, step=32),  # as above
            _LITTLE_ROOM[2],
        ),
        ("mask", "out"): (
            _HALF["mask", "out"][0],
            Row(80, 64, 16, 4, 1),
            *_HALF["mask", "out"][1:],
        ),
    },
    "amd": {
        ("keys", "out"): (Row(256, 16, 64, 4, 1),),  # 128 keys would spill scalar registers
        # No tile leaves scalar registers for all addresses: up to 34 of them go to lanes of a
        # vector register, most of them around the loops.
        ("keys", "both"): (Row(128, 16, 64, 4, 1), Row(256, 16, 32, 4, 1)),
        ("queries", "out"): (Row(128, 128, 16, 4, 2), Row(256, 64, 16, 4, 1)),
        ("queries", "both"): (
            Row(96, 128, 16, 4, 1),
            Row(112, 128, 16, 4, 1, widest=32),  # or a register spills
            Row(128, 128, 16, 4, 1),
            Row(256, 64, 16, 4, 1),
        ),
        ("queries", "both, dtq"): _AMD_QUERIES,
    },
}


# Of the keys' kernel through both outputs that adds up dq by atomics, without a mask: 12 products a
# tile in place of 18. By family and the most features, where it is faster; parts of features and
# masks would spill. K and tK are operands of two products, of tiles that lie differently: small
# tiles, two blocks a multiprocessor.
_ATOMIC = {
    "large": {
        64: Row(64, 32, 64, 4, 3, step=64),  # 149, where two kernels give 137
        96: None,
        128: Row(128, 32, 32, 4, 2, step=128),  # 134, where two give 117; at 112 features 114, 101
    },
}


@cache
def atomic_row(architecture: str, dtype: torch.dtype, features: int) -> Row | None:
    """The row of the table for dq by atomics, None if there is none."""
    gpu = family(architecture)
    if gpu == "interpreter":
        return INTERPRETER
    table = {} if dtype == torch.float32 else _ATOMIC.get(gpu, {})
    return next((row for most, row in table.items() if features <= most), None)


@cache
def backward_row(
    architecture: str,
    kernel: str,
    through: str,
    dtype: torch.dtype,
    features: int,
    causal: bool,
    masked: bool,
    padded: bool,
    ieee: bool = False,
) -> Row:
    """The row of the table; `features` is the larger of the head dimensions, `masked` says whether
    there is a mask with more than one row, `padded` whether there is one with one row, `ieee`
    whether float32 is for ordinary cores."""
    gpu, kind = family(architecture), (kernel, through)
    if gpu == "interpreter":
        return INTERPRETER
    if dtype == torch.float32:
        tables = [{} if ieee else float32.TENSOR.get(gpu, {}), float32.ORDINARY]
    elif masked:
        tables = [_MASKED_ELSEWHERE.get(gpu, {}), _MASKED, _ELSEWHERE.get(gpu, {}), _HALF]
    else:
        tables = [_ELSEWHERE.get(gpu, {}), _HALF]
    table = next(t[kind] for t in tables if kind in t)
    return next(row for row in table if row.serves(features, causal, dtype, padded))
