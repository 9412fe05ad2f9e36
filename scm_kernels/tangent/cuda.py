"""The sCM tangent on NVIDIA's GPUs by the CUDA C++ kernels of csrc/cuda."""

from torch import Tensor

from scm_kernels import _cuda, _native
from scm_kernels.tangent.problem import Apply, Norm, Normalize, refuses_types


def unavailable() -> str | None:
    """Why no CUDA kernel runs on this machine."""
    return _cuda.unavailable()


def refuses(problem: Norm | Apply | Normalize) -> str | None:
    """Tensors elsewhere, float64, and scalars that are not float64."""
    return _cuda.refuses(problem.f) or refuses_types(problem)


def norm(problem: Norm) -> None:
    """squares = sum of g^2; a large sample in parts."""
    p, arguments = problem, _arguments(problem)
    sums = _sums(p, arguments)
    _cuda.launch(
        "cuda_tangent_norm",
        (*_inputs(p), p.squares, sums),
        *arguments,
        p.squares.data_ptr(),
        sums.data_ptr(),
    )


def apply(problem: Apply) -> None:
    """out = g, or zeros in a row of zero coefficients."""
    p = problem
    _cuda.launch("cuda_tangent_apply", (*_inputs(p), p.out), *_arguments(p), p.out.data_ptr())


def normalize(problem: Normalize) -> None:
    """out = s g; a large sample in parts."""
    p, arguments = problem, _arguments(problem)
    sums = _sums(p, arguments)
    _cuda.launch(
        "cuda_tangent_normalize",
        (*_inputs(p), p.out, sums),
        *arguments,
        p.out.data_ptr(),
        p.f.shape[1] if p.mean else 1,
        p.c,
        p.zero,
        sums.data_ptr(),
    )


def _inputs(p: Norm | Apply | Normalize) -> tuple[Tensor, ...]:
    return p.f, p.v, p.x, p.j, p.coefficients


def _arguments(p: Norm | Apply | Normalize) -> tuple:
    """What all functions begin with: sizes, type, inputs."""
    inputs = [(x.data_ptr(), x.stride(0)) for x in (p.f, p.v, p.x, p.j)]
    return *p.f.shape, _native.TYPES[p.f.dtype], inputs, p.coefficients.data_ptr()


def _sums(p: Norm | Normalize, arguments: tuple) -> Tensor:
    """Room for the sums of the parts of samples; empty where samples are not cut."""
    return p.coefficients.new_empty(_native.module().cuda_tangent_sums(*arguments))
