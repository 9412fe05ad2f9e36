"""What is decided once for calls of one kind holds for all of them, and for no others."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import scm_kernels
from scm_kernels import _backends, _plans, _triton
from scm_kernels.attention import op, reference
from scm_kernels.attention.op import attention_jvp
from scm_kernels.tangent import op as tangent_op


@pytest.fixture(autouse=True)
def afresh():
    _backends.forget()
    yield
    _backends.forget()


def tensors(*shape, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*(shape or (2, 3, 37, 16)), dtype=dtype) for _ in range(6)]


def expected(x, **options):
    q, k, v, tq, tk, tv = (None if y is None else y.double() for y in x)
    causal, scale = options.get("is_causal", False), options.get("scale") or q.shape[-1] ** -0.5
    return reference.dense(q, k, v, tq, tk, tv, None, None, causal=causal, scale=scale)[:2]


def check(x, **options):
    for actual, right in zip(attention_jvp(*x, **options), expected(x, **options), strict=True):
        tolerance = 1e-5 if x[0].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)


def test_a_profiler_sees_the_ops():
    """Which calls of a known kind do not bring before the dispatcher."""
    x = [y.requires_grad_() for y in tensors()]
    for _ in range(2):
        with torch.profiler.profile() as profile:
            attention_jvp(*x)[0].sum().backward()
        events = {event.key for event in profile.key_averages()}
        assert events >= {f"scm_kernels::attention_jvp{step}" for step in ("", "_backward")}
    for _ in range(2):
        check(x)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_plans.Plans, "MOST", 3)
    plans = _plans.Plans()
    for i in range(10):
        assert plans[(i,)] is None
        plans[(i,)] = i
        assert plans[(i,)] == i
        assert len(plans) <= 3


def test_a_call_after_another_that_differs_in_one_thing():
    """Each right, in any order, the second time too."""
    x = tensors()
    apart = torch.randn(2, 3, 37, 32)[..., ::2]  # rows of other strides
    shifted = torch.randn(2 * 3 * 37 * 16 + 1)[1:].view(2, 3, 37, 16)  # another alignment
    calls = [
        (x, {}),
        (x, {"is_causal": True}),
        (x, {"scale": 0.5}),
        (x, {"scale": 1}),
        ([y.transpose(1, 2).contiguous().transpose(1, 2) for y in x], {}),
        ([apart, *x[1:]], {}),
        ([shifted, *x[1:]], {}),
        ([*x[:3], None, *x[4:]], {}),
        ([*x[:5], None], {}),
        ([y[:, :, :36] for y in x], {}),
        ([y.bfloat16() for y in x], {}),
        ([y[:0] for y in x], {}),
        ([y[:1] for y in x], {}),
    ]
    for x, options in [*calls, *reversed(calls)]:
        check(x, **options)


def test_a_known_kind_is_checked_as_any_other():
    """What equals a good argument, and is none."""
    x = tensors()
    attention_jvp(*x, is_causal=True, scale=1.0)
    assert len(op._calls) == 1
    with pytest.raises(TypeError, match="is_causal: got int 1"):
        attention_jvp(*x, is_causal=1, scale=1.0)
    with pytest.raises(TypeError, match="scale: got bool True"):
        attention_jvp(*x, is_causal=True, scale=True)
    with pytest.raises(TypeError, match="scale: got a list of length"):
        attention_jvp(*x, is_causal=True, scale=[1.0])
    with pytest.raises(TypeError, match="query: got"):
        attention_jvp(x[0].tolist(), *x[1:])
    with pytest.raises(TypeError, match="key: got"):
        attention_jvp(x[0], x[1].double(), *x[2:])


@pytest.mark.parametrize("of", [op, tangent_op], ids=["attention", "tangent"])
def test_a_known_kind_still_asks_which_backend(of, monkeypatch):
    x, f = [y.requires_grad_() for y in tensors()], torch.randn(4, 2, 64).unbind()
    t = torch.rand(2)
    call = {
        op: lambda: attention_jvp(*x),
        tangent_op: lambda: scm_kernels.normalized_tangent(*f, t),
    }[of]
    calls, choose = [], _backends.choose

    def spy(*args):
        calls.append(args[-1])
        return choose(*args)

    monkeypatch.setattr(_backends, "choose", spy)
    for _ in range(2):
        call()
        with scm_kernels.backend("reference"):
            call()
    assert calls == ["", "reference"]
    assert len(of._calls) == 2
    monkeypatch.setenv("SCM_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="SCM_KERNELS_BACKEND: got 'nonsense'"):
        call()


def test_a_known_kind_sees_whether_a_gradient_is_wanted():
    x = tensors()
    attention_jvp(*x)
    leaves = [y.clone().requires_grad_() for y in x]
    with torch.no_grad():
        assert not attention_jvp(*leaves)[0].requires_grad
    out, t_out = attention_jvp(*leaves)
    (out.sum() + t_out.sum()).backward()
    wide = [y.double().requires_grad_() for y in x]
    sum(y.sum() for y in expected(wide)).backward()
    for actual, right in zip(leaves, wide, strict=True):
        torch.testing.assert_close(actual.grad.double(), right.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 37), (2, 3, 37, 37), (37, 37), (3, 1, 37)])
def test_a_mask_is_part_of_a_kind(shape):
    x = [y.requires_grad_() for y in tensors()]
    for _ in range(2):
        for mask in (torch.randn(shape), torch.rand(shape) < 0.5, torch.randn(shape)):
            learned = [mask.requires_grad_()] if mask.dtype != torch.bool else []
            out, _ = attention_jvp(*x, attn_mask=mask)
            right = torch.nn.functional.scaled_dot_product_attention(*x[:3], mask)
            torch.testing.assert_close(out, right)
            pairs = [torch.autograd.grad(y.sin().sum(), [*x[:3], *learned]) for y in (out, right)]
            for actual, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(actual, expected)
    assert len(op._calls) == 2


@pytest.mark.parametrize("tangent", [0, 1, 2])
def test_out_has_no_graph_where_tangents_alone_have_one(tangent):
    x = tensors()
    x[3 + tangent].requires_grad_()
    for _ in range(2):
        out, t_out = attention_jvp(*x)
        assert (out.requires_grad, t_out.requires_grad) == (False, True)


def test_outputs_of_a_known_kind():
    """Of the strides of the first ones, of memory of their own, and for autograd wherever it is on,
    though the first were made in inference mode."""
    x = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in tensors()]
    with torch.inference_mode():
        attention_jvp(*x)
        calls = [attention_jvp(*x, return_stats=True) for _ in range(2)]
    calls += [attention_jvp(*x, return_stats=True) for _ in range(2)]
    (call,) = op._calls.values()
    assert [y.untyped_storage().nbytes() for y in call.patterns] == [0] * 5
    assert len({y.data_ptr() for outputs in calls for y in outputs}) == 4 * len(calls)
    for outputs in calls:
        assert outputs[0].stride() == x[0].stride()
        for one, other in zip(outputs, calls[0], strict=True):
            assert one.stride() == other.stride()
            assert torch.equal(one, other)
    assert not any(y.is_inference() for y in calls[-1])
    leaf = x[0].clone().requires_grad_()
    attention_jvp(leaf, *x[1:])[0].sum().backward()


def test_saved_tensors_that_come_back_otherwise():
    """Hooks may give the backward other strides than the forward had."""
    x = [y.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for y in tensors()]
    gradients = []
    for _ in range(2):
        for pack in (lambda y: y, lambda y: y.clone(memory_format=torch.contiguous_format)):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
                out, t_out = attention_jvp(*x)
            gradients.append(torch.autograd.grad(out.sum() + t_out.square().sum(), x))
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize("m", [37, 1])
def test_outputs_may_be_written_to(layout, m):
    """The first ones of a kind too, and inside of a jvp: none is a view."""
    x = tensors(2, 3, m, 16)
    if layout == "bmhd":
        x = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x]
    for leaf in (x[0], x[0].clone().requires_grad_()):
        for _ in range(2):
            for y in attention_jvp(leaf, *x[1:], return_stats=True):
                assert not y._is_view()
                y.mul_(2.0)
    function = scm_kernels.scaled_dot_product_attention
    right = attention_jvp(*x)
    actual = torch.func.jvp(lambda *y: function(*y).mul_(2.0), tuple(x[:3]), tuple(x[3:]))
    for one, other in zip(actual, right, strict=True):
        assert torch.equal(one, 2 * other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_checkpoint_around_the_first_call_of_a_kind(dtype, masked):
    """Which saves as many tensors as the second one, by which its backward computes it again."""
    x = tensors(dtype=dtype)
    mask = torch.zeros(37, 37, dtype=dtype) if masked else None
    leaf, *others = (y.requires_grad_() for y in x)
    for _ in range(2):
        outputs = checkpoint(attention_jvp, leaf, *others, attn_mask=mask, use_reentrant=False)
        (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs), leaf)
        outputs = attention_jvp(leaf, *others, attn_mask=mask)
        (right,) = torch.autograd.grad(sum(y.sum() for y in outputs), leaf)
        assert torch.equal(gradient, right)


def test_autocast_is_no_part_of_a_kernel():
    """The reference multiplies by PyTorch, which autocast would round."""
    x = tensors()
    with scm_kernels.backend("reference"):
        attention_jvp(*x)
        half = [y.bfloat16() for y in x]
        attention_jvp(*half)
        without = attention_jvp(*half)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = attention_jvp(*x)
    for one, other in zip(outputs, without, strict=True):
        assert torch.equal(one, other)


def test_dual_tensors_are_still_refused():
    x = tensors()
    attention_jvp(*x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[3])
        with pytest.raises(NotImplementedError, match="got a dual tensor"):
            attention_jvp(dual, *x[1:])


def test_transforms_after_a_plain_call():
    x = tensors()
    plain = attention_jvp(*x)
    batched = torch.func.vmap(lambda *y: attention_jvp(*y))(*(y.unsqueeze(1) for y in x))
    for one, other in zip(plain, batched, strict=True):
        torch.testing.assert_close(one, other.squeeze(1))
    subclassed = attention_jvp(*(torch.nn.Parameter(y) for y in x))
    assert torch.equal(plain[0], subclassed[0])


@pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")
def test_plans_keep_no_tensor():
    """Nor do the calls whose kinds they are of: of attention, its gradient, and the tangent."""
    offline = pytest.importorskip("benchmarks.offline")  # it needs Triton
    x = [y.requires_grad_() for y in tensors(1, 2, 16, 64, dtype=torch.bfloat16)]
    f = [torch.randn(2, 64) for _ in range(4)]
    with offline.gpu("sm_80", record=False):
        for _ in range(2):
            outputs = attention_jvp(*x)
            gradients = torch.autograd.grad(outputs, x, [torch.zeros_like(y) for y in outputs])
            tangent = scm_kernels.normalized_tangent(*f, torch.rand(2))
    alive = [weakref.ref(y) for y in (*x, *f, *outputs, *gradients, tangent)]
    del x, f, outputs, gradients, tangent
    gc.collect()
    assert [y() for y in alive] == [None] * len(alive)
