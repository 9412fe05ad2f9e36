"""The tangent's kernels in Triton: the formulas of `reference.py`, one tile of samples a step.

A tile is ROWS samples by COLUMNS elements. g is combined in float32 and its squares are summed in
float64, an accumulator for each element of a tile and then a tree: nothing is atomic, so the order
depends on the shape and the alignment alone. A large sample is cut into parts, one program each.

`inputs` are F, V, X, J, and `f_row` to `j_row` what is between the starts of their rows. That and D
count VEC elements: the compiler then knows that all rows start and end at multiples of VEC, and
makes accesses of VEC elements. They are int64, so that addresses are.
"""

import triton
import triton.language as tl

# No kernel for each value of these.
_RUNTIME = ["f_row", "v_row", "x_row", "j_row", "B", "D", "parts", "count", "c", "lost"]
_RUNTIME_NUMBERS = ["t_step", "r_step", "w_step", "dl_step", "B", "r", "sd", "size", "c"]


# --- numbers of a sample, a thread each: presets.py, in float64 --------------------------------


@triton.jit
def _samples(B, SAMPLES: tl.constexpr):
    """The samples of this program, and which of them there are."""
    samples = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    return samples, samples < B


@triton.jit
def _number(x, samples, step, live):
    """x [SAMPLES] in float64."""
    return tl.load(x + samples * step, mask=live, other=0.0).to(tl.float64)


@triton.jit
def _quads(x, samples):
    """Where the four coefficients of each sample are: one tile, for accesses without gaps."""
    return x + (samples * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def tangent_coefficients_kernel(
    t,
    t_step: tl.int64,
    warmup,
    r_step: tl.int64,
    coefficients,
    B: tl.int64,
    r: tl.float64,
    sd: tl.float64,
    PRESET: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """coefficients [B, 4] = a, b, k, d."""
    samples, live = _samples(B, SAMPLES)
    time = _number(t, samples, t_step, live)
    zero, one = tl.zeros([SAMPLES], tl.float64), tl.full([SAMPLES], 1.0, tl.float64)
    if PRESET == "meanflow":
        a, b, k, d = -one, one, zero, -time
    else:
        rate = zero + r if warmup is None else _number(warmup, samples, r_step, live)
        cos, sin = tl.cos(time), tl.sin(time)
        front, d = cos * cos, -sd * rate
        if PRESET == "rcm":
            # cos^2 + (1 - r^2) sin^2 is 1 - r^2 sin^2 without its cancellation at r = 1, t = pi/2.
            front = cos * tl.sqrt(front + (1.0 - rate * rate) * sin * sin)
            d = zero - sd
        a, b, k = -sd * front, front, -rate * cos * sin
    all = tl.reshape(tl.join(tl.join(a, k), tl.join(b, d)), [SAMPLES, 4])
    tl.store(_quads(coefficients, samples), all, mask=live[:, None])


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def tangent_loss_kernel(
    coefficients,
    distances,
    weights,
    losses,
    t,
    t_step: tl.int64,
    log_weight,
    w_step: tl.int64,
    B: tl.int64,
    size: tl.float64,
    sd: tl.float64,
    c: tl.float64,
    PRESET: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """From sums of squares, in `distances`: s times the coefficients, q, p, exp(w) p q - w."""
    samples, live = _samples(B, SAMPLES)
    squares = tl.load(distances + samples, mask=live, other=0.0)
    finite = squares < float("inf")
    # NaN for infinity too: s = 1 / infinity would make zeros of a sample that is to be seen.
    squares = tl.where(finite, squares, float("nan"))
    zero, one = tl.zeros([SAMPLES], tl.float64), tl.full([SAMPLES], 1.0, tl.float64)
    s, p = one, one / size
    if PRESET == "meanflow":
        p = 1.0 / (squares + c)
    else:
        s = 1.0 / (tl.sqrt(squares / size if PRESET == "rms" else squares) + c)
    if PRESET == "rcm":
        p = 100.0 * one
    if PRESET == "sana":
        time = _number(t, samples, t_step, live)
        p = tl.cos(time) / (size * sd * tl.sin(time))
    q = s * s * squares
    w = zero if log_weight is None else _number(log_weight, samples, w_step, live)
    loss = tl.exp(w) * (p * q) - w
    at, inside = _quads(coefficients, samples), live[:, None]
    scaled = s[:, None] * tl.load(at, mask=inside, other=0.0)
    if ZERO:
        scaled = tl.where(finite[:, None], scaled, 0.0)
        q, p = tl.where(finite, q, 0.0), tl.where(finite, p, 0.0)
        loss = tl.where(finite, loss, 0.0)
    tl.store(at, scaled, mask=inside)
    tl.store(distances + samples, q, mask=live)
    tl.store(weights + samples, p, mask=live)
    tl.store(losses + samples, loss.to(losses.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_RUNTIME_NUMBERS)
def tangent_gradient_kernel(
    coefficients,
    distances,
    weights,
    log_weight,
    w_step: tl.int64,
    dlosses,
    dl_step: tl.int64,
    scaled,
    dlog_weight,
    B: tl.int64,
    SAMPLES: tl.constexpr,
):
    """scaled = -2 dL exp(w) p times the coefficients, and dw; zeros where p is 0."""
    samples, live = _samples(B, SAMPLES)
    rates = tl.load(weights + samples, mask=live, other=0.0)
    dloss = _number(dlosses, samples, dl_step, live)
    taken = rates != 0.0
    if log_weight is not None:
        rates *= tl.exp(_number(log_weight, samples, w_step, live))
    slope = dloss * (rates * tl.load(distances + samples, mask=live, other=0.0) - 1.0)
    slope = tl.where(taken, slope, 0.0).to(dlog_weight.dtype.element_ty)
    tl.store(dlog_weight + samples, slope, mask=live)
    x = tl.load(_quads(coefficients, samples), mask=live[:, None], other=0.0)
    x = tl.where(taken[:, None], (-2.0 * dloss * rates)[:, None] * x, 0.0)
    tl.store(_quads(scaled, samples), x, mask=live[:, None])


# --- passes over the elements ------------------------------------------------------------------


@triton.jit
def _scalars(coefficients, rows, live):
    """a, b, k, d [ROWS] in float64. The 32 bytes of a sample are one sector of memory."""
    scalars, at = (), coefficients + rows * 4
    if rows.shape[0] == 1:
        for i in tl.static_range(4):
            scalars = scalars + (tl.load(at + i, mask=live, other=0.0),)
    else:  # in one load: four would ask for each sample's sector four times
        column = tl.arange(0, 8)[None, :]  # of 4 columns, a thread with 8 elements loads all twice
        mask = live[:, None] & (column < 4)
        four = tl.load(at[:, None] + column, mask=mask, other=0.0)
        for i in tl.static_range(4):
            scalars = scalars + (tl.sum(tl.where(column == i, four, 0.0), axis=1),)
    return scalars


@triton.jit
def _mask(live, columns, size):
    """[ROWS, COLUMNS]: samples that are live, elements before the end."""
    return live[:, None] & (columns < size)[None, :]


@triton.jit
def _combine(inputs, strides, scalars, rows, start, mask, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """g [ROWS, COLUMNS] from element `start` on, in float32; zeros where the mask is off."""
    g = 0.0
    for i in tl.static_range(4):
        at = inputs[i] + start + (rows * strides[i] * VEC)[:, None] + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(at) if mask is None else tl.load(at, mask=mask, other=0.0)
        g += scalars[i].to(tl.float32)[:, None] * x.to(tl.float32)
    return g


@triton.jit
def _write(out, x, rows, start, mask, D, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """x [ROWS, COLUMNS] from element `start` on, rounded, into rows that have no gaps."""
    at = out + start + (rows * D * VEC)[:, None] + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _total(sums, sample, parts, PARTS: tl.constexpr):
    """The sum of a sample's parts, at most PARTS."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + sample * parts + part, mask=part < parts, other=0.0), axis=0)


@triton.jit
def _scale(squares, count, c):
    """s = 1 / (||g|| + c), with ||g|| / sqrt(count) for ||g||."""
    return (1.0 / (tl.sqrt(squares / count) + c)).to(tl.float32)


@triton.jit(do_not_specialize=_RUNTIME)
def tangent_norm_kernel(
    inputs,
    f_row: tl.int64,
    v_row: tl.int64,
    x_row: tl.int64,
    j_row: tl.int64,
    coefficients,
    sums,
    B: tl.int64,
    D: tl.int64,
    parts: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """sums [B, parts] of g^2 over a part of a sample, g = a F + b V + k X + d J."""
    program, strides = tl.program_id(0).to(tl.int64), (f_row, v_row, x_row, j_row)
    rows, part = program // parts * ROWS + tl.arange(0, ROWS), program % parts
    live = rows < B
    scalars = _scalars(coefficients, rows, live)
    tiles = tl.cdiv(D * VEC, COLUMNS)
    each = tl.cdiv(tiles, parts)
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        start = tile * COLUMNS
        mask = _mask(live, tl.arange(0, COLUMNS), D * VEC - start)
        g = _combine(inputs, strides, scalars, rows, start, mask, COLUMNS, VEC).to(tl.float64)
        squares = tl.fma(g, g, squares)
    tl.store(sums + rows * parts + part, tl.sum(squares, axis=1), mask=live)


@triton.jit(do_not_specialize=_RUNTIME)
def tangent_sum_kernel(sums, squares, parts: tl.int64, PARTS: tl.constexpr):
    """squares [B] = the sums [B, parts] of `tangent_norm_kernel`, added up."""
    sample = tl.program_id(0).to(tl.int64)
    tl.store(squares + sample, _total(sums, sample, parts, PARTS))


@triton.jit(do_not_specialize=_RUNTIME)
def tangent_apply_kernel(
    inputs,
    f_row: tl.int64,
    v_row: tl.int64,
    x_row: tl.int64,
    j_row: tl.int64,
    coefficients,
    out,
    B: tl.int64,
    D: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """out = a F + b V + k X + d J, one tile a program; zeros where a, b, k, d are all zero."""
    program, strides = tl.program_id(0).to(tl.int64), (f_row, v_row, x_row, j_row)
    tiles = tl.cdiv(D * VEC, COLUMNS)
    rows, start = program // tiles * ROWS + tl.arange(0, ROWS), program % tiles * COLUMNS
    live = rows < B
    a, b, k, d = _scalars(coefficients, rows, live)
    # A sample that is left out is not read: it may hold NaN.
    read = (a != 0.0) | (b != 0.0) | (k != 0.0) | (d != 0.0)
    columns, size = tl.arange(0, COLUMNS), D * VEC - start
    mask = _mask(read, columns, size)
    g = _combine(inputs, strides, (a, b, k, d), rows, start, mask, COLUMNS, VEC)
    _write(out, g, rows, start, _mask(live, columns, size), D, COLUMNS, VEC)


@triton.jit(do_not_specialize=_RUNTIME)
def tangent_normalize_kernel(
    inputs,
    f_row: tl.int64,
    v_row: tl.int64,
    x_row: tl.int64,
    j_row: tl.int64,
    coefficients,
    out,
    B: tl.int64,
    D: tl.int64,
    count: tl.float64,
    c: tl.float64,
    lost: tl.float32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    VEC: tl.constexpr,
):
    """out = s g, s = 1 / (||g|| / sqrt(count) + c), in one read: g of a sample, PIECES tiles of it,
    stays in registers. `lost` where the sum of squares is not finite.
    """
    strides = (f_row, v_row, x_row, j_row)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < B
    scalars = _scalars(coefficients, rows, live)
    # A sample in pieces is alone in its program, and only its last piece may end early.
    last = _mask(live, (PIECES - 1) * COLUMNS + tl.arange(0, COLUMNS), D * VEC)
    pieces, squares = (), tl.zeros([ROWS, COLUMNS], tl.float64)
    for i in tl.static_range(PIECES):
        mask = None if i < PIECES - 1 else last
        g = _combine(inputs, strides, scalars, rows, i * COLUMNS, mask, COLUMNS, VEC)
        squares = tl.fma(g.to(tl.float64), g.to(tl.float64), squares)
        pieces = pieces + (g,)
    total = tl.sum(squares, axis=1)
    finite, s = (total < float("inf"))[:, None], _scale(total, count, c)[:, None]
    for i in tl.static_range(PIECES):
        mask = None if i < PIECES - 1 else last
        scaled = tl.where(finite, pieces[i] * s, lost)
        _write(out, scaled, rows, i * COLUMNS, mask, D, COLUMNS, VEC)


@triton.jit(do_not_specialize=_RUNTIME)
def tangent_scale_kernel(
    inputs,
    f_row: tl.int64,
    v_row: tl.int64,
    x_row: tl.int64,
    j_row: tl.int64,
    coefficients,
    sums,
    out,
    D: tl.int64,
    parts: tl.int64,
    count: tl.float64,
    c: tl.float64,
    lost: tl.float32,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out = s g as in `tangent_normalize_kernel`, for a part of a sample: the sums [B, parts] are
    those of `tangent_norm_kernel`, over the same parts.
    """
    # From the end, of which the cache still holds most.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    sample, part, strides = program // parts, program % parts, (f_row, v_row, x_row, j_row)
    total = _total(sums, sample, parts, PARTS)
    finite, s = total < float("inf"), _scale(total, count, c)
    rows = sample + tl.arange(0, 1)
    live = rows >= 0  # that one sample is
    scalars = _scalars(coefficients, rows, live)
    tiles = tl.cdiv(D * VEC, COLUMNS)
    each = tl.cdiv(tiles, parts)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        start = tile * COLUMNS
        mask = _mask(live, tl.arange(0, COLUMNS), D * VEC - start)
        g = _combine(inputs, strides, scalars, rows, start, mask, COLUMNS, VEC)
        _write(out, tl.where(finite, g * s, lost), rows, start, mask, D, COLUMNS, VEC)
