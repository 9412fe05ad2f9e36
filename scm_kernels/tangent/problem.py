"""What the ops hand to a backend: one problem for each step. Symbols as in `reference.py`.

f, v, x, j are [B, D], of one floating dtype, with stride(1) == 1 (or D == 1) and any stride(0), 0
included; two of them may be the same tensor. B and D are positive. The numbers of a sample, such as
t, are [B], float32 or float64, of any stride. coefficients [B, 4] and the other numbers that a step
writes or has written are contiguous, in float64 (float32 on a device without it). Every element of
an output is to be written.

A sample whose sum of squares is not finite is lost: it becomes NaN, all of it, or, where `zero` is
set, it is left out; it touches no other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scm_kernels import _checks, _plans
from scm_kernels.tangent.presets import PRESETS


class Loss(NamedTuple):
    """losses = exp(w) p q - w, by one read of each input: n^2 = sum over D of g^2, q = (s n)^2.

    Accumulate in float32 pairwise or compensated, or better, in an order that does not change from
    run to run. A sample that is left out has zeros for all outputs, and p = 0 tells that it is.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    t: Tensor
    warmup: Tensor | None
    log_weight: Tensor | None  # w; None is 0
    r: _plans.Number  # for all samples, where there is no `warmup`
    sigma_data: float
    c: float
    preset: str
    zero: bool

    # Outputs, allocated.
    losses: Tensor  # [B] contiguous, float32, or float64 if f is
    coefficients: Tensor  # s (a, b, k, d)
    distances: Tensor  # [B], q
    weights: Tensor  # [B], p


class Gradient(NamedTuple):
    """out = -2 dL exp(w) p G, the gradient of the losses in F; and dL (exp(w) p q - 1), in w.

    G is a F + b V + k X + d J by the coefficients of `Loss`. A sample that is left out has zeros,
    whatever the inputs hold.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    coefficients: Tensor
    distances: Tensor
    weights: Tensor
    log_weight: Tensor | None
    dlosses: Tensor

    # Outputs, allocated.
    out: Tensor  # [B, D], f's dtype, contiguous
    dlog_weight: Tensor  # [B] contiguous, float32 or float64; that at w = 0 where there is none


class Apply(NamedTuple):
    """out = a F + b V + k X + d J in one elementwise pass, rounded once.

    A row of zero coefficients writes zeros, whatever the inputs hold.
    """

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    coefficients: Tensor

    # Output, allocated.
    out: Tensor  # [B, D], f's dtype, contiguous


class Normalize(NamedTuple):
    """out = s g, rounded once. One read of each input where g of a sample fits a cache."""

    f: Tensor
    v: Tensor
    x: Tensor
    j: Tensor
    t: Tensor
    warmup: Tensor | None
    r: _plans.Number
    sigma_data: float
    c: float
    preset: str
    zero: bool

    # Output, allocated.
    out: Tensor  # [B, D], f's dtype, contiguous


Problem = Loss | Gradient | Apply | Normalize


def refuses_types(problem: Problem) -> str | None:
    """Why compiled kernels do not take the types of a problem."""
    if problem.f.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has float32, bfloat16 and float16, not {problem.f.dtype}"
    return None


def check(op: str, given: dict) -> None:
    """Raise if arguments of an op, called as such, are none of a problem's."""
    f = given["f"]
    if f.ndim != 2:
        raise ValueError(
            f"torch.ops.scm_kernels.{op}, f: got {_checks.describe(f)}, expected [B, D]"
        )
    batch, wide = f.shape[:1], _checks.wide_dtype(f)
    expected = {
        "f": (f.shape, *_checks.FLOATS),
        **dict.fromkeys("vxj", (f.shape, f.dtype)),
        "coefficients": ((*batch, 4), wide),
        **dict.fromkeys(("distances", "weights"), (batch, wide)),
        **dict.fromkeys(
            ("t", "warmup", "log_weight", "dlosses"), (batch, torch.float32, torch.float64)
        ),
    }
    for name, (shape, *dtypes) in expected.items():
        _checks.bare(op, name, given.get(name), f, shape, *dtypes)
    if "preset" in given and given["preset"] not in PRESETS:
        raise ValueError(
            f"torch.ops.scm_kernels.{op}, preset: got {given['preset']!r}, expected one of "
            f"{', '.join(map(repr, PRESETS))}"
        )
