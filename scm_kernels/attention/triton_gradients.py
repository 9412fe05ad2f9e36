"""What the backward kernels in Triton are made of: their arguments, and the mathematics of a tile.

Formulas and symbols are those of `reference.py`, and X = T - mu. A tile lies as rows by keys [M, N]
or as keys by rows [N, M], whichever its sums ask for: the functions take what belongs to rows (lse,
delta, mu, beta, indices) as [M, 1] or as [1, M], and a product over features is that of what lies
first with what lies second.

A tensor that is absent is a tile without parts, (), and a product with it is nothing: Triton has no
None inside of tuples.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.attention import triton_tiles as tiles
from scm_kernels.attention.triton_tiles import LOG2E, Features, View

INTERPRETED = tl.constexpr(_triton.interpreting())


class Operands(NamedTuple):
    """What gradients are computed from; absent tensors are None."""

    q: View
    k: View
    v: View
    tq: View | None
    tk: View | None
    tv: View | None
    mask: View | None
    tmask: View | None
    dout: View | None
    dt_out: View | None

    # Of `attention_backward_rows_kernel`: [B H, padded] float32; the last two for a dtO alone.
    padded: int
    lse: Tensor
    low: Tensor | None
    delta: Tensor
    mu: Tensor | None
    beta: Tensor | None


class Meta(NamedTuple):
    """What a kernel is compiled for."""

    D: Features
    E: Features
    VEC: int
    CAUSAL: bool
    PRECISION: str
    SCORES: str  # the precision of S and T: the forward's, which lse and mu are of
    BLOCK_M: int
    BLOCK_N: int
    RAW: bool  # lse is that of scores without their scale
    WHOLE: bool  # one tile has all keys, in float32: in half types it is lost in their rounding
    REST: bool  # several do, in float32: what rounding leaves of sums that are 0 is taken off


# --- loads


@triton.jit
def load_queries(x, batch, head, row, live, META: tl.constexpr):
    """(q, tq, do, dto) of a tile of rows; `live` [M] says which are there, None: all."""
    q = tiles.load_rows(x.q, batch, head, row, live, META.BLOCK_M, META.D, META.VEC)
    tq = tiles.load_rows(x.tq, batch, head, row, live, META.BLOCK_M, META.D, META.VEC)
    do = tiles.load_rows(x.dout, batch, head, row, live, META.BLOCK_M, META.E, META.VEC)
    dto = tiles.load_rows(x.dt_out, batch, head, row, live, META.BLOCK_M, META.E, META.VEC)
    return q, tq, do, dto


@triton.jit
def load_keys(x, batch, head, key, live, META: tl.constexpr):
    """(k, tk, v, tv) of a tile of keys."""
    k = tiles.load_rows(x.k, batch, head, key, live, META.BLOCK_N, META.D, META.VEC)
    tk = tiles.load_rows(x.tk, batch, head, key, live, META.BLOCK_N, META.D, META.VEC)
    v = tiles.load_rows(x.v, batch, head, key, live, META.BLOCK_N, META.E, META.VEC)
    tv = tiles.load_rows(x.tv, batch, head, key, live, META.BLOCK_N, META.E, META.VEC)
    return k, tk, v, tv


@triton.jit
def load_mask(
    x, batch, head, row, key, M, N,
    TURNED: tl.constexpr, BOUNDS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """A tile of a mask, [M, N] or, if TURNED, [N, M]; None of an absent one."""
    return tiles.load_mask(
        x, batch, head, row, key, M, N, META.BLOCK_M, META.BLOCK_N, TURNED, BOUNDS
    )


@triton.jit
def load_stats(x, index, row, AXIS: tl.constexpr, META: tl.constexpr):
    """(lse and low, delta, mu, beta) of a tile of rows, [1, M] (AXIS 0) or [M, 1]; () for those
    absent."""
    at = tl.cast(index, tl.int64) * x.padded + row
    at = tl.expand_dims(at + tl.arange(0, META.BLOCK_M), AXIS)
    lse, mu, beta = (tl.load(x.lse + at),), (), ()
    if x.low is not None:
        lse = lse + (tl.load(x.low + at),)
    if x.mu is not None:
        mu, beta = tl.load(x.mu + at), tl.load(x.beta + at)
    return lse, tl.load(x.delta + at), mu, beta


# --- mathematics


@triton.jit
def zeros_for(x, ROWS: tl.constexpr, F: tl.constexpr):
    """The sums of a gradient, none if nobody wants it."""
    if x is None:
        return ()
    else:
        return tiles.zeros(ROWS, F.parts)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b^T over features; None is zero, and so is a product with an absent tile."""
    if len(a) == 0 or len(b) == 0:
        return total
    else:
        return tiles.over_features(a, b, total, PRECISION)


@triton.jit
def add_product(sums, weights, x, PRECISION: tl.constexpr):
    """sums + weights x over rows or keys, for sums that are wanted and an x that is there."""
    if len(sums) == 0 or len(x) == 0:
        return sums
    else:
        return tiles.over_keys(weights.to(x[0].dtype), x, sums, PRECISION)


@triton.jit
def turned_scores(q, k, PRECISION: tl.constexpr):
    """K Q^T [N, M], to the last digit what the forward had as Q K^T: lse is that of those scores.

    A GPU sums both in the order of the features; the interpreter's products, those of numpy, depend
    on which factor is the first.
    """
    if INTERPRETED:
        return tl.trans(product(q, k, None, PRECISION))
    else:
        return product(k, q, None, PRECISION)


@triton.jit
def probabilities(s, mask, live, lse, scale, RAW: tl.constexpr):
    """P from raw products of Q and K; lse is +inf in a row without a key, and may have a second
    part, in units of log 2.

    Scores are rounded where the forward rounded them: in float32 not before lse is subtracted, or,
    under a mask, once they are scaled. log2(e), for exp2, multiplies the difference: in units of
    log 2, large scores and their lse would lose float32 its last digits.
    """
    if RAW:
        s = (s - lse[0]) * scale
    elif mask is None:
        s = s * scale - lse[0]
    elif mask.dtype == tl.int1:
        s = tl.where(mask, s * scale, -float("inf")) - lse[0]
    else:
        s = s * scale + mask.to(tl.float32) - lse[0]  # a large mask drowns s
    if live is not None:
        s = tl.where(live, s, -float("inf"))
    s = s * LOG2E
    if len(lse) > 1:
        s -= lse[1]
    return tl.exp2(s)


@triton.jit
def centred(t, tmask, mu, scale, p, AXIS: tl.constexpr, META: tl.constexpr):
    """X = T - mu from raw products, less what rounding has left of rowsum(P X) where one tile has
    all keys (over AXIS); None: the scores have no tangent, and mu is 0."""
    x = None
    if t is not None:
        x = t * scale - mu
        if tmask is not None:
            x += tmask.to(tl.float32)
    elif tmask is not None:
        x = tmask.to(tl.float32) - mu
    if META.WHOLE and x is not None:
        x = tl.where(p == 0.0, 0.0, x)  # of a key that is not seen it may be anything
        x -= tl.sum(p * x, AXIS, keep_dims=True)
    return x


@triton.jit
def beside_a(p, delta, g_t, x):
    """What gS is beside P A, gT X - P delta; None where the scores have no tangent."""
    return None if x is None else g_t * x - p * delta


@triton.jit
def gradient_of_scores(p, a, delta, beside):
    """gS from A, of which None is zero, and from `beside_a`."""
    if beside is None:
        return p * -delta if a is None else p * (a - delta)
    else:
        return beside if a is None else beside + p * a


@triton.jit
def balanced(g, p, AXIS: tl.constexpr, META: tl.constexpr):
    """g of scores, whose sum over the keys is 0, but for rounding: where one tile has all of them
    (over AXIS), that is taken off. So a key that takes all has no gradient, as in eager's formula.
    """
    return g - p * tl.sum(tl.where(p == 0.0, 0.0, g), AXIS, keep_dims=True) if META.WHOLE else g


@triton.jit
def gradients(queries, keys, stats, mask, tmask, live, scale, META: tl.constexpr):
    """(gS, gT, P) of a tile [M, N]; gT is () without a dtO."""
    P: tl.constexpr = META.PRECISION
    q, tq, do, dto = queries
    k, tk, v, tv = keys
    lse, delta, mu, beta = stats
    p = probabilities(product(q, k, None, META.SCORES), mask, live, lse, scale, META.RAW)
    g_t, x = (), None
    if len(dto) > 0:
        g_t = balanced(p * (product(dto, v, None, P) - beta), p, 1, META)
        t = product(q, tk, product(tq, k, None, META.SCORES), META.SCORES)
        x = centred(t, tmask, mu, scale, p, 1, META)
    beside = beside_a(p, delta, g_t, x)
    a = product(dto, tv, product(do, v, None, P), P)
    return balanced(gradient_of_scores(p, a, delta, beside), p, 1, META), g_t, p


# --- what rounding leaves of the sums of gS and gT over the keys of a row, which are 0


@triton.jit
def no_rest(META: tl.constexpr):
    """Those sums, the largest P of each row, and whose it is; () where nobody asks."""
    if META.REST:
        zero = tl.zeros([META.BLOCK_M], tl.float32)
        return zero, zero, zero, tl.zeros([META.BLOCK_M], tl.int32)
    else:
        return ()


@triton.jit
def add_rest(rest, g_s, g_t, p, key, BOTH: tl.constexpr):
    """The same with a tile of keys, from `key` on; BOTH: with a gT."""
    if len(rest) == 0:
        return rest
    else:
        s, t, most, heaviest = rest
        if BOTH:
            t += tl.sum(g_t, 1)
        top, at = tl.max(p, 1, return_indices=True)
        heaviest = tl.where(top > most, tl.cast(key, tl.int32) + at, heaviest)
        return s + tl.sum(g_s, 1), t, tl.maximum(top, most), heaviest


@triton.jit
def less_rest(sums, rest, x):
    """sums - rest [M] times the rows of the heaviest keys."""
    if len(sums) == 0 or len(x) == 0:
        return sums
    else:
        result = ()
        for i in tl.static_range(len(x)):
            part = tl.where(rest[:, None] == 0.0, 0.0, rest[:, None] * x[i].to(tl.float32))
            result = result + (sums[i] - part,)
        return result
