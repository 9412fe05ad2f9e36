"""Dual tensors: their parts, and where those are computed.

Inside of `torch.func.jvp` every op goes through functorch's stack of transforms, which keeps the
host busy several times as long as the op itself. A rule of `transforms/rules.py` needs none of it:
it is handed the parts of its dual tensors as they are outside of the jvp, computes there, and what
it returns is made dual inside again.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import CInterpreter, CJvpInterpreterPtr, TransformType
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_functorch = torch._C._functorch
# Not those of `forward_ad`, which for the sake of an export take twice as long.
_unpack_dual, _make_dual = torch._VF._unpack_dual, torch._VF._make_dual
_PARTS = "_scm_kernels_parts"  # of a dual tensor: (Dual, its version), which take long to find out


class Dual(NamedTuple):
    """The parts of a tensor outside of the jvp that is at work on it."""

    primal: Tensor
    tangent: Tensor | None


class DualMode(TorchFunctionMode):
    """A mode that takes functions on dual tensors to other paths."""

    def records(self, level: int) -> bool:
        """Whether autograd is to record tangents of functorch's level."""
        raise NotImplementedError


def unpack(x: object) -> tuple[object, Tensor | None]:
    """(primal, tangent) of what may be dual; a tangent that is zero by construction is None."""
    if type(x) is Dual:
        return x
    if x is None or not isinstance(x, Tensor) or not level_is_open():
        return x, None  # None, or what the checks will refuse
    if torch.compiler.is_compiling():
        return forward_ad.unpack_dual(x)
    return _parts(x)


def has_tangent(x: object) -> bool:
    """Whether x is a dual tensor at the current level."""
    return unpack_here(x)[1] is not None


def unpack_here(x: object) -> tuple[object, Tensor | None]:
    """`unpack` at the front door, where transforms may meet."""
    if is_batched_here(x):
        if is_dual_outside(x):
            refuse_batched()
        return x, None
    return unpack(x)


def is_batched_here(x: object) -> bool:
    """Whether the innermost transform is a vmap over x; one outside of the jvp is in order."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return False
    if not _functorch.is_batchedtensor(x):
        return False
    return _functorch.maybe_get_level(x) == _functorch.peek_interpreter_stack().level()


def refuse_batched() -> NoReturn:
    """Raise where a function that takes dual tensors apart meets a vmap inside of the jvp."""
    raise NotImplementedError(
        "scm_kernels: a jvp of a vmap (jvp(vmap(f))) has no batching rule for dual tensors; take "
        "vmap(jvp(f)), or give the batch to the op as a dimension"
    )


def is_dual_outside(x: object) -> bool:
    """Whether x is dual at a level outside of the innermost transform."""
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is None or not isinstance(x, Tensor):
        return False
    if _functorch.maybe_get_level(x) == interpreter.level():
        x = _functorch.get_unwrapped(x)
    with coerce_cinterpreter(interpreter).lower():
        return (not is_batched_here(x) and unpack(x)[1] is not None) or is_dual_outside(x)


def primals(x: object) -> object:
    """What a rule does not differentiate: an option, or a list of some, without its `Dual`s."""
    if type(x) is list:
        return [primals(y) for y in x]
    return x.primal if type(x) is Dual else x


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    if x.layout is not torch.strided or x.is_nested:
        return x, None  # there are no views of it, and so no dual ones
    primal, tangent = _unpack_dual(x, level=0)
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor; the first of a program is to be made by PyTorch's function of this name."""
    if torch.compiler.is_compiling():
        return forward_ad.make_dual(primal, tangent)
    return _make_dual(primal, tangent, level=0)


def current_level() -> int:
    """The level of functorch's innermost transform, 0 outside of any; under Dynamo too."""
    interpreter = _functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


# What torch.compiler.assume_constant_result does, without importing Dynamo, which makes an object
# of the None of an empty stack.
current_level._dynamo_marked_constant = True


def level_is_open() -> bool:
    """Whether a jvp or a `forward_ad.dual_level` is about."""
    return forward_ad._current_level >= 0


# A plain look at the level before a jvp would be what Dynamo of PyTorch 2.14 still sees inside.
level_is_open._dynamo_marked_constant = True


def jvp_at_work() -> CInterpreter | None:
    """functorch's innermost transform, if that is a jvp and ops may be computed outside of it."""
    if torch.compiler.is_compiling():
        return None
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() != TransformType.Jvp:
        return None
    return interpreter if CJvpInterpreterPtr(interpreter).prevFwdGradMode() else None


def apart(x: object, level: int) -> object:
    """x with a `Dual`, outside of the jvp of this level, in place of each tensor."""
    if not isinstance(x, Tensor):
        return [apart(y, level) for y in x] if isinstance(x, (list, tuple)) else x
    if _functorch.maybe_get_level(x) != level:
        return Dual(x, None)
    parts, version = getattr(x, _PARTS, (None, 0))
    if parts is not None and x._version == version:
        return parts
    tangent = _parts(x)[1]
    return Dual(_functorch.get_unwrapped(x), _unwrapped(tangent, level))


def together(parts: Dual) -> Tensor:
    """The dual tensor, inside of the jvp, of what was computed outside; `apart` undoes it."""
    x = _make_dual(*parts, level=0)
    setattr(x, _PARTS, (parts, x._version))
    return x


def _unwrapped(x: Tensor | None, level: int) -> Tensor | None:
    if x is None or _functorch.maybe_get_level(x) != level:
        return x
    return _functorch.get_unwrapped(x)


def unwrapped(x: Tensor) -> Tensor:
    """x outside of all of functorch's transforms."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def as_constant(x: Tensor, level: int) -> Tensor:
    """A constant that was computed outside, as the jvp of this level would have made it."""
    return _functorch._wrap_for_grad(x, level)


class outside:  # noqa: N801  (a function to who uses it; a generator would take longer)
    """Outside of functorch's innermost transform, for tensors that are so too."""

    __slots__ = ("layer",)

    def __enter__(self) -> None:
        self.layer = _functorch.pop_dynamic_layer_stack()

    def __exit__(self, *error) -> None:
        _functorch.push_dynamic_layer_stack(self.layer)


def require_grad(level: int, x: Tensor, requires_grad: bool = True) -> bool:
    """Have autograd record x, or not, where it does so: outside of the jvp of this level. False if
    x is not of that level."""
    if _functorch.maybe_get_level(x) != level:
        return False
    vars(x).pop(_PARTS, None)
    x = _functorch.get_unwrapped(x)
    if not (requires_grad and x.requires_grad):
        with outside():
            x.requires_grad_(requires_grad)
    return True


def set_data(level: int, x: Tensor, data: Tensor) -> bool:
    """x.data = data where x is no tensor of the jvp of this level, as a parameter is none: what was
    computed inside would outlive the jvp there. False if PyTorch's own will do."""
    if _functorch.maybe_get_level(x) == level or _functorch.maybe_get_level(data) != level:
        return False
    primal, tangent = apart(data, level)
    if tangent is not None:
        raise NotImplementedError(
            "scm_kernels: x.data = y inside of a jvp got a y with a tangent, which would be lost, "
            "as x is none of the jvp's tensors; pass y.detach() if it is meant to be a constant"
        )
    with outside():
        x.data = primal
    return True


def register_hook(level: int, x: Tensor, hook: Callable) -> RemovableHandle:
    """A hook of the gradient of x, where autograd records it: outside of the jvp of this level."""
    if _functorch.maybe_get_level(x) != level:
        return x.register_hook(hook)
    x = _functorch.get_unwrapped(x)
    with outside():
        return x.register_hook(hook)


def without_tangent_graph(x: object, level: int) -> object:
    """x, whose tangent, if it has one, autograd does not record any more."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    if level and not torch.compiler.is_compiling() and _functorch.maybe_get_level(x) != level:
        return x  # not dual in here
    primal, tangent = unpack(x)
    if tangent is None or not has_graph(tangent):
        return x  # and a view stays a view: rewrapping it would cut it off from its base
    if jvp_at_work() is None:
        return make_dual(primal, tangent.detach())
    tangent = _unwrapped(tangent, level)
    with outside():
        tangent = tangent.detach()
    return make_dual(primal, tangent)


def may_be_view(x: Tensor) -> bool:
    """Whether x is a view, which what a vmap batches does not tell."""
    return x._is_view() or _functorch.is_functorch_wrapped_tensor(x)


def has_graph(x: Tensor) -> bool:
    """Whether autograd records x, at any level of functorch's stack."""
    if torch.compiler.is_compiling():
        return True  # the levels cannot be read under Dynamo, and detaching is free in a graph
    while not x.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True
