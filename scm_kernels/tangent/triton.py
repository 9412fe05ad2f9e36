"""The sCM tangent on a GPU by the Triton kernels of `triton_kernels.py`."""

import math
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from scm_kernels import _triton
from scm_kernels.tangent import config
from scm_kernels.tangent.problem import Apply, Norm, Normalize, refuses_types


def unavailable() -> str | None:
    """Why no Triton kernel runs here."""
    return _triton.unavailable()


def refuses(problem: Norm | Apply | Normalize) -> str | None:
    """Tensors elsewhere, float64, and scalars that are not float64."""
    return _triton.refuses(problem.f) or refuses_types(problem)


@_triton.without_bfloat16()
def plan_norm(problem: Norm) -> Callable[[Norm], None]:
    """squares = sum of g^2; a large sample in parts, whose sums a second kernel adds up."""
    batch, parts = problem.f.shape[0], config.parts(*problem.f.shape)
    sum_parts = _plan_sums(problem, parts)
    if parts == 1:
        return lambda p: sum_parts(p, p.squares)
    add = _triton.Launch(_kernels().tangent_sum_kernel, batch, PARTS=config.PARTS)

    def run(p: Norm) -> None:
        sums = p.squares.new_empty(batch * parts)
        sum_parts(p, sums)
        add(p.f, sums, p.squares, parts)

    return run


@_triton.without_bfloat16("out")
def plan_apply(problem: Apply) -> Callable[[Apply], None]:
    """out = g, or zeros in a row of zero coefficients."""
    batch, size = problem.f.shape
    tile = config.choose(config.APPLIED, size)
    rows, columns = tile.shape(size)
    strides, width = _strides(problem, problem.out)
    launch = _triton.Launch(
        _kernels().tangent_apply_kernel,
        -(-batch // rows) * -(-size // columns),
        ROWS=rows,
        COLUMNS=columns,
        VEC=width,
        num_warps=tile.warps,
    )
    return lambda p: launch(p.f, *_inputs(p, strides), p.out, batch, size // width)


@_triton.without_bfloat16("out")
def plan_normalize(problem: Normalize) -> Callable[[Normalize], None]:
    """out = s g: in one kernel where g of a sample fits a program, else in parts, in two."""
    batch, size = problem.f.shape
    tile = config.choose(config.KEPT, size)
    if tile is None:
        return _plan_parts(problem)
    rows, columns = tile.shape(size)
    strides, width = _strides(problem, problem.out)
    launch = _triton.Launch(
        _kernels().tangent_normalize_kernel,
        -(-batch // rows),
        ROWS=rows,
        COLUMNS=columns,
        PIECES=-(-size // columns),
        VEC=width,
        num_warps=tile.warps,
    )
    numbers = (batch, size // width, *_scale(problem))
    return lambda p: launch(p.f, *_inputs(p, strides), p.out, *numbers)


def _plan_parts(problem: Normalize) -> Callable[[Normalize], None]:
    """The sums of each sample's parts, then the same parts times s."""
    batch, size = problem.f.shape
    parts, tile = config.parts(batch, size), config.choose(config.SUMMED, size)
    sum_parts = _plan_sums(problem, parts)
    strides, width = _strides(problem, problem.out)
    scale = _triton.Launch(
        _kernels().tangent_scale_kernel,
        batch * parts,
        COLUMNS=tile.elements,
        VEC=width,
        PARTS=config.PARTS,
        num_warps=tile.warps,
    )
    numbers = (size // width, parts, *_scale(problem))

    def run(p: Normalize) -> None:
        sums = p.coefficients.new_empty(batch * parts)
        sum_parts(p, sums)
        scale(p.f, *_inputs(p, strides), sums, p.out, *numbers)

    return run


def _plan_sums(problem: Norm | Normalize, parts: int) -> Callable[[Norm | Normalize, Tensor], None]:
    """sums [B, parts] = sum of g^2 over each part."""
    batch, size = problem.f.shape
    tile = config.choose(config.SUMMED, size)
    rows, columns = tile.shape(size)
    strides, width = _strides(problem)
    launch = _triton.Launch(
        _kernels().tangent_norm_kernel,
        -(-batch // rows) * parts,
        ROWS=rows,
        COLUMNS=columns,
        VEC=width,
        num_warps=tile.warps,
    )
    return lambda p, sums: launch(p.f, *_inputs(p, strides), sums, batch, size // width, parts)


def _scale(p: Normalize) -> tuple[float, float, float]:
    """What the norm is divided by, squared; c; what becomes of a sample that is not finite."""
    return (float(p.f.shape[1]) if p.mean else 1.0, p.c, 0.0 if p.zero else math.nan)


def _strides(p: Norm | Apply | Normalize, *outputs: Tensor) -> tuple[list[int], int]:
    """The inputs' strides, in accesses, and the width of an access in elements."""
    inputs = (p.f, p.v, p.x, p.j)
    width = math.gcd(_triton.vector(*inputs, *outputs), p.f.shape[1])
    return [x.stride(0) // width for x in inputs], width


def _inputs(p: Norm | Apply | Normalize, strides: list[int]) -> tuple:
    """What all kernels begin with."""
    return ((p.f, p.v, p.x, p.j), *strides, p.coefficients)


def _kernels() -> ModuleType:
    """The kernels: Triton is imported here, where one is first needed."""
    from scm_kernels.tangent import triton_kernels

    return triton_kernels
