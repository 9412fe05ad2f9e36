"""Providers of the sCM tangent and its loss: eager PyTorch, the same compiled, and ours."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import scm_kernels
from benchmarks import limits, providers
from benchmarks.accuracy import verdict_of_all
from benchmarks.cases import TANGENT_RUNS, Case
from benchmarks.providers import Problem, Provider

SIGMA_DATA, C = 0.5, 0.1


def eager_tangent(F: Tensor, V: Tensor, X: Tensor, J: Tensor, t: Tensor) -> Tensor:
    """g / (|g| + c), arXiv 2410.11081, Algorithm 1, at the end of its warm-up."""
    t = t.view(-1, *(1,) * (F.ndim - 1))
    cos, sin = t.cos().to(F.dtype), t.sin().to(F.dtype)
    g = -cos * cos * (SIGMA_DATA * F - V) - (cos * sin * X + SIGMA_DATA * J)
    norm = torch.linalg.vector_norm(g, dim=tuple(range(1, g.ndim)), keepdim=True)
    return g / (norm + C)


def eager_loss(F: Tensor, V: Tensor, X: Tensor, J: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """exp(w) / D |F - sg(F) - g|^2 - w, the mean over samples."""
    constant = F.detach()
    error = F - constant - eager_tangent(constant, V, X, J, t)
    wide = error.to(torch.promote_types(error.dtype, torch.float32))
    square = wide.square().flatten(1).sum(1)
    return (w.exp() / error[0].numel() * square - w).mean()


def problem(case: Case, device: str) -> Problem:
    """Inputs drawn and rounded to the dtype, and who computes on them."""
    inputs = draw(case, device)

    def provider(name: str, tangent: Callable, loss: Callable, **rest) -> Provider:
        return Provider(name, lambda: run(tangent, loss, case.run, inputs), **rest)

    pairs = (eager_tangent, eager_loss)
    everyone = [
        provider(providers.EAGER, *pairs),
        provider(providers.COMPILED, *map(providers.compiled, pairs), counted=False),
    ]
    for name, reason, force in providers.in_order(device):
        pair = (scm_kernels.normalized_tangent, scm_kernels.consistency_loss)
        everyone.append(provider(name, *map(force, pair), reason=reason))

    @cache
    def answers() -> tuple[list[Tensor], ...]:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        return tuple(run(*pairs, case.run, x) for x in (wide, inputs))

    def check(outputs: list[Tensor]) -> str | None:
        values = ([x[0], x[-1]] for x in (outputs, *answers()))  # of one output, twice the same
        return verdict_of_all((case.run, "gradient"), *values)

    size = math.prod(case.shape) * case.torch_dtype.itemsize
    work = float(TANGENT_RUNS[case.run] * size)
    return Problem(case, everyone, work, limits.copy(device), check)


def draw(case: Case, device: str) -> list[Tensor]:
    """F, V, X, J, t, w; a gradient of F where one is asked for."""
    generator = torch.Generator(device=device).manual_seed(0)
    samples = torch.randn(4, *case.shape, generator=generator, device=device)
    F, V, X, J = samples.to(case.torch_dtype)
    F = F.clone().requires_grad_("backward" in case.run)
    t = 0.1 + 1.4 * torch.rand(case.shape[0], generator=generator, device=device)
    return [F, V, X, J, t, torch.randn(case.shape[0], generator=generator, device=device)]


def run(tangent: Callable, loss: Callable, what: str, inputs: list[Tensor]) -> list[Tensor]:
    """The tangent, the loss, or the loss and its gradient in F."""
    if what == "tangent":
        return [tangent(*inputs[:5])]
    value = loss(*inputs)
    if what == "loss":
        return [value]
    return [value.detach(), *torch.autograd.grad(value, inputs[0])]
