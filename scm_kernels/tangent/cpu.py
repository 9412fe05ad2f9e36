"""The sCM tangent on the CPU by the C++ kernels of csrc/cpu."""

import torch

from scm_kernels import _native
from scm_kernels.tangent.problem import Apply, Norm, Normalize, refuses_types


def unavailable() -> str | None:
    """Why there are no compiled kernels."""
    return _native.unavailable()


def refuses(problem: Norm | Apply | Normalize) -> str | None:
    """Tensors elsewhere, float64, and scalars that are not float64."""
    device = problem.f.device.type
    return refuses_types(problem) if device == "cpu" else f"it runs on the CPU, not on {device}"


def norm(problem: Norm) -> None:
    """squares = sum of g^2."""
    _native.module().tangent_norm(*_arguments(problem), problem.squares.data_ptr())


def apply(problem: Apply) -> None:
    """out = g, or zeros in a row of zero coefficients."""
    _native.module().tangent_apply(*_arguments(problem), problem.out.data_ptr())


def normalize(problem: Normalize) -> None:
    """out = s g."""
    p = problem
    _native.module().tangent_normalize(
        *_arguments(p), p.out.data_ptr(), p.f.shape[1] if p.mean else 1, p.c, p.zero
    )


def _arguments(p: Norm | Apply | Normalize) -> tuple:
    """What all kernels begin with: sizes, threads, inputs."""
    inputs = [(x.data_ptr(), x.stride(0)) for x in (p.f, p.v, p.x, p.j)]
    type_ = _native.TYPES[p.f.dtype]
    return *p.f.shape, torch.get_num_threads(), type_, inputs, p.coefficients.data_ptr()
