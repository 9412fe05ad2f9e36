"""Attention on the CPU by the C++ kernels of csrc/cpu."""

import torch
from torch import Tensor

from scm_kernels import _native
from scm_kernels.attention.problem import Backward, Forward, refuses_types


def unavailable() -> str | None:
    """Why there are no compiled kernels."""
    return _native.unavailable()


def refuses(problem: Forward | Backward) -> str | None:
    """Tensors elsewhere, and float64."""
    device = problem.q.device.type
    return refuses_types(problem) if device == "cpu" else f"it runs on the CPU, not on {device}"


def forward(problem: Forward) -> None:
    """One pass over the keys."""
    p = problem
    _native.module().attention_forward(
        *_arguments(p),
        _native.address(p.out),
        _native.address(p.t_out),
        p.lse.data_ptr(),
        p.mu.data_ptr(),
        _pointer(p.lse_low),
    )


def backward(problem: Backward) -> None:
    """The closed form; gradients of masks are summed in float32."""
    p = problem
    masks = [
        None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (p.dmask, p.dtmask)
    ]
    shape = (*p.q.shape[:3], p.k.shape[2])
    gradients = (p.dq, p.dk, p.dv, p.dtq, p.dtk, p.dtv)
    _native.module().attention_backward(
        *_arguments(p),
        [_native.address(x) for x in (p.out, p.t_out, p.dout, p.dt_out)],
        p.lse.data_ptr(),
        _pointer(p.mu),
        _pointer(p.lse_low),
        [_native.address(x) for x in gradients] + [_mask(x, shape) for x in masks],
    )
    for to, total in zip((p.dmask, p.dtmask), masks, strict=True):
        if to is not None:
            to.copy_(total)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _arguments(p: Forward | Backward) -> tuple:
    """What both kernels begin with: threads, sizes, options, inputs."""
    (b, h, m, d), (_, hk, n, e) = p.q.shape, p.v.shape
    inputs = [_native.address(x) for x in (p.q, p.k, p.v, p.tq, p.tk, p.tv)]
    inputs += [_mask(x, (b, h, m, n)) for x in (p.mask, p.tmask)]
    return torch.get_num_threads(), (b, h, hk, m, n, d, e), p.causal, p.scale, inputs


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple | None:
    return None if mask is None else _native.address(mask.expand(shape))
