"""The sCM tangent on the CPU by the C++ kernels of csrc/cpu."""

import torch

from scm_kernels import _native
from scm_kernels.tangent import addresses
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, Problem, refuses_types


def unavailable() -> str | None:
    """Why there are no compiled kernels."""
    return _native.unavailable()


def refuses(problem: Problem) -> str | None:
    """Tensors elsewhere, and float64."""
    device = problem.f.device.type
    return refuses_types(problem) if device == "cpu" else f"it runs on the CPU, not on {device}"


def loss(problem: Loss) -> None:
    """losses, and what their gradient takes."""
    _native.module().tangent_loss(torch.get_num_threads(), *addresses.loss(problem))


def gradient(problem: Gradient) -> None:
    """The gradient in F and in log_weight."""
    scaled = torch.empty_like(problem.coefficients)
    arguments = addresses.gradient(problem, scaled)
    _native.module().tangent_gradient(torch.get_num_threads(), *arguments)


def apply(problem: Apply) -> None:
    """out = g, or zeros in a row of zero coefficients."""
    _native.module().tangent_apply(torch.get_num_threads(), *addresses.apply(problem))


def normalize(problem: Normalize) -> None:
    """out = s g."""
    coefficients = problem.f.new_empty(len(problem.f), 4, dtype=torch.float64)
    arguments = addresses.normalize(problem, coefficients)
    _native.module().tangent_normalize(torch.get_num_threads(), *arguments)
