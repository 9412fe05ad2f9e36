"""How the kernels of `triton_backward.py` are launched: a pass for each kind of gradient."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from scm_kernels import _triton
from scm_kernels.attention import triton_backward as kernels
from scm_kernels.attention import triton_tiles as tiles
from scm_kernels.attention.problem import Backward
from scm_kernels.attention.triton_backward_config import (
    PADDING,
    atomic_row,
    backward_row,
)
from scm_kernels.attention.triton_config import forward_row
from scm_kernels.attention.triton_gradients import Meta, Operands
from scm_kernels.attention.triton_tiles import View, mask_strides

_KERNELS = {
    "rows": kernels.attention_backward_rows_kernel,
    "keys": kernels.attention_backward_keys_kernel,
    "queries": kernels.attention_backward_queries_kernel,
    "mask": kernels.attention_backward_mask_kernel,
}
# The tensors of a problem in the order of `_tensors`; the first ten are those of `Operands`.
_NAMES = (
    *("q", "k", "v", "tq", "tk", "tv", "mask", "tmask", "dout", "dt_out", "out", "t_out"),
    *("dq", "dk", "dv", "dtq", "dtk", "dtv", "dmask", "dtmask"),
    "sum_q",  # what is added up by atomics
)
_DQ, _SUM_Q = _NAMES.index("dq"), _NAMES.index("sum_q")
_MASKS = ("mask", "tmask", "dmask", "dtmask")


def plan_attention_backward(
    problem: Backward, atomics: bool, precision: str = "exact"
) -> Callable[[Backward], None]:
    """What writes the gradients that are wanted; `atomics` allows them where there are tiles for
    them, `precision` is that of products in float32."""
    return _Plan(problem, atomics, precision).run


def _tensors(p: Backward) -> list[Tensor | None]:
    q, k, v, tq, tk, tv, mask, tmask, _, _, out, t_out, _, _, _, dout, dt_out, *gradients = p
    return [q, k, v, tq, tk, tv, mask, tmask, dout, dt_out, out, t_out, *gradients, None]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One launch of a kernel."""

    launch: _triton.Launch
    of_tangents: bool  # the ordinary gradients, with dtO in place of dO
    gradients: tuple[int | None, ...]  # where they are among the tensors
    numbers: tuple  # the arguments that are no tensors


class _Plan:
    """How problems of one kind are launched."""

    def __init__(self, p: Backward, atomics: bool, precision: str):
        tensors = _tensors(p)
        self.copied = []  # gradients whose last dimension is not contiguous, by way of one that is
        for i, (name, x) in enumerate(zip(_NAMES, tensors, strict=True)):
            if x is not None and name not in _MASKS and x.stride(-1) != 1 != x.shape[-1]:
                self.copied.append(i)
                tensors[i] = _contiguous(x)
        masks = [name in _MASKS for name in _NAMES]
        vec = _triton.vector(*(x for x, mask in zip(tensors, masks, strict=True) if not mask))
        self.strides = [
            mask_strides(x) if mask else _triton.strides(x, vec)
            for x, mask in zip(tensors, masks, strict=True)
        ]
        self.absent = [i for i, x in enumerate(tensors) if x is None]
        self.padded = triton.cdiv(p.q.shape[2], PADDING) * PADDING
        self.scratch = *p.lse.shape[:2], self.padded
        self.rows = _pass("rows", False, (), p, precision, vec)
        self.atomic = atomics and _takes_atomics(p)
        self.passes = [_pass(*kind, p, precision, vec) for kind in _kinds(p, self.atomic)]
        self.launches = [one.launch for one in (self.rows, *self.passes)]

    def run(self, p: Backward) -> None:
        tensors = _tensors(p)
        for i in self.copied:
            tensors[i] = _contiguous(tensors[i])
        views = list(zip(tensors, self.strides, strict=True))
        if not all(launch.known for launch in self.launches):  # what Triton compiles has names
            views = [View(*x) for x in views]
        for i in self.absent:
            views[i] = None
        if self.atomic:
            b, h, m, d = p.q.shape
            sum_q = views[_SUM_Q] = p.lse.new_zeros(b, h, self.padded, d)
        wanted = True, p.lse_low is not None, True, p.dt_out is not None, p.dt_out is not None
        scratch = iter(p.lse.new_empty(sum(wanted), *self.scratch).unbind())
        lse, low, delta, mu, beta = (next(scratch) if want else None for want in wanted)
        x = Operands(*views[:10], self.padded, lse, low, delta, mu, beta)
        of_tangents = Operands(
            *(*views[:3], None, None, None, views[6], None, views[9], None),
            *(self.padded, lse, low, beta, None, None),
        )
        self.rows.launch(p.q, x, *views[10:12], p.lse, p.lse_low, p.mu, *self.rows.numbers)
        for one in self.passes:
            gradients = (None if i is None else views[i] for i in one.gradients)
            one.launch(p.q, of_tangents if one.of_tangents else x, *gradients, *one.numbers)
        if self.atomic:
            torch.mul(sum_q[:, :, :m], p.scale, out=tensors[_DQ])
        for i in self.copied:
            getattr(p, _NAMES[i]).copy_(tensors[i])


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _takes_atomics(p: Backward) -> bool:
    """Whether dq can be added up by the kernel of the keys: through both outputs, if both kinds of
    gradients are wanted, and a row of the tables is for it."""
    if p.dt_out is None or p.dq is None or (p.dk is None and p.dv is None) or p.mask is not None:
        return False
    architecture, features = _triton.architecture(p.q.device), max(p.q.shape[3], p.v.shape[3])
    return atomic_row(architecture, p.q.dtype, features) is not None


def _kinds(p: Backward, atomic: bool) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """(kernel, of_tangents, gradients) of the passes for all gradients that are wanted."""
    if p.dk is not None or p.dv is not None:
        yield "keys", False, ("dk", "dv", "sum_q" if atomic else "")
    if p.dtk is not None or p.dtv is not None:
        yield "keys", True, ("dtk", "dtv", "")
    if p.dq is not None and not atomic:
        yield "queries", False, ("dq", "dtq")  # where dtq costs one product
    elif p.dtq is not None:
        yield "queries", True, ("dtq", "")
    if p.dmask is not None:
        yield "mask", False, ("dmask",)
    if p.dtmask is not None:
        yield "mask", True, ("dtmask",)


def _pass(
    kernel: str,
    of_tangents: bool,
    gradients: tuple[str, ...],
    p: Backward,
    precision: str,
    vec: int,
) -> _Pass:
    (b, h, m, d), (hk, n, e) = p.q.shape, p.v.shape[1:]
    through = "out" if p.dt_out is None or of_tangents else "both"
    if through == "both" and "dtq" in gradients and p.dtq is not None:
        through = "both, dtq"
    architecture = _triton.architecture(p.q.device)
    masked = tiles.differs_by_row(p.mask, p.tmask)
    padded = p.mask is not None and not masked
    features = max(d, e)
    if "sum_q" in gradients:
        row = atomic_row(architecture, p.q.dtype, features)
    else:
        row = backward_row(
            *(architecture, kernel, through, p.q.dtype, features, p.causal, masked, padded),
            precision == "ieee",
        )
    forward = forward_row(architecture, p.q.dtype, features, p.causal, masked, precision == "ieee")
    products, scores = row.precision(precision), forward.precision(precision)
    float32 = p.q.dtype == torch.float32
    # lse / scale is to be in the range of float32; with a tiny scale nothing depends on its digits.
    raw = p.lse_low is not None and p.mask is None and abs(p.scale) > 1e-30
    meta = Meta(
        *(row.features(d), row.features(e), vec, p.causal, products, scores),
        *(row.block_m, row.block_n, raw),
        *(float32 and n <= row.block_n, float32 and n > row.block_n and kernel == "queries"),
    )
    row_tiles, key_tiles = triton.cdiv(m, row.block_m), triton.cdiv(n, row.block_n)
    numbers = m, n, h, h // hk, p.scale
    if kernel == "rows":
        programs = b * h * triton.cdiv(m, PADDING) * (PADDING // row.block_m)
        numbers = m, h, p.scale
    elif kernel == "keys":
        programs = b * hk * key_tiles
    elif kernel == "queries":
        programs = b * h * row_tiles
    else:
        sizes, counts = getattr(p, gradients[0]).shape, (b, h, row_tiles, key_tiles)
        programs = math.prod(map(min, sizes, counts))  # 1 where the mask is shared
        numbers = (b, *numbers)
    launch = _triton.Launch(_KERNELS[kernel], programs, **row.options(architecture))
    places = tuple(_NAMES.index(name) if name else None for name in gradients)
    return _Pass(launch, of_tangents, places, (*numbers, meta))
