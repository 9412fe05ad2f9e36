"""Providers of attention with its tangent: eager PyTorch, compiled, fused, others, and ours."""

import importlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels
from benchmarks import limits, providers
from benchmarks.accuracy import verdict_of_all
from benchmarks.cases import ATTENTION_RUNS, Case
from benchmarks.providers import Problem, Provider

# Float32 buffers of B H M N elements that eager attention holds at once, in half precision too
# (counted by `memory.AllocatedBytes`, and the next integer).
EAGER_BUFFERS = {"forward": 6, "absent": 6, "out": 9, "both": 10}
NAMES = ("out", "t_out", "dq", "dk", "dv", "dtq", "dtk", "dtv")
CHECKED_ROWS, CHECKED_CHUNK = 256, 2**22  # of queries; elements of one matrix of scores


def eager(q, k, v, tq, tk, tv, mask) -> tuple[Tensor, Tensor]:
    """What one writes without this package."""
    with sdpa_kernel(SDPBackend.MATH):
        return _jvp(F.scaled_dot_product_attention, q, k, v, tq, tk, tv, mask)


def _jvp(attention: Callable, q, k, v, tq, tk, tv, mask) -> tuple[Tensor, Tensor]:
    if tk is None:
        return torch.func.jvp(lambda q: attention(q, k, v, attn_mask=mask), (q,), (tq,))
    return torch.func.jvp(partial(attention, attn_mask=mask), (q, k, v), (tq, tk, tv))


def _fused(q, k, v, tq, tk, tv, mask) -> tuple[Tensor, None]:
    """PyTorch's own choice of a kernel; it has no tangent."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None


def _ours(q, k, v, tq, tk, tv, mask) -> tuple[Tensor, Tensor]:
    return scm_kernels.attention_jvp(q, k, v, tq, tk, tv, attn_mask=mask)


def _jvp_flash_attention(q, k, v, tq, tk, tv, mask) -> tuple[Tensor, Tensor]:
    module = importlib.import_module("jvp_flash_attention.jvp_attention")
    return _jvp(module.JVPAttn.fwd_dual, q, k, v, tq, tk, tv, mask)


def jvp_flash_attention_refuses(case: Case, device: str) -> str | None:
    """Why it is not measured: not there, or an input that it is known to be wrong on."""
    try:
        importlib.import_module("jvp_flash_attention.jvp_attention")
    except ImportError as error:
        return f"not installed: {error}"
    _, _, m, n, d = case.shape
    if device != "cuda":
        return "it has kernels for GPUs only"
    if m != n or m % 32 or d & (d - 1) or d < 32:
        return "it takes M = N, multiples of 32, and D of 32, 64, 128 or 256"
    if case.run == "absent" or case.masked:
        return "it takes no absent tangents, and no mask that is not dense"
    return None


def problem(case: Case, device: str) -> Problem:
    """Inputs drawn and rounded to the dtype, and who computes on them."""
    inputs, seeds = draw(case, device)
    products, without = ATTENTION_RUNS[case.run]
    b, h, m, n, d = case.shape

    def provider(name: str, function: Callable, **rest) -> Provider:
        return Provider(name, lambda: run(function, case.run, inputs, seeds), **rest)

    dense = 4 * EAGER_BUFFERS[case.run] * b * h * m * n
    no_tangent = None if without else "PyTorch's fused attention has no tangent to go back through"
    refuses = jvp_flash_attention_refuses(case, device)
    compiled = providers.compiled(eager)
    everyone = [
        provider(providers.EAGER, eager, memory=dense),
        provider(providers.COMPILED, compiled, memory=dense, counted=False),
        provider(providers.SDPA, _fused, reason=no_tangent),
        provider("jvp_flash_attention", _jvp_flash_attention, reason=refuses),
    ]
    for name, reason, force in providers.in_order(device):
        everyone.append(provider(name, force(_ours), reason=reason))
    return Problem(
        case=case,
        providers=everyone,
        work=2.0 * products * b * h * m * n * d,
        limit=limits.gemm(device, case.torch_dtype),
        check=Check(case, inputs, seeds),
        arithmetic=products / without if without else None,
    )


def draw(case: Case, device: str) -> tuple[list[Tensor | None], list[Tensor]]:
    """q, k, v, tq, tk, tv, mask, and cotangents of out and its tangent."""
    b, h, m, n, d = case.shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(length: int, grad: bool = False) -> Tensor:
        x = torch.randn(b, h, length, d, generator=generator, device=device)
        return x.to(case.torch_dtype).requires_grad_(grad)

    primals = [normal(length, case.run in ("out", "both")) for length in (m, n, n)]
    tangents = [normal(length, case.run == "both") for length in (m, n, n)]
    if case.run == "absent":
        tangents[1:] = None, None
    mask = None
    if case.masked:
        lengths = torch.randint(n // 4, n + 1, (b, 1, 1, 1), generator=generator, device=device)
        mask = torch.arange(n, device=device) < lengths
    return [*primals, *tangents, mask], [normal(m), normal(m)]


def run(function: Callable, what: str, inputs, seeds) -> list[Tensor | None]:
    """A case's outputs and gradients by this function."""
    if what in ("forward", "absent"):
        with torch.no_grad():
            return list(function(*inputs))
    out, t_out = function(*inputs)
    if what == "out":
        gradients = torch.autograd.grad(out, inputs[:3], seeds[0])
    else:
        gradients = torch.autograd.grad((out, t_out), inputs[:6], seeds, allow_unused=True)
    return [x if x is None else x.detach() for x in (out, t_out, *gradients)]


class Check:
    """Values against the truth, on one head of the last samples (2,048 rows of it if they are few).

    Without gradients on some of its rows; with them on all, since each row of queries adds to the
    gradient of every key. Eager attention in float64, a chunk of rows at a time, at any length.
    """

    def __init__(self, case: Case, inputs, seeds):
        self.case = case
        b, _, m, _, d = case.shape
        self.samples = min(b, math.ceil(2048 / (m * d)))
        self.gradients = case.run in ("out", "both")
        self.rows = torch.arange(m, device=inputs[0].device)
        if not self.gradients:
            self.rows = torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).long().to(self.rows)
        self.inputs = [None if x is None else self._part(x) for x in inputs]
        self.seeds = [self._part(x) for x in seeds]
        self.answers = None

    def _part(self, x: Tensor) -> Tensor:
        return x.detach()[-self.samples :, -1:]

    def __call__(self, outputs: list[Tensor | None]) -> str | None:
        if self.answers is None:
            self.answers = self._answer(torch.float64), self._answer(self.case.torch_dtype)
        parts = [x if x is None else self._part(x) for x in outputs]
        parts[:2] = [x if x is None else x[:, :, self.rows] for x in parts[:2]]
        names, answers = NAMES, self.answers
        if parts[1] is None:  # a fused attention's: it has none to check
            names, parts, *answers = ([x[0], *x[2:]] for x in (NAMES, parts, *answers))
        return verdict_of_all(names[: len(parts)], parts, *answers)

    def _answer(self, dtype: torch.dtype) -> list[Tensor]:
        """out, t_out and the gradients by eager attention in this dtype, some rows at a time."""
        *x, mask = (y if y is None or y.dtype == torch.bool else y.to(dtype) for y in self.inputs)
        size = max(1, CHECKED_CHUNK // (self.samples * self.case.shape[3]))
        chunks = []
        for rows in self.rows.split(size):
            part = [x[0][:, :, rows], *x[1:3], x[3][:, :, rows], *x[4:]]
            if self.gradients:
                with_grad = 6 if self.case.run == "both" else 3
                part = [y.detach().requires_grad_(i < with_grad) for i, y in enumerate(part)]
            seeds = [y[:, :, rows].to(dtype) for y in self.seeds]
            chunks.append(run(eager, self.case.run, [*part, mask], seeds))
        names = NAMES[: len(chunks[0])]
        return [_join(name, [chunk[i] for chunk in chunks]) for i, name in enumerate(names)]


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """Rows of queries side by side; for keys, every part adds to the same gradient."""
    if name in ("out", "t_out", "dq", "dtq"):
        return torch.cat(parts, dim=2)
    return sum(x.double() for x in parts).to(parts[0].dtype)
