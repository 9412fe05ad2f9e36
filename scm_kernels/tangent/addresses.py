"""Problems as the compiled kernels of every device take them: csrc/bindings.h."""

import torch
from torch import Tensor

from scm_kernels import _native
from scm_kernels.tangent.presets import PRESETS
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, Problem

_PRESETS = {name: i for i, name in enumerate(PRESETS)}  # Preset in csrc/problems.h


def loss(p: Loss) -> tuple:
    """All of the problem."""
    outputs = p.losses.data_ptr(), p.distances.data_ptr(), p.weights.data_ptr()
    return *_samples(p, p.coefficients), _options(p), _number(p.log_weight), *outputs


def gradient(p: Gradient, scaled: Tensor) -> tuple:
    """All of the problem, and room for the coefficients of `out`."""
    given = scaled.data_ptr(), p.distances.data_ptr(), p.weights.data_ptr()
    numbers = _number(p.log_weight), _number(p.dlosses), _number(p.dlog_weight)
    return *_samples(p, p.coefficients), p.out.data_ptr(), *given, *numbers


def apply(p: Apply) -> tuple:
    """All of the problem."""
    return *_samples(p, p.coefficients), p.out.data_ptr()


def normalize(p: Normalize, coefficients: Tensor) -> tuple:
    """All of the problem, and room for its coefficients."""
    return *_samples(p, coefficients), p.out.data_ptr(), _options(p)


def _samples(p: Problem, coefficients: Tensor) -> tuple:
    rows = [(x.data_ptr(), x.stride(0)) for x in (p.f, p.v, p.x, p.j)]
    return *p.f.shape, _native.TYPES[p.f.dtype], rows, coefficients.data_ptr()


def _options(p: Loss | Normalize) -> tuple:
    return _number(p.t), _number(p.warmup), p.r, p.sigma_data, p.c, _PRESETS[p.preset], p.zero


def _number(x: Tensor | None) -> tuple[int, int, bool] | None:
    return None if x is None else (x.data_ptr(), x.stride(0), x.dtype == torch.float64)
