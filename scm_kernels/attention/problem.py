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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    masks = (b, h, m, n)
    if mask is not None and mask.ndim == 4:  # each of its sizes may be 1
        masks = tuple(1 if x == 1 else y for x, y in zip(mask.shape, masks, strict=True))
    out, stats, mask_dtypes = (b, h, m, e), (b, h, m), (torch.bool, torch.float32, q.dtype)
    tmask_dtypes = () if mask is None else (mask.dtype,)
    expected = {
        "q": (q.shape, *_checks.FLOATS),
        **dict.fromkeys(("k", "tk"), ((b, hk, n, d), q.dtype)),
        **dict.fromkeys(("v", "tv"), ((b, hk, n, e), q.dtype)),
        **{"tq": (q.shape, q.dtype), "mask": (masks, *mask_dtypes)},
        "tmask": (masks, *(x for x in tmask_dtypes if x != torch.bool)),
        **dict.fromkeys(("out", "t_out"), (out, q.dtype)),
        **dict.fromkeys(("dout", "dt_out"), (out, q.dtype, wide)),
        **dict.fromkeys(("lse", "mu"), (stats, wide)),
    }
    for name, (shape, *dtypes) in expected.items():
        _checks.bare(op, name, given.get(name), q, shape, *dtypes)
    low = given.get("lse_low")
    _checks.bare(op, "lse_low", low, q, stats if low is None or low.shape[-1] else (b, h, 0), wide)
    if "lse" in given:
        _check_backward(op, given)


def _check_backward(op: str, given: dict) -> None:
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
