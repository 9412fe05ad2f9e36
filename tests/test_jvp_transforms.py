"""`scm_kernels.jvp` inside and around the transforms of `torch.func`: right, or a clear error."""

from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import close, layer_norm, stock_jvp, true_jvp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels

torch.manual_seed(0)
W = torch.randn(6, 6, dtype=torch.float64)
X, TX, UX = torch.randn(3, 4, 6, dtype=torch.float64)
BOTH = pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])


def perceptron(w, x):
    return torch.tanh(F.layer_norm(torch.tanh(x @ w), (6,))) @ w


def attention(w, x, sdpa=F.scaled_dot_product_attention):
    q = (x @ w).unflatten(1, (2, 3)).transpose(0, 1)
    out = sdpa(q, q.sin(), torch.tanh(q))
    return out.transpose(0, 1).flatten(1) * x


NETWORKS = pytest.mark.parametrize("network", [perceptron, attention], ids=lambda f: f.__name__)


def linear(w, x):
    return torch.tanh(x @ w) @ w


def loss(jvp, network, w, part="both", **options):
    out, t_out = jvp(lambda x: network(w, x), (X,), (TX,), **options)
    return {
        "out": out.square().sum(),
        "tangent": (t_out * torch.arange(6)).square().sum(),
        "both": (out * t_out).sum() + out.sum(),
    }[part]


@NETWORKS
@pytest.mark.parametrize("part", ["out", "tangent", "both"])
def test_grad_of_jvp(network, part):
    got = grad(lambda w: loss(scm_kernels.jvp, network, w, part, tangent_grad=True))(W)
    close(got, grad(lambda w: loss(true_jvp, network, w, part))(W))


@NETWORKS
def test_grad_of_jvp_with_a_detached_tangent(network):
    """The tangent is a constant of the loss."""
    _, constant = stock_jvp(lambda x: network(W, x), (X,), (TX,))
    want = grad(lambda w: (network(w, X) * constant).sum() + network(w, X).sum())
    with sdpa_kernel(SDPBackend.MATH):
        close(grad(lambda w: loss(scm_kernels.jvp, network, w))(W), want(W))
    got = grad(lambda w: loss(scm_kernels.jvp, network, w, "tangent"))(W)
    assert torch.equal(got, torch.zeros_like(W))


@NETWORKS
@BOTH
def test_vmap_of_jvp(network, through):
    """Over directions, inputs and weights, which the function closes over."""

    def over(jvp, **options):
        def one(x, tx, w):
            return jvp(lambda x: network(w, x), (x,), (tx,), **options)

        batch = torch.stack([X, UX]), torch.stack([TX, X]), torch.stack([W, W.T])
        return [
            vmap(one)(*batch),
            vmap(one, in_dims=(None, 0, None))(X, batch[1], W),
            vmap(one, in_dims=(None, None, 0))(X, TX, batch[2]),
            vmap(one, in_dims=(1, 0, None), out_dims=1)(torch.stack([X, UX], 1), batch[1], W),
        ]

    close(over(scm_kernels.jvp, tangent_grad=through), over(stock_jvp))


@pytest.mark.parametrize("first", ["query", "weight"])
def test_a_batched_operand_before_the_dual_one(first):
    """The vmap is outside of the jvp, the batched tensor the first that a rule looks at."""
    queries = torch.randn(2, 1, 4, 6, dtype=torch.float64)

    def one(jvp):
        def run(w):
            if first == "weight":
                return jvp(lambda x: w[0] @ x.T, (X,), (TX,))
            return jvp(lambda x: F.scaled_dot_product_attention(w, x, x), (X[None],), (TX[None],))

        return vmap(run)(queries)

    close(one(scm_kernels.jvp), one(stock_jvp))


@NETWORKS
@BOTH
def test_vmap_of_grad_of_jvp(network, through):
    part = "both" if through else "out"
    weights = torch.stack([W, W.T])
    got = vmap(grad(lambda w: loss(scm_kernels.jvp, network, w, part, tangent_grad=through)))
    close(got(weights), vmap(grad(lambda w: loss(true_jvp, network, w, part)))(weights))


@NETWORKS
def test_jacrev_of_jvp(network):
    def both(jvp, **options):
        return jacrev(lambda x: jvp(lambda x: network(W, x), (x,), (TX,), **options))(X)

    close(both(scm_kernels.jvp, tangent_grad=True), both(true_jvp))
    got = both(scm_kernels.jvp)
    close(got[0], both(true_jvp)[0])
    assert torch.equal(got[1], torch.zeros_like(got[1]))


@NETWORKS
def test_reverse_twice(network):
    def twice(jvp, **options):
        def total(x):
            out, t_out = jvp(lambda x: network(W, x), (x,), (TX,), **options)
            return (out * t_out).sum()

        return jacrev(grad(total))(X)

    close(twice(scm_kernels.jvp, tangent_grad=True), twice(true_jvp), 1e-9)


# --- forward mode twice ---------------------------------------------------------------------------


def test_jvp_of_jvp():
    """Right where PyTorch's functions are differentiated, with a graph for the inner tangent."""

    def inner(jvp, **options):
        return lambda x: jvp(lambda x: linear(W, x), (x,), (TX,), **options)

    want = jvp(inner(jvp), (X,), (UX,))
    close(jvp(inner(scm_kernels.jvp, tangent_grad=True), (X,), (UX,)), want)
    for through in (False, True):
        close(scm_kernels.jvp(inner(jvp), (X,), (UX,), tangent_grad=through), want)
        got = scm_kernels.jvp(
            inner(scm_kernels.jvp, tangent_grad=True), (X,), (UX,), tangent_grad=through
        )
        close(got, want)


@pytest.mark.parametrize("network", [linear, perceptron, attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("outer", [jvp, scm_kernels.jvp], ids=["torch", "ours"])
def test_jvp_of_a_detached_tangent_raises(network, outer):
    def inner(x):
        return scm_kernels.jvp(lambda x: network(W, x), (x,), (TX,))

    with pytest.raises(NotImplementedError, match="tangent_grad: got False in a jvp inside a jvp"):
        outer(inner, (X,), (UX,))
    with pytest.raises(NotImplementedError, match="tangent_grad: got False"):
        outer(lambda x: grad(lambda x: inner(x)[0].sum())(x), (X,), (UX,))


@pytest.mark.parametrize("outer", [jvp, scm_kernels.jvp], ids=["torch", "ours"])
def test_jvp_of_a_jvp_of_attention_raises(outer):
    def inner(x):
        return scm_kernels.jvp(lambda x: attention(W, x), (x,), (TX,), tangent_grad=True)

    with pytest.raises(NotImplementedError, match="a jvp of a jvp is not supported"):
        outer(inner, (X,), (UX,))


def test_the_gradient_of_a_tangent_inside_the_function():
    """A network whose output is a tangent: parameters and the outer jvp see through it."""
    weight = W.clone().requires_grad_()

    def inner(x):
        return jvp(lambda x: torch.tanh(F.layer_norm(x, (6,)) * weight[0]) @ weight, (x,), (TX,))[1]

    def both(outer, **options):
        out, t_out = outer(inner, (X,), (UX,), **options)
        return out, t_out, torch.autograd.grad(out.square().sum(), weight)[0]

    want = both(true_jvp)
    for through in (False, True):
        close(both(scm_kernels.jvp, tangent_grad=through), want)


def by_hand(w, x):
    """perceptron: forward mode twice needs a layer norm whose tangent is differentiable."""
    return torch.tanh(layer_norm(torch.tanh(x @ w), (6,))) @ w


@BOTH
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(lambda x: f(x).sin().sum()),
        lambda f: lambda x: vjp(f, x)[1](UX)[0],
        lambda f: lambda x: jacfwd(lambda s: f(x * s))(x.new_ones(1)),
        lambda f: lambda x: vmap(lambda s: torch.sin(s) * W[0])(x),
    ],
    ids=["grad", "vjp", "jacfwd", "vmap"],
)
def test_jvp_of_a_transform(transform, through):
    func = transform(lambda x: linear(W, x))
    want = jvp(func, (X,), (TX,))
    close(scm_kernels.jvp(func, (X,), (TX,), tangent_grad=through), want)


@BOTH
def test_jvp_of_a_gradient_in_the_weights(through):
    def func(x):
        return grad(lambda w: perceptron(w, x).square().sum())(W)

    want = jvp(lambda x: grad(lambda w: by_hand(w, x).square().sum())(W), (X,), (TX,))
    close(scm_kernels.jvp(func, (X,), (TX,), tangent_grad=through), want)


def grad_in_a_level(f):
    with forward_ad.dual_level():
        dual = grad(lambda x: f(x).square().sum())(forward_ad.make_dual(X, TX))
        return tuple(forward_ad.unpack_dual(dual))


OUTSIDE = {
    "jvp of grad": lambda f: jvp(grad(lambda x: f(x).square().sum()), (X,), (TX,)),
    "ours": lambda f: scm_kernels.jvp(lambda x: vjp(f, x)[1](X)[0], (X,), (TX,)),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum())(X),
    "grad in a level": grad_in_a_level,
    "a jvp inside": lambda f: jvp(lambda x: jvp(lambda w: f(x) @ w, (W,), (W,))[1], (X,), (TX,)),
}


@pytest.mark.parametrize("door", ["function", "mode"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_attention_of_what_is_dual_at_an_outer_level_alone(name, door):
    """It is PyTorch's function that is called: its fused kernels have no forward mode, MATH has."""
    stock, ours = F.scaled_dot_product_attention, scm_kernels.scaled_dot_product_attention
    sdpa, mode = (ours, nullcontext()) if door == "function" else (stock, scm_kernels.fused())

    def f(x):
        return attention(W, x, sdpa)

    with mode, pytest.raises(NotImplementedError, match=r"an outer level alone.*kernel\(.*MATH"):
        OUTSIDE[name](f)
    with sdpa_kernel(SDPBackend.MATH):
        want = OUTSIDE[name](lambda x: attention(W, x))
        with mode:
            close(OUTSIDE[name](f), want)


@BOTH
def test_jvp_of_a_gradient_of_attention(through):
    def func(x):
        return grad(lambda x: attention(W, x).square().sum())(x)

    with pytest.raises(NotImplementedError, match="an outer level alone"):
        scm_kernels.jvp(func, (X,), (TX,), tangent_grad=through)
    with sdpa_kernel(SDPBackend.MATH):
        want = jvp(func, (X,), (TX,))
        close(scm_kernels.jvp(func, (X,), (TX,), tangent_grad=through), want)


@BOTH
def test_jvp_of_a_vmap_of_a_rule_raises(through):
    """No batching rule for unpacking a dual tensor: vmap(jvp) is the order that works."""
    rows = torch.randn(3, 1, 6, dtype=torch.float64)
    for func in (
        vmap(lambda x: F.scaled_dot_product_attention(x, x, x)),
        vmap(lambda x: F.layer_norm(x, (6,))),
    ):
        with pytest.raises(NotImplementedError, match=r"jvp\(vmap\(f\)\)"):
            scm_kernels.jvp(func, (rows,), (rows,), tangent_grad=through)


@BOTH
@pytest.mark.parametrize(
    "func",
    [
        lambda x: vmap(lambda row: F.linear(row, W))(x),
        lambda x: vmap(lambda row: torch.einsum("j,jk->k", row, W))(x),
        lambda x: x * vmap(lambda row: F.layer_norm(row, (6,)))(UX),
        lambda x: x * vmap(lambda a: F.scaled_dot_product_attention(a, a, a))(UX[:, None])[:, 0],
    ],
    ids=["linear", "einsum", "norm of constants", "attention of constants"],
)
def test_a_vmap_inside(func, through):
    """Of what PyTorch has a batching rule for, or of what is not dual."""
    close(scm_kernels.jvp(func, (X,), (TX,), tangent_grad=through), stock_jvp(func, (X,), (TX,)))


def test_hessians():
    """Forward over reverse over our forward: right, where nothing was detached."""

    def total(jvp, **options):
        return lambda x: jvp(lambda x: linear(W, x), (x,), (TX,), **options)[1].sum()

    close(hessian(total(scm_kernels.jvp, tangent_grad=True))(X), hessian(total(jvp))(X))
    with pytest.raises(NotImplementedError):
        hessian(total(scm_kernels.jvp))(X)


def test_nothing_of_the_mode_is_left_behind():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            scm_kernels.jvp(lambda x: x / (1 // 0), (X,), (TX,))
        assert torch.overrides._get_current_function_mode() is None
    scm_kernels.jvp(lambda x: x @ W, (X,), (TX,))
    assert torch.overrides._get_current_function_mode() is None


def test_attention_in_a_jvp_inside_keeps_the_graph_of_its_tangent():
    """The inner tangent is part of the outer output, also where attention is the first to see."""
    x, tx, w = torch.randn(3, 1, 2, 4, 4, dtype=torch.float64)

    def gradient(attention, outer):
        weight = w.clone().requires_grad_()

        def function(y):
            k = y * weight
            inner = torch.func.jvp(lambda q: attention(q, w, weight), (x,), (tx,))[1]
            return k.sum() + inner.square().sum()

        return torch.autograd.grad(outer(function, (x,), (tx,))[0], weight)[0]

    truth = gradient(lambda *qkv: scm_kernels.scaled_dot_product_attention(*qkv), torch.func.jvp)
    ours = gradient(lambda *qkv: scm_kernels.scaled_dot_product_attention(*qkv), scm_kernels.jvp)
    torch.testing.assert_close(ours, truth)
