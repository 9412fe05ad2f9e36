"""Tiles of attention in Triton: loads, stores, products, masks. Shapes: M rows, N keys of a tile.

A head dimension need not be a power of two: a tile of features is a tuple of parts, each as wide as
a power of two, as `PARTS` says: ((0, 64), (64, 16)) covers 72 as columns 0 to 63 and 64 to 79, the
last eight of which are zeros. Products over features sum over the parts; products that give
features have an accumulator for each.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from scm_kernels._triton import coded

LOG2E = tl.constexpr(1.4426950408889634)


class View(NamedTuple):
    """A tensor: [B, H, rows, features], with the strides of all but the last in units of VEC; or a
    mask, with four strides, None where one element stands for all. Strides are `coded`."""

    data: Tensor
    strides: tuple[int | None, ...]


class Features(NamedTuple):
    """A head dimension and its parts."""

    width: int
    parts: tuple[tuple[int, int], ...]


def mask_strides(x: Tensor | None) -> tuple[int | None, ...] | None:
    """Of a mask of four dimensions; one of size 1 has no stride."""
    if x is None:
        return None
    return tuple(None if n == 1 else coded(s) for n, s in zip(x.shape, x.stride(), strict=True))


def differs_by_row(*masks: Tensor | None) -> bool:
    """Whether one of the masks that there are has more than one row."""
    return any(x is not None and x.shape[2] > 1 for x in masks)


# --- loads and stores


@triton.jit
def decoded(stride):
    """A stride that `_triton.coded` has coded."""
    return (stride - 3) >> 1


@triton.jit
def head_start(x, strides, batch, head, VEC: tl.constexpr):
    """The address of a head's first row; strides of (batch, head, row) in units of VEC."""
    batch, head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    return x + (batch * decoded(strides[0]) + head * decoded(strides[1])) * VEC


@triton.jit
def row_start(x, strides, row, VEC: tl.constexpr):
    """The address of a row of a head."""
    return x + tl.cast(row, tl.int64) * decoded(strides[2]) * VEC


@triton.jit
def _row_offsets(strides, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Of the rows of a tile from its first one on; in 32 bits, which spares registers, where
    `_triton.strides` has not said that they do not fit.
    """
    rows = tl.arange(0, ROWS)
    if len(strides) > 3:
        return rows.to(tl.int64) * decoded(strides[2]) * VEC
    else:
        return rows * decoded(strides[2]) * VEC


@triton.jit
def _load_part(where, live, columns, END: tl.constexpr, D: tl.constexpr):
    if END <= D:
        if live is None:
            return tl.load(where)
        else:
            return tl.load(where, mask=live, other=0.0)
    else:
        if live is None:
            return tl.load(where, mask=columns < D, other=0.0)
        else:
            return tl.load(where, mask=live & (columns < D), other=0.0)


@triton.jit
def load(
    x, strides, live, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """ROWS rows from address x on, in parts; `live` [ROWS] or None: all. Zeros beyond.

    TURNED gives parts [features, ROWS]: a product that wants them so, twice, then loads them from
    shared memory once, which it does not with `tl.trans`.
    """
    ROW_AXIS: tl.constexpr = 0 if TURNED else 1  # the axis that rows do not lie along
    offsets = tl.expand_dims(_row_offsets(strides, ROWS, VEC), ROW_AXIS)
    if live is not None:
        live = tl.expand_dims(live, ROW_AXIS)
    parts = ()
    for i in tl.static_range(len(PARTS)):
        columns = tl.expand_dims(PARTS[i][0] + tl.arange(0, PARTS[i][1]), 1 - ROW_AXIS)
        where = x + (offsets + columns)
        parts = parts + (_load_part(where, live, columns, PARTS[i][0] + PARTS[i][1], D),)
    return parts


@triton.jit
def store(
    x,
    strides,
    live,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
):
    """The counterpart of `load`, rounded to the dtype of x."""
    offsets = _row_offsets(strides, ROWS, VEC)[:, None]
    for i in tl.static_range(len(PARTS)):
        columns = (PARTS[i][0] + tl.arange(0, PARTS[i][1]))[None, :]
        mask = live[:, None] & (columns < D)
        tl.store(x + (offsets + columns), parts[i].to(x.dtype.element_ty), mask)


@triton.jit
def load_rows(
    x, batch, head, row, live, ROWS: tl.constexpr, F: tl.constexpr, VEC: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """ROWS rows of a head of a view, from `row` on, as `load` has them; () of an absent tensor."""
    if x is None:
        return ()
    else:
        start = row_start(head_start(x.data, x.strides, batch, head, VEC), x.strides, row, VEC)
        return load(start, x.strides, live, ROWS, F.parts, F.width, VEC, TURNED)


@triton.jit
def gather_rows(x, batch, head, rows, live, F: tl.constexpr, VEC: tl.constexpr):
    """These rows of a head of a view, as `load` has them; () of an absent tensor."""
    if x is None:
        return ()
    else:
        start = head_start(x.data, x.strides, batch, head, VEC)
        offsets = (rows.to(tl.int64) * decoded(x.strides[2]) * VEC)[:, None]
        parts = ()
        for i in tl.static_range(len(F.parts)):
            columns = (F.parts[i][0] + tl.arange(0, F.parts[i][1]))[None, :]
            where = start + (offsets + columns)
            end = F.parts[i][0] + F.parts[i][1]
            parts = parts + (_load_part(where, live[:, None], columns, end, F.width),)
        return parts


@triton.jit
def store_rows(
    x, sums, batch, head, row, live, factor, ROWS: tl.constexpr, F: tl.constexpr, VEC: tl.constexpr
):
    """factor * sums to the rows of a view from `row` on, if there is one."""
    if x is not None:
        start = row_start(head_start(x.data, x.strides, batch, head, VEC), x.strides, row, VEC)
        parts = ()
        for i in tl.static_range(len(sums)):
            parts = parts + (sums[i] * factor,)
        store(start, x.strides, live, parts, ROWS, F.parts, F.width, VEC)


@triton.jit
def mask_place(
    x, batch, head, row, key, M, N, ROWS: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr
):
    """Addresses of a tile of a mask, and which are inside of it: [ROWS, KEYS], or [KEYS, ROWS] if
    TURNED. A dimension that the mask shares stays out of the result."""
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    if TURNED:
        rows, keys = rows[None, :], keys[:, None]
    else:
        rows, keys = rows[:, None], keys[None, :]
    at, inside = x.data, N > 0
    if x.strides[0] is not None:
        at += tl.cast(batch, tl.int64) * decoded(x.strides[0])
    if x.strides[1] is not None:
        at += tl.cast(head, tl.int64) * decoded(x.strides[1])
    if x.strides[2] is not None:
        at += (tl.cast(row, tl.int64) + rows) * decoded(x.strides[2])
        inside = inside & (row + rows < M)
    if x.strides[3] is not None:
        at += (tl.cast(key, tl.int64) + keys) * decoded(x.strides[3])
        inside = inside & (key + keys < N)
    return at, inside


@triton.jit
def load_mask(
    x, batch, head, row, key, M, N,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """A tile of a mask as `mask_place` has it, None of an absent mask."""
    if x is None:
        return None
    else:
        at, inside = mask_place(x, batch, head, row, key, M, N, ROWS, KEYS, TURNED)
        if BOUNDS:
            return tl.load(at, mask=inside, other=0)
        else:
            return tl.load(at)


# --- sums and products


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Accumulators [ROWS, features], a tuple of parts."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (tl.zeros([ROWS, PARTS[i][1]], tl.float32),)
    return parts


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr):
    """total + x y; a total of None is zeros."""
    if total is None:
        return tl.dot(x, y, input_precision=PRECISION)
    else:
        return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def over_features(a, b, total, PRECISION: tl.constexpr):
    """total + a b^T: [M, features] and [N, features] give [M, N]; a total of None is zeros."""
    for i in tl.static_range(len(a)):
        total = dot(a[i], tl.trans(b[i]), total, PRECISION)
    return total


@triton.jit
def over_keys(p, v, totals, PRECISION: tl.constexpr):
    """totals + p v: [M, N] and [N, features] give [M, features], in parts."""
    result = ()
    for i in tl.static_range(len(v)):
        result = result + (dot(p, v[i], totals[i], PRECISION),)
    return result
