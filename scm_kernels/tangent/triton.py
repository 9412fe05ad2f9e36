"""The sCM tangent on a GPU by the Triton kernels of `triton_kernels.py`."""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.tangent import config
from scm_kernels.tangent.presets import PRESETS
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, Problem, refuses_types


def unavailable() -> str | None:
    """Why no Triton kernel runs here."""
    return _triton.unavailable()


def refuses(problem: Problem) -> str | None:
    """Tensors elsewhere, and float64."""
    return _triton.refuses(problem.f) or refuses_types(problem)


@_triton.without_bfloat16()
def plan_loss(problem: Loss) -> Callable[[Loss], None]:
    """losses, and what their gradient takes: numbers, a pass over the elements, numbers."""
    (batch, size), preset = problem.f.shape, problem.preset
    write_coefficients, norm = _plan_coefficients(problem), _plan_norm(problem)
    numbers = _per_sample(_kernels().tangent_loss_kernel, batch, PRESET=preset, ZERO=problem.zero)

    def run(p: Loss) -> None:
        write_coefficients(p, p.coefficients)
        norm(p, p.coefficients, p.distances)
        outputs = p.coefficients, p.distances, p.weights, p.losses
        options = batch, float(size), p.sigma_data, p.c
        numbers(p.f, *outputs, *_number(p.t), *_number(p.log_weight), *options)

    return run


@_triton.without_bfloat16("out")
def plan_gradient(problem: Gradient) -> Callable[[Gradient], None]:
    """The gradient in log_weight and what to apply, then that in F."""
    apply, batch = _plan_apply(problem), problem.f.shape[0]
    numbers = _per_sample(_kernels().tangent_gradient_kernel, batch)

    def run(p: Gradient) -> None:
        scaled = torch.empty_like(p.coefficients)
        given = p.coefficients, p.distances, p.weights, *_number(p.log_weight), *_number(p.dlosses)
        numbers(p.f, *given, scaled, p.dlog_weight, batch)
        apply(p, scaled)

    return run


@_triton.without_bfloat16("out")
def plan_apply(problem: Apply) -> Callable[[Apply], None]:
    """out = g, or zeros in a row of zero coefficients."""
    apply = _plan_apply(problem)
    return lambda p: apply(p, p.coefficients)


@_triton.without_bfloat16("out")
def plan_normalize(problem: Normalize) -> Callable[[Normalize], None]:
    """out = s g: in one kernel where g of a sample fits a program, else in parts, in two."""
    tile = config.choose(config.KEPT, problem.f.shape[1])
    normalize = _plan_parts(problem) if tile is None else _plan_kept(problem, tile)
    write_coefficients = _plan_coefficients(problem)

    def run(p: Normalize) -> None:
        coefficients = p.f.new_empty(p.f.shape[0], 4, dtype=torch.float64)
        write_coefficients(p, coefficients)
        normalize(p, coefficients)

    return run


# --- numbers of a sample ----------------------------------------------------------------------


def _plan_coefficients(problem: Loss | Normalize) -> Callable[[Loss | Normalize, Tensor], None]:
    """coefficients = a, b, k, d."""
    batch = problem.f.shape[0]
    kind = problem.preset if problem.preset in ("rcm", "meanflow") else "paper"
    launch = _per_sample(_kernels().tangent_coefficients_kernel, batch, PRESET=kind)

    def run(p: Loss | Normalize, coefficients: Tensor) -> None:
        times = *_number(p.t), *_number(p.warmup)
        launch(p.f, *times, coefficients, batch, p.r, p.sigma_data)

    return run


def _per_sample(kernel, batch: int, **constants) -> _triton.Launch:
    """A thread a sample."""
    return _triton.Launch(
        kernel, -(-batch // config.SAMPLES), **constants, SAMPLES=config.SAMPLES, num_warps=4
    )


def _number(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A number a sample, and the stride from one to the next."""
    return (None, 0) if x is None else (x, x.stride(0))


# --- passes over the elements -----------------------------------------------------------------


def _plan_norm(problem: Loss) -> Callable[[Loss, Tensor, Tensor], None]:
    """squares = sum of g^2; a large sample in parts, whose sums a second kernel adds up."""
    batch, parts = problem.f.shape[0], config.parts(*problem.f.shape)
    sum_parts = _plan_sums(problem, parts)
    if parts == 1:
        return sum_parts
    add = _triton.Launch(_kernels().tangent_sum_kernel, batch, PARTS=config.PARTS)

    def run(p: Loss, coefficients: Tensor, squares: Tensor) -> None:
        sums = squares.new_empty(batch * parts)
        sum_parts(p, coefficients, sums)
        add(p.f, sums, squares, parts)

    return run


def _plan_apply(problem: Apply | Gradient) -> Callable[[Apply | Gradient, Tensor], None]:
    """out = g."""
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
    return lambda p, x: launch(p.f, *_inputs(p, strides, x), p.out, batch, size // width)


def _plan_kept(problem: Normalize, tile: config.Tile) -> Callable[[Normalize, Tensor], None]:
    """out = s g, g of a sample in one program."""
    batch, size = problem.f.shape
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
    return lambda p, x: launch(p.f, *_inputs(p, strides, x), p.out, *numbers)


def _plan_parts(problem: Normalize) -> Callable[[Normalize, Tensor], None]:
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

    def run(p: Normalize, coefficients: Tensor) -> None:
        sums = coefficients.new_empty(batch * parts)
        sum_parts(p, coefficients, sums)
        scale(p.f, *_inputs(p, strides, coefficients), sums, p.out, *numbers)

    return run


def _plan_sums(
    problem: Loss | Normalize, parts: int
) -> Callable[[Loss | Normalize, Tensor, Tensor], None]:
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
    numbers = (batch, size // width, parts)
    return lambda p, x, sums: launch(p.f, *_inputs(p, strides, x), sums, *numbers)


def _scale(p: Normalize) -> tuple[float, float, float]:
    """What the norm is divided by, squared; c; what becomes of a sample that is not finite."""
    count = float(p.f.shape[1]) if PRESETS[p.preset].mean else 1.0
    return count, p.c, 0.0 if p.zero else math.nan


def _strides(p: Problem, *outputs: Tensor) -> tuple[list[int], int]:
    """The inputs' strides, in accesses, and the width of an access in elements."""
    inputs = (p.f, p.v, p.x, p.j)
    width = math.gcd(_triton.vector(*inputs, *outputs), p.f.shape[1])
    return [x.stride(0) // width for x in inputs], width


def _inputs(p: Problem, strides: list[int], coefficients: Tensor) -> tuple:
    """What these kernels begin with."""
    return ((p.f, p.v, p.x, p.j), *strides, coefficients)


def _kernels() -> ModuleType:
    """The kernels: Triton is imported here, where one is first needed."""
    from scm_kernels.tangent import triton_kernels

    return triton_kernels
