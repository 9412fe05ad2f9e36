"""Layer, RMS and group norm on dual tensors.

    xhat  = r (x - mean)                                    r = 1 / sqrt(var + eps)
    txhat = r (tx - mean(tx) - xhat mean(xhat tx))          an RMS norm subtracts no means
    y  = w xhat + b
    ty = w txhat + tw xhat + tb

The primal is PyTorch's own function, bitwise. The tangent is computed in float32 for half inputs,
like the statistics of PyTorch's kernels. PyTorch has a formula for layer_norm too, but it takes mean
and r for constants: the gradient through its tangent is wrong in x. And `torch.compile` fails on
the affine ones inside a jvp.
"""

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from scm_kernels.attention.op import unpack
from scm_kernels.transforms.linear import tangent_context


def layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """`F.layer_norm`; statistics over the last dimensions, whose shape is `normalized_shape`."""
    (x, tx), (w, tw), (b, tb) = map(unpack, (input, weight, bias))
    out = F.layer_norm(x, normalized_shape, w, b, eps)
    with tangent_context(mode):
        dims = tuple(range(-len(normalized_shape), 0))
        t_out = _affine(*_normalize(x, tx, dims, eps, center=True), w, tw, tb)
    return forward_ad.make_dual(out, t_out.to(out.dtype))


def rms_norm(mode, input, normalized_shape, weight=None, eps=None):
    """`F.rms_norm`; statistics over the last dimensions, whose shape is `normalized_shape`."""
    (x, tx), (w, tw) = map(unpack, (input, weight))
    out = F.rms_norm(x, normalized_shape, w, eps)
    with tangent_context(mode):
        dims = tuple(range(-len(normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        t_out = _affine(*_normalize(x, tx, dims, eps, center=False), w, tw, None)
    return forward_ad.make_dual(out, t_out.to(out.dtype))


def group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5):
    """`F.group_norm`; x [B, C, ...], statistics over C / num_groups channels and all positions."""
    (x, tx), (w, tw), (b, tb) = map(unpack, (input, weight, bias))
    out = F.group_norm(x, num_groups, w, b, eps)
    with tangent_context(mode):
        grouped, t_grouped = (
            None if a is None else a.reshape(a.shape[0], num_groups, -1) for a in (x, tx)
        )
        xhat, t_xhat = _normalize(grouped, t_grouped, (-1,), eps, center=True)
        t_xhat = None if t_xhat is None else t_xhat.reshape(x.shape)
        channels = (-1, *(1,) * (x.ndim - 2))  # w, b [C] against x [B, C, ...]
        w, tw, tb = (None if a is None else a.reshape(channels) for a in (w, tw, tb))
        t_out = _affine(xhat.reshape(x.shape), t_xhat, w, tw, tb)
    return forward_ad.make_dual(out, t_out.to(out.dtype))


def _normalize(x, tx, dims: tuple[int, ...], eps: float, *, center: bool):
    """(xhat, txhat); txhat is None where tx is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, tx = x.to(wide), None if tx is None else tx.to(wide)
    if center:
        x = x - x.mean(dims, keepdim=True)
    r = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    xhat = x * r
    if tx is None:
        return xhat, None
    if center:
        tx = tx - tx.mean(dims, keepdim=True)
    return xhat, r * (tx - xhat * (xhat * tx).mean(dims, keepdim=True))


def _affine(xhat: Tensor, t_xhat: Tensor | None, w, tw, tb) -> Tensor:
    """w txhat + tw xhat + tb, without the terms that are absent."""
    terms = []
    if t_xhat is not None:
        terms.append(t_xhat if w is None else w * t_xhat)
    if tw is not None:
        terms.append(tw * xhat)
    if tb is not None:
        terms.append(tb.expand(xhat.shape))
    return sum(terms[1:], start=terms[0])
