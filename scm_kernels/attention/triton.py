"""Attention on a GPU by the Triton kernels of `triton_forward.py` and `triton_backward.py`."""

import torch

from scm_kernels import _triton
from scm_kernels.attention.problem import Backward, Forward

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
MOST_FEATURES = 256


def unavailable() -> str | None:
    """Why no Triton kernel runs on this machine."""
    return _triton.unavailable()


def refuses(problem: Forward | Backward) -> str | None:
    """Tensors elsewhere, float64, and head dimensions above 256."""
    q, v = problem.q, problem.v
    reason = _triton.refuses(q)
    if reason is not None:
        return reason
    if q.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, not {q.dtype}"
    widest = max(q.shape[3], v.shape[3])
    if widest > MOST_FEATURES:
        return f"it has head dimensions up to {MOST_FEATURES}, not {widest}"
    return None


@_triton.without_bfloat16("out", "t_out")
def forward(problem: Forward) -> None:
    """One pass over the keys."""
    from scm_kernels.attention.triton_forward import launch_attention_forward

    launch_attention_forward(problem, _precision())


@_triton.without_bfloat16("dq", "dk", "dv", "dtq", "dtk", "dtv", "dmask", "dtmask")
def backward(problem: Backward) -> None:
    """The closed form, in a pass for each kind of gradient."""
    from scm_kernels.attention.triton_backward import launch_attention_backward

    launch_attention_backward(problem, _precision())


def _precision() -> str:
    """Of products in float32: exact, or in TF32 where PyTorch's own products are."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
