"""The gradient through `out` alone by a backward of PyTorch's attention, from our out and lse.

On a CPU its flash backward stands in for the reference alone, not in float32: it is slower than
the kernels of `cpu.py`. On a GPU the flash one, in half types without a mask, makes five products a
tile where ours make seven, and goes before Triton's kernels where it is faster; it does not sum dq
in the same order every time, but under `torch.use_deterministic_algorithms`. The memory-efficient
one is not used: in half types it takes 2 to 3 times as long as Triton's (measured on an H200), and
in float32 its scores are not those that lse is of, so that P = exp(S - lse) is off where one key
takes it all: at logits of 30 the error of dq was 3 times eager's (measured).
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.attention import reference, triton
from scm_kernels.attention.problem import Backward

# Where Triton's kernels are faster, up to so many features: on an H200 (measured, bfloat16, B = 2,
# H = 16, M = N = 4096) they take 1.1 ms where flash takes 1.4 at D = 64, and 1.9 for 2.5 at 128.
_FLASH_SLOWER = {"sm_90": 128}


def serves(problem: Backward, chosen: ModuleType) -> bool:
    """Whether it takes the problem in place of the backend that was chosen."""
    if refuses(problem) is not None:
        return False
    if problem.q.device.type == "cpu":
        return chosen is reference
    return chosen is not triton or not _slower(problem)


def _slower(p: Backward) -> bool:
    """Whether Triton's kernels take the problem in less time than PyTorch's on a GPU."""
    return p.q.shape[3] <= _FLASH_SLOWER.get(_triton.architecture(p.q.device), 0)


def refuses(problem: Backward) -> str | None:
    """Why PyTorch has no backward for this problem, None if it has."""
    p = problem
    if p.dt_out is not None:
        return "it has no tangent"
    if p.q.shape[1] != p.k.shape[1]:
        return "it wants as many key heads as query heads"
    if p.dmask is not None or (p.mask is not None and p.mask.dtype == torch.bool):
        return "it takes additive masks only, and has no gradient for them"
    if p.mask is not None and p.q.dtype.itemsize < 4:
        return "half types may not hold the cotangents under a mask"  # 1e-5 / 1024 is no float16
    if 0 in p.q.shape or 0 in p.k.shape:
        return "it takes no empty tensors"
    if p.q.device.type == "cuda":
        return _flash_refuses(p)
    if p.q.device.type != "cpu":
        return (
            f"this file knows PyTorch's kernels for CPUs and NVIDIA's GPUs, not {p.q.device.type}"
        )
    if p.q.dtype == torch.float32:
        return "its P has the rounding error of lse, more than eager's at large scores"
    return None if p.q.shape[3] == p.v.shape[3] else "it wants values as wide as queries"


def _flash_refuses(p: Backward) -> str | None:
    """FlashAttention-2 as it is in PyTorch."""
    if torch.version.hip is not None or _triton.refuses(p.q) is not None:
        return "it is for NVIDIA's GPUs, from compute capability 8.0 on"
    if p.q.dtype not in (torch.float16, torch.bfloat16) or p.q.shape[3] > 256:
        return "it has float16 and bfloat16, and head dimensions up to 256"
    if p.q.shape[3] != p.v.shape[3]:
        return "it wants values as wide as queries"
    if p.mask is not None or (p.causal and p.q.shape[2] != p.k.shape[2]):
        return "it has no masks, and aligns causal ones at the other corner"
    width = 16 // p.q.element_size()
    if p.q.shape[3] % width:
        return f"it wants features in multiples of {width}"
    if _triton.vector(p.q, p.k, p.v, p.out, p.dout) < width:
        return "it wants rows at multiples of 16 bytes"
    return None


def plan_backward(problem: Backward) -> Callable[[Backward], None]:
    """dq, dk, dv of those that are wanted."""
    gradients = _on_cpu if problem.q.device.type == "cpu" else _flash

    def run(p: Backward) -> None:
        if p.lse_low is not None:
            # What it computes is linear in dO, and its P = exp(S - lse) off by a factor in a row.
            p = p._replace(dout=p.dout * torch.exp(-p.lse_low)[..., None])
        for wanted, gradient in zip((p.dq, p.dk, p.dv), gradients(p), strict=False):
            if wanted is not None:
                wanted.copy_(gradient)

    return run


def _on_cpu(p: Backward) -> tuple[Tensor, ...]:
    mask, lse = p.mask, p.lse
    if mask is not None:
        mask = mask.expand(*p.q.shape[:3], p.k.shape[2])
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # of a row without keys: P = 0 there
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        p.dout, p.q, p.k, p.v, p.out, lse, 0.0, p.causal, attn_mask=mask, scale=p.scale
    )


def _flash(p: Backward) -> tuple[Tensor, ...]:
    """No sequences of several lengths, and no dropout: no state of a random generator."""
    lengths = None, None, p.q.shape[2], p.k.shape[2]
    unused = p.lse.new_empty(0, dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(p.dout, p.q, p.k, p.v, p.out, p.lse, *lengths, 0.0, p.causal, unused, unused),
        scale=p.scale,
    )
