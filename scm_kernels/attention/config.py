"""Tile sizes, each with its reason."""


def reference_tiles(batch_heads: int, rows: int, keys: int) -> tuple[int, int]:
    """(rows, keys) of a tile of the reference, which works on all B H heads at once.

    A tile of scores is at most 2^22 elements (16 MiB in float32): it and the few temporaries of its
    size then stay near the caches, and memory grows with B H (M + N), not with M N. At least 64 by
    64, because below that the price of launching PyTorch ops is all that one measures.
    """
    budget = max(2**22 // max(batch_heads, 1), 64 * 64)
    block_n = min(keys, max(64, min(1024, budget // 64)))
    block_m = min(rows, max(64, budget // max(block_n, 1)))
    return max(block_m, 1), max(block_n, 1)
