"""The mode that takes functions of PyTorch on dual tensors to this package's paths."""

import sys

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import BackwardHook

from scm_kernels._checkpoint import BACKWARD, looks_on
from scm_kernels._duals import (
    Dual,
    DualMode,
    apart,
    current_level,
    has_graph,
    has_tangent,
    is_batched_here,
    jvp_at_work,
    level_is_open,
    make_dual,
    may_be_view,
    outside,
    refuse_batched,
    register_hook,
    require_grad,
    set_data,
    together,
    without_tangent_graph,
)
from scm_kernels._dynamo import never_compiled_alone
from scm_kernels.transforms import checkpoints
from scm_kernels.transforms.functions import LINEAR
from scm_kernels.transforms.rules import EAGER_RULES, RULES, attention, multi_head_attention

# Functions that read or build dual tensors: a mode that rewrapped their results would lose
# tangents.
_DUAL_FUNCTIONS = frozenset({torch._VF._make_dual, torch._VF._unpack_dual})
# What is asked of autograd, which records what is outside of a jvp.
_REQUIRES_GRAD = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})
_DATA = frozenset({Tensor.data.__set__})
_HOOKS = frozenset({Tensor.register_hook, Tensor.requires_grad.__get__})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})  # no subclass with functions of its own
_PYTORCH_NAMESPACES = frozenset({"aten", "prim", "prims", "scm_kernels"})


def fused() -> TorchFunctionMode:
    """Take what is called inside to this package's paths wherever an input is a dual tensor.

    For code that calls `torch.func.jvp` or `torch.autograd.forward_ad` itself:

        with scm_kernels.fused():
            out, t_out = torch.func.jvp(model, (x, t), (t_x, t_t))

    The model stays as it is: `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, linear
    layers, convolutions, matrix products, norms and arithmetic are rerouted. A call without a dual
    input is PyTorch's own, bitwise. The tangent keeps its graph and what that saves, as
    `torch.func.jvp` has it; `scm_kernels.jvp` is what does without.

    Returns:
        A context manager (a `torch.overrides.TorchFunctionMode`).

    Raises:
        NotImplementedError: inside, by a custom op that would drop a tangent, by what attention has
            no derivative for (a jvp of a jvp, of a vmap or of a grad), by a module's backward
            hooks, which PyTorch would leave out.

    Source: Lu & Song, arXiv 2410.11081, section 4.
    """
    return Fused(forget_level=None)


class Fused(DualMode):
    """The mode. Autograd does not record what happens to the tangents of `forget_level`.

    That is a level of functorch's stack, or None. Transforms inside that level are left alone: the
    tangents of a jvp inside a jvp are part of what the outer one differentiates.
    """

    def __init__(self, *, forget_level: int | None):
        super().__init__()
        self.forget_level = forget_level
        self.tangent_grad = True  # whether autograd is to record tangents in the call at hand
        self.apart = False  # whether a rule has been handed parts, outside of functorch's stack
        self.inference = True  # whether all of a jvp may be in inference mode, and not a part alone

    @never_compiled_alone
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not level_is_open() or func in _DUAL_FUNCTIONS:
            return func(*args, **kwargs)
        if func is checkpoint:
            return self._checkpoint(*args, **kwargs)
        level, eager = current_level(), not torch.compiler.is_compiling()
        if eager and torch.is_inference_mode_enabled() and not self.inference:
            return func(*args, **kwargs)  # a part that has no derivative
        if eager and func in BACKWARD and level == 0 and _PLAIN.issuperset(types):
            with self:
                return BACKWARD[func](*args, **kwargs)
        if eager and func in _REQUIRES_GRAD and jvp_at_work() is not None:
            done = require_grad(level, *args, **kwargs)  # gradient checkpointing asks for it
            return args[0] if done else func(*args, **kwargs)
        if eager and func in _HOOKS and jvp_at_work() is not None:
            if func is Tensor.register_hook:
                return register_hook(level, *args, **kwargs)
            if has_graph(args[0]):
                _refuse_module_hooks()
        if eager and func in _DATA and jvp_at_work() is not None and set_data(level, *args):
            return None
        self.tangent_grad = self.records(level)
        rule = RULES.get(func)
        if rule is None and eager:
            rule = EAGER_RULES.get(func)
        if rule is not None:
            out = self._by_rule(rule, level, args, kwargs)
            if out is not NotImplemented:
                return out
        watched = not self.tangent_grad and looks_on()  # by a checkpoint
        if watched:
            ruled = rule not in (None, attention)
            out = checkpoints.compute(func, level, args, kwargs, ruled=ruled)
            if out is not NotImplemented:
                return out
            checkpoints.refuse_writes(func, args)
        custom = _is_custom(func)
        if custom:
            _refuse_mutation(func, (args, kwargs))
        out = func(*args, **kwargs)
        if custom:
            _refuse_lost_tangents(func, (args, kwargs), out)
        if watched:
            checkpoints.refuse_results(func, (args, kwargs), out)
        if self.tangent_grad or (eager and func in LINEAR):
            return out
        return _forget_graph(out, level)

    def records(self, level: int) -> bool:
        return self.forget_level is None or self.forget_level != level

    def _checkpoint(self, function, *args, **kwargs):
        """`torch.utils.checkpoint.checkpoint`, which is a function to a mode under Dynamo alone.

        What it runs would run with the mode popped. The one that is entered instead belongs to that
        graph, as Dynamo lets no graph write to what is outside of it.
        """
        forget_level = self.forget_level

        def inside(*args, **kwargs):
            with Fused(forget_level=forget_level):
                return function(*args, **kwargs)

        return checkpoint(inside, *args, **kwargs)

    def _by_rule(self, rule, level: int, args, kwargs):
        """What a rule makes of a call, NotImplemented where it is PyTorch's own."""
        if kwargs.get("out") is not None:  # PyTorch refuses it on dual tensors, in its own words
            return NotImplemented
        jvp = jvp_at_work()
        eager = not torch.compiler.is_compiling()
        if eager and jvp is None and level > 0 and getattr(rule, "is_shortcut", False):
            return NotImplemented
        if rule is multi_head_attention or jvp is None:
            values = (*args, *kwargs.values())
            ruled = any(map(has_tangent, values))
            if ruled and any(map(is_batched_here, values)):
                refuse_batched()
        else:
            parts = [apart(x, level) for x in args]
            named = {name: apart(x, level) for name, x in kwargs.items()} if kwargs else kwargs
            if any(map(_has_tangent, parts)) or any(map(_has_tangent, named.values())):
                self.apart = True
                with outside():
                    out = rule(self, *parts, **named)
                return out if out is NotImplemented else together(out)
            ruled = False
        if ruled or rule is attention:  # which looks for tangents of outer levels too
            self.apart = False
            return rule(self, *args, **kwargs)
        return NotImplemented

    def dual(self, out: Tensor, t_out: Tensor) -> Tensor | Dual:
        """What a rule makes its result of."""
        if not self.tangent_grad and (torch.compiler.is_compiling() or may_be_view(t_out)):
            t_out = t_out.detach()  # PyTorch lets nobody write to a view that no_grad has made
        return Dual(out, t_out) if self.apart else make_dual(out, t_out)


def _has_tangent(x: object) -> bool:
    """Of an argument whose tensors are apart."""
    if type(x) is Dual:
        return x.tangent is not None
    return type(x) is list and any(map(_has_tangent, x))


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


def _refuse_module_hooks() -> None:
    """Raise where a module asks whether its backward hooks are to be set up: no tensor inside of a
    jvp says that it requires a gradient, so PyTorch would leave them out, silently."""
    frame = sys._getframe(2)
    if torch.is_grad_enabled() and frame.f_code is BackwardHook._apply_on_tensors.__code__:
        module = type(frame.f_locals["self"].module).__name__
        raise NotImplementedError(
            f"scm_kernels: {module} has a backward hook (register_full_backward_hook or "
            "register_full_backward_pre_hook), which PyTorch leaves out inside of a jvp. Remove "
            "it, or register a hook of a tensor in the module's forward"
        )


def _forget_graph(out, level: int):
    """The results, their tangents without a graph; what was saved for one is freed here."""
    if type(out) is tuple and all(isinstance(x, Tensor) for x in out):
        return tuple(without_tangent_graph(x, level) for x in out)
    if isinstance(out, (tuple, list, dict)) and type(out) is not torch.Size:
        return pytree.tree_map_only(Tensor, lambda x: without_tangent_graph(x, level), out)
    return without_tangent_graph(out, level)
