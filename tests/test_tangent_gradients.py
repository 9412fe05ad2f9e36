"""The gradient of `consistency_loss` on every way to it: backward, double backward, torch.func.

Its values in eager mode are in `test_tangent.py`, which also holds the formula.
"""

import functools

import pytest
import torch
import torch._dynamo.compiled_autograd
from test_tangent import DEVICE, PRESETS, close, eager_loss
from test_tangent_transforms import arguments

from scm_kernels.tangent import consistency_loss, normalized_tangent


@pytest.mark.parametrize("preset", PRESETS)
def test_second_and_third_derivatives(preset):
    """Differentiating F - F.detach() - G.detach() again and again, as autograd does."""
    (F, *inputs, t, w), options = arguments(), {"preset": preset}
    learned = () if preset == "rcm" else (w.requires_grad_(),)
    generator = torch.Generator().manual_seed(1)
    results = []
    for function in (lambda *a, **k: consistency_loss(*a, reduction="none", **k), eager_loss):
        generator.manual_seed(1)
        leaves = (F.clone().requires_grad_(), *learned)
        cotangent = torch.arange(3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
        loss = function(leaves[0], *inputs, t, *learned, **options)
        order, derivatives = (loss * cotangent).sum(), []
        for _ in range(3):
            grads = torch.autograd.grad(order, (*leaves, cotangent), create_graph=True)
            derivatives += grads
            order = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype).to(DEVICE)).sum()
                for g in grads
            )
        results.append(derivatives)
    for a, e in zip(*results, strict=True):
        close(a, e, rtol=1e-12, scale=max(e.abs().max().item(), 1e-3))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_func_grad_of_grad(preset, power):
    """Each of functorch's levels has a value and a gradient of its own to differentiate."""
    (F, *inputs, t, w), options = arguments(), {"preset": preset}
    leaves = (F,) if preset == "rcm" else (F, w)

    def second(function):
        def loss(F, *w):
            return function(F, *inputs, t, *w, **options).pow(power).sum()

        def squares(*leaves):
            return sum(g.square().sum() for g in torch.func.grad(loss, places)(*leaves))

        places = tuple(range(len(leaves)))
        return torch.func.grad(squares, places)(*leaves)

    by_sample = functools.partial(consistency_loss, reduction="none")
    for actual, expected in zip(second(by_sample), second(eager_loss), strict=True):
        close(actual, expected, rtol=1e-12, scale=max(expected.abs().max().item(), 1e-3))


def test_a_weight_beyond_the_exponentials_of_float32():
    """Every way to the gradient takes exp(w) in float64, as the loss does."""
    F, *inputs, t, _ = arguments((2, 1000), torch.float32)
    # A small g: exp(w) ||G||^2 / D is a float32 again.
    F, *inputs = (1e-6 * x for x in (F, *inputs))
    w = torch.full((2,), 90.0, device=DEVICE)

    def loss(F, w):
        return consistency_loss(F, *inputs, t, w)

    leaves = F.clone().requires_grad_(), w.clone().requires_grad_()
    value = loss(*leaves)
    truth = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(x.isfinite().all() for x in (value, *truth))
    for gradients in (
        torch.autograd.grad(value, leaves, create_graph=True),
        torch.func.grad(loss, (0, 1))(F, w),
    ):
        torch.testing.assert_close(gradients, truth, rtol=1e-5, atol=0.0)
    primal, tangent = torch.func.jvp(lambda w: loss(F, w), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(primal, value.detach())
    torch.testing.assert_close(tangent, truth[1].sum(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float32_weight_costs_float64_losses_no_digits(dtype):
    F, *inputs, t, w = arguments()
    w = w.to(dtype)
    leaves = F.clone().requires_grad_(), w.clone().requires_grad_()
    value = consistency_loss(leaves[0], *inputs, t, leaves[1])
    truth = torch.autograd.grad(value, leaves, retain_graph=True)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    torch.testing.assert_close(gradients[0], truth[0], rtol=1e-13, atol=0.0)
    jvp, _ = torch.func.jvp(lambda w: consistency_loss(F, *inputs, t, w), (w,), (w,))
    torch.testing.assert_close(jvp, value.detach(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("weight", [100.0, float("nan"), float("inf")])
@pytest.mark.parametrize("cotangent", [1.0, float("inf"), float("nan")])
def test_a_lost_sample_is_in_no_derivative(weight, cotangent):
    F, V, *inputs, t, w = arguments((2, 5), torch.float32)
    V, w = V.clone(), w.clone()
    V[0, 1], w[0] = float("nan"), weight
    leaves = (F.requires_grad_(), w.requires_grad_())
    cotangents = torch.tensor([cotangent, 1.0], device=DEVICE, requires_grad=True)
    leaves = (*leaves, cotangents)
    options = {"nan_policy": "zero", "reduction": "none"}
    value = consistency_loss(F, V, *inputs, t, w, **options)
    first = torch.autograd.grad(value, leaves[:2], cotangents, create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), leaves)
    for x in (*first, *second):
        assert not x[0].any()
        assert x[1].isfinite().all()
        assert x[1].any()


def test_the_weight_alone_needs_no_elements():
    """What only log_weight learns from may be written over, or be of inference mode."""
    *inputs, t, w = arguments()
    w.requires_grad_()
    truth = torch.autograd.grad(consistency_loss(*inputs, t, w), w)
    with torch.inference_mode():
        copies = [x.clone() for x in inputs]
    value = consistency_loss(*copies, t, w)
    torch.testing.assert_close(torch.autograd.grad(value, w), truth)
    copies = [x.clone() for x in inputs]
    value = consistency_loss(*copies, t, w)
    for x in copies:
        x.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, w, create_graph=True), truth)


def test_compiled_autograd():
    *inputs, t, w = arguments()
    leaves = inputs[0].requires_grad_(), w.requires_grad_()
    truth = torch.autograd.grad(consistency_loss(*inputs, t, w), leaves)
    value = consistency_loss(*inputs, t, w)
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        value.backward()
    torch.testing.assert_close(tuple(x.grad for x in leaves), truth)


def test_the_value_of_a_vjp_has_a_gradient():
    F, *others = arguments()
    F.requires_grad_()
    value, _ = torch.func.vjp(lambda F: consistency_loss(F, *others), F)
    truth = torch.autograd.grad(consistency_loss(F, *others), F)
    torch.testing.assert_close(torch.autograd.grad(value, F), truth)


def test_gradients_reach_output_and_log_weight_alone():
    args = [x.requires_grad_() for x in arguments()]
    warmup = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    consistency_loss(*args, warmup=warmup).backward()
    assert [x.grad is not None for x in (*args, warmup)] == [True, *[False] * 4, True, False]
    assert not normalized_tangent(*args[:5]).requires_grad
