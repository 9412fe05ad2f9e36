"""The sCM tangent on a GPU by the Triton kernels of `triton_kernels.py`."""

import math
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
def norm(problem: Norm) -> None:
    """squares = sum of g^2; a large sample in parts, whose sums a second kernel adds up."""
    p, batch = problem, problem.f.shape[0]
    parts = config.parts(*p.f.shape)
    sums = p.squares if parts == 1 else p.squares.new_empty(batch * parts)
    _sum_parts(p, sums, parts)
    if parts > 1:
        kernel = _kernels().tangent_sum_kernel
        _triton.launch(kernel, batch, p.f, sums, p.squares, parts, PARTS=config.PARTS)


@_triton.without_bfloat16("out")
def apply(problem: Apply) -> None:
    """out = g, or zeros in a row of zero coefficients."""
    p, (batch, size) = problem, problem.f.shape
    tile = config.choose(config.APPLIED, size)
    rows, columns = tile.shape(size)
    inputs, width = _inputs(p, p.out)
    _triton.launch(
        _kernels().tangent_apply_kernel,
        -(-batch // rows) * -(-size // columns),
        p.f,
        *inputs,
        p.out,
        batch,
        size // width,
        ROWS=rows,
        COLUMNS=columns,
        VEC=width,
        num_warps=tile.warps,
    )


@_triton.without_bfloat16("out")
def normalize(problem: Normalize) -> None:
    """out = s g: in one kernel where g of a sample fits a program, else in parts, in two."""
    p, (batch, size) = problem, problem.f.shape
    scale = (float(size) if p.mean else 1.0, p.c, 0.0 if p.zero else math.nan)
    tile = config.choose(config.KEPT, size)
    if tile is None:
        _normalize_parts(p, scale)
        return
    rows, columns = tile.shape(size)
    inputs, width = _inputs(p, p.out)
    _triton.launch(
        _kernels().tangent_normalize_kernel,
        -(-batch // rows),
        p.f,
        *inputs,
        p.out,
        batch,
        size // width,
        *scale,
        ROWS=rows,
        COLUMNS=columns,
        PIECES=-(-size // columns),
        VEC=width,
        num_warps=tile.warps,
    )


def _normalize_parts(p: Normalize, scale: tuple[float, float, float]) -> None:
    """The sums of each sample's parts, then the same parts times s."""
    batch, size = p.f.shape
    parts, tile = config.parts(batch, size), config.choose(config.SUMMED, size)
    sums = p.coefficients.new_empty(batch * parts)
    _sum_parts(p, sums, parts)
    inputs, width = _inputs(p, p.out)
    _triton.launch(
        _kernels().tangent_scale_kernel,
        batch * parts,
        p.f,
        *inputs,
        sums,
        p.out,
        size // width,
        parts,
        *scale,
        COLUMNS=tile.elements,
        VEC=width,
        PARTS=config.PARTS,
        num_warps=tile.warps,
    )


def _sum_parts(p: Norm | Normalize, sums: Tensor, parts: int) -> None:
    """sums [B, parts] = sum of g^2 over each part."""
    batch, size = p.f.shape
    tile = config.choose(config.SUMMED, size)
    rows, columns = tile.shape(size)
    inputs, width = _inputs(p)
    _triton.launch(
        _kernels().tangent_norm_kernel,
        -(-batch // rows) * parts,
        p.f,
        *inputs,
        sums,
        batch,
        size // width,
        parts,
        ROWS=rows,
        COLUMNS=columns,
        VEC=width,
        num_warps=tile.warps,
    )


def _inputs(p: Norm | Apply | Normalize, *outputs: Tensor) -> tuple[tuple, int]:
    """What all kernels begin with, and the width of their accesses in elements."""
    inputs = (p.f, p.v, p.x, p.j)
    width = math.gcd(_triton.vector(*inputs, *outputs), p.f.shape[1])
    return (inputs, *(x.stride(0) // width for x in inputs), p.coefficients), width


def _kernels() -> ModuleType:
    """The kernels: Triton is imported here, where one is first needed."""
    from scm_kernels.tangent import triton_kernels

    return triton_kernels
