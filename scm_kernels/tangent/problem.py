"""What the ops hand to a backend: one problem for each step. Symbols as in `reference.py`."""

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """squares = sum over D of g^2, g = a F + b V + k X + d J, in one read of each input.

    f, v, x, j [B, D], of one floating dtype, with stride(1) == 1 (or D == 1) and any stride(0), 0
    included; two of them may be the same tensor. coefficients [B, 4] contiguous: (a, b, k, d) of
    each sample. B and D are positive.

    Accumulate in float32 pairwise or compensated, or better, in an order that does not change from
    run to run. A sample with a non-finite g gets a non-finite sum, and touches no other sample.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    coefficients: Tensor  # float64 (float32 on a device without it)

    # Output, allocated; every element is to be written.
    squares: Tensor  # [B], the coefficients' dtype, contiguous


class Apply(NamedTuple):
    """out = a F + b V + k X + d J in one elementwise pass, rounded once. Inputs as in `Norm`.

    A row of zero coefficients writes zeros, whatever the inputs hold: that is how a non-finite
    sample is left out.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    coefficients: Tensor

    # Output, allocated; every element is to be written.
    out: Tensor  # [B, D], f's dtype, contiguous


class Normalize(NamedTuple):
    """out = s g with s = 1 / (||g|| + c), rounded once. Inputs as in `Norm`.

    One read of each input where g of a sample fits a cache. A sample whose sum of squares is not
    finite becomes NaN, all of it, or zeros; it touches no other.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    coefficients: Tensor
    c: float
    mean: bool  # s = 1 / (||g|| / sqrt(D) + c)
    zero: bool  # a non-finite sample becomes zeros

    # Output, allocated; every element is to be written.
    out: Tensor  # [B, D], f's dtype, contiguous


def refuses_types(problem: Norm | Apply | Normalize) -> str | None:
    """Why compiled kernels do not take the types of a problem: float64, or scalars that are not."""
    f, scalars = problem.f, problem.coefficients
    if f.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has float32, bfloat16 and float16, not {f.dtype}"
    if scalars.dtype != torch.float64:
        return f"it has coefficients in float64, not {scalars.dtype}"
    return None
