"""The operations that `torch.utils.flop_counter.FlopCounterMode` counts for attention.

As PyTorch counts those of its own: 2 B H M N for each feature of each matrix product that the
mathematics of `reference.py` needs, whatever a mask leaves out and a kernel computes again.
"""

from torch import Tensor


def forward(q, k, v, tq, tk, tv, mask, tmask, *options, out_val=None) -> int:
    """Of `attention_jvp`: S and P V; tq K^T, q tK^T, H V and P tV where there are such tangents."""
    features = 1 + _present(tq, tk)
    values = 1 + _scores_move(tq, tk, tmask) + _present(tv)
    return _operations(q, k, v, features, values)


def backward(dout, dt_out, q, k, v, tq, tk, tv, mask, tmask, *rest, out_val=None) -> int:
    """Of `attention_jvp_backward`: S and the tangents of the scores again, the cotangents of P and
    of H, and what a wanted gradient is a sum of."""
    dq, dk, dv, dtq, dtk, dtv, *_ = rest[-2]
    if dt_out is None:
        tq = tk = tv = tmask = None
    moved = _scores_move(tq, tk, tmask)
    features = 1 + _present(tq, tk)
    features += dq * (1 + _present(tk)) + dk * (1 + _present(tq)) + dtq + dtk
    values = _present(dout) + moved + _present(tv)
    values += dv * (_present(dout) + moved) + dtv
    return _operations(q, k, v, features, values)


def _present(*tensors: Tensor | None) -> int:
    return sum(x is not None for x in tensors)


def _scores_move(*tangents: Tensor | None) -> bool:
    """Whether H, the tangent of P, is not zero."""
    return _present(*tangents) > 0


def _operations(q: Tensor, k: Tensor, v: Tensor, features: int, values: int) -> int:
    """Of so many products over D features, and so many over E."""
    b, h, m, d = q.shape
    return 2 * b * h * m * k.shape[2] * (features * d + values * v.shape[3])
