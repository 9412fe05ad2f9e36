"""PyTorch's own MATH attention and small inputs, against which the tests of transforms compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scm_kernels import scaled_dot_product_attention

B, H, M, N, D, E = 2, 2, 5, 7, 4, 3
SHAPES = ((B, H, M, D), (B, H, N, D), (B, H, N, E))
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def draw(seed: int = 0) -> list[Tensor]:
    """q, k, v, tq, tk, tv in float64."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in SHAPES * 2]


def stock(*args, **kwargs) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def stock_jvp(q, k, v, tq, tk, tv, attn_mask=None, t_attn_mask=None, **options):
    """`attention_jvp` by `torch.func.jvp`."""

    def function(q, k, v, mask):
        return stock(q, k, v, attn_mask=mask, **options)

    if t_attn_mask is not None:
        return torch.func.jvp(function, (q, k, v, attn_mask), (tq, tk, tv, t_attn_mask))
    return torch.func.jvp(lambda *x: function(*x, attn_mask), (q, k, v), (tq, tk, tv))


def same(function, *args) -> None:
    """`function(attention, *args)` with ours and with PyTorch's."""
    truth = function(stock, *args)
    torch.testing.assert_close(function(scaled_dot_product_attention, *args), truth, **EXACT)
