"""The mode that takes functions of PyTorch on dual tensors to this package's paths."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from scm_kernels._dynamo import never_compiled_alone
from scm_kernels.attention.op import has_tangent
from scm_kernels.transforms.rules import RULES, attention

# Functions that read or build dual tensors: a mode that rewrapped their results would lose
# tangents.
_DUAL_FUNCTIONS = frozenset({torch._VF._make_dual, torch._VF._unpack_dual})
_PYTORCH_NAMESPACES = frozenset({"aten", "prim", "prims", "scm_kernels"})


def fused() -> TorchFunctionMode:
    """Take what is called inside to this package's paths wherever an input is a dual tensor.

    For code that calls `torch.func.jvp` or `torch.autograd.forward_ad` itself:

        with scm_kernels.fused():
            out, t_out = torch.func.jvp(model, (x, t), (t_x, t_t))

    The model stays as it is: `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, linear
    layers, convolutions, matrix products and norms are rerouted. A call without a dual input is
    PyTorch's own, bitwise. A custom op that would drop a tangent raises `NotImplementedError`.

    Returns:
        A context manager (a `torch.overrides.TorchFunctionMode`).
    """
    return Fused(forget_level=None)


class Fused(TorchFunctionMode):
    """The mode. Autograd does not record what happens to the tangents of `forget_level`.

    That is a level of functorch's stack, or None. Transforms inside that level are left alone: the
    tangents of a jvp inside a jvp are part of what the outer one differentiates.
    """

    def __init__(self, *, forget_level: int | None):
        super().__init__()
        self.forget_level = forget_level
        self.tangent_grad = True  # whether autograd is to record tangents in the call at hand

    @never_compiled_alone
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if forward_ad._current_level < 0 or func in _DUAL_FUNCTIONS:
            return func(*args, **kwargs)
        self.tangent_grad = self.forget_level is None or self.forget_level != current_level()
        rule = RULES.get(func)
        # Attention looks for itself, also for tangents of outer levels.
        if rule is attention or (
            rule is not None and any(map(has_tangent, (*args, *kwargs.values())))
        ):
            return rule(self, *args, **kwargs)
        custom = _is_custom(func)
        if custom:
            _refuse_mutation(func, (args, kwargs))
        out = func(*args, **kwargs)
        if custom:
            _refuse_lost_tangents(func, (args, kwargs), out)
        return out if self.tangent_grad else _forget_graph(func, out)


def current_level() -> int:
    """The level of functorch's innermost transform, 0 outside of any; under Dynamo too."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else coerce_cinterpreter(interpreter).level()


def _is_custom(func) -> bool:
    """Whether func is an op that somebody registered with `torch.library`."""
    packet = getattr(func, "overloadpacket", func)
    name = getattr(packet, "_qualified_op_name", "")
    return "::" in name and name.partition("::")[0] not in _PYTORCH_NAMESPACES


def _writes(func) -> bool:
    """Whether an op of `torch.library` writes to its arguments in a kernel of its own.

    A composite op (`CompositeImplicitAutograd`) is PyTorch's own functions, and those take care of
    the tangents.
    """
    if isinstance(func, torch._ops.OpOverload):
        overloads = [func]
    else:
        overloads = [getattr(func, name) for name in func.overloads()]
    return any(op._schema.is_mutable and not op._can_decompose() for op in overloads)


# What torch.compiler.assume_constant_result does, without importing Dynamo, which cannot trace
# these two.
_is_custom._dynamo_marked_constant = True
_writes._dynamo_marked_constant = True


def _refuse_mutation(func, inputs) -> None:
    """Raise where an op of `torch.library` would leave the tangent of what it writes as it was."""
    if _writes(func) and any(map(has_tangent, pytree.tree_leaves(inputs))):
        raise NotImplementedError(
            f"{func}: this custom op got a dual tensor and writes to one of its arguments, whose "
            "tangent would not follow. Write it as a composition of PyTorch's functions, or pass "
            "it x.detach() if it is meant to be constant."
        )


def _refuse_lost_tangents(func, inputs, outputs) -> None:
    """Raise where an op of `torch.library` without a forward-mode formula dropped a tangent."""
    if not any(map(has_tangent, pytree.tree_leaves(inputs))):
        return
    for out in pytree.tree_leaves(outputs):
        if isinstance(out, Tensor) and out.is_floating_point() and not has_tangent(out):
            raise NotImplementedError(
                f"{func}: this custom op got a dual tensor and returned a result without a "
                "tangent, which would be a "
                "silent zero. Write it as a composition of PyTorch's functions, give it a rule in "
                "scm_kernels.transforms.rules.RULES, or pass it x.detach() if it is meant to be "
                "constant."
            )


def _forget_graph(func, out):
    """The results, their tangents without a graph; what was saved for one is freed here."""
    if isinstance(out, Tensor):
        return _without_tangent_graph(out)
    if isinstance(out, (tuple, list, dict)):
        return pytree.tree_map_only(Tensor, _without_tangent_graph, out)
    return out


def _without_tangent_graph(x: Tensor) -> Tensor:
    if not x.is_floating_point() and not x.is_complex():
        return x
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None or not _has_graph(tangent):
        return x  # and a view stays a view: rewrapping it would cut it off from its base
    return forward_ad.make_dual(primal, tangent.detach())


def _has_graph(x: Tensor) -> bool:
    """Whether autograd records x, at any level of functorch's stack."""
    if torch.compiler.is_compiling():
        return True  # the levels cannot be read under Dynamo, and detaching is free in a graph
    while not x.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True
