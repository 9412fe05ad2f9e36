"""Attention under forward and reverse mode, checkpoint, autocast, threads: right, or an error.

Each is held against the same transform of PyTorch's own MATH attention: in float64, which goes to
the reference, and in float32, which goes to the kernels that there are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from stock_attention import B, D, E, H, M, N, assert_near, draw, same, stock_jvp
from torch.func import jvp
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import scm_kernels
from scm_kernels import _backends, attention_jvp, scaled_dot_product_attention


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def x(request):
    """q, k, v, tq, tk, tv."""
    return draw(dtype=request.param)


@pytest.fixture
def x64():
    """The same for numerical differentiation."""
    return draw()


# --- forward mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_jvp(x, options):
    same(lambda f: jvp(lambda *y: f(*y, **options), tuple(x[:3]), tuple(x[3:])))


def test_jvp_with_gqa(x):
    q, tq = (y.repeat_interleave(3, dim=1) for y in (x[0], x[3]))
    arguments = (q, *x[1:3]), (tq, *x[4:])
    same(lambda f: jvp(lambda *y: f(*y, enable_gqa=True), *arguments))


@pytest.mark.parametrize("dual", ["q", "k", "v", "qk", "kv", "qv"])
def test_jvp_of_some_inputs(x, dual):
    moving = ["qkv".index(letter) for letter in dual]

    def run(f):
        def function(*values):
            y = list(x[:3])
            for i, value in zip(moving, values, strict=True):
                y[i] = value
            return f(*y)

        return jvp(function, tuple(x[i] for i in moving), tuple(x[3 + i] for i in moving))

    same(run)


@pytest.mark.parametrize("shape", [(M, N), (B, 1, 1, N), (1, H, M, 1), (B, H, M, N), (1, 1, M, N)])
def test_jvp_of_a_mask(x, shape):
    mask, t_mask = torch.randn(2, *shape, dtype=x[0].dtype)
    same(lambda f: jvp(lambda q, m: f(q, *x[1:3], attn_mask=m), (x[0], mask), (x[3], t_mask)))
    same(lambda f: jvp(lambda m: f(*x[:3], attn_mask=m), (mask,), (t_mask,)))


def test_jvp_keeps_an_aux_and_a_pytree(x):
    def run(f):
        def function(tree):
            out = f(*tree["qkv"])
            return {"out": [out, out.sum()]}, out.detach()

        return jvp(function, ({"qkv": x[:3]},), ({"qkv": x[3:]},), has_aux=True)

    same(run)


def test_dual_level(x):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, t) for y, t in zip(x[:3], x[3:], strict=True)]
        out = forward_ad.unpack_dual(scaled_dot_product_attention(*duals))
    assert_near(tuple(out), stock_jvp(*x))


def test_dual_level_with_gradients_through_the_tangent(x):
    leaves = [y.requires_grad_() for y in x]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, t) for y, t in zip(leaves[:3], leaves[3:], strict=True)]
        out, t_out = forward_ad.unpack_dual(scaled_dot_product_attention(*duals))
    actual = torch.autograd.grad(out.square().sum() + t_out.square().sum(), leaves)
    truth = torch.autograd.grad(sum(y.square().sum() for y in stock_jvp(*leaves)), leaves)
    assert_near(actual, truth)


def test_expanded_primal_and_tangent(x):
    q, tq = (y[:1].expand(B, H, M, D) for y in (x[0], x[3]))
    same(lambda f: jvp(lambda q: f(q, *x[1:3]), (q,), (tq,)))


@pytest.mark.parametrize("keywords", [False, True])
def test_without_a_dual_input_it_is_pytorchs_own(x, keywords):
    mask = torch.randn(M, N, dtype=x[0].dtype)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, m = (y.to(dtype) for y in (*x[:3], mask))
        if keywords:
            args, kwargs = (), {"query": q, "key": k, "value": v, "attn_mask": m, "scale": 0.3}
        else:
            args, kwargs = (q, k, v, m, 0.0, False), {"scale": 0.3, "enable_gqa": False}
        truth = F.scaled_dot_product_attention(*args, **kwargs)
        assert torch.equal(scaled_dot_product_attention(*args, **kwargs), truth)
        with forward_ad.dual_level():
            assert torch.equal(scaled_dot_product_attention(*args, **kwargs), truth)
        one = torch.ones(())
        beside = jvp(lambda z: (scaled_dot_product_attention(*args, **kwargs), z), (one,), (one,))  # noqa: B023
        assert torch.equal(beside[0][0], truth)
        assert not beside[1][0].any()


def test_gqa_without_a_dual_input_is_pytorchs_own(x):
    q = x[0].repeat_interleave(3, dim=1)
    ours = scaled_dot_product_attention(q, *x[1:3], enable_gqa=True)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, *x[1:3], enable_gqa=True))


def test_what_has_no_tangent_reaches_a_backend_as_absent(x, monkeypatch):
    """Not as zeros, which would cost matmuls."""
    problems, run = [], _backends.run

    def spy(op, step, problem, request):
        problems.append(problem)
        return run(op, step, problem, request)

    monkeypatch.setattr(_backends, "run", spy)
    jvp(lambda q: scaled_dot_product_attention(q, *x[1:3]), (x[0],), (x[3],))
    assert problems[0].tq is not None
    assert problems[0].tk is problems[0].tv is problems[0].tmask is None


def test_dropout_without_a_dual_input_is_pytorchs_own(x):
    torch.manual_seed(1)
    ours = scaled_dot_product_attention(*x[:3], dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(ours, F.scaled_dot_product_attention(*x[:3], dropout_p=0.5))


# --- reverse mode ---------------------------------------------------------------------------------


def leaves_of(x, mask: bool):
    x = [y[:1, :, :3, :2] for y in x]
    if mask:
        x += [
            torch.randn(2, 1, 1, 3, generator=torch.Generator().manual_seed(i)).to(x[0].dtype)
            for i in (1, 2)
        ]
        x = [y[:1] if y.shape[0] == 2 else y for y in x]
    return tuple(y.clone().requires_grad_() for y in x)


def op(*tensors, **options):
    names = ("attn_mask", "t_attn_mask")
    return attention_jvp(*tensors[:6], **dict(zip(names, tensors[6:], strict=False)), **options)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}], ids=str)
def test_gradcheck(x64, mask, options):
    if mask and options.get("is_causal"):
        options = {}
    leaves = leaves_of(x64, mask)
    assert torch.autograd.gradcheck(lambda *y: op(*y, **options), leaves)
    assert torch.autograd.gradcheck(lambda *y: op(*y, **options)[0], leaves[:3] + leaves[3:])
    assert torch.autograd.gradcheck(lambda *y: op(*y, **options)[1], leaves)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("output", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=str)
def test_gradgradcheck(x64, output, mask):
    assert torch.autograd.gradgradcheck(lambda *y: op(*y)[output], leaves_of(x64, mask))


def test_triple_backward(x64):
    """Three times through both outputs, against PyTorch's MATH attention."""

    def third(function):
        leaves = [y.clone().requires_grad_() for y in x64]
        total = sum(y.square().sum() for y in function(*leaves))
        for last in (False, False, True):
            grads = torch.autograd.grad(total, leaves, create_graph=not last)
            total = sum(g.square().sum() for g in grads)
        return grads

    for ours, truth in zip(third(attention_jvp), third(stock_jvp), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("mask", ["bool", "float", "shared"])
def test_gradient_of_what_is_masked(x, mask):
    """A mask that wants a gradient, through a jvp in which it is no dual tensor."""
    gen = torch.Generator().manual_seed(3)
    shape = (1, H, 1, N) if mask == "shared" else (B, 1, M, N)
    values = torch.randn(shape, generator=gen, dtype=x[0].dtype)

    def run(f):
        bias = values > -0.5 if mask == "bool" else values.clone().requires_grad_()
        q = x[0].clone().requires_grad_()
        out, t_out = jvp(lambda q: f(q, *x[1:3], attn_mask=bias), (q,), (x[3],))
        wanted = [q] if mask == "bool" else [q, bias]
        of_both = torch.autograd.grad((out + t_out).square().sum(), wanted, retain_graph=True)
        return of_both + torch.autograd.grad(out.square().sum(), wanted)

    same(run)


def test_only_some_inputs_want_a_gradient(x):
    for wanted in ([0], [1, 4], [2], [5], [3, 4, 5]):

        def run(function, wanted=wanted):
            y = [z.clone().requires_grad_(i in wanted) for i, z in enumerate(x)]
            loss = sum(z.square().sum() for z in function(*y))
            return torch.autograd.grad(loss, [y[i] for i in wanted])

        assert_near(run(attention_jvp), run(stock_jvp))


def test_what_was_saved_may_not_be_changed(x):
    q = x[0].clone().requires_grad_()
    key = x[1] + q.sum() * 0
    out, _ = attention_jvp(q, key, *x[2:])
    with torch.no_grad():
        key.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("where", ["attention_jvp", "jvp", "dual_level"])
def test_checkpoint(x, where):
    leaves = [y.clone().requires_grad_() for y in x]

    def by_jvp(*y):
        return jvp(scaled_dot_product_attention, tuple(y[:3]), tuple(y[3:]))

    def loss(outputs):
        return sum(y.square().sum() for y in outputs)

    if where == "dual_level":  # the block inside is recomputed in the backward: at the same level
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(y, t) for y, t in zip(leaves[:3], leaves[3:], strict=True)
            ]
            out = checkpoint(scaled_dot_product_attention, *duals, use_reentrant=False)
            actual = torch.autograd.grad(loss(forward_ad.unpack_dual(out)), leaves)
    else:
        function = attention_jvp if where == "attention_jvp" else by_jvp
        actual = torch.autograd.grad(
            loss(checkpoint(function, *leaves, use_reentrant=False)), leaves
        )
    assert_near(actual, torch.autograd.grad(loss(stock_jvp(*leaves)), leaves))


# --- autocast, no_grad, inference, threads --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_the_dtypes_of_pytorchs_function(x, dtype):
    y = [z.to(dtype) for z in x]
    mask = torch.randn(M, N, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        truth = F.scaled_dot_product_attention(*y[:3], attn_mask=mask).dtype
        out, t_out = jvp(
            lambda *z: scaled_dot_product_attention(*z, attn_mask=mask), tuple(y[:3]), tuple(y[3:])
        )
        explicit = attention_jvp(*y, attn_mask=mask, t_attn_mask=mask)
    assert {z.dtype for z in (out, t_out, *explicit)} == {truth}
    assert truth == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_autocast_does_what_a_cast_does(x):
    """Also for inputs of several dtypes, and in a backward outside of it or inside."""
    leaves = [z.float().requires_grad_() for z in x]
    mixed = [z.bfloat16() if i % 2 else z for i, z in enumerate(leaves)]
    truth = attention_jvp(*(z.bfloat16() for z in leaves))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attention_jvp(*mixed)
        inside = torch.autograd.grad(outputs, leaves, truth, retain_graph=True)
    outside = torch.autograd.grad(outputs, leaves, truth)
    plain = torch.autograd.grad(truth, leaves, [z.detach() for z in truth])
    assert all(torch.equal(a, b) for a, b in zip(outputs, truth, strict=True))
    for gradients in (inside, outside):
        torch.testing.assert_close(gradients, plain, rtol=0, atol=0)


def test_autocast_rounds_no_second_derivative(x):
    """The formula in PyTorch that a double backward differentiates is in float32 at least."""
    x = [y.requires_grad_() for y in x]
    results = []
    for enabled in (False, True):
        total = sum(map(torch.sum, attention_jvp(*x)))
        gradients = torch.autograd.grad(total, x, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), x))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors(x, autocast):
    """Shapes without data; autocast does not know their device."""
    meta = [z.to("meta").requires_grad_() for z in x]
    mask = torch.randn(M, N, dtype=x[0].dtype, device="meta")
    with torch.autocast("cpu", enabled=autocast):
        outputs = attention_jvp(*meta, attn_mask=mask, t_attn_mask=mask)
        duals = jvp(scaled_dot_product_attention, tuple(meta[:3]), tuple(meta[3:]))
        ours = scm_kernels.jvp(F.scaled_dot_product_attention, tuple(meta[:3]), tuple(meta[3:]))
    for z in (*outputs, *duals, *ours):
        assert z.is_meta
        assert z.shape == (B, H, M, E)
    gradients = torch.autograd.grad(outputs, meta, outputs)
    assert [z.shape for z in gradients] == [z.shape for z in x]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording(x, mode):
    leaves = [z.requires_grad_() for z in x]
    with mode():
        same(lambda f: jvp(f, tuple(leaves[:3]), tuple(leaves[3:])))
        outputs = attention_jvp(*leaves)
    assert not any(z.requires_grad for z in outputs)


def test_inference_tensors(x):
    with torch.inference_mode():
        frozen = [z.clone() for z in x]
    assert_near(attention_jvp(*frozen), stock_jvp(*x))


def test_threads(x64):
    """`torch.func.jvp` itself is for one thread at a time; `attention_jvp` is not."""
    truth = stock_jvp(*x64)

    def work(_):
        leaves = [z.clone().requires_grad_() for z in x64]
        outputs = attention_jvp(*leaves)
        sum(z.sum() for z in outputs).backward()
        return max(float((a - b).detach().abs().max()) for a, b in zip(outputs, truth, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(40))) < 1e-12


def test_a_thread_without_duals_beside_one_with(x):
    def function(q):
        with ThreadPoolExecutor(1) as pool:
            plain = pool.submit(scaled_dot_product_attention, *x[:3]).result()
        assert torch.equal(plain, F.scaled_dot_product_attention(*x[:3]))
        return scaled_dot_product_attention(q, *x[1:3])

    truth = stock_jvp(*x[:4], *(torch.zeros_like(z) for z in x[4:]))
    assert_near(jvp(function, (x[0],), (x[3],)), truth)


def test_a_query_that_is_no_tensor_beside_a_dual_key(x):
    with pytest.raises(TypeError, match="query: got"):
        jvp(lambda k: scaled_dot_product_attention([1.0], k, x[2]), (x[1],), (x[4],))


def test_a_mode_of_the_user_is_none_of_ours():
    """Whatever its attributes are called."""

    class Log(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.records = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.records.append(func)
            return func(*args, **(kwargs or {}))

    x, t = torch.randn(2, 1, 2, 5, 4)
    attention = scm_kernels.scaled_dot_product_attention
    expected = torch.func.jvp(lambda x: attention(x, x, x), (x,), (t,))
    with Log() as log:
        results = torch.func.jvp(lambda x: attention(x, x, x), (x,), (t,))
        torch.testing.assert_close(attention(x, x, x), expected[0])
    assert log.records
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
