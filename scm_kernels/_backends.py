"""Which backend runs an op: the names, what is available, how one is forced, and the dispatch.

A backend joins an op by one file, `scm_kernels/<op>/<backend>.py`, that holds

    unavailable() -> str | None     why this machine cannot run it, with the command that would help
    refuses(problem) -> str | None  why it does not take this combination of inputs
    <step>(problem) -> None         one function a step ("forward", ...): writes the outputs

where `problem` is the op's named tuple of inputs and of outputs that `library.py` has allocated.
Nothing else changes: `run` below finds the file, asks it, and calls it. A backend that decides much
for a step has `plan_<step>(problem)` in its place: it returns what runs this problem and all that
differ from it in their numbers alone. `cuda.py` may have `yields(problem)`, which says where
Triton's kernels are faster. `DETAILS` may hold a function that gives what else `backends()` tells
about a backend, such as an instruction set; `FAULTS` one that gives why a backend that is there
does not work, which only who asks for that backend has to wait for.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType, NoneType

from scm_kernels import _cuda, _library, _native, _plans, _triton

AUTO = "auto"
NAMES = ("cuda", "triton", "cpu", "reference")  # the order in which "auto" asks
OPS = ("attention", "tangent")
DETAILS = {
    "cuda": lambda: _cuda.describe(),
    "triton": lambda: _triton.describe(),
    "cpu": _native.instruction_set,
}
FAULTS = {"cuda": lambda: _cuda.fault()}
ENVIRONMENT = "SCM_KERNELS_BACKEND"

_forced: ContextVar[str] = ContextVar("scm_kernels_backend", default="")
_planned = _plans.Plans()
_HASHED = frozenset({bool, int, float, str, NoneType})


def backends() -> dict[str, str]:
    """What each backend is on this machine.

    Returns:
        `{"reference": ..., "cpu": ..., "triton": ..., "cuda": ...}`; a value starts with
        "available" or with "not available" and the reason: "available (attention; avx512)".

    Raises:
        ValueError: `SCM_KERNELS_CPU_ISA` names an instruction set that is not here.
    """
    return {name: _status(name) for name in reversed(NAMES)}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend, for every op that this thread or task calls inside, and for their backward
    passes wherever those run.

    Under a forced backend, a combination of inputs that it does not have raises
    `NotImplementedError`. `SCM_KERNELS_BACKEND=<name>` does the same from outside the program; this
    context manager goes before it. Enter it outside of what `torch.compile(fullgraph=True)` takes:
    Dynamo has no `ContextVar.set`.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" for the choice by availability.

    Raises:
        ValueError: `name` is no backend.
        RuntimeError: the backend is not available on this machine (with the reason).
    """
    token = _forced.set(_checked(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def requested() -> str:
    """The backend that the innermost `backend(...)` names, "" outside of any; kept in the graph."""
    return _forced.get()


def setting(request: str) -> str:
    """The backend that is asked for: by `request`, else by the environment; "" by neither."""
    return request or os.environ.get(ENVIRONMENT, "")


def kind_of_call(tensors: tuple, options: tuple) -> tuple | None:
    """The kind of a call of a public function: what it was given, and which backend is asked for.

    None where the call is not `plain`, or where an option is none of Python's own values. Their
    types are part of a kind, as 1 equals True and 1.0.
    """
    if not _library.plain(tensors):
        return None
    types = (*map(type, options),)
    if not _HASHED.issuperset(types):
        return None
    request = requested()
    return (*options, *types, request, setting(request), *_plans.kind(tensors))


def run(
    op: str, step: str, problem: tuple, request: str, stand_in: ModuleType | None = None
) -> None:
    """Run one step of an op: `plan` for this problem alone."""
    plan(op, step, problem, request, stand_in)(problem)


def plan(
    op: str, step: str, problem: tuple, request: str, stand_in: ModuleType | None = None
) -> Callable[[tuple], None]:
    """What runs a step of an op, for problems of one kind, on the backend that `request` names, or
    on the first to take it.

    `request` is what `requested()` gave; where that is "", the environment decides. Where neither
    forces a backend, `stand_in` may take its place: its `serves(problem, module)` says so.
    """
    kind = (op, step, setting(request), *_plans.kind(problem))
    result = _planned[kind]
    if result is None:
        module, forced = choose(op, step, problem, request)
        if not forced and stand_in is not None and stand_in.serves(problem, module):
            module = stand_in
        prepare = getattr(module, f"plan_{step}", None)
        result = _planned[kind] = getattr(module, step) if prepare is None else prepare(problem)
    return result


def forget() -> None:
    """What has been found out about this machine, as after a change of it."""
    _implementation.cache_clear()
    _plans.forget()


def choose(op: str, step: str, problem: tuple, request: str) -> tuple[ModuleType, bool]:
    """The backend that runs this, and whether it is forced."""
    name = _resolve(request)
    if name == AUTO:
        return _first_that_takes(op, problem)[0], False
    chosen, reason = _implementation(op, name)
    reason = reason or chosen.refuses(problem)
    if reason is not None:
        _, other = _first_that_takes(op, problem)
        raise NotImplementedError(
            f"backend {name!r} was forced, but it does not take this {op} {step}: {reason}. "
            f'Backend {other!r} takes it: force that one, or leave the choice to "auto".'
        )
    return chosen, True


def _first_that_takes(op: str, problem: object) -> tuple[ModuleType, str]:
    reasons = []
    for name in _order(op, problem):
        module, reason = _implementation(op, name)
        reason = reason or module.refuses(problem)
        if reason is None:
            return module, name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no backend takes this {op}: " + "; ".join(reasons))


def _order(op: str, problem: object) -> tuple[str, ...]:
    """The names as "auto" asks them: CUDA's kernels first, but where those yield to Triton's."""
    cuda, _ = _implementation(op, "cuda")
    yields = getattr(cuda, "yields", None)
    swapped = yields is not None and yields(problem)
    return (NAMES[1], NAMES[0], *NAMES[2:]) if swapped else NAMES


def _resolve(request: str) -> str:
    return request or _checked(setting("") or AUTO, ENVIRONMENT)


def _checked(name: str, argument: str) -> str:
    if name not in (AUTO, *NAMES):
        known = ", ".join(map(repr, (*NAMES, AUTO)))
        raise ValueError(f"{argument}: got {name!r}, expected one of {known}")
    if name != AUTO and not _status(name).startswith("available"):
        raise RuntimeError(f"{argument}: backend {name!r} is {_status(name)}")
    return name


def _status(name: str) -> str:
    reasons = {}
    for op in OPS:
        _, reason = _implementation(op, name)
        reasons[op] = reason
    served = [op for op, reason in reasons.items() if reason is None]
    fault = FAULTS[name]() if served and name in FAULTS else None
    if fault is not None:
        return f"not available: {fault}"
    if served:
        details = DETAILS[name]() if name in DETAILS else ""
        return f"available ({'; '.join(filter(None, [', '.join(served), details]))})"
    return "not available: " + "; ".join(dict.fromkeys(reasons.values()))


@cache
def _implementation(op: str, name: str) -> tuple[ModuleType | None, str | None]:
    """The module of a backend's kernels for an op, or why there is none here."""
    path = f"scm_kernels.{op}.{name}"
    if importlib.util.find_spec(path) is None:
        return None, f"this version of scm_kernels has no {name} kernels for it"
    module = importlib.import_module(path)
    reason = module.unavailable()
    return (module, None) if reason is None else (None, reason)
