"""Attention in compositions of `torch.func`'s transforms: right, or an error that says what to do.

What may raise is a second forward derivative (jvp of jvp, however it is spelled), jvp(vmap), and
where PyTorch has no kernel with a derivative for it, jvp(grad).
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from stock_attention import B, D, H, M, N, assert_near, draw, same, stock, stock_jvp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from scm_kernels import attention_jvp, scaled_dot_product_attention

OP = torch.ops.scm_kernels.attention_jvp
SIZE = 3


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request):
    """float64 goes to the reference, float32 to the kernels that there are."""
    return request.param


@pytest.fixture
def x(dtype):
    """q, k, v, tq, tk, tv."""
    return draw(dtype=dtype)


@pytest.fixture
def many(dtype):
    """The same with a leading dimension to map over."""
    draws = (draw(seed, dtype) for seed in range(SIZE))
    return [torch.stack(y) for y in zip(*draws, strict=True)]


def squares(outputs) -> torch.Tensor:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum(y.square().sum() for y in outputs)


# --- vmap over a jvp ------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", ["q", "k", "v", "kv", "qkv"])
def test_vmap_of_jvp(x, many, mapped):
    """Of primal and tangent of some inputs; the others are the same for all."""
    moving = ["qkv".index(letter) for letter in mapped]

    def run(f):
        def one(*values):
            y = list(x)
            for i, value in zip([*moving, *(3 + i for i in moving)], values, strict=True):
                y[i] = value
            return jvp(f, tuple(y[:3]), tuple(y[3:]))

        return vmap(one)(*(many[i] for i in moving), *(many[3 + i] for i in moving))

    same(run)


def test_vmap_over_tangents_alone(x, many):
    same(lambda f: vmap(lambda t: jvp(lambda q: f(q, *x[1:3]), (x[0],), (t,)))(many[3]))
    same(lambda f: vmap(lambda t: jvp(lambda v: f(*x[:2], v), (x[2],), (t,))[1])(many[5]))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (3, 1), (4, 4), (-1, 0)], ids=str)
@pytest.mark.parametrize("out_dims", [0, 3])
def test_vmap_of_any_dimension(x, many, in_dims, out_dims):
    q, tq = many[0].movedim(0, in_dims[0]), many[3].movedim(0, in_dims[1])

    def run(f):
        one = lambda q, tq: jvp(lambda q: f(q, *x[1:3]), (q,), (tq,))  # noqa: E731
        return vmap(one, in_dims, out_dims)(q, tq)

    same(run)


def test_vmap_of_nothing(x, many):
    """A batch of size 0, of a jvp and of its gradient."""
    empty = [y[:0] for y in many]
    same(lambda f: vmap(lambda *y: jvp(f, y[:3], y[3:]))(*empty))

    def loss(f):
        return lambda q, t: jvp(lambda q: f(q, *x[1:3]), (q,), (t,))[1].square().sum()

    same(lambda f: vmap(grad(loss(f)))(empty[0], empty[3]))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_vmap_in_chunks(x, many, chunk_size):
    same(lambda f: vmap(lambda q, t: jvp(lambda q: f(q, *x[1:3]), (q,), (t,)),
                        chunk_size=chunk_size)(many[0], many[3]))  # fmt: skip


@pytest.mark.parametrize("shape", [(M, N), (1, N), (B, 1, 1, N), (1, H, M, N), (B, H, M, 1)])
@pytest.mark.parametrize("is_bool", [False, True])
def test_vmapped_masks(x, many, shape, is_bool):
    """A mask for each, and one mask for all."""
    masks = torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(0)).to(x[0].dtype)
    masks = masks > -0.5 if is_bool else masks
    one = lambda f, q, m: jvp(lambda q: f(q, *x[1:3], attn_mask=m), (q,), (x[3],))  # noqa: E731
    same(lambda f: vmap(lambda m: one(f, x[0], m))(masks))
    same(lambda f: vmap(lambda q: one(f, q, masks[0]))(many[0]))
    same(lambda f: vmap(lambda q, m: one(f, q, m))(many[0], masks))


@pytest.mark.parametrize("closed_over", [0, 1, 2])
def test_vmap_over_what_the_jvp_closes_over(x, many, closed_over):
    """An input that only the outer vmap knows; first or last in the list of arguments."""
    moving = (closed_over + 1) % 3

    def run(f):
        def one(constant):
            y = list(x[:3])
            y[closed_over] = constant

            def function(z):
                y[moving] = z
                return f(*y)

            return jvp(function, (x[moving],), (x[3 + moving],))

        return vmap(one)(many[closed_over])

    same(run)


def test_samples_without_a_batch_dimension(x):
    """[H, M, D] and [M, D] inside, as with vmap over per-sample gradients."""

    def one(f, *y):
        return jvp(f, tuple(y[:3]), tuple(y[3:]))

    same(lambda f: vmap(lambda *y: one(f, *y))(*x))
    same(lambda f: vmap(vmap(lambda *y: one(f, *y)))(*x))


def test_vmap_of_vmap_of_jvp(x, many):
    one = lambda f, q, k: jvp(lambda q: f(q, k, x[2]), (q,), (x[3],))  # noqa: E731
    same(lambda f: vmap(vmap(lambda q, k: one(f, q, k), (0, None)), (None, 0))(many[0], many[1]))


# --- gradients over a jvp -------------------------------------------------------------------------


def test_grad_of_jvp(x):
    same(lambda f: grad(lambda *y: squares(jvp(f, y[:3], y[3:])), tuple(range(6)))(*x))


def test_grad_of_the_output_or_the_tangent_alone(x):
    for which in (0, 1):
        same(lambda f, i=which: grad(lambda *y: squares(jvp(f, y[:3], y[3:])[i]), (0, 1, 2))(*x))


@pytest.mark.parametrize("mask", [None, (M, N), (1, 1, M, N), (B, H, 1, N)], ids=str)
def test_vmap_of_grad_of_jvp(x, many, mask):
    mask = None if mask is None else torch.randn(mask, dtype=x[0].dtype)

    def run(f):
        def loss(q, k, tk, mask):
            return squares(jvp(lambda q, k: f(q, k, x[2], attn_mask=mask), (q, k), (x[3], tk)))

        wanted = (0, 1, 2) if mask is None else (0, 1, 2, 3)
        return vmap(grad(loss, wanted), (0, 0, 0, None))(many[0], many[1], many[4], mask)

    same(run)


def test_grad_of_vmap_of_jvp_in_what_is_shared(x, many):
    mask = torch.randn(1, 1, M, N, dtype=x[0].dtype)

    def run(f):
        def loss(k, mask):
            one = lambda q: jvp(lambda q: f(q, k, x[2], attn_mask=mask), (q,), (x[3],))  # noqa: E731
            return squares(vmap(one)(many[0]))

        return grad(loss, (0, 1))(x[1], mask)

    same(run)


@pytest.mark.parametrize("batch", [1, B])
def test_vmap_of_vjp_of_jvp(x, many, batch):
    """What the forward saved is expanded to the mapped dimension; of one sample, without a copy."""
    x = [y[:batch] for y in x]

    def run(f):
        outputs, pull = vjp(lambda q, k: jvp(lambda q: f(q, k, x[2]), (q,), (x[3],)), *x[:2])
        return vmap(lambda a, b: pull((a, b)))(*(torch.stack([y, -y, 2 * y]) for y in outputs))

    same(run)


@pytest.mark.parametrize("order", [2, 3])
def test_repeated_grad_of_jvp(x, order):
    """Each level keeps its graph: a grad of a grad, not only a double backward."""

    def run(f):
        function = lambda q: squares(jvp(lambda q: f(q, *x[1:3]), (q,), (x[3],)))  # noqa: E731
        for _ in range(order - 1):
            inner = function
            function = lambda q, inner=inner: squares(grad(inner)(q)) / 100  # noqa: E731
        return grad(function)(0.3 * x[0])

    same(run)


def test_backward_of_a_grad_of_a_jvp(x):
    """`torch.func.grad` inside, the ordinary graph of a parameter outside."""

    def run(f):
        weight = torch.ones(D, dtype=x[0].dtype, requires_grad=True)
        loss = lambda q: squares(jvp(lambda q: f(q * weight, *x[1:3]), (q,), (x[3],)))  # noqa: E731
        return torch.autograd.grad(squares(grad(loss)(x[0])), weight)

    same(run)


def test_explicit_tangents_under_grad_and_vmap(x, many):
    def run(function):
        loss = lambda *y: squares(function(*y))  # noqa: E731
        first = vmap(grad(loss, (0, 1, 2, 3, 4, 5)))(*many)
        second = vmap(grad(lambda q: squares(grad(loss)(q, *x[1:]))))(many[0])
        return first, second

    assert_near(run(attention_jvp), run(stock_jvp))


# --- Jacobians ------------------------------------------------------------------------------------

SMALL = (slice(0, 1), slice(0, 1), slice(0, 3))


@pytest.mark.parametrize("transform", [jacfwd, jacrev, hessian], ids=lambda f: f.__name__)
def test_jacobian(x, transform):
    q, k, v = (y[SMALL] for y in x[:3])
    same(lambda f: transform(lambda q, k: f(q, k, v).square().sum(0), (0, 1))(q, k))


def test_jacrev_of_jacfwd_and_of_jvp(x):
    q, k, v, tq = (y[SMALL] for y in x[:4])
    same(lambda f: jacrev(jacfwd(lambda q: f(q, k, v)))(q))
    same(lambda f: jacrev(lambda q: jvp(lambda q: f(q, k, v), (q,), (tq,)))(q))


@pytest.mark.filterwarnings("ignore")
def test_linearize(x):
    out, push = linearize(scaled_dot_product_attention, *x[:3])
    assert_near((out, push(*x[3:])), stock_jvp(*x))


@pytest.mark.filterwarnings("ignore")
def test_vmap_of_linearize(dtype):
    """Of a function that counts on how out lies in memory, which is as q does."""
    packed, *tangents = torch.randn(1 + SIZE, B, M, 3, H, D, dtype=dtype)

    def function(packed):
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).view(B, M, H * D)

    _, push = linearize(function, packed)
    want = [jvp(function, (packed,), (t,))[1] for t in tangents]
    assert_near(vmap(push)(torch.stack(tangents)), torch.stack(want))


def test_jvp_of_grad(x):
    """Nothing is dual at the level of attention itself: PyTorch's own function takes it."""
    loss = lambda f: lambda q: squares(f(q, *x[1:3]))  # noqa: E731
    same(lambda f: jvp(grad(loss(f)), (x[0],), (x[3],)))
    same(lambda f: jvp(vmap(grad(lambda q: squares(f(q, *x[1:3])))), (x[0][None],), (x[3][None],)))


def test_hessian_vector_product_by_double_backward(x):
    def run(f):
        loss = lambda q: squares(jvp(lambda q: f(q, *x[1:3]), (q,), (x[3],)))  # noqa: E731
        return torch.autograd.functional.hvp(loss, x[0], x[3])

    same(run)


# --- what raises ----------------------------------------------------------------------------------

TWICE = {
    "jvp of jvp": lambda f, q, t, k: jvp(lambda q: jvp(lambda q: f(q, k), (q,), (t,)), (q,), (t,)),
    "in two inputs": lambda f, q, t, k: jvp(
        lambda q: jvp(lambda k: f(q, k), (k,), (k,)), (q,), (t,)
    ),
    "jacfwd of jacfwd": lambda f, q, t, k: jacfwd(jacfwd(lambda q: f(q, k)))(q),
    "jvp of grad of jvp": lambda f, q, t, k: jvp(
        grad(lambda q: squares(jvp(lambda q: f(q, k), (q,), (t,)))), (q,), (t,)
    ),
    "jvp of grad of jvp in a constant": lambda f, q, t, k: jvp(
        lambda k: grad(lambda q: squares(jvp(lambda q: f(q, k), (q,), (t,))))(q), (k,), (k,)
    ),
    "jvp of vmap of grad of jvp": lambda f, q, t, k: jvp(
        vmap(grad(lambda q: squares(jvp(lambda q: f(q, k), (q,), (t,))))), (q[None],), (t[None],)
    ),
    "jvp of a pullback": lambda f, q, t, k: jvp(
        vjp(lambda q: jvp(lambda q: f(q, k), (q,), (t,))[0], q)[1], (f(q, k),), (f(q, k),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_a_second_forward_derivative_raises(x, name):
    """Each of them would be a silent zero if the op let a dual tensor through."""
    v = x[2]
    with pytest.raises(NotImplementedError, match="its tangent would be lost"):
        TWICE[name](lambda q, k: scaled_dot_product_attention(q, k, v), x[0], x[3], x[1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_over_explicit_tangents_raises(x, which):
    def function(y):
        z = list(x)
        z[which] = y
        return attention_jvp(*z)

    for transform in (lambda f, y: jvp(f, (y,), (y,)), lambda f, y: jacfwd(f)(y)):
        with pytest.raises(NotImplementedError, match="its tangent would be lost"):
            transform(function, x[which])


VMAP_INSIDE = {
    "query": lambda f, x, y: jvp(vmap(lambda q: f(q, *x[1:3])), (y[0],), (y[3],)),
    "twice": lambda f, x, y: jvp(vmap(vmap(lambda q: f(q, *x[1:3]))), (y[0][None],), (y[3][None],)),
    "key": lambda f, x, y: jvp(lambda q: vmap(lambda k: f(q, k, x[2]))(y[1]), (x[0],), (x[3],)),
    "mask": lambda f, x, y: jvp(
        lambda q: vmap(lambda m: f(q, *x[1:3], m > 0))(torch.randn(SIZE, M, N)), (x[0],), (x[3],)
    ),
}


@pytest.mark.parametrize("batched", VMAP_INSIDE)
def test_jvp_of_vmap_raises(x, many, batched):
    with pytest.raises(NotImplementedError, match=r"jvp of a vmap.*take vmap\(jvp\(f\)\)"):
        VMAP_INSIDE[batched](scaled_dot_product_attention, x, many)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("by", ["jvp", "dual_level"])
def test_the_bare_op_refuses_duals_anywhere(x, place, by):
    tensors = [*x, *torch.randn(2, B, H, M, N, dtype=x[0].dtype)]

    def call(y):
        return OP(*tensors[:place], y, *tensors[place + 1 :], False, 0.5, True, "")

    def dual_level(y):
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(y, y))

    run = dual_level if by == "dual_level" else lambda y: jvp(call, (y,), (y,))
    with pytest.raises(NotImplementedError, match=r"scm_kernels\.attention_jvp got a dual tensor"):
        run(tensors[place])


def test_the_bare_backward_op_refuses_duals(x):
    out, *saved = OP(*x, None, None, False, 0.5, True, "")
    wanted = [True] * 6 + [False] * 2
    call = lambda d: torch.ops.scm_kernels.attention_jvp_backward(  # noqa: E731
        d, d, *x, None, None, out, *saved, False, 0.5, wanted, "")  # fmt: skip
    with pytest.raises(NotImplementedError, match="attention_jvp_backward got a dual tensor"):
        jvp(call, (out,), (saved[0],))


def test_forward_over_a_backward_is_right(x):
    """The cotangent is a dual tensor there, and k, which has no tangent, gets a dual gradient."""

    def gradient(attention):
        k = x[1].clone().requires_grad_()
        with forward_ad.dual_level():
            out = attention(forward_ad.make_dual(x[0], x[3]), k, x[2])
            (grad,) = torch.autograd.grad(squares(out), k)
            return [y.detach() for y in forward_ad.unpack_dual(grad)]

    actual, truth = gradient(scaled_dot_product_attention), gradient(stock)
    assert_near(actual, truth)


def test_an_unrelated_outer_jvp_is_right(x):
    one = torch.ones((), dtype=x[0].dtype)
    same(
        lambda f: jvp(
            lambda s: jvp(lambda q: f(q, *x[1:3]), (x[0],), (x[3],))[1] * s, (one,), (one,)
        )
    )
    same(
        lambda f: jvp(
            lambda q: jvp(lambda s: f(q, *x[1:3]) * s, (one,), (one,))[1], (x[0],), (x[3],)
        )
    )
