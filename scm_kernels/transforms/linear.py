"""Functions that are linear in each operand: the product rule, with no product for what is absent.

    y = f(x, w) + b        ty = f(tx, w) + f(x, tw) + tb

PyTorch materialises an absent tangent as zeros and multiplies it: its jvp of a linear layer with
constant weights runs three GEMMs where two are needed. One GEMM over the stacked [x ; tx] takes
0.94 to 1.33 times as long as the two on a CPU (`benchmarks/linear.py`, measured): it is not used.
"""

from contextlib import nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from scm_kernels import _checks
from scm_kernels._checkpoint import hooked, unrecorded
from scm_kernels._duals import primals, unpack

_BROADCASTING = frozenset({torch.matmul, Tensor.__rmatmul__})


def tangent_context(mode):
    """Where a rule computes a tangent: autograd looks away unless the mode says otherwise."""
    return nullcontext() if mode.tangent_grad else unrecorded()


def on_primals(mode, func, *operands, composite: bool = False):
    """`func` of the primals of operands that may be dual, without the tangents.

    In a plain `forward_ad.dual_level` a backward pass may run inside of the level, and its results
    have tangents if autograd has saved dual tensors: the operands, and of a `composite` function,
    which saves results or copies of its own, those too; and where hooks of saved tensors copy, what
    they are given. functorch's transforms end before.
    """
    if mode.apart:
        return func(*map(primals, operands))
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return func(*(unpack(x)[0] for x in operands))
    if composite or hooked():
        return unpack(func(*operands))[0]
    with forward_ad._set_fwd_grad_enabled(False):
        return func(*operands)


def bilinear(func, *names: str):
    """A rule for `func(x, w, ...)` or `func(x, w, b, ...)`, whose first parameters are `names`."""

    def rule(mode, *args, **kwargs):
        rest = primals([*args[len(names) :]])
        operands = [*args[: len(names)], *(kwargs.pop(name, None) for name in names[len(args) :])]
        kwargs = {name: primals(option) for name, option in kwargs.items()}
        (x, tx), (w, tw), *biases = map(unpack, operands)

        def call(x, w, *bias):
            return func(x, w, *bias, *rest, **kwargs)

        padded = any(isinstance(option, str) for option in (*rest, *kwargs.values()))
        composite = padded or (not mode.apart and _saves_copies(func, operands))
        out = on_primals(mode, call, *operands, composite=composite)
        t_biases = [tb for _, tb in biases]
        with tangent_context(mode):
            if tx is None and tw is None:
                tx = torch.zeros_like(x)
            t_out = None if tx is None else call(tx, w, *t_biases)
            if tw is not None:
                part = call(x, tw, *(t_biases if tx is None else [None] * len(biases)))
                t_out = part if t_out is None else t_out + part
        return mode.dual(out, t_out)

    rule.is_shortcut = True
    return rule


def _saves_copies(func, operands) -> bool:
    """Whether a function may save for its gradient what it has made of an operand."""
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if any(map(_checks.under_autocast, tensors)):
        return True
    if func is F.linear:
        return not tensors[0].is_contiguous()
    return func in _BROADCASTING and any(x.ndim != 2 for x in tensors)


def einsum(mode, equation, *operands):
    """The product rule for `torch.einsum(equation, *operands)`."""
    if not isinstance(equation, str):  # the form with sublists
        return NotImplemented
    if len(operands) == 1 and type(operands[0]) in (list, tuple):
        operands = operands[0]
    if len(operands) == 1:  # no product; and what may be a view has to stay one
        return NotImplemented
    parts, tangents = zip(*map(unpack, operands), strict=True)
    # Composite: what is multiplied may be copies, permuted or summed.
    out = on_primals(
        mode, lambda *operands: torch.einsum(equation, *operands), *operands, composite=True
    )
    with tangent_context(mode):
        t_out = None
        for i, tangent in enumerate(tangents):
            if tangent is not None:
                part = torch.einsum(equation, *parts[:i], tangent, *parts[i + 1 :])
                t_out = part if t_out is None else t_out + part
    return mode.dual(out, t_out)


einsum.is_shortcut = True
