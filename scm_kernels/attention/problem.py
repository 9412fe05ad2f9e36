"""What a backend gets: one problem for each step. Symbols are those of `reference.py`."""

from typing import NamedTuple

import torch
from torch import Tensor

from scm_kernels import _checks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Forward(NamedTuple):
    """Attention and its tangent, one pass.

    q, tq [B, H, M, D]; k, tk [B, Hk, N, D]; v, tv [B, Hk, N, E], H a multiple of Hk, any strides.
    An absent tangent is None. mask and tmask have four dimensions, each of the size of [B, H, M, N]
    or 1; a bool mask is True where a key takes part, any other mask is of q's dtype or float32 and
    is added. `causal` is aligned top-left.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    mask: Tensor | None
    tmask: Tensor | None
    causal: bool
    scale: float

    # Outputs, allocated; every element is to be written.
    out: Tensor  # [B, H, M, E], q's dtype; any strides with a contiguous last dimension
    t_out: Tensor  # like out
    lse: Tensor  # [B, H, M] float32 (float64 for float64), contiguous
    mu: Tensor  # like lse
    lse_low: Tensor | None  # like lse: what it has lost by rounding; None: nobody needs it


class Backward(NamedTuple):
    """Gradients through `out` and `t_out`, from what the forward saved.

    An absent cotangent is None, never both. Where dt_out is None, so are tq, tk, tv, tmask, t_out
    and mu: the gradient through `out` alone does not need them. A gradient that nobody asks for is
    None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    mask: Tensor | None
    tmask: Tensor | None
    causal: bool
    scale: float
    out: Tensor
    t_out: Tensor | None
    lse: Tensor
    mu: Tensor | None
    lse_low: Tensor | None
    dout: Tensor | None
    dt_out: Tensor | None

    # Outputs, allocated, each like the input that it is the gradient of; every element is to be
    # written.
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dtq: Tensor | None
    dtk: Tensor | None
    dtv: Tensor | None
    dmask: Tensor | None
    dtmask: Tensor | None


def refuses_types(problem: Forward | Backward) -> str | None:
    """Why compiled kernels do not take the dtype of a problem."""
    if problem.q.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, not {problem.q.dtype}"
    return None


def check(op: str, given: dict) -> None:
    """Raise if arguments of the op, called as such, are none of a problem's."""
    q, k, v, mask = (given[name] for name in ("q", "k", "v", "mask"))
    for name, x in zip("qkv", (q, k, v), strict=True):
        if x.ndim != 4:
            raise ValueError(
                f"torch.ops.scm_kernels.{op}, {name}: got {_checks.describe(x)}, expected "
                "[B, H, tokens, features]"
            )
    (b, h, m, d), (hk, n, e) = q.shape, v.shape[1:]
    if h % max(hk, 1) != 0 or (hk == 0) != (h == 0):
        raise ValueError(
            f"torch.ops.scm_kernels.{op}, q: got {h} heads, expected a multiple of {hk}"
        )
    shapes = {"q": q.shape, "k": (b, hk, n, d), "v": (b, hk, n, e)}
    _checks.bare(op, "q", q, q, q.shape, *_checks.FLOATS)
    for name in ("k", "v", "tq", "tk", "tv"):
        _checks.bare(op, name, given[name], q, shapes[name[-1]], q.dtype)
    if mask is not None or given["tmask"] is not None:
        _check_masks(op, given, (b, h, m, n))
    if "lse" in given:
        _check_backward(op, given, (b, h, m, e))


def _check_masks(op: str, given: dict, shape: tuple) -> None:
    q, mask, tmask = given["q"], given["mask"], given["tmask"]
    dtypes = () if mask is None or mask.dtype == torch.bool else (mask.dtype,)
    if mask is not None and mask.ndim == 4:  # each of its sizes may be 1
        shape = tuple(1 if x == 1 else y for x, y in zip(mask.shape, shape, strict=True))
    _checks.bare(op, "mask", mask, q, shape, torch.bool, torch.float32, q.dtype)
    _checks.bare(op, "tmask", tmask, q, shape, *dtypes)


def _check_backward(op: str, given: dict, shape: tuple) -> None:
    q, low, stats = given["q"], given["lse_low"], shape[:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name in ("out", "t_out"):
        _checks.bare(op, name, given[name], q, shape, q.dtype)
    for name in ("dout", "dt_out"):
        _checks.bare(op, name, given[name], q, shape, q.dtype, wide)
    for name in ("lse", "mu"):
        _checks.bare(op, name, given[name], q, stats, wide)
    _checks.bare(
        op, "lse_low", low, q, stats if low is None or low.shape[-1] else (*stats[:2], 0), wide
    )
    if given["dout"] is None and given["dt_out"] is None:
        raise ValueError(f"torch.ops.scm_kernels.{op}, dout, dt_out: got none, expected one")
    through = given["dt_out"] is not None
    for name in ("t_out", "mu"):
        if through and given[name] is None:
            raise ValueError(
                f"torch.ops.scm_kernels.{op}, {name}: got None with a dt_out, expected a tensor"
            )
    inputs = ("q", "k", "v", "tq", "tk", "tv", "mask", "tmask")
    wanted = given["wanted"]
    if len(wanted) != 8 or any(w and given[x] is None for x, w in zip(inputs, wanted, strict=True)):
        raise ValueError(
            f"torch.ops.scm_kernels.{op}, wanted: got {list(wanted)}, expected a bool for each of "
            f"{', '.join(inputs)}, True for none that is absent"
        )
