"""Attention on a GPU by the Triton kernels of `triton_forward.py` and `triton_backward.py`."""

import os
from collections.abc import Callable

import torch

from scm_kernels import _triton
from scm_kernels.attention.problem import Backward, Forward, refuses_types

MOST_FEATURES = 256
ATOMICS = "SCM_KERNELS_ATOMICS"  # 1: a faster gradient through both outputs, not deterministic


def unavailable() -> str | None:
    """Why no Triton kernel runs on this machine."""
    return _triton.unavailable()


def refuses(problem: Forward | Backward) -> str | None:
    """Tensors elsewhere, float64, and head dimensions above 256."""
    q, v = problem.q, problem.v
    reason = _triton.refuses(q) or refuses_types(problem)
    if reason is not None:
        return reason
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

    return _following(plan_attention_forward, problem, *_precision_switch(problem))


@_triton.without_bfloat16("dq", "dk", "dv", "dtq", "dtk", "dtv", "dmask", "dtmask")
def plan_backward(problem: Backward) -> Callable[[Backward], None]:
    """The closed form, in a pass for each kind of gradient."""
    from scm_kernels.attention.triton_backward_plan import plan_attention_backward

    return _following(plan_attention_backward, problem, _atomics, *_precision_switch(problem))


def _following(plan: Callable, problem: Forward | Backward, *switches: Callable) -> Callable:
    """What runs problems of one kind by what the switches are at the time."""
    if not switches:
        return plan(problem)
    plans = {}

    def run(problem):
        state = tuple(switch() for switch in switches)
        if state not in plans:
            plans[state] = plan(problem, *state)
        return plans[state](problem)

    return run


def float32_precision() -> str:
    """Of products in float32, by PyTorch's own switch. Where nobody has set it, "exact": to the
    last of float32's digits, on tensor cores where there are tiles for it. "ieee" and "tf32" mean
    what they mean for `torch.matmul`."""
    switch = torch.backends.cuda.matmul.fp32_precision
    return switch if switch in ("ieee", "tf32") else "exact"


def _precision_switch(problem: Forward | Backward) -> tuple[Callable, ...]:
    return (float32_precision,) if problem.q.dtype == torch.float32 else ()


def _atomics() -> bool:
    """Whether sums may be added up by atomics, in an order that varies from run to run."""
    switch = os.environ.get(ATOMICS, "0")
    if switch not in ("0", "1", ""):
        raise ValueError(f"{ATOMICS}: got {switch!r}, expected 0 or 1")
    return switch == "1" and not torch.are_deterministic_algorithms_enabled()
