"""The table of functions that have a path of their own on dual tensors: one line each.

A rule is called as `rule(mode, *args, **kwargs)` with the function's own arguments, at least one of
which is a dual tensor, or the parts of one (`_duals.Dual`); `unpack` takes both. It returns
`mode.dual(out, t_out)`, or NotImplemented for what it leaves to PyTorch. `mode.tangent_grad` says
whether autograd is to record the tangent. One that `is_shortcut` is not asked where another
transform than a jvp is at work: PyTorch does the same, if in more of the host's time or without a
gradient of the tangent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scm_kernels._duals import primals
from scm_kernels.attention.op import dual_attention
from scm_kernels.transforms import arithmetic, norm
from scm_kernels.transforms.linear import bilinear, einsum
from scm_kernels.transforms.multihead import multi_head_attention


def attention(mode, *args, **kwargs):
    """`F.scaled_dot_product_attention` by this package's op."""
    tensors = ("query", "key", "value", "attn_mask")
    args = (*args[:4], *map(primals, args[4:]))
    kwargs = {name: x if name in tensors else primals(x) for name, x in kwargs.items()}
    return dual_attention(*args, **kwargs, tangent_grad=mode.tangent_grad)


RULES = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.layer_norm: norm.layer_norm,
    F.rms_norm: norm.rms_norm,
    F.group_norm: norm.group_norm,
    F.batch_norm: norm.batch_norm,
    F.instance_norm: norm.instance_norm,
    F.glu: arithmetic.glu,
    torch.layer_norm: norm.layer_norm,
    torch.rms_norm: norm.rms_norm,  # what Dynamo makes of F.rms_norm
    torch.group_norm: norm.group_norm,
    F.linear: bilinear(F.linear, "input", "weight", "bias"),
    F.conv1d: bilinear(F.conv1d, "input", "weight", "bias"),
    F.conv2d: bilinear(F.conv2d, "input", "weight", "bias"),
    F.conv3d: bilinear(F.conv3d, "input", "weight", "bias"),
    F.conv_transpose1d: bilinear(F.conv_transpose1d, "input", "weight", "bias"),
    F.conv_transpose2d: bilinear(F.conv_transpose2d, "input", "weight", "bias"),
    F.conv_transpose3d: bilinear(F.conv_transpose3d, "input", "weight", "bias"),
    torch.matmul: bilinear(torch.matmul, "input", "other"),
    torch.mm: bilinear(torch.mm, "input", "mat2"),
    torch.bmm: bilinear(torch.bmm, "input", "mat2"),
    torch.linalg.matmul: bilinear(torch.matmul, "input", "other"),
    torch.einsum: einsum,
    Tensor.matmul: bilinear(torch.matmul, "self", "other"),
    Tensor.mm: bilinear(torch.mm, "self", "mat2"),
    Tensor.bmm: bilinear(torch.bmm, "self", "mat2"),
    Tensor.__matmul__: bilinear(torch.matmul, "self", "other"),
}
# Not to be looked into under Dynamo, whose guard on `Tensor.__rsub__` and the like does not hold.
EAGER_RULES = {
    Tensor.__rmatmul__: bilinear(Tensor.__rmatmul__, "self", "other"),
    **arithmetic.RULES,
}
