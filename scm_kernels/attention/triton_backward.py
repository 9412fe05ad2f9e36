"""The backward of attention in Triton: a kernel for each kind of gradient.

    rows      what the others need of every row, to scratch memory
    keys      dk, dv: a program for each tile of keys, over the rows of all heads that share it
    queries   dq, dtq: a program for each tile of rows, over the keys
    mask      dmask: a program for each tile of the mask, over all that shares it

Sums stay in the registers of one program, without atomics, so they are deterministic, and no buffer
has M N elements; scores are computed again by each kernel that asks for them. As an option, that of
the keys adds up dq by atomics: 12 products a tile in place of 18, in an order that varies.

tO depends on the tangents as O would on q, k, v: their gradients are the ordinary ones for dtO in
place of dO and beta in place of delta. So dtk, dtv and dtmask are a pass of the same kernels, with
four products a tile, where two more sums beside dk and dv would not fit into the registers. The
mathematics is in `triton_gradients.py`, the launches are in `triton_backward_plan.py`.
"""

import triton
import triton.language as tl

from scm_kernels.attention import triton_gradients as gradients
from scm_kernels.attention import triton_tiles as tiles
from scm_kernels.attention.triton_tiles import LOG2E


@triton.jit
def _row_sums(x, y, total):
    """total + rowsum(x y) in float32 of two tiles of parts, a cotangent's and an output's. A tO
    that float16 does not hold is no part of a gradient that nothing flows back to."""
    for i in tl.static_range(len(x)):
        products = x[i].to(tl.float32) * y[i].to(tl.float32)
        total += tl.sum(tl.where(x[i] == 0, 0.0, products), 1)
    return total


@triton.jit(do_not_specialize=["M", "H"])
def attention_backward_rows_kernel(
    x, out, t_out, lse, lse_low, mu, M, H, scale: tl.float64, META: tl.constexpr
):  # fmt: skip
    """x.lse, low, delta, mu, beta of a tile of rows, the last two for a dtO alone.

        beta = rowsum(dtO O)        delta = rowsum(dO O) + rowsum(dtO tO)

    lse becomes +inf in rows without a key, and is so in the rows that fill the last tile: P = 0 in
    both, and no other kernel needs to ask. Where it is to be that of raw scores, it is divided by
    their scale, and low is what all of lse is beyond that.
    """
    ROWS: tl.constexpr = META.BLOCK_M
    row_tiles = x.padded // ROWS
    index, row = tl.program_id(0) // row_tiles, (tl.program_id(0) % row_tiles) * ROWS
    batch, head = index // H, index % H
    rows = row + tl.arange(0, ROWS)
    live = rows < M
    source = tl.cast(index, tl.int64) * M + rows
    target = tl.cast(index, tl.int64) * x.padded + rows
    nothing = tl.zeros([ROWS], tl.float32)

    o = tiles.load_rows(out, batch, head, row, live, ROWS, META.E, META.VEC)
    do = tiles.load_rows(x.dout, batch, head, row, live, ROWS, META.E, META.VEC)
    delta = _row_sums(do, o, nothing)
    if x.dt_out is not None:
        to = tiles.load_rows(t_out, batch, head, row, live, ROWS, META.E, META.VEC)
        dto = tiles.load_rows(x.dt_out, batch, head, row, live, ROWS, META.E, META.VEC)
        delta = _row_sums(dto, to, delta)
        tl.store(x.beta + target, _row_sums(dto, o, nothing))
        tl.store(x.mu + target, tl.load(mu + source, mask=live, other=0.0))
    tl.store(x.delta + target, delta)
    log_sum = tl.load(lse + source, mask=live, other=-float("inf"))
    dead, beyond = log_sum == -float("inf"), float("inf")
    log_sum = tl.where(dead, 0.0, log_sum)
    if x.low is not None:
        low = tl.load(lse_low + source, mask=live, other=0.0)
        if META.RAW:
            scaled = log_sum.to(tl.float64)
            log_sum = (scaled / scale).to(tl.float32)
            low = (scaled - log_sum.to(tl.float64) * scale + low).to(tl.float32)
            beyond = tl.where(scale > 0, beyond, -beyond)
        tl.store(x.low + target, low * LOG2E)
    tl.store(x.lse + target, tl.where(dead, beyond, log_sum))


# --- keys


@triton.jit
def _add_queries(
    sums, keys, x, sum_q, batch, head, H, row, key, M, N, scale,
    BOUNDS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Add what a tile of rows gives to (dk, dv) of a tile of keys, and to sum_q; tiles are [N, M].

    Registers limit this kernel: each product stands where it is used, and A comes last.
    """
    P: tl.constexpr = META.PRECISION
    dk, dv = sums
    k, tk, v, tv = keys
    rows, at = row + tl.arange(0, META.BLOCK_M), key + tl.arange(0, META.BLOCK_N)
    inside, live = None, None
    if BOUNDS:
        inside = rows < M
        if META.CAUSAL:
            live = rows[None, :] >= at[:, None]
        if sum_q is not None or META.WHOLE:  # a key out of bounds must not spoil sums over the keys
            known = (at < N)[:, None]
            live = known if live is None else live & known
    q, tq, do, dto = gradients.load_queries(x, batch, head, row, inside, META)
    lse, delta, mu, beta = gradients.load_stats(x, batch * H + head, row, 0, META)
    mask = gradients.load_mask(x.mask, batch, head, row, key, M, N, True, BOUNDS, META)

    s = gradients.turned_scores(q, k, META.SCORES)
    p = gradients.probabilities(s, mask, live, lse, scale, META.RAW)
    dv = gradients.add_product(dv, p, do, P)
    g_t, centred = (), None
    if x.dt_out is not None:
        tmask = gradients.load_mask(x.tmask, batch, head, row, key, M, N, True, BOUNDS, META)
        t = gradients.product(k, tq, None, META.SCORES)
        t = gradients.product(tk, q, t, META.SCORES)
        centred = gradients.centred(t, tmask, mu, scale, p, 0, META)
        if centred is not None:
            dv = gradients.add_product(dv, p * centred, dto, P)
        g_t = p * (gradients.product(v, dto, None, P) - beta)
        g_t = gradients.balanced(g_t, p, 0, META)
        dk = gradients.add_product(dk, g_t, tq, P)
    beside = gradients.beside_a(p, delta, g_t, centred)
    a = gradients.product(tv, dto, gradients.product(v, do, None, P), P)
    g_s = gradients.balanced(gradients.gradient_of_scores(p, a, delta, beside), p, 0, META)
    dk = gradients.add_product(dk, g_s, q, P)
    if sum_q is not None:
        _add_to_queries(sum_q, g_s, g_t, k, tk, batch * H + head, row, x.padded, META)
    return dk, dv


@triton.jit
def _add_to_queries(sum_q, g_s, g_t, k, tk, index, row, padded, META: tl.constexpr):
    """sum_q += gS K + gT tK of a tile of rows, by atomics; gS and gT are [N, M]."""
    sums = tiles.zeros(META.BLOCK_M, META.D.parts)
    sums = gradients.add_product(sums, tl.trans(g_s.to(k[0].dtype)), k, META.PRECISION)
    sums = gradients.add_product(sums, tl.trans(g_t.to(k[0].dtype)), tk, META.PRECISION)
    start = sum_q + (tl.cast(index, tl.int64) * padded + row) * META.D.width
    rows = tl.arange(0, META.BLOCK_M)[:, None] * META.D.width
    for i in tl.static_range(len(sums)):
        columns = (META.D.parts[i][0] + tl.arange(0, META.D.parts[i][1]))[None, :]
        tl.atomic_add(start + (rows + columns), sums[i], mask=columns < META.D.width, sem="relaxed")


@triton.jit
def _row_tiles(key, M, N, META: tl.constexpr):
    """(first, clear, partial, end): the tiles of rows that see a tile of keys are [first, end), and
    those in [clear, partial) see all of it and are inside of all bounds."""
    first, clear, end = 0, 0, tl.cdiv(M, META.BLOCK_M)
    if META.CAUSAL:
        first = tl.minimum(key // META.BLOCK_M, end)
        clear = tl.minimum(tl.cdiv(key + META.BLOCK_N - 1, META.BLOCK_M), end)
    partial = tl.maximum(clear, M // META.BLOCK_M)
    return first, clear, tl.where(key + META.BLOCK_N <= N, partial, clear), end


@triton.jit
def _next(head, i, count):
    """What follows the i-th of `count` tiles of a head: its next, or the first of the next head."""
    last = i + 1 == count
    return tl.where(last, head + 1, head), tl.where(last, 0, i + 1)


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def attention_backward_keys_kernel(x, dk, dv, sum_q, M, N, H, GROUP, scale, META: tl.constexpr):
    """dk, dv of a tile of keys, over the rows of the GROUP heads that share them.

        dK = scale (gS^T Q + gT^T tQ)    dV = P^T dO + tP^T dtO

    With a sum_q [B H, padded, D], float32 and zero at first, dQ / scale is added up in it.

    A key out of bounds spoils its own sums alone, which are not stored. The loops over heads and
    over tiles of rows are one, so that its pipeline of loads fills once.
    """
    KEYS: tl.constexpr = META.BLOCK_N
    key_tiles, key_heads = tl.cdiv(N, KEYS), H // GROUP
    pair = tl.program_id(0) // key_tiles
    batch, key_head = pair // key_heads, pair % key_heads
    key = (tl.program_id(0) % key_tiles) * KEYS  # those with most to do, if causal, go first
    inside = key + tl.arange(0, KEYS) < N
    keys = gradients.load_keys(x, batch, key_head, key, inside, META)
    sums = gradients.zeros_for(dk, KEYS, META.D), gradients.zeros_for(dv, KEYS, META.E)

    first, clear, partial, end = _row_tiles(key, M, N, META)
    ONE: tl.constexpr = sum_q is not None or META.SCORES == "bf16x6"
    whole = 0 if ONE else partial - clear  # with atomics, two loops would spill
    rest = end - first - whole
    head, i = key_head * GROUP, 0
    for _ in range(rest * GROUP):
        row = tl.where(first + i < clear, first + i, first + i + whole) * META.BLOCK_M
        sums = _add_queries(sums, keys, x, sum_q, batch, head, H, row, key, M, N, scale, True, META)
        head, i = _next(head, i, rest)
    if not ONE:
        head, i = key_head * GROUP, 0
        for _ in range(whole * GROUP):
            row = (clear + i) * META.BLOCK_M
            sums = _add_queries(
                sums, keys, x, None, batch, head, H, row, key, M, N, scale, False, META
            )
            head, i = _next(head, i, whole)

    sum_k, sum_v = sums
    inside = tl.arange(0, KEYS) < N - key  # not as above: or it stays in registers until here
    tiles.store_rows(dk, sum_k, batch, key_head, key, inside, scale, KEYS, META.D, META.VEC)
    tiles.store_rows(dv, sum_v, batch, key_head, key, inside, 1.0, KEYS, META.E, META.VEC)


# --- queries


@triton.jit
def _gradients(
    queries, stats, x, batch, head, key_head, row, key, M, N, scale,
    BOUNDS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """(gS, gT, P, K, tK) of a tile of rows and keys [M, N]."""
    rows, at = row + tl.arange(0, META.BLOCK_M), key + tl.arange(0, META.BLOCK_N)
    inside, live = None, None
    if BOUNDS:
        inside = at < N
        live = inside[None, :]
        if META.CAUSAL:
            live = live & (rows[:, None] >= at[None, :])
    keys = gradients.load_keys(x, batch, key_head, key, inside, META)
    mask = gradients.load_mask(x.mask, batch, head, row, key, M, N, False, BOUNDS, META)
    tmask = gradients.load_mask(x.tmask, batch, head, row, key, M, N, False, BOUNDS, META)
    g_s, g_t, p = gradients.gradients(queries, keys, stats, mask, tmask, live, scale, META)
    return g_s, g_t, p, keys[0], keys[1]


@triton.jit
def _add_keys(
    sums, queries, stats, x, batch, head, key_head, row, key, M, N, scale,
    BOUNDS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to (dq, dtq, rest) of a tile of rows."""
    dq, dtq, rest = sums
    g_s, g_t, p, k, tk = _gradients(
        queries, stats, x, batch, head, key_head, row, key, M, N, scale, BOUNDS, META
    )
    dtq = gradients.add_product(dtq, g_t, k, META.PRECISION)
    dq = gradients.add_product(dq, g_t, tk, META.PRECISION)
    rest = gradients.add_rest(rest, g_s, g_t, p, key, x.dt_out is not None)
    return gradients.add_product(dq, g_s, k, META.PRECISION), dtq, rest


@triton.jit
def _without_rest(sums, x, batch, key_head, META: tl.constexpr):
    """(dq, dtq) of (dq, dtq, rest)."""
    dq, dtq, rest = sums
    if META.REST:
        s, t, most, heaviest = rest
        one = most > 0.5  # or no key is near the mean that the rest is on
        k = tiles.gather_rows(x.k, batch, key_head, heaviest, one, META.D, META.VEC)
        tk = tiles.gather_rows(x.tk, batch, key_head, heaviest, one, META.D, META.VEC)
        dq = gradients.less_rest(gradients.less_rest(dq, s, k), t, tk)
        dtq = gradients.less_rest(dtq, t, k)
    return dq, dtq


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def attention_backward_queries_kernel(x, dq, dtq, M, N, H, GROUP, scale, META: tl.constexpr):
    """dq, dtq of a tile of rows, over the keys.

    dQ = scale (gS K + gT tK)        dtQ = scale gT K
    """
    ROWS: tl.constexpr = META.BLOCK_M
    KEYS: tl.constexpr = META.BLOCK_N
    row_tiles = tl.cdiv(M, ROWS)
    index, place = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    row = (row_tiles - 1 - place) * ROWS  # those with most to do, if causal, go first
    batch, head = index // H, index % H
    key_head = head // GROUP
    inside = row + tl.arange(0, ROWS) < M
    queries = gradients.load_queries(x, batch, head, row, inside, META)
    stats = gradients.load_stats(x, index, row, 1, META)
    sum_q, sum_tq = gradients.zeros_for(dq, ROWS, META.D), gradients.zeros_for(dtq, ROWS, META.D)
    sums = sum_q, sum_tq, gradients.no_rest(META)

    # Where rows lie at odd addresses loops count in 64 bits: of a count in 32, LLVM would widen the
    # lower half of a register of 64, which is legal PTX, and which no simulator here takes.
    if META.VEC == 1:
        N = tl.cast(N, tl.int64)
    end, clear = N, N // KEYS  # tiles before `clear` are seen by all rows, and inside of all bounds
    if META.CAUSAL:
        end, clear = tl.minimum(N, row + ROWS), tl.minimum(clear, (row + 1) // KEYS)
    clear = tl.where(row + ROWS <= M, clear, 0)
    if META.SCORES == "bf16x6":
        clear = 0
    else:
        for i in range(clear):
            sums = _add_keys(
                *(sums, queries, stats, x, batch, head, key_head, row, i * KEYS),
                *(M, N, scale, False, META),
            )
    for i in range(clear, tl.cdiv(end, KEYS)):
        sums = _add_keys(
            *(sums, queries, stats, x, batch, head, key_head, row, i * KEYS),
            *(M, N, scale, True, META),
        )

    sum_q, sum_tq = _without_rest(sums, x, batch, key_head, META)
    inside = tl.arange(0, ROWS) < M - row  # not as above: or it stays in registers until here
    tiles.store_rows(dq, sum_q, batch, head, row, inside, scale, ROWS, META.D, META.VEC)
    tiles.store_rows(dtq, sum_tq, batch, head, row, inside, scale, ROWS, META.D, META.VEC)


# --- masks


@triton.jit
def _store_mask(x, total, batch, head, row, key, M, N, META: tl.constexpr):
    """A tile of a mask's gradient, summed over the rows or keys that share an element."""
    ROWS: tl.constexpr = 1 if x.strides[2] is None else META.BLOCK_M
    KEYS: tl.constexpr = 1 if x.strides[3] is None else META.BLOCK_N
    if ROWS == 1:
        total = tl.sum(total, 0, keep_dims=True)
    if KEYS == 1:
        total = tl.sum(total, 1, keep_dims=True)
    at, inside = tiles.mask_place(x, batch, head, row, key, M, N, ROWS, KEYS, False)
    nowhere = tl.zeros([ROWS, KEYS], tl.int32)  # gives both the shape of the tile
    tl.store(at + nowhere, total.to(x.data.dtype.element_ty), mask=inside & (nowhere == 0))


@triton.jit(do_not_specialize=["B", "M", "N", "H", "GROUP"])
def attention_backward_mask_kernel(x, dmask, B, M, N, H, GROUP, scale, META: tl.constexpr):
    """dmask = gS of a tile of a mask, summed over everything that shares it, in one loop, so that
    loads run ahead whatever is shared."""
    row_tiles, key_tiles = tl.cdiv(M, META.BLOCK_M), tl.cdiv(N, META.BLOCK_N)
    batches, heads, rows, keys = B, H, row_tiles, key_tiles  # how many of each share the tile
    first_batch, first_head, first_row, first_key, place = 0, 0, 0, 0, tl.program_id(0)
    if dmask.strides[3] is not None:
        keys, first_key, place = 1, place % key_tiles, place // key_tiles
    if dmask.strides[2] is not None:
        rows, first_row, place = 1, place % row_tiles, place // row_tiles
    if dmask.strides[1] is not None:
        heads, first_head, place = 1, place % H, place // H
    if dmask.strides[0] is not None:
        batches, first_batch = 1, place

    total = tl.zeros([META.BLOCK_M, META.BLOCK_N], tl.float32)
    for step in range(batches * heads * rows * keys):
        key = (first_key + step % keys) * META.BLOCK_N
        row = (first_row + step // keys % rows) * META.BLOCK_M
        head = first_head + step // (keys * rows) % heads
        batch = first_batch + step // (keys * rows * heads)
        inside = row + tl.arange(0, META.BLOCK_M) < M
        queries = gradients.load_queries(x, batch, head, row, inside, META)
        stats = gradients.load_stats(x, batch * H + head, row, 1, META)
        g_s, _, _, _, _ = _gradients(
            queries, stats, x, batch, head, head // GROUP, row, key, M, N, scale, True, META
        )
        total += g_s
    row, key = first_row * META.BLOCK_M, first_key * META.BLOCK_N
    _store_mask(dmask, total, first_batch, first_head, row, key, M, N, META)
