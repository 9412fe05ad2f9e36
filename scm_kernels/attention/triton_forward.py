"""The forward of attention and its tangent in Triton: one kernel, one pass over the keys.

A program has a tile of rows of one head, and walks along the keys: first the tiles that all of its
rows see whole, then those at the end of the keys and on the causal diagonal, with bounds. What the
loop keeps is the dual online softmax, `_State`. Formulas and symbols are those of `reference.py`;
scores are in units of log 2, for exp2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scm_kernels import _triton
from scm_kernels.attention import triton_tiles as tiles
from scm_kernels.attention.problem import Forward
from scm_kernels.attention.triton_config import forward_row
from scm_kernels.attention.triton_tiles import LOG2E, Features, View, mask_strides

NOTHING = tl.constexpr(1e-10)  # sums of p that are lost in rounding: float32's eps / 1024
SUMS = tl.constexpr(8)  # columns of `_State.sums`: those of one tensor core product


class Inputs(NamedTuple):
    """Absent tensors are None."""

    q: View
    k: View
    v: View
    tq: View | None
    tk: View | None
    tv: View | None
    mask: View | None
    tmask: View | None


class Meta(NamedTuple):
    """What the kernel is compiled for."""

    D: Features
    E: Features
    VEC: int
    CAUSAL: bool
    PRECISION: str
    BLOCK_M: int
    BLOCK_N: int
    REST: int  # keys of a tile with bounds or under a mask
    SIGN: int  # of the scale: queries are multiplied by it, so that the scale itself is positive


class _State(NamedTuple):
    """The dual online softmax of a tile of rows."""

    m: tl.tensor  # [M] largest score: under a mask as it is, else over log 2, in float32 unscaled
    l: tl.tensor  # [M] sum of p
    mu: tl.tensor  # [M] sum of h
    c: tl.tensor  # [M] shift of T
    sums: tl.tensor  # [M, SUMS] sums of p and h as they are rounded for the products; () in float32
    acc: tuple  # [M, features] in parts: sum of p V
    tacc: tuple  # sum of h V + p tV; () without a tangent


# --- one tile


@triton.jit
def _scores(q, tq, k, tk, PRECISION: tl.constexpr):
    """Raw S = Q K^T and T = tQ K^T + Q tK^T, (None: no such tangent), with keys [features, N].

    Part by part, so that a part of K is in registers for both of its products.
    """
    s, t = None, None
    for i in tl.static_range(len(k)):
        s = tiles.dot(q[i], k[i], s, PRECISION)
        if len(tq) > 0:
            t = tiles.dot(tq[i], k[i], t, PRECISION)
        if len(tk) > 0:
            t = tiles.dot(q[i], tk[i], t, PRECISION)
    return s, t


@triton.jit
def _values(state, a, p, h, v, tv, PRECISION: tl.constexpr):
    """(sums, acc, tacc) with the products of this tile; h may be None."""
    low = p.to(v[0].dtype)
    sums, acc, tacc = state.sums, (), ()
    if h is not None:
        h = h.to(v[0].dtype)
    if len(sums) > 0:
        # Row sums of what the products see, by products with ones: no conversion back is needed.
        ones = tl.full([p.shape[1], SUMS], 1.0, low.dtype)
        sums = (tiles.dot(low, ones, sums[0] * a[:, None], PRECISION),)
        if h is not None:
            sums = sums + (tiles.dot(h, ones, state.sums[1] * a[:, None], PRECISION),)
    for i in tl.static_range(len(v)):
        acc = acc + (tiles.dot(low, v[i], state.acc[i] * a[:, None], PRECISION),)
        if len(state.tacc) > 0:
            x = state.tacc[i] * a[:, None]
            if h is not None:
                x = tiles.dot(h, v[i], x, PRECISION)
            if len(tv) > 0:
                x = tiles.dot(low, tv[i], x, PRECISION)
            tacc = tacc + (x,)
    return sums, acc, tacc


@triton.jit
def _add_tile(state, q, tq, keys, live, scale, scale2, META: tl.constexpr):
    """Take in a tile of keys without a mask: then every row has seen one. In half types c is known.

    `live`: which of the keys are inside of the bounds; None: all.
    """
    k, tk, v, tv = keys
    s, t = _scores(q, tq, k, tk, META.PRECISION)
    if live is not None:
        s = tl.where(live, s, -float("inf"))
        if META.CAUSAL and t is not None and v[0].dtype != tl.float32:
            t = tl.where(live, t, 0.0)  # of a later key it may be anything
    if v[0].dtype == tl.float32:
        # m is that of the raw scores: large ones are subtracted before anything is rounded.
        m = tl.maximum(state.m, tl.max(s, 1))
        a = tl.exp2((state.m - m) * scale2)
        p = tl.exp2((s - m[:, None]) * scale2)
    else:
        m = tl.maximum(state.m, tl.max(s, 1) * scale2)
        a = tl.exp2(state.m - m)
        p = tl.exp2(s * scale2 - m[:, None])  # one fused multiply-add
    mu, c, h = state.mu, state.c, None
    if t is not None:
        t = t * scale
        if v[0].dtype == tl.float32:
            if live is not None:  # and rounded: it is not fused with what comes next
                t = tl.where(live, t, 0.0)
            c = _shift(state, a, p, t)
        h = p * (t - c[:, None])
        mu = mu * a + tl.sum(h, 1)
    sums, acc, tacc = _values(state, a, p, h, v, tv, META.PRECISION)
    return _State(m, state.l * a + tl.sum(p, 1), mu, c, sums, acc, tacc)


@triton.jit
def _add_masked_tile(state, q, tq, keys, mask, tmask, live, scale, META: tl.constexpr):
    """Take in a tile of keys under a mask, of which a row may see none.

    m is that of the scores as they are: in units of log 2, the least number would be -inf.
    """
    k, tk, v, tv = keys
    s, t = _scores(q, tq, k, tk, META.PRECISION)
    s = s * scale
    if mask.dtype == tl.int1:
        live = live & mask
    else:
        s += mask.to(tl.float32)
        live = live & (s != -float("inf"))
    s = tl.where(live, s, -float("inf"))
    m = tl.maximum(state.m, tl.max(s, 1))
    finite = tl.where(m == -float("inf"), 0.0, m)
    a = tl.exp2((state.m - finite) * LOG2E)
    p = tl.exp2((s - finite[:, None]) * LOG2E)
    if t is not None:
        t = t * scale
        if tmask is not None:
            t += tmask.to(tl.float32)
    elif tmask is not None:
        t = tl.zeros_like(s) + tmask.to(tl.float32)
    mu, c, h = state.mu, state.c, None
    if t is not None:
        t = tl.where(live, t, 0.0)
        c = _shift(state, a, p, t)
        h = p * (t - c[:, None])
        mu = mu * a + tl.sum(h, 1)
    sums, acc, tacc = _values(state, a, p, h, v, tv, META.PRECISION)
    return _State(m, state.l * a + tl.sum(p, 1), mu, c, sums, acc, tacc)


@triton.jit
def _shift(state, a, p, t):
    """c; a new one where nothing counts that came before: the mean of T by p. That of a key which
    takes all is its own T, and its h is 0."""
    mean = tl.sum(p * t, 1) / tl.maximum(tl.sum(p, 1), 1.0)
    return tl.where(a * state.l < NOTHING, mean, state.c)


# --- tiles of keys


@triton.jit
def _load_keys(x, batch, head, key, live, KEYS: tl.constexpr, META: tl.constexpr):
    """(k, tk, v, tv) of a tile; k and tk are [features, N]."""
    return (
        tiles.load_rows(x.k, batch, head, key, live, KEYS, META.D, META.VEC, True),
        tiles.load_rows(x.tk, batch, head, key, live, KEYS, META.D, META.VEC, True),
        tiles.load_rows(x.v, batch, head, key, live, KEYS, META.E, META.VEC),
        tiles.load_rows(x.tv, batch, head, key, live, KEYS, META.E, META.VEC),
    )


@triton.jit
def _load_mask(x, batch, head, row, key, M, N, META: tl.constexpr):
    return tiles.load_mask(x, batch, head, row, key, M, N, META.BLOCK_M, META.REST, False, True)


@triton.jit
def _live(rows, keys, N, META: tl.constexpr):
    """Which keys of a tile take part, by the bounds alone: [1 or M, N]."""
    live = (keys < N)[None, :]
    if META.CAUSAL:
        live = live & (keys[None, :] <= rows[:, None])
    return live


@triton.jit
def _first_shift(q, tq, x, batch, head, rows, N, scale, META: tl.constexpr):
    """c in half types, the mean of T over the live keys of the first tile; a row has one without a
    mask. To choose it in the loop, as in float32, would take registers there. T - c is to be in the
    range of float16."""
    keys = tl.arange(0, META.REST)
    k = tiles.load_rows(x.k, batch, head, 0, keys < N, META.REST, META.D, META.VEC, True)
    tk = tiles.load_rows(x.tk, batch, head, 0, keys < N, META.REST, META.D, META.VEC, True)
    _, t = _scores(q, tq, k, tk, META.PRECISION)
    live = tl.broadcast_to(_live(rows, keys, N, META), t.shape)
    count = tl.maximum(tl.sum(live.to(tl.float32), 1), 1.0)
    return tl.sum(tl.where(live, t, 0.0), 1) / count * scale


# --- the kernel


@triton.jit
def _load_queries(x, batch, head, row, inside, META: tl.constexpr):
    """A tile of rows times the sign of the scale, which is exact in every dtype."""
    q = tiles.load_rows(x, batch, head, row, inside, META.BLOCK_M, META.D, META.VEC)
    if META.SIGN != 1:
        signed = ()
        for i in tl.static_range(len(q)):
            signed = signed + ((q[i].to(tl.float32) * META.SIGN).to(q[i].dtype),)
        q = signed
    return q


@triton.jit
def _start(x, META: tl.constexpr):
    """The state before the first key."""
    nothing = tl.zeros([META.BLOCK_M], tl.float32)
    sums, tacc = (), ()
    if x.v.data.dtype.element_ty != tl.float32:
        sums = (tl.zeros([META.BLOCK_M, SUMS], tl.float32),)
        if not (x.tq is None and x.tk is None and x.tmask is None):
            sums = sums + (tl.zeros([META.BLOCK_M, SUMS], tl.float32),)
    if not (x.tq is None and x.tk is None and x.tv is None and x.tmask is None):
        tacc = tiles.zeros(META.BLOCK_M, META.E.parts)
    acc = tiles.zeros(META.BLOCK_M, META.E.parts)
    # Without a mask there is always a key; its score may be -inf all the same, by overflow.
    least = nothing - (3.4028234663852886e38 if x.mask is None else float("inf"))
    return _State(least, nothing, nothing, nothing, sums, acc, tacc)


@triton.jit
def _finish(state, unit):
    """(O, tO, lse, lse_low, mu), normalised by the sums of what the products have seen.

    lse is what a backward subtracts from large scores: it is rounded once.
    """
    dead = state.l == 0
    l = tl.where(dead, 1.0, state.l)
    p_sum, h_sum = l, state.mu
    if len(state.sums) > 0:
        p_sum = tl.where(dead, 1.0, tl.max(state.sums[0], 1))  # all columns are alike
        if len(state.sums) > 1:
            h_sum = tl.max(state.sums[1], 1)
    out, t_out = (), ()
    for i in tl.static_range(len(state.acc)):
        o = state.acc[i] / p_sum[:, None]
        out = out + (o,)
        if len(state.tacc) > 0:
            t_out = t_out + (state.tacc[i] / p_sum[:, None] - (h_sum / p_sum)[:, None] * o,)
        else:
            t_out = t_out + (tl.zeros_like(o),)
    m, log = state.m.to(tl.float64) * unit, tl.log2(l) / LOG2E
    lse = (m + log).to(tl.float32)
    low = tl.where(dead, 0.0, (m - lse.to(tl.float64) + log).to(tl.float32))
    lse = tl.where(dead, -float("inf"), lse)
    return out, t_out, lse, low, tl.where(dead, 0.0, state.mu / l + state.c)


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def attention_forward_kernel(
    x,
    out,
    t_out,
    lse,
    lse_low,
    mu,
    M,
    N,
    H,
    GROUP,
    scale,
    scale2,
    unit: tl.float64,
    META: tl.constexpr,
):
    """out, t_out, lse, mu of a tile of rows. scale is |scale|, scale2 the same over log 2, in
    float32; unit is what one of `_State.m` is in lse."""
    row_tiles = tl.cdiv(M, META.BLOCK_M)
    index, place = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    row = (row_tiles - 1 - place) * META.BLOCK_M  # the last, with most to do if causal, go first
    batch, head = index // H, index % H
    key_head = head // GROUP
    rows = row + tl.arange(0, META.BLOCK_M)
    inside = rows < M
    q = _load_queries(x.q, batch, head, row, inside, META)
    tq = _load_queries(x.tq, batch, head, row, inside, META)
    state = _start(x, META)
    end, whole = N, 0  # keys that a row sees; those that all rows see, in whole tiles
    if META.CAUSAL:
        end = tl.minimum(N, row + META.BLOCK_M)
    if x.mask is None:
        if q[0].dtype != tl.float32 and not (x.tq is None and x.tk is None):
            c = _first_shift(q, tq, x, batch, key_head, rows, N, scale, META)
            state = _State(state.m, state.l, state.mu, c, state.sums, state.acc, state.tacc)
        if META.PRECISION != "bf16x6":
            whole = N // META.BLOCK_N * META.BLOCK_N
            if META.CAUSAL:
                whole = tl.minimum(whole, (row + 1) // META.BLOCK_N * META.BLOCK_N)
            for key in range(0, whole, META.BLOCK_N):
                keys = _load_keys(x, batch, key_head, key, None, META.BLOCK_N, META)
                state = _add_tile(state, q, tq, keys, None, scale, scale2, META)
    for key in range(whole, end, META.REST):
        at = key + tl.arange(0, META.REST)
        keys = _load_keys(x, batch, key_head, key, at < N, META.REST, META)
        live = _live(rows, at, N, META)
        if x.mask is None:
            state = _add_tile(state, q, tq, keys, live, scale, scale2, META)
        else:
            mask = _load_mask(x.mask, batch, head, row, key, M, N, META)
            tmask = _load_mask(x.tmask, batch, head, row, key, M, N, META)
            state = _add_masked_tile(state, q, tq, keys, mask, tmask, live, scale, META)

    o, to, log_sum, low, mean = _finish(state, unit)
    inside = tl.arange(0, META.BLOCK_M) < M - row  # not as above: it would be kept in registers
    tiles.store_rows(out, o, batch, head, row, inside, 1.0, META.BLOCK_M, META.E, META.VEC)
    tiles.store_rows(t_out, to, batch, head, row, inside, 1.0, META.BLOCK_M, META.E, META.VEC)
    at = tl.cast(index, tl.int64) * M + row + tl.arange(0, META.BLOCK_M)
    tl.store(lse + at, log_sum, inside)
    if lse_low is not None:
        tl.store(lse_low + at, low, inside)
    tl.store(mu + at, mean, inside)


# --- host


def plan_attention_forward(problem: Forward, precision: str = "exact") -> Callable[[Forward], None]:
    """What writes all outputs; `precision` of float32: "exact", "ieee", "tf32"."""
    launch, strides, numbers = _plan(problem, precision)
    absent = [i for i, x in enumerate(strides) if x is None]

    def run(p: Forward) -> None:
        q, k, v, tq, tk, tv, mask, tmask, _, _, out, t_out, lse, mu, low = p
        views = list(zip((q, k, v, tq, tk, tv, mask, tmask, out, t_out), strides, strict=True))
        for i in absent:
            views[i] = None
        if not launch.known:  # what Triton compiles has names
            views = [None if x is None else View(*x) for x in views]
            launch(q, Inputs(*views[:8]), *views[8:], lse, low, mu, *numbers)
        else:
            launch(q, tuple(views[:8]), *views[8:], lse, low, mu, *numbers)

    return run


def _plan(p: Forward, precision: str) -> tuple[_triton.Launch, list[tuple | None], tuple]:
    """The launch, the strides of the tensors, and the arguments that are no tensors."""
    (b, h, m, d), (_, hk, n, e) = p.q.shape, p.v.shape
    masked = tiles.differs_by_row(p.mask, p.tmask)
    architecture = _triton.architecture(p.q.device)
    row = forward_row(architecture, p.q.dtype, max(d, e), p.causal, masked, precision == "ieee")
    tensors = (p.q, p.k, p.v, p.tq, p.tk, p.tv, p.mask, p.tmask, p.out, p.t_out)
    vec = _triton.vector(*tensors[:6], *tensors[8:])
    strides = [_triton.strides(x, vec) for x in tensors]
    strides[6:8] = (mask_strides(x) for x in tensors[6:8])
    meta = Meta(
        *(row.features(d), row.features(e, row.widest_e), vec, p.causal, row.precision(precision)),
        *(row.block_m, row.block_n, row.bounded_tile(p.mask is not None, masked)),
        (p.scale > 0) - (p.scale < 0),
    )
    scale = abs(p.scale) or 1.0
    # In float32, whatever the default dtype and the default device are.
    scale2 = torch.tensor(scale / math.log(2), dtype=torch.float32, device="cpu").item()
    unit = scale if p.q.dtype == torch.float32 else scale / scale2
    if p.mask is not None:
        unit = 1.0
    numbers = m, n, h, h // hk, scale, scale2, unit, meta
    programs = triton.cdiv(m, row.block_m) * b * h
    launch = _triton.Launch(attention_forward_kernel, programs, **row.options(architecture))
    return launch, strides, numbers
