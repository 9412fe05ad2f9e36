"""Keys that are alone, that take all, or that no row may see: of attention and its gradients."""

import math

import pytest
import torch
from test_attention import device_of
from test_attention_properties import BACKENDS

import scm_kernels
from scm_kernels import attention_jvp
from scm_kernels.attention import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_that_is_not_a_number(backend, dtype):
    """Spoils no gradient of the others, as under eager's mask."""
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 8, 16, dtype=dtype, device=device_of(backend)) for _ in range(6)]
    x[1][:, :, 7] = x[4][:, :, 7] = math.nan
    mask = torch.arange(8, device=device_of(backend)) < 7
    leaves = [y.requires_grad_() for y in x[:3]]
    with scm_kernels.backend(backend):
        outputs = attention_jvp(*x, attn_mask=mask)
        gradients = torch.autograd.grad(outputs, leaves[1:], [torch.ones_like(y) for y in outputs])
    assert all(y.isfinite().all() for y in outputs)
    assert all(y[:, :, :7].isfinite().all() for y in gradients)


@pytest.mark.parametrize("drowned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_key_that_is_not_a_number(backend, dtype, drowned):
    """Reaches no row before it, under a causal mask, and all others, though its weight be 0."""
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 40, 16, dtype=dtype, device=device_of(backend)) for _ in range(6)]
    x[4][:, :, 30] = math.nan
    if drowned:
        x[0][..., 0], x[1][:, :, 30, 0] = 8.0, -200.0
    else:
        x[1][:, :, 30] = math.nan
    with scm_kernels.backend(backend):
        out, t_out, lse, mu = attention_jvp(*x, is_causal=True, return_stats=True)
    for y in (t_out, mu) if drowned else (out, t_out, lse, mu):
        assert y[:, :, :30].isfinite().all()
        assert y[:, :, 30:].isnan().all()


@pytest.mark.parametrize("why", ["scores", "hidden", "by 60", "by 10000"])
@pytest.mark.parametrize("n", [2, 20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_that_takes_all_gives_its_value_and_its_tangent(
    backend, dtype, n, why, monkeypatch
):
    """To the last digit, as by eager's formula: however large T is, nothing of it is left."""
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: (64, 64))
    m, options = 80, {"dtype": dtype, "device": device_of(backend)}
    q, tq = 5 * torch.randn(2, 1, 2, m, 32, **options)
    k, tk, v, tv = 5 * torch.randn(4, 1, 2, n, 32, **options)
    tk *= 100
    taken, mask = torch.randint(n, (m,), device=q.device), None
    if why == "scores":
        q[..., 0] = 1e3
        k[..., 0] = torch.where(torch.arange(n, device=q.device) == n - 1, 1e3, 0.0)
        taken.fill_(n - 1)
    elif why == "hidden":
        mask = taken[:, None] == torch.arange(n, device=q.device)
    elif why == "by 60":
        mask, k = torch.full((m, n), -60.0, **options), k * 0.0
        mask[torch.arange(m, device=q.device), taken] = 0.0
    else:
        mask = torch.full((m, n), -1e4, **options)
        mask[torch.arange(m, device=q.device), taken] = 0.0
    with scm_kernels.backend(backend):
        out, t_out = attention_jvp(q, k, v, tq, tk, tv, attn_mask=mask, scale=0.3)
    assert torch.equal(out, v[:, :, taken])
    assert torch.equal(t_out, tv[:, :, taken])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softmax_of_one_key_does_not_vary(backend, dtype, masked):
    """Its output is the value, and the gradients through it vanish, as eager's do."""
    torch.manual_seed(0)
    device, shapes = device_of(backend), ((2, 4, 33, 64), (2, 2, 1, 64), (2, 2, 1, 48))
    x = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes * 2]
    mask = torch.randn(33, 1, dtype=dtype, device=device, requires_grad=True) if masked else None
    with scm_kernels.backend(backend):
        outputs = attention_jvp(*x, attn_mask=mask, enable_gqa=True)
        leaves = [*x, mask] if masked else x
        gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])
    for y, value in zip(outputs, (x[2], x[5]), strict=True):
        assert torch.equal(y, value.repeat_interleave(2, 1).expand_as(y))
    for i, gradient in enumerate(gradients):
        assert (i in (2, 5)) == bool(gradient.any())


@pytest.mark.parametrize(("d", "e"), [(16, 16), (64, 200), (200, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_key_that_takes_all_of_several_tiles_has_no_gradient_on_a_cpu(dtype, d, e):
    """But that of its value: B - beta and A - delta cancel to the last digit, as in eager's."""
    if "cpu" not in BACKENDS:
        pytest.skip("the native module is not built")
    torch.manual_seed(0)
    m, n = 70, 150
    shapes = {"q": (m, d), "k": (n, d), "v": (n, e)}
    x = [torch.randn(2, 2, *s, dtype=dtype, requires_grad=True) for s in shapes.values()] + [
        torch.randn(2, 2, *s, dtype=dtype, requires_grad=True) for s in shapes.values()
    ]
    taken = torch.randint(n, (m,))
    mask = torch.full((m, n), -1e4, dtype=dtype)
    mask[torch.arange(m), taken] = 0.0
    with scm_kernels.backend("cpu"):
        outputs = attention_jvp(*x, attn_mask=mask)
        gradients = torch.autograd.grad(outputs, x, [torch.randn_like(y) for y in outputs])
    assert torch.equal(outputs[0], x[2][:, :, taken])
    assert torch.equal(outputs[1], x[5][:, :, taken])
    for i, gradient in enumerate(gradients):
        assert (i in (2, 5)) == bool(gradient.any())


@pytest.mark.parametrize("why", ["sharp", "common", "diffuse", "diffuse, common"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_keys_have_in_common_costs_no_digits_of_the_gradients(backend, why, monkeypatch):
    """gS and gT of a row sum to 0: what rounding leaves must not come out times large keys, nor,
    where it is on many, be moved to one."""
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: (64, 64))
    torch.manual_seed(0)
    m, n, d = 32, 300, 64
    q, tq, dout, dt_out = torch.randn(4, 1, 2, m, d, device=device_of(backend))
    k, tk, v, tv = torch.randn(4, 1, 2, n, d, device=device_of(backend))
    if why.startswith("diffuse"):
        q *= 0.5
        v += 3 * torch.randn(d, device=q.device)
        k += 10 if why.endswith("common") else 0
    else:
        q *= 60 if why == "sharp" else 20
        tk += 300 if why == "common" else 0
    x = (q, k, v, tq, tk, tv)

    def eager(*x):
        function = lambda q, k, v: (q @ k.mT * 0.125).softmax(-1) @ v  # noqa: E731
        return torch.func.jvp(function, x[:3], x[3:])

    def gradients(function, dtype):
        leaves = [y.to(dtype).requires_grad_() for y in x]
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, (dout.to(dtype), dt_out.to(dtype)))

    def ours(*x):
        with scm_kernels.backend(backend):
            return attention_jvp(*x, scale=0.125)

    lo, got = gradients(eager, torch.float32), gradients(ours, torch.float32)
    for truth, low, y in zip(gradients(eager, torch.float64), lo, got, strict=True):
        error, allowed, eps = (y - truth).abs(), (low - truth).abs(), torch.finfo(y.dtype).eps
        assert error.mean() <= 2 * allowed.mean() + 2 * eps * truth.abs().mean()
        assert error.max() <= 5 * allowed.max() + 2 * eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_minus_infinity(backend, dtype):
    """By overflow, of all keys but the last: a row is that one's value, and its tangent that's."""
    torch.manual_seed(0)
    q, k, v, tv = torch.randn(4, 1, 2, 150, 32, device=device_of(backend)).to(dtype)
    q[..., :1], k[..., :1] = 1e30, -1e30
    k[:, :, -1] = 0.0
    with scm_kernels.backend(backend):
        out, t_out, lse, mu = attention_jvp(q, k, v, None, None, tv, return_stats=True)
    assert torch.equal(out, v[:, :, -1:].expand_as(out))
    assert torch.equal(t_out, tv[:, :, -1:].expand_as(out))
    assert not lse.any()
    assert not mu.any()


@pytest.mark.parametrize("scale", [1e-30, -1e-38, 1e-42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_leaves_nothing_of_the_scores(backend, dtype, scale):
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 80, 16, device=device_of(backend)).to(dtype) for _ in range(6)]
    with scm_kernels.backend(backend):
        outputs = attention_jvp(*(y.requires_grad_() for y in x), scale=scale)
        gradients = torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
    for y, value in zip(outputs, (x[2], x[5]), strict=True):
        torch.testing.assert_close(y, value.mean(2, keepdim=True).expand_as(y), atol=2e-2, rtol=0)
    for i, gradient in enumerate(gradients):
        expected = 1.0 if i in (2, 5) else 0.0
        torch.testing.assert_close(gradient, torch.full_like(gradient, expected), atol=1e-2, rtol=0)
