"""Tile sizes of the Triton kernels, each with its reason."""

from dataclasses import dataclass
from functools import cache

from scm_kernels import _triton


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time."""

    most: int  # elements of a sample, at most
    elements: int  # of the tile, a power of two
    warps: int

    def shape(self, size: int) -> tuple[int, int]:
        """(rows, columns): as many samples of `size` elements as fit, or a piece of one."""
        columns = min(1 << (size - 1).bit_length(), self.elements)
        return self.elements // columns, columns


# Of a program, where there is a thread for each: an operation on a number waits for nothing else.
SAMPLES = 128

ANY = 2**63
# Samples of a few elements: their addresses take more registers than they do.
TINY = Tile(16, elements=512, warps=4)
# Several samples a program: 4096 samples of 64 are 256 programs. Of 2 warps, since each warp may
# load the coefficients of all of a program's samples.
SMALL = Tile(1024, elements=1024, warps=2)

# To sum, and to scale what has been summed: 8 elements a thread, one 16-byte load of each input in
# bfloat16 and two in float32. More would wait in registers, at the price of warps to wait with: an
# element has an accumulator in float64 too.
SUMMED = (TINY, SMALL, Tile(ANY, elements=2048, warps=8))
# To apply: twice as many, for which 1,024 threads and more have room; less of what is once a tile.
APPLIED = (TINY, SMALL, Tile(ANY, elements=4096, warps=8))
# To normalise with g of a sample in the registers of one program, in pieces of a tile.
KEPT = (
    TINY,
    SMALL,
    # Up to 64 elements a thread, of the 128 registers that let two programs share a multiprocessor.
    Tile(16384, elements=2048, warps=8),
    # The same with one program: 16 warps is the most that AMD's GPUs, too, have for one.
    Tile(32768, elements=4096, warps=16),
)

# Triton's interpreter takes some 10 ms for a tile of any size.
if _triton.interpreting():
    SUMMED = APPLIED = (Tile(1024, elements=8192, warps=1), Tile(ANY, elements=16384, warps=1))
    KEPT = (SUMMED[0], Tile(32768, elements=8192, warps=1))

# A sample up to this size is summed by one program, in 16 steps: a second kernel would cost more.
WHOLE = 32768
# Larger ones are cut into parts, for about this many programs, three times what the 100 to 150
# multiprocessors of a large GPU hold at once; of two tiles at least, less of what is once a part.
PROGRAMS = 2048
LEAST = 2
# Most parts of a sample: to normalise it, each program adds their sums up again, 4 KiB of them.
PARTS = 512


def choose(table: tuple[Tile, ...], size: int) -> Tile | None:
    """The row of a table for samples of `size` elements, None if there is none."""
    return next((tile for tile in table if size <= tile.most), None)


@cache
def parts(batch: int, size: int) -> int:
    """Into how many parts each sample is cut, whole tiles each, to be summed."""
    if size <= WHOLE:
        return 1
    tiles = -(-size // choose(SUMMED, size).elements)
    each = max(batch * tiles // PROGRAMS, -(-tiles // PARTS), LEAST)
    return -(-tiles // each)
