"""Tiles of the backward kernels of attention in Triton in float32: on ordinary cores, and on tensor
cores of some families of GPUs by products of bfloat16 (see `triton_config.py`).
`triton_backward_config.py` chooses.
"""

from collections.abc import Iterable
from dataclasses import replace

from scm_kernels.attention.triton_config import Row

ROWS = (Row(256, 32, 16, 8, 1),)  # of every dtype, bound by memory: any tile that fits registers


def _turned(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The tiles of queries for keys: what is summed for and what is walked along change places."""
    return tuple(replace(row, block_m=row.block_n, block_n=row.block_m) for row in rows)


_OUT = (
    Row(64, 32, 32, 4, 2, widest=16),
    Row(128, 32, 16, 4, 2, widest=16),
    Row(256, 16, 16, 4, 1, widest=16),
)
_BOTH = (
    Row(128, 32, 16, 8, 1, widest=16, maxnreg=255),
    Row(256, 16, 16, 8, 1, widest=16, maxnreg=255),  # of keys: 129 KiB of shared memory
)
ORDINARY = {
    ("rows", "out"): ROWS,
    ("rows", "both"): ROWS,
    ("keys", "out"): _turned(_OUT),
    ("keys", "both"): (Row(64, 16, 32, 8, 2, widest=16, maxnreg=255), *_turned(_BOTH)),
    ("queries", "out"): _OUT,
    ("queries", "both"): _BOTH,
    ("queries", "both, dtq"): _BOTH,
    ("mask", "out"): (
        Row(128, 32, 16, 4, 1, widest=16),
        Row(256, 16, 16, 4, 1, widest=16),
    ),
    ("mask", "both"): _BOTH,
}


def _tensor_cores(*tall: Row) -> dict[tuple[str, str], tuple[Row, ...]]:
    """On tensor cores: `tall` tiles for what is summed for rows, the same turned for keys; the
    first, in the gradient through out, at any head dimension. They wait for shared memory a fifth
    to a sixth of the time that ordinary cores do (counted by the simulator at D = 64 and 128).
    They, too, have one loop."""
    tables = {}
    for (kernel, through), ordinary in ORDINARY.items():
        if kernel == "rows":  # it has no products
            continue
        rows = [replace(tall[0], most=128)] if through == "out" else tall
        if kernel == "mask" and through == "both":  # more features would spill
            rows = tall[:1]
        if kernel == "keys":
            rows = _turned(rows)
        tables[kernel, through] = (*rows, *(x for x in ordinary if x.most > rows[-1].most))
    return tables


TENSOR = {
    # Through both outputs registers spill above D = 64; still the model has 4.7 TFLOP/s at 72, and
    # 2.9 for ordinary cores. More features would take minutes to compile.
    "large": _tensor_cores(
        Row(64, 64, 16, 4, 2, widest=16, exact="bf16x6"),
        Row(80, 64, 16, 4, 1, widest=16, exact="bf16x6", maxnreg=255),
    ),
    # Measured on an H200, 2x8x2048x2048. Through both outputs at D = 64 4.3 ms, where 16 rows in
    # flight give 6.2 and tiles of 64 rows 6 to 19; through out 2.8 ms at D = 128, for 3.9 and 2.9
    # to 13. Smaller tiles for wider heads fit shared memory, if not registers: keys and queries
    # take 4.8 and 3.7 ms at D = 72, 9.3 and 6.6 at D = 128, ordinary cores 14 and 31, 45 and 84.
    "hopper": _tensor_cores(
        Row(64, 128, 32, 8, 1, widest=64, exact="bf16x6"),
        Row(96, 64, 32, 4, 1, widest=64, exact="bf16x6"),
        Row(128, 64, 16, 4, 1, widest=64, exact="bf16x6"),
    ),
}
