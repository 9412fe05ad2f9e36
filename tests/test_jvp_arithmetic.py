"""Sums, differences, products and quotients inside `scm_kernels.jvp`: those of PyTorch's jvp.

Their gradients and the calls' forms are in `test_jvp.py`, with those of the other rules.
"""

import operator

import pytest
import torch
from networks import close, stock_jvp

import scm_kernels

torch.manual_seed(0)
C = torch.rand(4, dtype=torch.float64) + 0.5
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]
OTHERS = {
    "int": 2,
    "float": 1.5,
    "complex": 1.5 + 2j,
    "float64 scalar": torch.tensor(1.5, dtype=torch.float64),
    "bfloat16": torch.tensor([[1.5], [2.5], [3.5]], dtype=torch.bfloat16),
    "float64": C,
    "wider": torch.rand(2, 3, 4) + 0.5,
    "integers": torch.arange(1, 5),
    "complex64": torch.rand(4, dtype=torch.complex64) + 0.5,
}
OPTIONS = {
    "alpha": lambda x: torch.add(x, C, alpha=2) + torch.sub(C, x, alpha=3),
    "named": lambda x: torch.mul(input=x, other=C) + x.div(other=C),
    "floor": lambda x: torch.div(x, C, rounding_mode="floor") + x,
    "masks": lambda x: x * (x > 0) + (x > 1) * x,
    "nothing dual": lambda x: x + C * 2 + torch.tensor(3.0).add(1),
    "empty": lambda x: x[:0] * C + C,
    "expanded": lambda x: x[:1].expand(3, 4) + C,
}


def same(function, *shape, dtype=torch.float64):
    x, tx = (torch.rand(2, *shape, dtype=torch.float64) + 0.5).to(dtype)
    ours, stock = (jvp(function, (x,), (tx,)) for jvp in (scm_kernels.jvp, stock_jvp))
    assert torch.equal(ours[0], stock[0])
    # PyTorch's tangent of a scalar is wider than what it is the tangent of.
    assert (ours[1].shape, ours[1].dtype) == (stock[0].shape, stock[0].dtype)
    torch.testing.assert_close(ours[1], stock[1].to(ours[1].dtype))


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("operation", OPERATORS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (3, 4)], ids=str)
def test_types_and_shapes(shape, dtype, other, operation, reflected):
    y = OTHERS[other]
    if dtype == torch.bfloat16 and other == "complex":
        pytest.skip("PyTorch has no complex numbers of two bfloat16")
    same(lambda x: operation(y, x) if reflected else operation(x, y), *shape, dtype=dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    same(OPTIONS[name], 3, 4)


@pytest.mark.parametrize("operation", OPERATORS)
def test_what_is_written_to_later(operation):
    """A result has a tangent of its own, whatever becomes of the operand, and the other way."""

    def function(x):
        x = x.sin()
        y = operation(x, C)
        x.mul_(3)
        z = operation(x, 2)
        z.mul_(x)
        return x, y, z

    x, tx = torch.rand(2, 3, 4, dtype=torch.float64)
    close(scm_kernels.jvp(function, (x,), (tx,)), stock_jvp(function, (x,), (tx,)))


@pytest.mark.parametrize("tangent_grad", [False, True])
def test_transforms(tangent_grad):
    def function(x):
        return (2 - x * C / (x + 1)) / C + x.sum() * 3

    def ours(x, tx):
        return scm_kernels.jvp(function, (x,), (tx,), tangent_grad=tangent_grad)

    def stock(x, tx):
        return stock_jvp(function, (x,), (tx,))

    x, tx = torch.rand(2, 3, 4, dtype=torch.float64)
    close(torch.func.vmap(ours)(x, tx), torch.func.vmap(stock)(x, tx))
    close(torch.func.vmap(ours, (0, None))(x, tx[0]), torch.func.vmap(stock, (0, None))(x, tx[0]))
    ours_of, stock_of = (
        torch.func.grad(
            lambda x, jvp=jvp: sum(y.sin().sum() for y in jvp(x, tx)[: 1 + tangent_grad])
        )
        for jvp in (ours, stock)
    )
    close(ours_of(x), stock_of(x))
    batched = torch.func.vmap(function)
    close(scm_kernels.jvp(batched, (x,), (tx,)), stock_jvp(batched, (x,), (tx,)))
    if tangent_grad:
        outer = [stock_jvp(lambda x, f=f: f(x, tx), (x,), (tx,)) for f in (ours, stock)]
        close(*outer)
