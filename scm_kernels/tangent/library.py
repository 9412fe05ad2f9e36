"""The four ops behind `op.py`: schema, kernel, fake, autograd and vmap.

    tangent_norm      sum of g^2 a sample, a constant
    tangent_apply     g, linear in the coefficients; F, V, X and J are constants
    tangent_normalize s g, the two at once, a constant
    tangent_distance  q = ||F - F^- - g||^2 with a known value; its gradient is `tangent_apply`

F, V, X, J are [B, D], the coefficients [B, 4]; symbols and derivation in `reference.py`.
"""

import torch
from torch import Tensor

from scm_kernels import _backends, _library
from scm_kernels.tangent.problem import Apply, Norm, Normalize

_INPUTS = "Tensor f, Tensor v, Tensor x, Tensor j, Tensor coefficients"
_INSTEAD = (
    "normalized_tangent is a constant, and consistency_loss has derivatives in reverse mode alone, "
    "in output and log_weight."
)


def _rows(x: Tensor) -> Tensor:
    """x [B, D] with a contiguous last dimension, which every backend may rely on."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _vmap(op):
    """The batching rule that all ops share: a vmapped dimension is folded into B."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        tensors = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args, in_dims, strict=True)
            if isinstance(x, Tensor)  # they come first
        ]
        out = op(*(x.flatten(0, 1) for x in tensors), *args[len(tensors) :])
        return out.unflatten(0, (size, tensors[0].shape[1])), 0

    return rule


# --- tangent_norm ---------------------------------------------------------------------------------


def _fake_norm(f, v, x, j, coefficients, backend):
    return coefficients.new_empty(coefficients.shape[0])


def _norm(f, v, x, j, coefficients, backend):
    squares = coefficients.new_empty(coefficients.shape[0])
    if f.numel() > 0:
        problem = Norm(*map(_rows, (f, v, x, j)), coefficients.contiguous(), squares)
        _backends.run("tangent", "norm", problem, backend)
    return squares


def _autograd_norm(*args):
    _library.refuse_duals("tangent_norm", _INSTEAD, args[:5])
    return tangent_norm.below(*args)


# --- tangent_apply --------------------------------------------------------------------------------


def _fake_apply(f, v, x, j, coefficients, backend):
    return f.new_empty(f.shape)


def _apply(f, v, x, j, coefficients, backend):
    out = f.new_empty(f.shape)
    if f.numel() > 0:
        problem = Apply(*map(_rows, (f, v, x, j)), coefficients.contiguous(), out)
        _backends.run("tangent", "apply", problem, backend)
    return out


class _Apply(_library.Function):
    """Linear in the coefficients; only a double backward comes here."""

    @staticmethod
    def forward(ctx, f, v, x, j, coefficients, backend):
        ctx.save_for_backward(f, v, x, j)
        ctx.scalar_dtype = coefficients.dtype
        with _library.outer_levels():
            return tangent_apply.below(f, v, x, j, coefficients, backend)

    @staticmethod
    def backward(ctx, dout):
        dout = dout.to(ctx.scalar_dtype)
        rates = torch.stack([(dout * x.detach()).sum(1) for x in ctx.saved_tensors], dim=1)
        return None, None, None, None, rates, None


def _autograd_apply(*args):
    *tensors, _backend = args
    _library.refuse_duals("tangent_apply", _INSTEAD, tensors)
    if _library.differentiable(tensors[4:]):
        return _library.apply(_Apply, *args)
    return tangent_apply.below(*args)


# --- tangent_normalize ----------------------------------------------------------------------------


def _fake_normalize(f, v, x, j, coefficients, c, mean, zero, backend):
    return f.new_empty(f.shape)


def _normalize(f, v, x, j, coefficients, c, mean, zero, backend):
    out = f.new_empty(f.shape)
    if f.numel() > 0:
        inputs = (*map(_rows, (f, v, x, j)), coefficients.contiguous())
        problem = Normalize(*inputs, c, mean, zero, out)
        _backends.run("tangent", "normalize", problem, backend)
    return out


def _autograd_normalize(*args):
    _library.refuse_duals("tangent_normalize", _INSTEAD, args[:5])
    return tangent_normalize.below(*args)


# --- tangent_distance -----------------------------------------------------------------------------


def _fake_distance(f, v, x, j, coefficients, squares, backend):
    return torch.empty_like(squares)


def _distance(f, v, x, j, coefficients, squares, backend):
    return squares.clone()


class _Distance(_library.Function):
    """q = ||F - F^- - g||^2, whose value, `squares`, is known. Gradients reach f alone."""

    @staticmethod
    def forward(ctx, f, v, x, j, coefficients, squares, backend):
        ctx.save_for_backward(f, v, x, j, coefficients)
        ctx.backend = backend
        with _library.outer_levels():
            return tangent_distance.below(f, v, x, j, coefficients, squares, backend)

    @staticmethod
    def backward(ctx, dq):
        f, v, x, j, coefficients = ctx.saved_tensors
        dq = 2 * dq.unsqueeze(1)
        # A sample that is left out: its inputs may be NaN, and no derivative is to see that.
        left_out = coefficients.eq(0).all(1, keepdim=True)
        scaled = (-dq * coefficients).masked_fill(left_out, 0.0)
        df = tangent_apply(f, v, x, j, scaled, ctx.backend)
        if torch.is_grad_enabled():
            # A second derivative may follow: F - F^- is zero in value only.
            zero = (f - f.detach()).masked_fill(left_out, 0.0)
            # In float32 at least: an infinite dq would make NaN of a float16 zero.
            wide = torch.promote_types(f.dtype, torch.float32)
            df = df + (dq.to(wide) * zero).to(df.dtype)
        return df, *(None,) * 6


def _autograd_distance(*args):
    *tensors, _backend = args
    _library.refuse_duals("tangent_distance", _INSTEAD, tensors)
    if _library.differentiable(tensors[:1]):
        return _library.apply(_Distance, *args)
    return tangent_distance.below(*args)


_ops = torch.ops.scm_kernels
tangent_norm = _library.define(
    f"tangent_norm({_INPUTS}, str backend) -> Tensor",
    kernel=_norm,
    fake=_fake_norm,
    autograd=_autograd_norm,
    vmap=_vmap(lambda *args: _ops.tangent_norm(*args)),
)
tangent_apply = _library.define(
    f"tangent_apply({_INPUTS}, str backend) -> Tensor",
    kernel=_apply,
    fake=_fake_apply,
    autograd=_autograd_apply,
    vmap=_vmap(lambda *args: _ops.tangent_apply(*args)),
)
tangent_normalize = _library.define(
    f"tangent_normalize({_INPUTS}, float c, bool mean, bool zero, str backend) -> Tensor",
    kernel=_normalize,
    fake=_fake_normalize,
    autograd=_autograd_normalize,
    vmap=_vmap(lambda *args: _ops.tangent_normalize(*args)),
)
tangent_distance = _library.define(
    f"tangent_distance({_INPUTS}, Tensor squares, str backend) -> Tensor",
    kernel=_distance,
    fake=_fake_distance,
    autograd=_autograd_distance,
    vmap=_vmap(lambda *args: _ops.tangent_distance(*args)),
)
