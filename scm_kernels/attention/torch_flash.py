"""The gradient through `out` alone, by PyTorch's own flash backward from our out and lse.

On a CPU it stands in for the reference alone: it is slower than the kernels of `cpu.py`. On a GPU
it goes before ours, which make seven products a tile where it makes five, but for one kind.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.attention import reference, triton
from scm_kernels.attention.problem import Backward

# Where Triton's kernels are faster, up to so many features: on an H200 (measured, bfloat16, B = 2,
# H = 16, M = N = 4096) they take 1.1 ms where it takes 1.4 at D = 64, and 1.9 for 2.5 at D = 128.
_SLOWER = {"sm_90": 128}


def serves(problem: Backward, chosen: ModuleType) -> bool:
    """Whether it takes the problem in place of the backend that was chosen."""
    q = problem.q
    if q.device.type == "cuda":
        better = chosen is not triton or q.shape[3] > _SLOWER.get(_triton.architecture(q.device), 0)
    else:
        better = chosen is reference
    return better and refuses(problem) is None


def refuses(problem: Backward) -> str | None:
    """Why PyTorch's flash backward does not take this problem, None if it does."""
    p = problem
    if p.dt_out is not None:
        return "it has no tangent"
    if p.q.shape[1] != p.k.shape[1] or p.q.shape[3] != p.v.shape[3]:
        return "it wants as many key heads as query heads, and values as wide as queries"
    if p.dmask is not None or (p.mask is not None and p.mask.dtype == torch.bool):
        return "it takes additive masks only, and has no gradient for them"
    if p.dout.dtype != p.q.dtype:
        return "it wants cotangents of query's dtype"
    if 0 in p.q.shape or 0 in p.k.shape:
        return "it takes no empty tensors"
    if p.q.device.type == "cuda":
        return _refuses_on_gpu(p)
    if p.q.device.type != "cpu":
        return (
            f"this file knows PyTorch's kernels for CPUs and NVIDIA's GPUs, not {p.q.device.type}"
        )
    return None


def _refuses_on_gpu(p: Backward) -> str | None:
    """FlashAttention-2 as it is in PyTorch."""
    if torch.version.hip is not None or _triton.refuses(p.q) is not None:
        return "it is for NVIDIA's GPUs, from compute capability 8.0 on"
    if p.q.dtype not in (torch.float16, torch.bfloat16) or p.q.shape[3] > 256:
        return "it has float16 and bfloat16, and head dimensions up to 256"
    if p.mask is not None or (p.causal and p.q.shape[2] != p.k.shape[2]):
        return "it has no masks, and aligns causal ones at the other corner"
    if _triton.vector(p.q, p.k, p.v, p.out, p.dout) < 8:
        return "it wants rows at multiples of 16 bytes"
    return None


def backward(problem: Backward) -> None:
    """dq, dk, dv of those that are wanted."""
    p = problem
    gradients = _on_cpu(p) if p.q.device.type == "cpu" else _on_gpu(p)
    for wanted, gradient in zip((p.dq, p.dk, p.dv), gradients, strict=True):
        if wanted is not None:
            wanted.copy_(gradient)


def _on_cpu(p: Backward) -> tuple[Tensor, ...]:
    lse = p.lse.masked_fill(p.lse == -math.inf, math.inf)  # P = exp(S - lse) = 0 in a dead row
    mask = None if p.mask is None else p.mask.expand(*p.q.shape[:3], p.k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        p.dout, p.q, p.k, p.v, p.out, lse, 0.0, p.causal, attn_mask=mask, scale=p.scale
    )


def _on_gpu(p: Backward) -> tuple[Tensor, ...]:
    """No sequences of several lengths, and no dropout: no state of a random generator."""
    lengths = None, None, p.q.shape[2], p.k.shape[2]
    unused = p.lse.new_empty(0, dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(p.dout, p.q, p.k, p.v, p.out, p.lse, *lengths, 0.0, p.causal, unused, unused),
        scale=p.scale,
    )
