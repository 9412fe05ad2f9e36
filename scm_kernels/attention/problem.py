"""What a backend gets: one problem for each step. Symbols are those of `reference.py`."""

from typing import NamedTuple

from torch import Tensor


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
