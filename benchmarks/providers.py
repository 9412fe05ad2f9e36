"""What all kinds of cases share: a provider, and which of ours there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import scm_kernels
from benchmarks.cases import Case
from benchmarks.limits import Limit
from scm_kernels import _triton

Outputs = Sequence[Tensor | None]
OURS, EAGER, COMPILED, SDPA = "ours", "eager", "eager compiled", "SDPA, no tangent"


@dataclass
class Provider:
    """One way to do a case's work.

    reason: why it cannot, known before it is tried. memory: bytes that it is going to need, about.
    counted: whether a CPU's memory can be counted (a compiled function's cannot). values: what
    gives the values to check, where that is not `run`.
    """

    name: str
    run: Callable[[], Outputs]
    reason: str | None = None
    memory: int = 0
    counted: bool = True
    values: Callable[[], Outputs] | None = None


@dataclass
class Problem:
    """A case with its inputs drawn, and everyone who may solve it.

    work: operations or bytes, as the limit counts them. check: why the values of a provider are
    wrong, or None. arithmetic: the least that a tangent can cost over SDPA, None where that has no
    such pass.
    """

    case: Case
    providers: list[Provider]
    work: float
    limit: Limit
    check: Callable[[Outputs], str | None]
    arithmetic: float | None = None


def ours(device: str) -> dict[str, str | None]:
    """Our backends that can run on this device, fastest first; each with why it is left out. Where
    there are CUDA kernels, before them "auto", which takes those of a case that they have."""
    wanted = {"cuda": ("cuda", "triton", "reference"), "cpu": ("triton", "cpu", "reference")}
    reasons = {}
    for name in wanted[device]:
        status = scm_kernels.backends()[name]
        if name == "cuda" and status.startswith("available"):
            reasons["auto"] = None
        reasons[name] = None if status.startswith("available") else status
        if name == "triton" and _triton.interpreting():
            reasons[name] = "the interpreter is for debugging: it has no speed"
        elif name == "triton" and device == "cpu":
            del reasons[name]  # it has no kernels for a CPU
    return reasons


def forced(name: str, run: Callable) -> Callable:
    """A call on one of our backends."""

    def on_backend(*args):
        with scm_kernels.backend(name):
            return run(*args)

    return on_backend


def compiled(function: Callable) -> Callable:
    """torch.compile, for this shape and without a silent fall back."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def in_order(device: str) -> list[tuple[str, str | None, Callable]]:
    """(name of the provider, why it is left out, what puts a function on it) for each of ours."""
    return [
        (f"{OURS} ({name})", reason, lambda run, name=name: forced(name, run))
        for name, reason in ours(device).items()
    ]
