"""Sums, differences, products, quotients, activations and softmax on dual tensors.

PyTorch has formulas for them. But where one operand has no tangent it takes zeros without memory
for one, and asks Python for the shape of what comes of them: 0.2 to 0.6 ms of the host a call, on
2 cores of an AMD EPYC, where the operation takes 2 us. Here, what is absent costs nothing.

    x + y    tx + ty                 x y    tx y + x ty
    x - y    tx - ty                 x / y  (tx - (x / y) ty) / y

And the tangent of an activation in half types is f'(x) tx, PyTorch's kernel of the gradient of f,
in one rounding; its formula makes a graph of half a dozen operations. So is that of a softmax,
whose Jacobian is symmetric: its formula makes four passes, and twice the error. In float32 both are
left to PyTorch, bitwise: a model in float64 may have parts in float32. So are a GLU and a hard
sigmoid where autograd does not record the tangent; PyTorch has no gradient of theirs.
"""

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from scm_kernels._duals import Dual, unpack
from scm_kernels.transforms.linear import on_primals, tangent_context


def _sum(out, x, tx, y, ty):
    if tx is None or ty is None:
        return _like(out, ty if tx is None else tx)
    return tx + ty


def _difference(out, x, tx, y, ty):
    if ty is None:
        return _like(out, tx)
    return -_like(out, ty) if tx is None else tx - ty


def _product(out, x, tx, y, ty):
    if tx is None or ty is None:
        return x * ty if tx is None else tx * y
    return tx * y + x * ty


def _quotient(out, x, tx, y, ty):
    if tx is None:
        if torch.is_grad_enabled():  # PyTorch's 1 / y is y.reciprocal() * 1: out may be written to
            out = x / y
        return -ty * (out / y)
    return tx / y if ty is None else (tx - out * ty) / y


def _like(out: Tensor, tangent: Tensor) -> Tensor:
    """The tangent as that of out, in memory of its own: what it was may be written to."""
    return tangent.to(out.dtype).expand(out.shape).clone()


def binary(func, tangent, *, reflected: bool = False):
    """A rule for `func(x, y)`, or `func(y, x)` if it is reflected, without options."""

    def rule(mode, *args, **kwargs):
        if len(args) != 2 or kwargs or not all(map(_is_operand, args)):
            return NotImplemented
        (x, tx), (y, ty) = map(unpack, reversed(args) if reflected else args)
        out = on_primals(mode, func, *args, composite=reflected)  # number / y saves 1 / y
        with tangent_context(mode):
            t_out = tangent(out, x, tx, y, ty)
        return mode.dual(out, t_out)

    rule.is_shortcut = True
    return rule


def activation(func, tangent):
    """A rule for `func(x)` with options, whose tangent is `tangent(tx, x, **options)`."""

    def rule(mode, *args, inplace=False, **options):
        if len(args) != 1 or inplace or mode.tangent_grad:
            return NotImplemented
        x, tx = unpack(args[0])
        if x.dtype.itemsize > 2:
            return NotImplemented
        out = on_primals(mode, lambda x: func(x, **options), *args)
        with tangent_context(mode):
            t_out = tangent(tx, x, **options)
        return mode.dual(out, t_out)

    rule.is_shortcut = True
    return rule


def softmax(func):
    """A rule for `func(x, dim)`, with or without a dtype."""

    def rule(mode, input=None, dim=None, *args, dtype=None, **options):
        if mode.tangent_grad or input is None or type(dim) is not int or args:
            return NotImplemented
        x, tx = unpack(input)
        if x.dtype.itemsize > 2:
            return NotImplemented
        out = on_primals(mode, lambda x: func(x, dim, dtype=dtype, **options), input)
        with tangent_context(mode):
            t_out = torch._softmax_backward_data(tx.to(out.dtype), out, dim, out.dtype)
        return mode.dual(out, t_out)

    rule.is_shortcut = True
    return rule


def glu(mode, input, dim=-1):
    """`F.glu`, a sigmoid(b). PyTorch has no gradient of its tangent, and in half types on a CPU no
    tangent."""
    x, tx = unpack(input)
    if x.dtype.itemsize > 2 and not mode.tangent_grad:
        return NotImplemented
    out = on_primals(mode, lambda x: F.glu(x, dim), input)
    with tangent_context(mode):
        wide = torch.promote_types(x.dtype, torch.float32)
        (a, b), (ta, tb) = (y.to(wide).chunk(2, dim) for y in (x, tx))
        gate = b.sigmoid()
        t_out = (gate * (ta + a * (1 - gate) * tb)).to(out.dtype)
    return mode.dual(out, t_out)


def hardsigmoid(mode, input, inplace=False):
    """`F.hardsigmoid`, x / 6 + 1 / 2 between 0 and 1, of whose tangent PyTorch has no gradient."""
    x, tx = unpack(input)
    if inplace or not mode.tangent_grad:
        return NotImplemented
    out = on_primals(mode, F.hardsigmoid, input)
    with tangent_context(mode):
        t_out = torch.where((x > -3) & (x < 3), tx / 6, 0.0)
    return mode.dual(out, t_out)


glu.is_shortcut = hardsigmoid.is_shortcut = True


def _is_operand(x: object) -> bool:
    return isinstance(x, (Dual, Tensor, numbers.Number))


_TABLE = {
    _sum: ("add", "__add__"),
    _difference: ("sub", "subtract", "__sub__"),
    _product: ("mul", "multiply", "__mul__"),
    _quotient: ("div", "divide", "true_divide", "__truediv__"),
}
_REFLECTED = {_sum: "__radd__", _difference: "__rsub__", _product: "__rmul__"}
_REFLECTED[_quotient] = "__rtruediv__"

RULES = {
    getattr(place, name): binary(getattr(place, name), tangent)
    for tangent, names in _TABLE.items()
    for name in names
    for place in (torch, Tensor)
    if hasattr(place, name)
} | {
    getattr(Tensor, name): binary(getattr(Tensor, name), tangent, reflected=True)
    for tangent, name in _REFLECTED.items()
}
RULES[F.hardsigmoid] = hardsigmoid
RULES[F.silu] = activation(F.silu, torch.ops.aten.silu_backward)
RULES[F.gelu] = activation(F.gelu, torch.ops.aten.gelu_backward)
RULES[F.mish] = activation(F.mish, torch.ops.aten.mish_backward)
RULES |= {func: softmax(func) for func in (F.softmax, torch.softmax, Tensor.softmax)}
