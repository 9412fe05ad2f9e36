"""Providers of one DiT block with its tangent, and of a whole training step of an sCM.

The network is that of `examples/digits`, at the size that the case names.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels
from benchmarks import limits, providers
from benchmarks.accuracy import verdict_of_all
from benchmarks.attention_providers import EAGER_BUFFERS
from benchmarks.cases import Case
from benchmarks.providers import Problem, Provider
from benchmarks.tangent_providers import eager_loss
from examples.digits.model import Block, DiT, ModelConfig
from scm_kernels import trigflow

PATCH, CLASSES, MLP_RATIO = 2, 1000, 4
# Elements of the width, for each token and block, that eager keeps of what is not attention.
EAGER_ACTIVATIONS = 80
CHECKED_SAMPLES = 2


def config(case: Case) -> ModelConfig:
    _, tokens, width, depth, heads = case.shape
    side = PATCH * round(tokens**0.5)
    return ModelConfig(side, PATCH, width, depth, heads, MLP_RATIO, CLASSES)


def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    return (_block if case.kind == "block" else _step)(case, device)


def _filled(module: nn.Module, case: Case, device: str) -> nn.Module:
    """With something in every parameter: at its start a branch is zero, and so is its tangent."""
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return module.to(device, case.torch_dtype)


def _products(case: Case, linear: int, attention: int) -> float:
    """Operations of all blocks, for so many times the products of an ordinary forward of each."""
    b, tokens, width, depth, _ = case.shape
    layers = 2 * (4 + 2 * MLP_RATIO) * width * width * tokens
    scores = 2 * tokens * tokens * width
    return float(b * depth * (linear * layers + attention * scores))


def _dense(case: Case, run: str) -> int:
    """Bytes that eager attention and its layers hold in every block, about."""
    b, tokens, width, depth, heads = case.shape
    scores = 4 * EAGER_BUFFERS[run] * b * heads * tokens * tokens
    return depth * (scores + EAGER_ACTIVATIONS * b * tokens * width * case.torch_dtype.itemsize)


def eager_jvp(network: Callable, primals, tangents) -> tuple[Tensor, Tensor]:
    """One pass of stock PyTorch; what goes through the output keeps its graph."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(network, primals, tangents)


def two_passes(jvp: Callable, network: Callable, primals, tangents) -> tuple[Tensor, Tensor]:
    """The tangent without a graph, and an ordinary forward, by fused attention, for the loss."""
    with torch.no_grad():
        _, tangent = jvp(network, primals, tangents)
    return network(*primals), tangent


def stock(case: Case, device: str) -> Callable[[Callable], Callable]:
    """A decorator of what stock PyTorch does: with RMS norms that it has a tangent of.

    On a GPU the tangent of a half input's norm is in float32 (measured, PyTorch 2.11), which the
    next linear layer refuses. One writes the norm in float32, then, and rounds what it gives.
    """
    if device == "cpu" or case.torch_dtype.itemsize > 2:
        return lambda run: run
    norm = F.rms_norm

    def wide(x, shape, weight=None, eps=None):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return norm(y, shape, weight, eps).type_as(x)

    return mock.patch.object(F, "rms_norm", wide)


def _block(case: Case, device: str) -> Problem:
    b, tokens, width, _, _ = case.shape
    block = _filled(Block(config(case)), case, device)
    x, tx = torch.randn(2, b, tokens, width, device=device).to(case.torch_dtype)
    c, tc = torch.randn(2, b, 4, width, device=device).to(case.torch_dtype)

    def run(jvp: Callable, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return jvp(module, inputs[:2], inputs[2:])

    def provider(name: str, jvp: Callable, **rest) -> Provider:
        return Provider(name, lambda: run(jvp, block, x, c, tx, tc), **rest)

    dense, as_stock = _dense(case, "forward"), stock(case, device)
    eager = as_stock(eager_jvp)
    everyone = [
        provider(providers.EAGER, eager, memory=dense),
        _compiled_block(as_stock, block, (x, c), (tx, tc), dense),
        Provider(providers.SDPA, _without_tangent(block, x, c)),
    ]
    for name, reason, force in providers.in_order(device):
        everyone.append(provider(name, force(scm_kernels.jvp), reason=reason))

    @cache
    def answers() -> tuple[tuple[Tensor, ...], ...]:
        wide = run(eager, deepcopy(block).double(), *(y.double() for y in (x, c, tx, tc)))
        return wide, run(eager, block, x, c, tx, tc)

    def check(outputs: tuple[Tensor, ...]) -> str | None:
        n = len(outputs)
        return verdict_of_all(("out", "t_out")[:n], outputs, *(values[:n] for values in answers()))

    limit = limits.gemm(device, case.torch_dtype)
    return Problem(case, everyone, _products(case, 2, 6), limit, check)


def _without_tangent(block: nn.Module, x: Tensor, c: Tensor) -> Callable:
    def run() -> tuple[Tensor]:
        with torch.no_grad():
            return (block(x, c),)

    return run


def _compiled_block(
    as_stock: Callable, block: nn.Module, primals, tangents, memory: int
) -> Provider:
    function = providers.compiled(lambda p, t: eager_jvp(block, p, t))

    @as_stock
    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return function(primals, tangents)

    return Provider(providers.COMPILED, run, memory=memory, counted=False)


@dataclass
class Step:
    """A training step of a network: tangent, loss, gradient, and Adam's update.

    Adam's rate is 0, which costs it the same: all providers meet the same weights.
    """

    network: nn.Module
    inputs: list[Tensor]
    adam: torch.optim.Optimizer
    jvp: Callable
    loss: Callable

    def gradients(self) -> list[Tensor]:
        """Of the loss of the first samples, in one vector."""
        self.network.zero_grad(set_to_none=True)  # of one who has failed half-way
        self._backward([x[:CHECKED_SAMPLES] for x in self.inputs])
        vector = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        self.network.zero_grad(set_to_none=True)
        return [vector]

    def _backward(self, inputs: list[Tensor]) -> None:
        x_t, dxdt, t, label = inputs
        primals, tangents = trigflow.tangent_inputs(x_t, dxdt, t)
        F, J = self.jvp(lambda x, t: self.network(x, t, label), primals, tangents)
        self.loss(F, dxdt, x_t, J.detach(), t, torch.zeros_like(t)).backward()

    def __call__(self) -> None:
        self._backward(self.inputs)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def _adam(network: nn.Module) -> torch.optim.Optimizer:
    """With its state there already."""
    adam = torch.optim.Adam(network.parameters(), lr=0.0, fused=True)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return adam


def _step(case: Case, device: str) -> Problem:
    network = _filled(DiT(config(case)), case, device)
    side, b = network.config.image_size, case.shape[0]
    images = torch.randn(2, b, 1, side, side, device=device).to(case.torch_dtype)
    t = 0.1 + 1.4 * torch.rand(b, device=device)
    inputs = [*(0.5 * images), t, torch.randint(CLASSES, (b,), device=device)]
    adam = _adam(network)

    def provider(name: str, jvp: Callable, loss: Callable, **rest) -> Provider:
        step = Step(network, inputs, adam, jvp, loss)
        return Provider(name, step, values=step.gradients, **rest)

    one = _dense(case, "out")
    two = one // case.shape[3]  # attention of one block at a time
    eager = stock(case, device)(eager_jvp)
    two_eager = partial(two_passes, eager)
    everyone = [
        provider(f"{providers.EAGER}, two passes", two_eager, eager_loss, memory=two),
        provider(f"{providers.EAGER}, one pass", eager, eager_loss, memory=one),
    ]
    for name, reason, force in providers.in_order(device):
        calls = (force(scm_kernels.jvp), force(scm_kernels.consistency_loss))
        everyone.append(provider(f"{name}, one pass", *calls, reason=reason))

    @cache
    def answers() -> tuple[list[Tensor], list[Tensor]]:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        double = deepcopy(network).double()
        return tuple(
            Step(module, x, adam, eager, eager_loss).gradients()
            for module, x in ((double, wide), (network, inputs))
        )

    limit = limits.gemm(device, case.torch_dtype)
    return Problem(
        *(case, everyone, _products(case, 4, 11), limit),
        check=lambda outputs: verdict_of_all(("gradient",), outputs, *answers()),
    )
