"""What activation checkpoints inside of a jvp get to see: `_checkpoint.py` says why.

A function on dual tensors is computed twice, the primal as autograd records it of PyTorch's own,
and the tangent beside it; one on constants as it will be computed again, without a transform about.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scm_kernels._checkpoint import selects, unrecorded
from scm_kernels._duals import (
    Dual,
    apart,
    as_constant,
    has_tangent,
    jvp_at_work,
    outside,
    together,
    unwrapped,
)
from scm_kernels.transforms.functions import (
    DECOMPOSED,
    IN_PLACE,
    LINEAR,
    RANDOM,
    REPEATABLE,
    is_in_place,
    is_written_to,
)


def compute(func, level: int, args, kwargs, *, ruled: bool):
    """What a checkpoint is to see of a function, NotImplemented where that is what it sees anyway.

    `ruled` functions have a rule, which has left this call alone.
    """
    repeated, decomposed = _may_be_repeated(func), ruled or func in DECOMPOSED
    if not (repeated or decomposed) or kwargs.get("out") is not None or jvp_at_work() is None:
        return NotImplemented
    if any(map(has_tangent, pytree.tree_leaves((args, kwargs)))):
        return _beside(func, level, args, kwargs) if repeated else NotImplemented
    return _constant(func, level, args, kwargs) if decomposed else NotImplemented


def refuse_writes(func, args) -> None:
    """Raise where a selective checkpoint would see a tangent being written to."""
    if is_written_to(func) and selects():
        _refuse_numbered(func, args)


def refuse_results(func, inputs, out) -> None:
    """Raise where a selective checkpoint has seen the ops of a tangent."""
    if selects():
        unchanged = set(map(id, pytree.tree_leaves(inputs)))  # by cpu(), for one
        _refuse_numbered(func, [x for x in pytree.tree_leaves(out) if id(x) not in unchanged])


def _may_be_repeated(func) -> bool:
    """Whether a checkpoint can have the primal of a function by itself, and has to."""
    if selects():  # which numbers the ops of linear functions too
        return func in LINEAR or (func in REPEATABLE and func not in IN_PLACE)
    return func in REPEATABLE


def _beside(func, level: int, args, kwargs):
    """The primal as autograd records it of PyTorch's own, and beside it the tangent."""
    if not args and "input" in kwargs:  # which those that draw or write take first
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    values, options = _primals(level, args, kwargs)
    written = args[0] if is_in_place(func, args, kwargs) else None
    if written is not None:
        args, values = (written.clone(), *args[1:]), (values[0].clone(), *values[1:])
    if func in RANDOM:
        out = _random(func, apart(args[0], level), values, options, written is not None)
    else:
        with unrecorded():
            duals = func(*args, **kwargs)
        with outside():
            out = func(*values, **options)
        out = pytree.tree_map(lambda x, dual: _with_tangent(x, dual, level), out, duals)
    return out if written is None else written.copy_(out)


def _constant(func, level: int, args, kwargs):
    """What is constant as the checkpoint will compute it again, without a transform about. What is
    an input, or a view of one, stays that: a tangent may be written to it."""
    values, options = _primals(level, args, kwargs)
    inputs, there = (pytree.tree_leaves(x) for x in ((args, kwargs), (values, options)))
    if any(map(_has_graph_here, inputs, there)) or is_in_place(func, args, kwargs):
        return NotImplemented
    with outside():
        out = func(*values, **options)
    if not _memory(out).isdisjoint(_memory(there)):
        return NotImplemented
    return pytree.tree_map_only(Tensor, lambda x: as_constant(x, level), out)


def _memory(tree) -> set[int]:
    """The storages of the tensors among these; those of empty ones have one address."""
    tensors = map(unwrapped, (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)))
    return {
        x.untyped_storage()._cdata for x in tensors if x.layout is torch.strided and not x.is_nested
    }


def _primals(level: int, args, kwargs):
    return pytree.tree_map_only(Tensor, lambda x: apart(x, level).primal, (args, kwargs))


def _has_graph_here(x: object, outside: object) -> bool:
    """Whether autograd records x inside of the transform alone: a leaf that was made there."""
    return isinstance(x, Tensor) and x.requires_grad and not outside.requires_grad


def _random(func, x: Dual, values, options, in_place: bool) -> Tensor:
    """A random function of x and of it alone, by the same numbers for its tangent."""

    def call(primal):
        return func(primal.clone() if in_place else primal, *values[1:], **options)

    with outside():
        with unrecorded():
            tangent = _random_tangent(call, values[0], x.tangent)
        out = func(*values, **options)
    return together(Dual(out, tangent))


def _with_tangent(x: Tensor, dual: Tensor, level: int) -> Tensor:
    tangent = apart(dual, level).tangent
    return as_constant(x, level) if tangent is None else together(Dual(x, tangent))


def _random_tangent(call: Callable, x: Tensor, tx: Tensor) -> Tensor:
    """The tangent of `call(x)`, where `call` is one of `RANDOM`, by the numbers that the next call
    of it draws.

    As the Jacobian is diagonal, that is the gradient at tx. A call with tx would draw the same
    numbers, but give them to other elements, should tx lie otherwise in memory.
    """
    devices = [] if x.device.type == "cpu" else [x.device]
    same_numbers = torch.random.fork_rng(
        devices, device_type="cuda" if not devices else x.device.type
    )
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with same_numbers, unseen, torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x), x, tx)[0]


def _refuse_numbered(func, values) -> None:
    if any(map(has_tangent, pytree.tree_leaves(values))):
        raise NotImplementedError(
            f"{func}: in a selective checkpoint inside of a jvp this function is not computed "
            "twice, as it may draw random numbers or write to its input; take a plain checkpoint, "
            "or keep the function out of it"
        )
