"""PyTorch's own attention, where nothing is dual; and the dtype that autocast asks for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scm_kernels import _checks
from scm_kernels._duals import current_level, has_graph


def stock_attention(inputs, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
    """PyTorch's own function, of what is not dual at the innermost level."""
    if _learned_outside(inputs[3]):
        return torch.ops.aten._scaled_dot_product_attention_math(
            *autocast(inputs), dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return F.scaled_dot_product_attention(
        *inputs, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _learned_outside(mask: object) -> bool:
    """Whether autograd records mask at a level outside of the innermost transform alone.

    PyTorch looks at the innermost one when it chooses a kernel, and its fused one for CPUs has no
    gradient of the mask.
    """
    if not isinstance(mask, Tensor) or mask.device.type != "cpu" or current_level() == 0:
        return False
    if not mask.is_floating_point() or not has_graph(mask):
        return False
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def autocast(tensors: tuple) -> tuple:
    """As autocast does for PyTorch's own function: floats but float64 to the lower precision."""
    if not isinstance(tensors[0], Tensor) or not _checks.under_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )
