"""What shares memory with a constant, in a checkpoint; and what autograd saves copies of, where a
backward runs inside of a `forward_ad.dual_level`: as in PyTorch's own jvp.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import close, stock_jvp
from torch import nn
from torch.utils.checkpoint import checkpoint

import scm_kernels

torch.manual_seed(0)
SQUARE = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
WIDE = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
VECTOR = nn.Parameter(torch.randn(2, dtype=torch.float64))
LEAVES = [SQUARE, WIDE, VECTOR]


def ones():
    return torch.ones(3, 3, dtype=torch.float64)


def written(alias):
    """A constant, to an alias of which a dual tensor is written."""

    def function(x):
        constant = ones()
        alias(constant).add_(x * SQUARE)
        return constant * x

    return function


ALIASES = {
    "zero_": lambda y: y.zero_(),
    "fill_": lambda y: y.fill_(2.0),
    "dropout in evaluation": lambda y: F.dropout(y, 0.5, training=False),
    "dropout of nothing": lambda y: F.dropout(y, 0.0),
    "dropout in place": lambda y: F.dropout(y, 0.0, True, inplace=True),
    "einsum": lambda y: torch.einsum("ij->ji", y),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_constant_in_a_checkpoint_gets_the_tangent_that_is_written_to_an_alias(alias):
    function = written(ALIASES[alias])
    x, tx = torch.randn(2, 3, 3, dtype=torch.float64)
    kept = lambda x: checkpoint(function, x, use_reentrant=False)  # noqa: E731
    ours, stock = scm_kernels.jvp(kept, (x,), (tx,)), stock_jvp(function, (x,), (tx,))
    close(tuple(ours), tuple(stock), 1e-13)
    close(*(torch.autograd.grad(y[0].sum(), SQUARE)[0] for y in (ours, stock)), 1e-13)


def test_constants_of_a_vmap_around_the_jvp_in_a_checkpoint():
    constants = torch.randn(2, 3, 3, dtype=torch.float64)
    x, tx = torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def run(jvp, wrapped):
        def one(x, tx, c):
            return jvp(wrapped(lambda x: F.dropout(c, 0.5, False) @ SQUARE * x), (x,), (tx,))

        return torch.func.vmap(one)(x, tx, constants)

    ours = run(scm_kernels.jvp, lambda f: lambda x: checkpoint(f, x, use_reentrant=False))
    close(tuple(ours), tuple(run(stock_jvp, lambda f: f)), 1e-13)


def test_constants_without_elements_in_a_checkpoint_are_no_aliases():
    empty, weight = torch.zeros(0, 3, dtype=torch.float64), SQUARE[0]

    def function(x):
        return (F.layer_norm(empty, (3,), weight).sum() + (empty @ SQUARE).sum() + x) * weight

    x, tx = torch.randn(2, 3, dtype=torch.float64)
    kept = lambda x: checkpoint(function, x, use_reentrant=False)  # noqa: E731
    ours, stock = scm_kernels.jvp(kept, (x,), (tx,)), stock_jvp(function, (x,), (tx,))
    close(tuple(ours), tuple(stock), 1e-13)
    close(*(torch.autograd.grad(y[0].sum(), SQUARE)[0] for y in (ours, stock)), 1e-13)


SAVED = {
    "linear": lambda x: F.linear(x, WIDE),
    "linear, transposed": lambda x: F.linear(x.mT, SQUARE),
    "linear, expanded": lambda x: F.linear(x[:1].expand(2, 3, 4), WIDE),
    "matmul": lambda x: x @ WIDE,
    "matmul, transposed": lambda x: x.mT @ SQUARE,
    "matmul, from the left": lambda x: SQUARE @ x,
    "matmul, batched": lambda x: x @ WIDE.expand(2, 4, 4),
    "matmul, vector": lambda x: x.permute(1, 2, 0) @ VECTOR,
    "rmatmul": lambda x: x.__rmatmul__(SQUARE),
    "bmm": lambda x: torch.bmm(x.mT, SQUARE.expand(2, 3, 3)),
    "mm": lambda x: torch.mm(x[0].mT, SQUARE),
    "einsum": lambda x: torch.einsum("bij,kj->kib", x, WIDE),
    "einsum, summed": lambda x: torch.einsum("bij,kl->bl", x, SQUARE),
    "conv1d": lambda x: F.conv1d(x.mT.contiguous().mT, SQUARE[..., None]),
    "quotient": lambda x: VECTOR[0] / (x + 4),
    "reciprocal": lambda x: 1.0 / (x * VECTOR[1] + 4),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_the_gradient_inside_of_a_dual_level_has_its_tangent(name, autocast):
    x, tx = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    def tangents(mode, dtype):
        leaves = [y.detach().to(dtype).requires_grad_() for y in LEAVES]
        rounding = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with forward_ad.dual_level(), mode, rounding:
            out = function(forward_ad.make_dual(x.to(dtype), tx.to(dtype)), leaves)
            loss = out.double().square().sum()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            return [forward_ad.unpack_dual(y).tangent for y in gradients if y is not None]

    def function(x, leaves):
        names = dict(zip(("SQUARE", "WIDE", "VECTOR"), leaves, strict=True))
        call = SAVED[name]
        return type(call)(call.__code__, {**globals(), **names})(x)

    dtype = torch.float32 if autocast else torch.float64  # autocast leaves float64 as it is
    ours = tangents(scm_kernels.fused(), dtype)
    stock = tangents(nullcontext(), dtype)
    close(tuple(ours), tuple(stock), 2e-2 if autocast else 1e-12)
