"""The backward of attention in Triton: a kernel for each kind of gradient, all deterministic.

    rows      what the others need of every row, to scratch memory
    keys      dk, dv: a program for each tile of keys, over the rows of all heads that share it
    queries   dq, dtq: a program for each tile of rows, over the keys
    mask      dmask: a program for each tile of the mask, over all that shares it

Sums stay in the registers of one program, without atomics, and no buffer has M N elements; scores
are computed again by each kernel that asks for them.

tO depends on the tangents as O would on q, k, v: their gradients are the ordinary ones for dtO in
place of dO and beta in place of delta. So dtk, dtv and dtmask are a pass of the same kernels, with
four products a tile, where two more sums beside dk and dv would not fit into the registers. The
mathematics is in `triton_gradients.py`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.attention import triton_gradients as gradients
from scm_kernels.attention import triton_tiles as tiles
from scm_kernels.attention.problem import Backward
from scm_kernels.attention.triton_backward_config import PADDING, backward_row
from scm_kernels.attention.triton_gradients import Meta, Operands
from scm_kernels.attention.triton_tiles import View, mask_strides


@triton.jit
def _row_sums(x, y, total):
    """total + rowsum(x y) in float32 of two tiles of parts."""
    for i in tl.static_range(len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["M", "H"])
def attention_backward_rows_kernel(x, out, t_out, lse, mu, M, H, META: tl.constexpr):
    """x.lse, delta, mu, beta of a tile of rows, the last two for a dtO alone.

        beta = rowsum(dtO O)        delta = rowsum(dO O) + rowsum(dtO tO)

    lse becomes +inf in rows without a key, and is so in the rows that fill the last tile: P = 0 in
    both, and no other kernel needs to ask.
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
    tl.store(x.lse + target, tl.where(log_sum == -float("inf"), float("inf"), log_sum))


# --- keys


@triton.jit
def _add_queries(
    sums, keys, x, batch, head, H, row, key, M, N, scale, BOUNDS: tl.constexpr, META: tl.constexpr
):
    """Add what one tile of rows gives to (dk, dv) of a tile of keys; tiles are [N, M].

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
    q, tq, do, dto = gradients.load_queries(x, batch, head, row, inside, META)
    lse, delta, mu, beta = gradients.load_stats(x, batch * H + head, row, 0, META)
    mask = gradients.load_mask(x.mask, batch, head, row, key, M, N, True, BOUNDS, META)

    p = gradients.probabilities(gradients.turned_scores(q, k, P), mask, live, lse, scale)
    dv = gradients.add_product(dv, p, do, P)
    g_t, centred = (), None
    if x.dt_out is not None:
        tmask = gradients.load_mask(x.tmask, batch, head, row, key, M, N, True, BOUNDS, META)
        t = gradients.product(tk, q, gradients.product(k, tq, None, P), P)
        centred = gradients.centred(t, tmask, mu, scale)
        if centred is not None:
            dv = gradients.add_product(dv, p * centred, dto, P)
        g_t = p * (gradients.product(v, dto, None, P) - beta)
        dk = gradients.add_product(dk, g_t, tq, P)
    beside = gradients.beside_a(p, delta, g_t, centred)
    a = gradients.product(tv, dto, gradients.product(v, do, None, P), P)
    g_s = gradients.gradient_of_scores(p, a, delta, beside)
    return gradients.add_product(dk, g_s, q, P), dv


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
def attention_backward_keys_kernel(x, dk, dv, M, N, H, GROUP, scale, META: tl.constexpr):
    """dk, dv of a tile of keys, over the rows of the GROUP heads that share them.

        dK = scale (gS^T Q + gT^T tQ)    dV = P^T dO + tP^T dtO

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
    whole = partial - clear
    rest = end - first - whole
    head, i = key_head * GROUP, 0
    for _ in range(rest * GROUP):
        row = tl.where(first + i < clear, first + i, first + i + whole) * META.BLOCK_M
        sums = _add_queries(sums, keys, x, batch, head, H, row, key, M, N, scale, True, META)
        head, i = _next(head, i, rest)
    head, i = key_head * GROUP, 0
    for _ in range(whole * GROUP):
        row = (clear + i) * META.BLOCK_M
        sums = _add_queries(sums, keys, x, batch, head, H, row, key, M, N, scale, False, META)
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
    """(gS, gT, K, tK) of a tile of rows and keys [M, N]."""
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
    g_s, g_t = gradients.gradients(queries, keys, stats, mask, tmask, live, scale, META)
    return g_s, g_t, keys[0], keys[1]


@triton.jit
def _add_keys(
    sums, queries, stats, x, batch, head, key_head, row, key, M, N, scale,
    BOUNDS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to (dq, dtq) of a tile of rows."""
    dq, dtq = sums
    g_s, g_t, k, tk = _gradients(
        queries, stats, x, batch, head, key_head, row, key, M, N, scale, BOUNDS, META
    )
    dtq = gradients.add_product(dtq, g_t, k, META.PRECISION)
    dq = gradients.add_product(dq, g_t, tk, META.PRECISION)
    return gradients.add_product(dq, g_s, k, META.PRECISION), dtq


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
    sums = gradients.zeros_for(dq, ROWS, META.D), gradients.zeros_for(dtq, ROWS, META.D)

    end, clear = N, N // KEYS  # tiles before `clear` are seen by all rows, and inside of all bounds
    if META.CAUSAL:
        end, clear = tl.minimum(N, row + ROWS), tl.minimum(clear, (row + 1) // KEYS)
    clear = tl.where(row + ROWS <= M, clear, 0)
    for i in range(clear):
        sums = _add_keys(
            sums, queries, stats, x, batch, head, key_head, row, i * KEYS, M, N, scale, False, META
        )
    for i in range(clear, tl.cdiv(end, KEYS)):
        sums = _add_keys(
            sums, queries, stats, x, batch, head, key_head, row, i * KEYS, M, N, scale, True, META
        )

    sum_q, sum_tq = sums
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
        g_s, _, _, _ = _gradients(
            queries, stats, x, batch, head, head // GROUP, row, key, M, N, scale, True, META
        )
        total += g_s
    row, key = first_row * META.BLOCK_M, first_key * META.BLOCK_N
    _store_mask(dmask, total, first_batch, first_head, row, key, M, N, META)


# --- host

_KERNELS = {
    "rows": attention_backward_rows_kernel,
    "keys": attention_backward_keys_kernel,
    "queries": attention_backward_queries_kernel,
    "mask": attention_backward_mask_kernel,
}
_READ = ("q", "k", "v", "tq", "tk", "tv", "dout", "dt_out", "out", "t_out")
_WRITTEN = ("dq", "dk", "dv", "dtq", "dtk", "dtv")
_MASKS = ("mask", "tmask", "dmask", "dtmask")


def plan_attention_backward(problem: Backward, precision: str) -> Callable[[Backward], None]:
    """What writes the gradients that are wanted; `precision` is that of products in float32."""
    return _Plan(problem, precision).run


def _rowwise(x: Tensor | None) -> Tensor | None:
    """A gradient, or what is copied to it if its last dimension is not contiguous."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One launch of a kernel."""

    launch: _triton.Launch
    of_tangents: bool  # the ordinary gradients, with dtO in place of dO
    gradients: tuple[str, ...]
    numbers: tuple  # the arguments that are no tensors


class _Plan:
    """How problems of one kind are launched."""

    def __init__(self, p: Backward, precision: str):
        tensors = {name: getattr(p, name) for name in _READ}
        tensors |= {name: _rowwise(getattr(p, name)) for name in _WRITTEN}
        vec = _triton.vector(*tensors.values())
        self.strides = {name: _triton.strides(x, vec) for name, x in tensors.items()}
        self.strides |= {name: mask_strides(getattr(p, name)) for name in _MASKS}
        self.padded = triton.cdiv(p.q.shape[2], PADDING) * PADDING
        self.rows = _pass("rows", False, (), p, precision, vec)
        self.passes = [_pass(*kind, p, precision, vec) for kind in _kinds(p)]

    def run(self, p: Backward) -> None:
        tensors = {name: getattr(p, name) for name in (*_READ, *_MASKS)}
        tensors |= {name: _rowwise(getattr(p, name)) for name in _WRITTEN}
        views = {
            name: None if x is None else View(x, self.strides[name]) for name, x in tensors.items()
        }
        scratch = p.lse.new_empty(2 if p.dt_out is None else 4, *p.lse.shape[:2], self.padded)
        lse, delta, mu, beta = (*scratch, None, None)[:4]
        vectors = self.padded, lse, delta, mu, beta
        x = Operands(*(views[name] for name in Operands._fields[: -len(vectors)]), *vectors)
        of_tangents = Operands(
            *(x.q, x.k, x.v, None, None, None, x.mask, None, x.dt_out, None),
            *(self.padded, lse, beta, None, None),
        )
        out = views["out"], views["t_out"], p.lse, p.mu
        self.rows.launch(p.q, x, *out, *self.rows.numbers)
        for one in self.passes:
            gradients = (views.get(name) for name in one.gradients)
            one.launch(p.q, of_tangents if one.of_tangents else x, *gradients, *one.numbers)
        for name in _WRITTEN:
            if tensors[name] is not getattr(p, name):
                getattr(p, name).copy_(tensors[name])


def _kinds(p: Backward) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """(kernel, of_tangents, gradients) of the passes for all gradients that are wanted."""
    if p.dk is not None or p.dv is not None:
        yield "keys", False, ("dk", "dv")
    if p.dtk is not None or p.dtv is not None:
        yield "keys", True, ("dtk", "dtv")
    if p.dq is not None:
        yield "queries", False, ("dq", "dtq")  # where dtq costs one product
    elif p.dtq is not None:
        yield "queries", True, ("dtq", "")
    if p.dmask is not None:
        yield "mask", False, ("dmask",)
    if p.dtmask is not None:
        yield "mask", True, ("dtmask",)


def _pass(
    kernel: str,
    of_tangents: bool,
    gradients: tuple[str, ...],
    p: Backward,
    precision: str,
    vec: int,
) -> _Pass:
    (b, h, m, d), (hk, n, e) = p.q.shape, p.v.shape[1:]
    through = "out" if p.dt_out is None or of_tangents else "both"
    if through == "both" and "dtq" in gradients and p.dtq is not None:
        through = "both, dtq"
    architecture = _triton.architecture(p.q.device)
    masked = tiles.differs_by_row(p.mask, p.tmask)
    padded = p.mask is not None and not masked
    row = backward_row(
        architecture, kernel, through, p.q.dtype, max(d, e), p.causal, masked, padded
    )
    meta = Meta(
        row.features(d), row.features(e), vec, p.causal, precision, row.block_m, row.block_n
    )
    row_tiles, key_tiles = triton.cdiv(m, row.block_m), triton.cdiv(n, row.block_n)
    numbers = m, n, h, h // hk, p.scale
    if kernel == "rows":
        programs, numbers = b * h * triton.cdiv(m, PADDING) * (PADDING // row.block_m), (m, h)
    elif kernel == "keys":
        programs = b * hk * key_tiles
    elif kernel == "queries":
        programs = b * h * row_tiles
    else:
        sizes, counts = getattr(p, gradients[0]).shape, (b, h, row_tiles, key_tiles)
        programs = math.prod(map(min, sizes, counts))  # 1 where the mask is shared
        numbers = (b, *numbers)
    launch = _triton.Launch(_KERNELS[kernel], programs, **row.options(architecture))
    return _Pass(launch, of_tangents, gradients, (*numbers, meta))
