"""Tiles of the Triton kernels of attention, each with its reason.

Speeds are modelled for an A100 (bfloat16, M = N = 4096; `python -m benchmarks.a100`), except for
those of "hopper", which are measured. What decides is registers: 255 a thread hold the two
accumulators of a tile, its scores and their tangent, and no more. `widest` then says how much of a
product's operands is held at once; ptxas answers to it by some registers more or less, so rows are
found by trying (`python -m benchmarks.tune`), and tests hold them to no spills.
"""

from dataclasses import dataclass
from functools import cache

import torch

from scm_kernels.attention.triton_tiles import Features


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
class Row:
    """How a kernel is cut and compiled, for head dimensions up to `most`."""

    most: int
    block_m: int  # rows
    block_n: int  # keys
    warps: int
    stages: int  # tiles of keys in flight, the one at work included
    step: int = 16  # head dimensions are rounded up to a multiple of it
    widest: int = 256  # of the parts of a head dimension
    widest_e: int = 256  # the forward: of those of the values
    rest: int = 16  # the forward: keys of a tile at the end or on the diagonal
    padding: int = 32  # the forward: keys of a tile under a mask that all rows share
    causal: bool | None = None  # for causal problems alone, for others alone, or for all
    dtype: torch.dtype | None = None  # for problems in it alone
    padded: bool | None = None  # the backward: with a mask that all rows share alone, or without
    maxnreg: int | None = None  # where ptxas would otherwise give up, at 32 registers
    exact: str = "ieee"  # how float32 is multiplied unless PyTorch's switch says how

    def serves(
        self, features: int, causal: bool, dtype: torch.dtype, padded: bool | None = None
    ) -> bool:
        """Whether it is for such a problem."""
        return (
            features <= self.most
            and self.causal in (None, causal)
            and self.dtype in (None, dtype)
            and self.padded in (None, padded)
        )

    def features(self, width: int, widest: int | None = None) -> Features:
        """A head dimension in parts."""
        rounded = -(-width // self.step) * self.step
        return Features(width, parts(rounded, widest or self.widest))

    def bounded_tile(self, mask: bool, masked: bool) -> int:
        """The forward: keys of a tile at the end or on the diagonal, or, which they then all are,
        under a mask; `masked` says whether it has more than one row."""
        if masked:
            return self.block_n
        return self.padding if mask else self.rest

    def precision(self, switch: str) -> str:
        """What a product in float32 is; "exact" is as here."""
        return self.exact if switch == "exact" else switch

    def options(self, architecture: str) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.maxnreg is not None and architecture.startswith("sm_"):  # others do not know it
            options["maxnreg"] = self.maxnreg
        return options


def family(architecture: str) -> str:
    """The GPUs that share a table: by shared memory, and by where accumulators are.

    "large": 163 KiB a block, accumulators in registers (A100); "hopper": operands of products in
    shared memory (H100); "small": 99 KiB (GeForce, L40S); "tensor memory": accumulators are there
    (B200); "amd": 64 KiB; "interpreter".
    """
    if not architecture:
        return "interpreter"
    if architecture.startswith("gfx"):
        return "amd"
    number = int(architecture.removeprefix("sm_"))
    if number in (86, 89) or number >= 120:
        return "small"
    if number >= 100:
        return "tensor memory"
    return "hopper" if number >= 90 else "large"


# The forward in float16 and bfloat16, by family.
_HALF = {
    "large": (
        # Two blocks a multiprocessor, 64 keys to a rescaling of the accumulators: 201 TFLOP/s, 205.
        Row(64, 64, 64, 4, 2, widest=32, widest_e=64, causal=False),
        Row(64, 64, 64, 4, 2, widest=32, widest_e=32),
        # The same with 16 columns more of everything: 188, and 180.
        Row(80, 64, 64, 4, 2, widest=64, widest_e=32, causal=False),
        Row(80, 64, 64, 4, 2, widest=16, widest_e=32),
        # Eight warps, for 16 rows a warp: 32 rows or 64 keys do not fit 255 registers. 112: 192,
        # and 181; 128: 204, and 198. More parts, as 112 has, take registers for their addresses.
        Row(96, 128, 32, 8, 3, widest=32, widest_e=64),
        Row(112, 128, 32, 8, 3, widest=16, widest_e=32, rest=32, causal=False),
        Row(112, 128, 32, 8, 3, widest=16, widest_e=16),
        Row(128, 128, 32, 8, 3, widest=32, widest_e=64, padding=16, causal=False),  # or it spills
        Row(128, 128, 32, 8, 3, widest=64, widest_e=32),
        # Accumulators of 64 rows alone would take all registers of four warps.
        Row(256, 32, 32, 4, 2, widest=64, widest_e=64),
    ),
    # Measured on an H200, at 64, 72, 96 and 128 features. Operands stay in shared memory, so fewer
    # parts of features; two groups of four warps share the loads of keys.
    "hopper": (
        Row(80, 128, 64, 8, 3, widest=64, widest_e=64, rest=32),  # 385 at 64; 64 rows give 345
        # In float16 a wider part would spill.
        Row(96, 128, 64, 8, 3, widest=64, widest_e=32, rest=32, causal=False, dtype=torch.float16),
        Row(96, 128, 64, 8, 3, widest=64, widest_e=64, rest=32, causal=False),
        Row(128, 128, 32, 8, 3, step=128, rest=32, causal=False),  # 386 at 128
        Row(128, 128, 32, 8, 3, widest=64, widest_e=64, rest=32),  # 366; undivided it would spill
        Row(256, 32, 32, 4, 2, widest=64, widest_e=64),
    ),
    "small": (
        Row(64, 64, 64, 4, 2, widest=32, widest_e=64),
        Row(80, 64, 64, 4, 2, widest=32, widest_e=32),
        Row(128, 128, 32, 8, 2, widest=32, widest_e=64),  # as above, less one stage
        Row(256, 32, 16, 4, 2, widest=64, widest_e=64),
    ),
    "tensor memory": (
        Row(64, 64, 64, 4, 2),
        Row(80, 64, 64, 4, 2),
        Row(256, 64, 32, 4, 2),  # 128 rows would take more than 512 columns of tensor memory
    ),
    # Four warps have 512 registers a thread, eight 256. Under a mask of 32 keys a tile conditions
    # would take more scalar registers than the 102 there are.
    "amd": (
        Row(64, 128, 32, 4, 2, padding=16),  # 64 keys would spill
        Row(96, 128, 32, 4, 1, padding=16),  # tiles in flight would spill at 72 features
        Row(112, 64, 64, 4, 1, padding=16),  # three parts of features: 128 rows would spill
        Row(128, 128, 32, 4, 1, padding=16, causal=False),  # 490 registers
        Row(128, 128, 32, 4, 1, widest=64),
        Row(256, 64, 16, 4, 1),
    ),
}
# Under a mask that differs between rows: its tile, element by element and in two layouts, takes the
# registers of half of the others. All keys are in tiles of block_n. Speeds with a tangent of it.
_MASKED = (
    Row(64, 64, 32, 4, 2, widest=32, widest_e=32),  # 114, where 16 keys give 92
    Row(80, 64, 16, 4, 2, widest=64, widest_e=32),  # 97
    # Loads that run ahead would spill; two blocks take turns instead. 112: 118, 128: 114.
    Row(128, 64, 16, 4, 1, widest=32, widest_e=64),
    Row(256, 32, 16, 4, 2, widest=64, widest_e=64),
)
# And where that differs, by family.
_MASKED_ELSEWHERE = {
    "hopper": (
        *_MASKED[:2],
        Row(128, 128, 16, 8, 3, widest=64, widest_e=64),  # room for loads that run ahead
        *_MASKED[3:],
    ),
    "tensor memory": (
        Row(64, 64, 32, 4, 2),  # parts of features would spill
        Row(80, 64, 16, 4, 2, step=32, widest=64, widest_e=64),  # and so would parts of 64 and 16
        *_MASKED[2:],
    ),
    "amd": (  # with loads that run ahead, or with 32 keys, scalar registers would spill
        Row(64, 128, 16, 4, 1, widest=32),  # undivided features would, in float16
        Row(128, 128, 16, 4, 1),
        Row(256, 64, 16, 4, 1),
    ),
}
# In float32. "bf16x6" on tensor cores: an operand is the sum of three bfloat16 numbers, all of its
# 24 bits, and six of the nine products, all but those below 2^-24, are summed in float32. Their
# rounding error is a third of that of "ieee", whose ordinary cores wait for operands in shared
# memory, whose banks conflict. One loop, with bounds, serves all tiles: Triton compiles two in
# three times as long, for its passes look at each product again for each other one. Parts of
# features are the backward's, too: then its scores are the forward's to the last bit, or nearly.
_FLOAT_TENSOR = Row(128, 64, 16, 4, 2, widest=16, widest_e=16, exact="bf16x6")
_FLOAT_ORDINARY = (
    Row(64, 32, 32, 4, 2, widest=32, widest_e=32),
    Row(128, 32, 16, 4, 2, widest=16, widest_e=16),
    Row(256, 16, 16, 4, 2, widest=16, widest_e=16),  # 96 KiB of shared memory
)
_FLOAT = {  # families that have room for it and where it is known to pay
    "large": (_FLOAT_TENSOR, _FLOAT_ORDINARY[-1]),
    # Two groups of four warps, and products as large as registers allow, which are an instruction
    # each of such a group. At D = 128 51 TFLOP/s on an H200 (measured), where the tiles above, in
    # parts of 16 features, give 10, and "ieee" 7.
    "hopper": (
        Row(128, 128, 32, 8, 1, widest=64, widest_e=64, rest=32, exact="bf16x6"),
        _FLOAT_ORDINARY[-1],
    ),
}
# Head dimensions up to which they fit a block's shared memory, where not all do: in the forward and
# the gradient through out, and in that through both outputs.
FLOAT_FEATURES = {"small": (256, 128), "amd": (128, 128)}
# Where an operation costs the same whatever its size.
INTERPRETER = Row(256, 64, 64, 4, 1, rest=64, padding=64)


@cache
def forward_row(
    architecture: str,
    dtype: torch.dtype,
    features: int,
    causal: bool,
    masked: bool,
    ieee: bool = False,
) -> Row:
    """The row of the table; `features` is the larger of the head dimensions, `masked` says whether
    there is a mask with more than one row, `ieee` whether float32 is for ordinary cores."""
    gpu = family(architecture)
    if gpu == "interpreter":
        return INTERPRETER
    if dtype == torch.float32:
        table = _FLOAT_ORDINARY if ieee else _FLOAT.get(gpu, _FLOAT_ORDINARY)
    else:
        table = _MASKED_ELSEWHERE.get(gpu, _MASKED) if masked else _HALF[gpu]
    return next(row for row in table if row.serves(features, causal, dtype))
