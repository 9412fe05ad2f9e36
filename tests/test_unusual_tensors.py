"""Tensors whose memory does not hold their numbers as they are, and those that a transform left
behind: the short way past PyTorch's dispatcher is not for them."""

import pytest
import torch
import torch.nn.functional as F
from torch._vmap_internals import _vmap
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels
from scm_kernels import (
    _backends,
    attention_jvp,
    consistency_loss,
    normalized_tangent,
    scaled_dot_product_attention,
)

SHAPE = (2, 3, 5, 4)


def negated(*shape: int) -> torch.Tensor:
    """A view of an imaginary part: PyTorch changes its sign when it is read."""
    x = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x


def zeros_without_memory(*shape: int) -> torch.Tensor:
    return torch._efficientzerotensor(shape)


MAKERS = [negated, zeros_without_memory]


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x])[0]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("place", [*range(6), "attn_mask"])
def test_attention(make, place):
    x = [torch.randn(2, 3, 5, 1) for _ in range(6)]
    options = {}
    if place == "attn_mask":
        options["attn_mask"] = make(5, 5)
    else:
        x[place] = make(2, 3, 5, 1)
    x = [y.requires_grad_() for y in x]
    same = {name: as_it_is(y) for name, y in options.items()}
    actual, expected = attention_jvp(*x, **options), attention_jvp(*map(as_it_is, x), **same)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad((y + 2 * t).sum(), x) for y, t in (actual, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("place", range(4))
def test_tangent(make, place):
    x, t = [torch.randn(3, 8) for _ in range(4)], torch.rand(3)
    x[place] = make(3, 8)
    same = [*map(as_it_is, x)]
    torch.testing.assert_close(normalized_tangent(*x, t), normalized_tangent(*same, t))
    torch.testing.assert_close(consistency_loss(*x, t), consistency_loss(*same, t))


def test_pullbacks_are_called_when_their_transform_has_ended():
    x, t = [torch.randn(3, 8) for _ in range(4)], torch.rand(3)
    _, pullback = vjp(lambda f: consistency_loss(f, *x[1:], t), x[0])
    expected = grad(lambda f: consistency_loss(f, *x[1:], t))(x[0])
    torch.testing.assert_close(pullback(torch.tensor(1.0))[0], expected)


def test_tensors_that_were_kept():
    kept, rest = [], [torch.randn(SHAPE) for _ in range(5)]

    def function(q):
        kept.append(q)
        return q.sum()

    q = torch.randn(SHAPE)
    grad(function)(q)
    torch.testing.assert_close(attention_jvp(kept[0], *rest), attention_jvp(q, *rest))


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_gradients_in_a_batch(output, wanted):
    """PyTorch's older vmap."""
    x = [torch.randn(SHAPE, requires_grad=True) for _ in range(6)]
    y = attention_jvp(*x)[output]
    if output == 0 and wanted == 3:
        pytest.skip("out does not depend on a tangent")
    cotangents = torch.randn(2, *SHAPE)
    for several in (cotangents, cotangents[:1]):
        actual = torch.autograd.grad(
            y, x[wanted], several, is_grads_batched=True, retain_graph=True
        )
        expected = [torch.autograd.grad(y, x[wanted], c, retain_graph=True)[0] for c in several]
        torch.testing.assert_close(actual[0], torch.stack(expected))


def test_a_batch_of_batches_raises():
    x = [torch.randn(SHAPE, requires_grad=True) for _ in range(6)]
    outputs = attention_jvp(*x)

    def gradient(*cotangents):
        return torch.autograd.grad(outputs, x, cotangents, retain_graph=True)

    first, second = torch.randn(2, *SHAPE), torch.randn(3, *SHAPE)
    with pytest.raises(NotImplementedError, match=r"inside of another.*torch\.func\.vmap"):
        _vmap(lambda a: _vmap(lambda b: gradient(a, b))(second))(first)


def test_jacobians_in_one_pass():
    x, t = [torch.randn(3, 8, dtype=torch.float64) for _ in range(4)], torch.rand(3)
    q = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(6)]
    for function, at in (
        (lambda f: consistency_loss(f, *x[1:], t, reduction="none"), x[0]),
        (lambda k: attention_jvp(q[0], k, *q[2:])[1], q[1]),
    ):
        torch.testing.assert_close(jacobian(function, at, vectorize=True), jacobian(function, at))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}], ids=str)
def test_jacobians_of_forward_mode_in_one_pass(options, dtype):
    """A batch of tangents, with a primal that has none; and the gradient of such a Jacobian."""
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=dtype)
    weights = torch.randn(1, 2, 5, 4, 1, 2, 5, 4, dtype=dtype)
    leaves = [k.requires_grad_()]
    if "attn_mask" in options:
        leaves.append(torch.randn(5, 5, dtype=dtype, requires_grad=True))
        options = {"attn_mask": leaves[1]}

    def run(attention):
        def function(q):
            return attention(q, k, v, **options)

        result = jacobian(function, q, vectorize=True, strategy="forward-mode")
        return result, *torch.autograd.grad((weights * result).sum(), leaves)

    with sdpa_kernel(SDPBackend.MATH):
        expected = run(F.scaled_dot_product_attention)
    with scm_kernels.fused():
        rerouted = run(F.scaled_dot_product_attention)
    for actual in (run(scaled_dot_product_attention), rerouted):
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_gradient_inside_of_such_a_jacobian_raises():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    options = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    with pytest.raises(NotImplementedError, match=r"vectorised jacobian.*torch\.func\.jacrev"):
        hessian(lambda q: scaled_dot_product_attention(q, k, v).sin().sum(), q, **options)


def test_a_backend_that_two_ways_have_forced(monkeypatch):
    """The backward runs where the forward did, whether the first call of the kind said so by the
    environment or by the context manager."""
    seen, plan = [], _backends.plan

    def spy(op, step, problem, request, *rest):
        seen.append((step, _backends.setting(request)))
        return plan(op, step, problem, request, *rest)

    x = [torch.randn(SHAPE, requires_grad=True) for _ in range(6)]
    monkeypatch.setenv("SCM_KERNELS_BACKEND", "reference")
    attention_jvp(*x)
    monkeypatch.delenv("SCM_KERNELS_BACKEND")
    with scm_kernels.backend("reference"):
        out = attention_jvp(*x)[0]
    monkeypatch.setattr(_backends, "plan", spy)
    out.sum().backward()
    assert seen == [("backward", "reference")]


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
        ((5, 8), (2, 4, 7, 8), (7, 6)),
        ((2, 4, 5, 8), (7, 8), (1, 7, 6)),
        ((3, 2, 4, 5, 8), (2, 1, 7, 8), (4, 7, 6)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_tensors_of_other_ranks_are_broadcast_as_by_pytorch(shapes, masked):
    primals, tangents = ([torch.randn(s, requires_grad=True) for s in shapes] for _ in range(2))
    mask = torch.randn(2, 1, 5, 7) if masked else None

    def gradients(out, t_out):
        seeds = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return out, t_out, *torch.autograd.grad((out, t_out), primals + tangents, (seeds, seeds))

    with sdpa_kernel(SDPBackend.MATH):
        stock = torch.func.jvp(
            lambda *x: F.scaled_dot_product_attention(*x, mask), (*primals,), (*tangents,)
        )
    ours = attention_jvp(*primals, *tangents, attn_mask=mask)
    torch.testing.assert_close(gradients(*ours), gradients(*stock))


def test_a_mask_with_heads_where_there_are_none():
    """PyTorch refuses it too."""
    x = [torch.randn(*s) for s in ((4, 8), (5, 8), (5, 8)) * 2]
    attention_jvp(*x, attn_mask=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"attn_mask: got .* expected .* broadcasts to \[4, 5\]"):
        attention_jvp(*x, attn_mask=torch.zeros(1, 4, 5))
