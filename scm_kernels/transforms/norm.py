"""Layer, RMS, group, batch and instance norm on dual tensors.

    xhat  = r (x - mean)                                    r = 1 / sqrt(var + eps)
    txhat = r (tx - mean(tx) - xhat mean(xhat tx))          an RMS norm subtracts no means
    y  = w xhat + b
    ty = w txhat + tw xhat + tb

The primal is PyTorch's own function, bitwise. The tangent is computed in float32 for half inputs,
like the statistics of PyTorch's kernels. PyTorch has formulas for layer and batch norm too, but
they take mean and r for constants: the gradient through their tangents is wrong in x. And
`torch.compile` fails on the affine ones inside a jvp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scm_kernels import _checks
from scm_kernels._duals import Dual, has_tangent, primals, unpack
from scm_kernels.transforms.linear import on_primals, tangent_context


def layer_norm(mode, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    """`F.layer_norm`; statistics over the last dimensions, whose shape is `normalized_shape`.

    `cudnn_enable` comes from `torch.layer_norm`, and has no effect there either.
    """
    (x, tx), (w, tw), (b, tb) = map(unpack, (input, weight, bias))
    normalized_shape, eps = primals(normalized_shape), primals(eps)
    if _symmetric(mode, input, weight):
        out, *stats = torch.native_layer_norm(x, normalized_shape, w, b, eps)
        with tangent_context(mode):
            if tx.dtype.itemsize >= 4:
                # Its mean has no part in txhat. On a CPU the kernel takes it away in the form
                # mean(tx x) - mean(tx) mean(x), of which little is left if both are large.
                tx = tx - tx.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
            t_xhat, _, _ = torch.ops.aten.native_layer_norm_backward(
                tx, x, normalized_shape, *stats, None, None, (True, False, False)
            )
            t_out = _affine(out, t_xhat, w, None, tb)
        return mode.dual(out, t_out.to(out.dtype))
    out = on_primals(
        mode, lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), input, weight, bias
    )
    with tangent_context(mode):
        dims = tuple(range(-len(normalized_shape), 0))
        t_out = _affine(*_normalize(x, tx, dims, eps, center=True), w, tw, tb)
    return mode.dual(out, t_out.to(out.dtype))


def rms_norm(mode, input, normalized_shape, weight=None, eps=None):
    """`F.rms_norm`; statistics over the last dimensions, whose shape is `normalized_shape`."""
    (x, tx), (w, tw) = map(unpack, (input, weight))
    normalized_shape, eps = primals(normalized_shape), primals(eps)
    # As F.rms_norm does on a GPU; elsewhere PyTorch has no kernel.
    if x.is_cuda and (w is None or w.dtype == x.dtype) and _symmetric(mode, input, weight):
        out, scale = torch.ops.aten._fused_rms_norm(x, normalized_shape, w, eps)
        with tangent_context(mode):
            t_xhat, _ = torch.ops.aten._fused_rms_norm_backward(
                tx, x, normalized_shape, scale, None, (True, False)
            )
            t_out = _affine(out, t_xhat, w, None, None)
        return mode.dual(out, t_out.to(out.dtype))
    out = on_primals(
        mode, lambda x, w: F.rms_norm(x, normalized_shape, w, eps), input, weight, composite=True
    )
    with tangent_context(mode):
        dims = tuple(range(-len(normalized_shape), 0))
        if eps is None:  # PyTorch takes that of the dtype in which it computes
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        t_out = _affine(*_normalize(x, tx, dims, eps, center=False), w, tw, None)
    return mode.dual(out, t_out.to(out.dtype))


def group_norm(mode, input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """`F.group_norm`; x [B, C, ...], statistics over C / num_groups channels and all positions.

    `cudnn_enabled` comes from `torch.group_norm`, and has no effect there either.
    """
    (x, tx), (w, tw), (_, tb) = map(unpack, (input, weight, bias))
    num_groups, eps = primals(num_groups), primals(eps)
    out = on_primals(
        mode, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps), input, weight, bias
    )
    with tangent_context(mode):
        # [B, groups, C / groups, ...]: views in any layout, channels_last too.
        split = num_groups, x.shape[1] // num_groups
        grouped, t_grouped = (None if a is None else a.unflatten(1, split) for a in (x, tx))
        dims = tuple(range(2, grouped.ndim))
        xhat, t_xhat = _normalize(grouped, t_grouped, dims, eps, center=True)
        t_xhat = None if t_xhat is None else t_xhat.flatten(1, 2)
        channels = (-1, *(1,) * (x.ndim - 2))  # w, b [C] against x [B, C, ...]
        w, tw, tb = (None if a is None else a.reshape(channels) for a in (w, tw, tb))
        t_out = _affine(xhat.flatten(1, 2), t_xhat, w, tw, tb)
    return mode.dual(out, t_out.to(out.dtype))


def batch_norm(
    mode,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """`F.batch_norm`; x [B, C, ...], statistics over all but C, or the running ones."""

    training, momentum, eps = primals([training, momentum, eps])

    def forward(x, w, b):
        return F.batch_norm(x, *map(primals, running), w, b, training, momentum, eps)

    running = running_mean, running_var
    dims = (0, *range(2, unpack(input)[0].ndim))
    used = None if training else running
    return _channel_norm(mode, forward, input, weight, bias, dims, used, eps)


def instance_norm(
    mode,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    """`F.instance_norm`; x [B, C, ...], statistics over the positions, or the running ones."""

    use_input_stats, momentum, eps = primals([use_input_stats, momentum, eps])

    def forward(x, w, b):
        return F.instance_norm(x, *map(primals, running), w, b, use_input_stats, momentum, eps)

    running = running_mean, running_var
    dims = tuple(range(2, unpack(input)[0].ndim))
    used = None if use_input_stats else running
    return _channel_norm(mode, forward, input, weight, bias, dims, used, eps)


def _channel_norm(mode, forward, input, weight, bias, dims, running, eps):
    """x [B, C, ...] with w, b and the running mean and variance (or None) of shape [C]."""
    if running is not None and any(map(has_tangent, running)):
        raise NotImplementedError(
            "running_mean, running_var: got a dual tensor, expected plain ones: there is no "
            "derivative in the running statistics"
        )
    (x, tx), (w, tw), (_, tb) = map(unpack, (input, weight, bias))
    out = on_primals(mode, forward, input, weight, bias, composite=True)
    with tangent_context(mode):
        channels = (-1, *(1,) * (x.ndim - 2))
        w, tw, tb = (None if a is None else a.reshape(channels) for a in (w, tw, tb))
        if running is None:
            xhat, t_xhat = _normalize(x, tx, dims, eps, center=True)
        else:
            mean, var = (primals(a).reshape(channels) for a in running)
            r = torch.rsqrt(var + eps)
            xhat, t_xhat = (x - mean) * r, None if tx is None else tx * r
        t_out = _affine(xhat, t_xhat, w, tw, tb)
    return mode.dual(out, t_out.to(out.dtype))


def _symmetric(mode, input, weight) -> bool:
    """Whether txhat may be PyTorch's kernel of the gradient at tx: the Jacobian of xhat in x,
    r (1 - 1 1^T / n - xhat xhat^T / n), for an RMS norm r (1 - xhat xhat^T / n), is symmetric.

    That has no graph, and for half types a CPU keeps r no better than that.
    """
    if type(input) is not Dual or input.tangent is None or mode.tangent_grad:
        return False
    if type(weight) is Dual and weight.tangent is not None:
        return False
    x = input.primal
    return (x.is_cuda or x.dtype.itemsize >= 4) and not _checks.under_autocast(x)


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
    along = (xhat * tx).mean(dims, keepdim=True)
    return xhat, r * torch.addcmul(tx, xhat, along, value=-1)


def _affine(xhat: Tensor, t_xhat: Tensor | None, w, tw, tb) -> Tensor:
    """w txhat + tw xhat + tb, without the terms that are absent."""
    terms = []
    if t_xhat is not None:
        terms.append(t_xhat if w is None else w * t_xhat)
    if tw is not None:
        terms.append(tw * xhat)
    if tb is not None:
        # Alone in memory of its own: what is made of it may be written to.
        terms.append(tb.expand(xhat.shape) if terms else tb.expand(xhat.shape).clone())
    return sum(terms[1:], start=terms[0])
