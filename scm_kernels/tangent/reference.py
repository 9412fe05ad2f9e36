"""The sCM tangent and its loss in plain PyTorch: the specification, and a backend for everywhere.

Symbols, for one sample of D elements: F the network's output, F^- the same with its gradient
stopped, V = dx/dt, X = x_t, J the tangent of F along (cos t sin t V / sd, cos t sin t), r the
warm-up, w the learned log weight.

    g = a F^- + b V + k X + d J            four scalars a sample, from t: `presets.py`
    s = 1 / (||g|| + c)                    the normaliser; G = s g is the normalised tangent
    L = exp(w) p ||F - F^- - G||^2 - w     p = 1 / D in the paper

In the paper (arXiv 2410.11081, Algorithm 1), where g = cos t df/dt at r = 1:

    g = -cos^2 t (sd F^- - V) - r (cos t sin t X + sd J)

F - F^- is zero in value but not in derivative. So the distance q = ||F - F^- - G||^2 has the value
||G||^2, which needs the norm of g alone, and the gradient of a regression to a constant:

    n^2 = sum g^2                          step "loss": one read of F, V, X, J,
    q   = (s n)^2, exp(w) p q - w          and numbers a sample
    dF  = -2 dL exp(w) p s g               step "gradient": one more read
    dw  = dL (exp(w) p q - 1)              numbers a sample
    G   = s g                              step "normalize"

With dq = dL exp(w) p, dF is 2 dq (F - F^- - G) once more, and G and s and p are constants; so a
second derivative is that of 2 dq (F - F^-) and that of -2 dq G in dq. `library.py` adds the first
and differentiates step "apply", any a F + b V + k X + d J, for the second: it is linear in its
scalars.

Half inputs are combined in float32, float64 ones in float64, by scalars of that dtype: from inputs
of 1e30 on the gradient's are so small that they lose digits in float32. Squares are summed in
float64: the square of no float32 overflows there, and the order of the sum does not show.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scm_kernels import _checks
from scm_kernels.tangent.presets import PRESETS
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, Problem


def unavailable() -> str | None:
    """PyTorch is all that it needs."""
    return None


def refuses(problem: Problem) -> str | None:
    """It takes every problem."""
    return None


def loss(problem: Loss) -> None:
    """losses, and what their gradient takes."""
    p, preset = problem, PRESETS[problem.preset]
    scaled, q, squares, left_out = _scaled(p)
    weights = preset.weight(p.t.to(squares.dtype), squares, p.f.shape[1], p.sigma_data, p.c)
    w = torch.zeros_like(weights) if p.log_weight is None else p.log_weight.to(weights.dtype)
    p.coefficients.copy_(scaled)
    p.distances.copy_(q)
    p.weights.copy_(weights.masked_fill_(left_out, 0.0))
    p.losses.copy_((w.exp() * (p.weights * q) - w).masked_fill_(left_out, 0.0))


def gradient(problem: Gradient) -> None:
    """The gradient in F and in log_weight."""
    p, rates, dlosses = problem, problem.weights, problem.dlosses.to(problem.weights.dtype)
    if p.log_weight is not None:
        rates = rates * p.log_weight.to(rates.dtype).exp()
    left_out = p.weights.eq(0)
    scaled = (-2 * dlosses * rates).unsqueeze(1) * p.coefficients
    scaled.masked_fill_(left_out.unsqueeze(1), 0.0)
    apply(Apply(p.f, p.v, p.x, p.j, scaled, p.out))
    slopes = dlosses * (rates * p.distances - 1)
    p.dlog_weight.copy_(slopes.masked_fill_(left_out, 0.0))


def apply(problem: Apply) -> None:
    """out = a F + b V + k X + d J; zeros in a row of zero coefficients."""
    p, left_out = problem, problem.coefficients.eq(0).all(1, keepdim=True)
    for rows, columns in _blocks(p.f):
        g = _combine(p, p.coefficients, rows, columns)
        p.out[rows, columns] = g.masked_fill_(left_out[rows], 0.0)


def normalize(problem: Normalize) -> None:
    """out = s g."""
    p = problem
    scaled, *_ = _scaled(p)
    apply(Apply(p.f, p.v, p.x, p.j, scaled, p.out))


def _scaled(p: Loss | Normalize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (a, b, k, d), q, ||g||^2, and whether the sample is left out."""
    preset, (batch, size), dtype = PRESETS[p.preset], p.f.shape, _checks.wide_dtype(p.f)
    r = p.r if p.warmup is None else p.warmup.to(dtype)
    coefficients = torch.stack(preset.scalars(p.t.to(dtype), r, p.sigma_data), dim=1)
    squares = coefficients.new_zeros(batch)
    for rows, columns in _blocks(p.f):
        squares[rows] += _combine(p, coefficients, rows, columns).to(dtype).square_().sum(1)
    lost = ~squares.isfinite()
    # NaN for infinity too: s = 1 / infinity would make zeros of a sample that is to be seen.
    squares.masked_fill_(lost, math.nan)
    s = torch.ones_like(squares)
    if preset.normalised:
        s = 1 / ((squares / size if preset.mean else squares).sqrt() + p.c)
    left_out = lost if p.zero else torch.zeros_like(lost)
    scaled = (s.unsqueeze(1) * coefficients).masked_fill_(left_out.unsqueeze(1), 0.0)
    return scaled, (s * s * squares).masked_fill_(left_out, 0.0), squares, left_out


def _combine(p: Problem, coefficients: Tensor, rows: slice, columns: slice) -> Tensor:
    """g of a block, in float32 or float64."""
    inputs = (p.f, p.v, p.x, p.j)
    wide = torch.float64 if p.f.dtype == torch.float64 else torch.float32
    scalars = coefficients[rows].to(wide).split(1, dim=1)
    g = scalars[0] * inputs[0][rows, columns]
    for scalar, x in zip(scalars[1:], inputs[1:], strict=True):
        g.addcmul_(scalar, x[rows, columns])
    return g


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of x [B, D] that stay in a CPU's cache, and that bound the temporaries elsewhere."""
    budget = 2**16 if x.device.type == "cpu" else 2**24
    width = min(x.shape[1], budget)
    height = max(budget // width, 1)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            yield slice(i, i + height), slice(j, j + width)
