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

    n^2 = sum g^2                          step "norm":  one read of F, V, X, J
    q   = (s n)^2                          numbers a sample
    dF  = -2 dq s g                        step "apply": one more read, scalars times -2 dq s
    dw  = exp(w) p q - 1                   numbers a sample, by PyTorch's own autograd
    G   = s g                              step "normalize": norm and apply at once

dF is 2 dq (F - F^- - G) once more, and G and s and p are constants; so a second derivative is that
of 2 dq (F - F^-) and that of -2 dq G in dq. `library.py` adds the first and differentiates "apply",
which is linear in its scalars, for the second.

Half inputs are combined in float32, float64 ones in float64. Squares are summed in float64: the
square of no float32 overflows there, and the order of the sum does not show.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scm_kernels.tangent.problem import Apply, Norm, Normalize


def unavailable() -> str | None:
    """PyTorch is all that it needs."""
    return None


def refuses(problem: Norm | Apply | Normalize) -> str | None:
    """It takes every problem."""
    return None


def norm(problem: Norm) -> None:
    """squares = sum of g^2."""
    squares = problem.squares.zero_()
    for rows, columns in _blocks(problem.f):
        g = _combine(problem, rows, columns).to(squares.dtype)
        squares[rows] += g.square_().sum(1)


def apply(problem: Apply) -> None:
    """out = a F + b V + k X + d J; zeros in a row of zero coefficients."""
    left_out = problem.coefficients.eq(0).all(1, keepdim=True)
    for rows, columns in _blocks(problem.f):
        g = _combine(problem, rows, columns)
        problem.out[rows, columns] = g.masked_fill_(left_out[rows], 0.0)


def normalize(problem: Normalize) -> None:
    """out = s g by the other two steps."""
    normalize_in_two(problem, norm, apply)


def normalize_in_two(
    problem: Normalize, norm: Callable[[Norm], None], apply: Callable[[Apply], None]
) -> None:
    """`normalize` by a backend's other two steps."""
    p = problem
    inputs, squares = (p.f, p.v, p.x, p.j), p.coefficients.new_empty(len(p.coefficients))
    norm(Norm(*inputs, p.coefficients, squares))
    no_number = lost(squares)
    s = scale(squares.masked_fill_(no_number, math.nan), p.f.shape[1] if p.mean else 1, p.c)
    coefficients = s.unsqueeze(1) * p.coefficients
    if p.zero:
        coefficients.masked_fill_(no_number.unsqueeze(1), 0.0)
    apply(Apply(*inputs, coefficients, p.out))


def lost(squares: Tensor) -> Tensor:
    """Where a sum of squares is infinite or NaN; `isfinite` launches twice as many kernels."""
    return ~(squares < math.inf)


def scale(squares: Tensor, count: int, c: float) -> Tensor:
    """s = 1 / (||g|| + c), or with ||g|| / sqrt(count) for ||g||."""
    mean = squares if count == 1 else squares / count
    return 1 / (mean.sqrt() + c)


def _combine(problem: Norm | Apply, rows: slice, columns: slice) -> Tensor:
    """g of a block, in float32 or float64."""
    inputs = (problem.f, problem.v, problem.x, problem.j)
    wide = torch.float64 if problem.f.dtype == torch.float64 else torch.float32
    scalars = problem.coefficients[rows].to(wide).split(1, dim=1)
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
