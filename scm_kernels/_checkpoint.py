"""Activation checkpoints, `torch.utils.checkpoint` (non-reentrant), on dual tensors.

A checkpoint keeps its inputs, and its backward computes the forward again for what autograd had
saved. It insists on as many tensors, in the order of the first time.

Inside of `scm_kernels.jvp` with no graph for the tangents, what is computed again are the primals,
by PyTorch's own functions, as the level is closed by then. So where a checkpoint looks on, autograd
records the primal of each function as PyTorch's own, and the tangent is computed beside it
(`transforms/checkpoints.py`).

A selective checkpoint numbers the ops that it sees, and hands out what it has kept by number: there
all tangents are computed out of its sight, and a function for which that cannot be is refused.

Inside of an open `forward_ad.dual_level`, the backward runs within `scm_kernels.fused()` too, and
computes dual tensors again on the paths of the first time.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C._autograd import _make_saved_tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from scm_kernels._duals import apart, current_level, jvp_at_work, outside

# What was there when the jvp at work began: a checkpoint around it computes all of it again.
# Other hooks of saved tensors, which may move them elsewhere, are to see what PyTorch saves alone.
_around: ContextVar[tuple] = ContextVar("scm_kernels_around", default=(None, 0))


@contextmanager
def inside_of_a_jvp() -> Iterator[None]:
    """Where a new checkpoint is one inside of the jvp that begins here."""
    hook = _hook()
    of_checkpoint = getattr(hook, "__module__", "") == torch.utils.checkpoint.__name__
    token = _around.set((hook if of_checkpoint else None, _selecting()))
    torch.utils.checkpoint._make_saved_tensor = _save_primal  # for good: it is what it was outside
    try:
        yield
    finally:
        _around.reset(token)


def _save_primal(x: Tensor, *, is_output: bool):
    """What a checkpoint keeps of an input: its primal, which says whether it has a graph.

    A tensor inside of a jvp does not, and hooks around the checkpoint, such as those of another,
    would give it back as one without.
    """
    if jvp_at_work() is None:
        return _make_saved_tensor(x, is_output=is_output)
    x = apart(x, current_level()).primal
    with outside():
        return _make_saved_tensor(x, is_output=is_output)


def hooked() -> bool:
    """Whether there are hooks of saved tensors."""
    return _hook() is not None


def looks_on() -> bool:
    """Whether a checkpoint inside of the jvp, or another hook, is given what autograd saves."""
    return not torch.compiler.is_compiling() and _hook() not in (None, _around.get()[0])


def selects() -> bool:
    """Whether a selective one (`create_selective_checkpoint_contexts`) numbers the ops."""
    return not torch.compiler.is_compiling() and _selecting() > _around.get()[1]


def _hook() -> Callable | None:
    """The innermost of saved tensors, which is another for each checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _selecting() -> int:
    """How many selective ones there are."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return 0
    modes = _get_current_dispatch_mode_stack()
    return sum(isinstance(x, _CachingTorchDispatchMode) for x in modes)


def unrecorded() -> AbstractContextManager:
    """Where tangents are computed that nothing is to be kept of."""
    return _out_of_sight() if selects() else torch.no_grad()


@contextmanager
def _out_of_sight():
    with torch.no_grad(), _disable_current_modes():
        yield


def _blind(function: Callable) -> Callable:
    """A copy of a function of `torch.autograd` that does not look for modes."""
    copy = types.FunctionType(
        function.__code__,
        {**vars(torch.autograd), "has_torch_function": lambda tensors: False},
        function.__name__,
        function.__defaults__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_backward = _blind(torch.autograd.backward)


def _tensor_backward(
    tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None
) -> None:
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


# To a mode a backward is a function like any other, which runs with the mode popped. These run in
# the mode that calls them.
BACKWARD = {
    Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _blind(torch.autograd.grad),
}
