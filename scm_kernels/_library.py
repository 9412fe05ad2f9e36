"""What every op of this package shares: the library, the refusal of dual tensors, autograd below
the dispatcher.

An op registered with `torch.library` returns a zero tangent, silently, when it meets a dual tensor.
So each op's Autograd kernel is written by hand: it refuses duals, and it works at one level of
functorch's stack at a time, which is what lets `torch.func.grad` and `vmap` pass through it.
"""

import functools
import operator
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import SimpleNamespace

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.profiler as profiler
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

LIBRARY = torch.library.Library("scm_kernels", "DEF")


def _keys(*names: str) -> torch._C.DispatchKeySet:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets)


_DEVICES = ("CPU", "CUDA", "XPU", "MPS")
_AUTOCAST = _keys(*("Autocast" + device for device in _DEVICES))
# What PyTorch's dispatcher knows of a tensor whose memory holds its numbers as they are.
_ORDINARY = _keys("ADInplaceOrView", *_DEVICES, *("Autograd" + device for device in _DEVICES))
_UNUSUAL = ~(_ORDINARY | _AUTOCAST).raw_repr()
_keys_of = torch._C._dispatch_keys
# Whether an op runs for PyTorch's older vmap, below which autograd records whole batches.
in_older_vmap: ContextVar[bool] = ContextVar("scm_kernels_in_older_vmap", default=False)
# Not `forward_ad.unpack_dual`, which for the sake of an export takes twice as long.
_unpack_dual = torch._VF._unpack_dual

__all__ = [
    "LIBRARY",
    "Function",
    "Op",
    "apply",
    "below_autograd",
    "define",
    "differentiable",
    "in_older_vmap",
    "refuse_duals",
    "without_autocast",
]


class Function(_SingleLevelFunction):
    """A function at one level of functorch's stack, which compiled autograd takes as well."""

    @staticmethod
    def _compiled_autograd_key(ctx):
        return (ctx._autograd_function_id,)


class Op:
    """An op of this package: a call of it, and one from inside of its own Autograd kernel.

    Where no transform, mode or tensor subclass has to see a call, it goes to the kernel without
    PyTorch's dispatcher, which takes longer than all checks.
    """

    def __init__(self, schema: str, kernel: Callable, autograd: Callable, flops: Callable | None):
        self.name, _, arguments = schema.partition("(")
        self.tensors = arguments.partition(" -> ")[0].count("Tensor")
        self.kernel, self.autograd, self.flops = kernel, autograd, flops
        self.dispatched = getattr(torch.ops.scm_kernels, self.name)

    def __call__(self, *args):
        tensors = args[: self.tensors]
        if not plain(tensors):
            if self.flops is not None and not torch.compiler.is_compiling():
                _tell_flop_counters(self.dispatched, self.flops)
            return self.dispatched(*args)
        if forward_ad._current_level >= 0 or differentiable(tensors):
            return self.autograd(*args)
        with below_autograd():
            return self.kernel(*args)

    def below(self, *args):
        """Below autograd."""
        with below_autograd():
            if plain(args[: self.tensors]):
                return self.kernel(*args)
            return self.dispatched(*args)

    def inside(self, *args):
        """Below autograd from inside `Function.forward`, which turns both modes of AD off: the
        levels of functorch's stack outside of this one (the other `grad` of `grad(grad(f))`) still
        need them.
        """
        if torch._C._functorch.peek_interpreter_stack() is None:
            return self.below(*args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return self.below(*args)


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing but autograd has to see a call with these tensors."""
    if (
        torch.compiler.is_compiling()
        or profiler._is_profiler_enabled  # which knows ops by the dispatcher
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:  # a loop is quicker than all
        if x is not None and (
            (type(x) is not Tensor and type(x) is not Parameter)
            or _keys_of(x).raw_repr() & _UNUSUAL  # negated, without memory, left by a transform
        ):
            return False
    return True


def _tell_flop_counters(op: Callable, flops: Callable) -> None:
    """Have each `FlopCounterMode` that is on count an op, which it would take for none.

    PyTorch's module of these imports Triton: it is not imported to register a formula there.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is not None:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, module._FlopCounterMode):
                mode.counter.flop_registry.setdefault(op, flops)


def define(
    schema: str,
    *,
    check: Callable,
    kernel: Callable,
    fake: Callable,
    autograd: Callable,
    vmap: Callable,
    flops: Callable | None = None,
) -> Op:
    """Register one op: schema, kernel for every device, shapes without data, autograd, batching,
    and the formula of its operations.

    `check` gets the op's name and its arguments by name; the public functions have made sure of
    more, and go to the kernel where they can.
    """
    name, _, arguments = schema.partition(" -> ")[0].partition("(")
    names = [argument.split()[-1] for argument in arguments.removesuffix(")").split(",")]
    kernel = without_autocast(kernel)

    def checked(run):
        def checked(*args):
            check(name, dict(zip(names, args, strict=True)))
            return run(*args)

        return checked

    LIBRARY.define(schema)
    LIBRARY.impl(name, checked(kernel), "CompositeExplicitAutograd")
    LIBRARY.impl(name, checked(autograd), "Autograd")
    torch.library.register_fake(f"scm_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"scm_kernels::{name}", vmap, lib=LIBRARY)
    op = Op(schema, kernel, autograd, flops)
    LIBRARY.impl(name, _older_vmap(op.dispatched, vmap), "Batched")
    return op


def _older_vmap(op: Callable, rule: Callable) -> Callable:
    """The rule of `torch.func.vmap` for PyTorch's older vmap, which serves
    `torch.autograd.grad(is_grads_batched=True)` and `torch.autograd.functional.jacobian`."""

    def run(*args):
        args, in_dims = list(args), [None] * len(args)
        tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        for i in tensors:  # its batch, or one of 1, goes first
            args[i] = torch._remove_batch_dim(args[i], level, 1, 0)
        if any(torch._C._functorch.is_legacy_batchedtensor(args[i]) for i in tensors):
            raise NotImplementedError(
                "scm_kernels: a batch of gradients (is_grads_batched) inside of another is not "
                "supported; take torch.func.vmap of a torch.func.vjp"
            )
        size = max(args[i].shape[0] for i in tensors)
        for i in tensors:
            if args[i].shape[0] == size != 1:
                in_dims[i] = 0
            else:
                args[i] = args[i][0]
        if size == 1:  # PyTorch expands what has no batch
            return op(*args)
        token = in_older_vmap.set(True)
        try:
            out, out_dims = rule(SimpleNamespace(batch_size=size), in_dims, *args)
        finally:
            in_older_vmap.reset(token)
        if isinstance(out, Tensor):
            return torch._add_batch_dim(out, out_dims, level)
        return [
            x if dim is None else torch._add_batch_dim(x, dim, level)
            for x, dim in zip(out, out_dims, strict=True)
        ]

    return run


def without_autocast(kernel: Callable) -> Callable:
    """Autocast has had its say at the front door; the ops inside a kernel keep their dtype."""

    @functools.wraps(kernel)
    def run(*args):
        if not torch._C._is_any_autocast_enabled():
            return kernel(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return kernel(*args)

    return run


def refuse_duals(op: str, instead: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise if one of the tensors carries a tangent that this op would drop."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and _unpack_dual(tensor, level=0)[1] is not None:
            raise NotImplementedError(
                f"scm_kernels.{op} got a dual tensor where only plain tensors are expected: its "
                "tangent would be "
                f"lost. {instead}"
            )


def differentiable(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd has to record a call with these inputs."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110  (quicker than any)
        if x is not None and x.requires_grad:
            return True
    return False


def apply(function: type[Function], *args):
    """`function.apply` inside an Autograd kernel, where functorch has already chosen the level."""
    with enable_single_level_autograd_function():
        return function.apply(*args)
