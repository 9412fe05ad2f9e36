"""The sCM tangent, its normalisation and its loss in plain PyTorch: the specification, and the backend for everywhere.

Symbols, for one sample of D elements: F the network's output, F^- the same with its gradient stopped, V = dx/dt,
X = x_t, J the tangent of F along (cos t sin t V / sd, cos t sin t); r the warm-up, w the learned log weight.

    g = a F^- + b V + k X + d J             four scalars a sample, from t: `presets.py`
    s = 1 / (||g|| + c)                     the normaliser; G = s g is the normalised tangent
    L = exp(w) p ||F - F^- - G||^2 - w      p = 1 / D in the paper

For the paper (arXiv 2410.11081, Algorithm 1), g = cos t df/dt at r = 1:

    g = -cos^2 t (sd F^- - V) - r (cos t sin t X + sd J)

F - F^- is zero in value but not in derivative, so the value of the distance q = ||F - F^- - G||^2 is ||G||^2 and needs
the norm of g alone, while its gradient is that of a regression to a constant target:

    n^2 = sum g^2                           step "norm":  one read of F, V, X, J
    q   = (s n)^2                           nothing to compute
    dF  = -2 dq s g                         step "apply": one more pass, with the four scalars times -2 dq s
    dw  = exp(w) p q - 1                    PyTorch's own autograd, on [B]

Differentiating again, dF = 2 dq (F - F^- - G), so d(dF) = 2 dq dF' - 2 d(dq) G: `library.py` adds the first term
where a second derivative may be asked for. s and p are constants: no gradient flows through n.

Half inputs are combined in float32 and float64 ones in float64; squares are summed in float64, where neither the
square of a large float32 overflows nor the order of summation shows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from scm_kernels.tangent.problem import Apply, Norm


def unavailable() -> str | None:
    """PyTorch is all that it needs."""
    return None


def refuses(problem: Norm | Apply) -> str | None:
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
    """Blocks of x [B, D] that stay in a cache on a CPU, and that bound the temporaries elsewhere."""
    budget = 2**16 if x.device.type == "cpu" else 2**24
    width = min(x.shape[1], budget)
    height = max(budget // width, 1)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            yield slice(i, i + height), slice(j, j + width)
