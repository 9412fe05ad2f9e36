"""Attention on a GPU by the Triton kernels of `triton_forward.py` and `triton_backward.py`."""

from collections.abc import Callable

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
    widest, most, name = max(q.shape[3], v.shape[3]), MOST_FEATURES, ""
    if q.dtype == torch.float32:
        from scm_kernels.attention.triton_config import FLOAT_FEATURES, family

        both = isinstance(problem, Backward) and problem.dt_out is not None
        most = FLOAT_FEATURES.get(family(_triton.architecture(q.device)), (most, most))[both]
        name = " in float32 on this GPU" if most < MOST_FEATURES else ""
    if widest > most:
        return f"it has head dimensions up to {most}{name}, not {widest}"
    return None


@_triton.without_bfloat16("out", "t_out")
def plan_forward(problem: Forward) -> Callable[[Forward], None]:
    """One pass over the keys."""
    from scm_kernels.attention.triton_forward import plan_attention_forward

    return _by_precision(plan_attention_forward, problem)


@_triton.without_bfloat16("dq", "dk", "dv", "dtq", "dtk", "dtv", "dmask", "dtmask")
def plan_backward(problem: Backward) -> Callable[[Backward], None]:
    """The closed form, in a pass for each kind of gradient."""
    from scm_kernels.attention.triton_backward_plan import plan_attention_backward

    return _by_precision(plan_attention_backward, problem)


def _by_precision(plan: Callable, problem: Forward | Backward) -> Callable:
    """Products in float32 are exact, or in TF32 where PyTorch's own are when they run."""
    if problem.q.dtype != torch.float32:
        return plan(problem, "ieee")
    plans = {}

    def run(problem):
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        precision = "tf32" if tf32 else "ieee"
        if precision not in plans:
            plans[precision] = plan(problem, precision)
        plans[precision](problem)

    return run
