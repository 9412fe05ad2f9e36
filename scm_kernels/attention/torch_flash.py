"""The gradient through `out` alone, by PyTorch's own flash backward from out and lse.

It stands in for the reference where no backend of ours has kernels: it is slower than those of
`cpu.py`.
"""

import math

import torch

from scm_kernels.attention.problem import Backward


def refuses(problem: Backward) -> str | None:
    """Why PyTorch's flash backward does not take this problem, None if it does."""
    p = problem
    if p.dt_out is not None:
        return "it has no tangent"
    if p.q.device.type != "cpu":
        return f"this file knows PyTorch's CPU kernel only, not {p.q.device.type}"
    if p.q.shape[1] != p.k.shape[1] or p.q.shape[3] != p.v.shape[3]:
        return "it wants as many key heads as query heads, and values as wide as queries"
    if p.dmask is not None or (p.mask is not None and p.mask.dtype == torch.bool):
        return "it takes additive masks only, and has no gradient for them"
    if 0 in p.q.shape or 0 in p.k.shape:
        return "it takes no empty tensors"
    return None


def backward(problem: Backward) -> None:
    """dq, dk, dv of those that are wanted."""
    p = problem
    lse = p.lse.masked_fill(p.lse == -math.inf, math.inf)  # P = exp(S - lse) = 0 in a dead row
    mask = None if p.mask is None else p.mask.expand(*p.q.shape[:3], p.k.shape[2])
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        p.dout, p.q, p.k, p.v, p.out, lse, 0.0, p.causal, attn_mask=mask, scale=p.scale
    )
    for wanted, gradient in zip((p.dq, p.dk, p.dv), gradients, strict=True):
        if wanted is not None:
            wanted.copy_(gradient)
