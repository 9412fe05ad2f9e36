"""The sCM tangent on NVIDIA's GPUs by the CUDA C++ kernels of csrc/cuda."""

import torch
from torch import Tensor

from scm_kernels import _cuda, _native
from scm_kernels.tangent import addresses
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, Problem, refuses_types


def unavailable() -> str | None:
    """Why no CUDA kernel runs on this machine."""
    return _cuda.unavailable()


def refuses(problem: Problem) -> str | None:
    """Tensors elsewhere, and float64."""
    return _cuda.refuses(problem.f) or refuses_types(problem)


def loss(problem: Loss) -> None:
    """losses, and what their gradient takes; a large sample in parts."""
    p, sums = problem, _sums(problem)
    numbers = p.t, p.warmup, p.log_weight, p.losses, p.coefficients, p.distances, p.weights
    _launch("loss", p, (*numbers, sums), *addresses.loss(p), sums.data_ptr())


def gradient(problem: Gradient) -> None:
    """The gradient in F and in log_weight."""
    p, scaled = problem, torch.empty_like(problem.coefficients)
    numbers = p.coefficients, p.distances, p.weights, p.log_weight, p.dlosses, p.dlog_weight
    _launch("gradient", p, (*numbers, scaled, p.out), *addresses.gradient(p, scaled), 0)


def apply(problem: Apply) -> None:
    """out = g, or zeros in a row of zero coefficients."""
    p = problem
    _launch("apply", p, (p.coefficients, p.out), *addresses.apply(p), 0)


def normalize(problem: Normalize) -> None:
    """out = s g; a large sample in parts."""
    p, sums = problem, _sums(problem)
    coefficients = p.f.new_empty(len(p.f), 4, dtype=torch.float64)
    numbers = p.t, p.warmup, coefficients, sums
    arguments = addresses.normalize(p, coefficients)
    _launch("normalize", p, (*numbers, p.out), *arguments, sums.data_ptr())


def _launch(step: str, p: Problem, tensors: tuple[Tensor | None, ...], *arguments) -> None:
    function = getattr(_native.module(), f"cuda_tangent_{step}")
    _cuda.launch(function, (p.f, p.v, p.x, p.j, *tensors), *arguments)


def _sums(p: Loss | Normalize) -> Tensor:
    """Room for the sums of the parts of samples; empty where samples are not cut."""
    room = _native.module().cuda_tangent_sums(*p.f.shape)
    return p.f.new_empty(room, dtype=torch.float64)
