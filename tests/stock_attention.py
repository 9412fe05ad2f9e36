"""PyTorch's own MATH attention and small inputs, against which the tests of transforms compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from scm_kernels import scaled_dot_product_attention

B, H, M, N, D, E = 2, 2, 5, 7, 4, 3
SHAPES = ((B, H, M, D), (B, H, N, D), (B, H, N, E))
EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # float32: a wrong transform is off by far more


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, tq, tk, tv."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in SHAPES * 2]


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
    assert_near(function(scaled_dot_product_attention, *args), function(stock, *args))


def assert_near(actual, truth) -> None:
    """As near as the dtype lets two right programs be."""
    first = next(x for x in tree_leaves(truth) if isinstance(x, Tensor))
    tolerance = EXACT if first.dtype == torch.float64 else CLOSE
    torch.testing.assert_close(actual, truth, **tolerance)
