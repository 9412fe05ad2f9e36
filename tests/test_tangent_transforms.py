"""`normalized_tangent` and `consistency_loss` under every transform, and forced backends.

Values and gradients in eager mode are in `test_tangent.py`, which also holds the formula, further
derivatives in `test_tangent_gradients.py`.
"""

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from test_tangent import DEVICE, PRESETS, close, make
from torch.utils.checkpoint import checkpoint

from scm_kernels import _backends
from scm_kernels.tangent import consistency_loss, normalized_tangent, reference

NAMES = ("output", "dxdt", "x_t", "jvp", "t", "log_weight")
COMPILERS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def arguments(shape=(3, 2, 4), dtype=torch.float64):
    tensors, t, w = make(shape, dtype)
    return [*tensors, t, w]


# --- forward mode: right or refused ---------------------------------------------------------------


def losses(*args):
    return consistency_loss(*args, preset="sana")


def tangents(*args):
    return normalized_tangent(*args[:5], preset="sana")


@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in (losses, tangents) for name in NAMES if (f, name) != (tangents, NAMES[5])],
)
def test_func_jvp_is_right_or_refused(function, name):
    args, i = arguments(), NAMES.index(name)

    def one(x):
        return function(*args[:i], x, *args[i + 1 :])

    if name == "log_weight":  # its derivative is that of plain PyTorch
        direction = torch.randn_like(args[i])
        _, tangent = torch.func.jvp(one, (args[i],), (direction,))
        close(tangent, (torch.func.grad(one)(args[i]) * direction).sum(), rtol=1e-12)
        return
    for call in (
        lambda: torch.func.jvp(one, (args[i],), (args[i],)),
        lambda: torch.func.jacfwd(one)(args[i]),
        lambda: torch.func.jvp(lambda x: torch.func.vmap(one)(x[None]), (args[i],), (args[i],)),
        lambda: torch.func.vmap(lambda x: torch.func.jvp(one, (x,), (x,)))(args[i][None]),
    ):
        with pytest.raises(NotImplementedError, match="dual tensor"):
            call()


@pytest.mark.parametrize("name", NAMES[:5])
def test_dual_level_is_refused(name):
    args, i = arguments(), NAMES.index(name)
    with forward_ad.dual_level():
        args[i] = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
        for function in (losses, tangents):
            with pytest.raises(NotImplementedError, match="dual tensor"):
                function(*args)


@pytest.mark.parametrize("i", range(5))
def test_bare_ops_refuse_duals(i):
    inputs = [torch.randn(3, 4, device=DEVICE) for _ in range(5)]
    numbers = [torch.rand(3, device=DEVICE, dtype=torch.float64) for _ in range(3)]
    ops = torch.ops.scm_kernels
    options = (1.0, 0.5, 0.1, "paper", False, "")
    with forward_ad.dual_level():
        inputs[i] = forward_ad.make_dual(inputs[i], torch.ones_like(inputs[i]))
        times, rows = (inputs[4][:, 0], None), (*inputs[:4], inputs[4].double())
        for call in (
            lambda: ops.tangent_loss(*inputs[:4], *times, None, *options),
            lambda: ops.tangent_gradient(*rows, *numbers[:2], None, numbers[2], ""),
            lambda: ops.tangent_normalize(*inputs[:4], *times, *options),
            lambda: ops.tangent_apply(*rows, ""),
            lambda: ops.tangent_distance(*rows, numbers[0], ""),
        ):
            with pytest.raises(NotImplementedError, match="dual tensor"):
                call()


def test_a_dual_warmup_is_refused():
    args = arguments()
    with pytest.raises(NotImplementedError, match="dual tensor"):
        torch.func.jvp(
            lambda r: consistency_loss(*args, warmup=r), (torch.tensor(0.5),), (torch.tensor(1.0),)
        )


def test_jvp_over_grad_and_grad_over_jvp_are_refused():
    F, *rest = arguments()

    def loss(x):
        return consistency_loss(x, *rest)

    with pytest.raises(NotImplementedError, match="dual tensor"):
        torch.func.jvp(torch.func.grad(loss), (F,), (F,))
    with pytest.raises(NotImplementedError, match="dual tensor"):
        torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (F,))[1])(F)


@pytest.mark.parametrize("backend", COMPILERS)
def test_jvp_under_compile_is_refused(backend):
    F, *rest = arguments()

    @torch.compile(fullgraph=True, backend=backend)
    def call(x):
        return torch.func.jvp(lambda y: consistency_loss(y, *rest), (x,), (x,))[1]

    with pytest.raises(Exception, match="dual tensor"):
        call(F)


# --- vmap, compile, checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_func_grad_and_vmap(preset):
    args = arguments()
    args = args[:5] if preset == "rcm" else args
    wrt = (0,) if preset == "rcm" else (0, 5)

    def batch_loss(*args):
        return consistency_loss(*args, preset=preset, reduction="none")

    def sample_loss(*args):
        return consistency_loss(*(x[None] for x in args), preset=preset)

    leaves = [x.clone().requires_grad_() if i in wrt else x for i, x in enumerate(args)]
    loss = batch_loss(*leaves)
    expected = torch.autograd.grad(loss.sum(), [leaves[i] for i in wrt])
    total = torch.func.grad(lambda *a: batch_loss(*a).sum(), argnums=wrt)(*args)
    each = torch.func.vmap(torch.func.grad(sample_loss, argnums=wrt))(*args)
    for actual in (total, each):
        for a, e in zip(actual, expected, strict=True):
            close(a, e, rtol=1e-13)
    close(torch.func.vmap(sample_loss)(*args), loss.detach(), rtol=1e-13)
    jacobian = torch.func.jacrev(batch_loss)(*args)
    close(jacobian.sum(0), expected[0], rtol=1e-13)
    if preset != "meanflow":
        alone = torch.func.vmap(
            lambda *a: normalized_tangent(*(x[None] for x in a), preset=preset)[0]
        )(*args[:5])
        close(alone, normalized_tangent(*args[:5], preset=preset), rtol=1e-13)


def test_vmap_of_nothing():
    """A batch of size 0, of the values and of a gradient."""
    args = [x.expand(2, *x.shape)[:0] for x in arguments()]
    vmap = torch.func.vmap
    assert vmap(normalized_tangent)(*args[:5]).shape == args[0].shape
    assert vmap(consistency_loss)(*args).shape == (0,)
    assert vmap(torch.func.grad(consistency_loss))(*args).shape == args[0].shape
    shared = vmap(consistency_loss, in_dims=(None, 0, None, None, None))
    assert shared(*arguments()[:1], args[1], *arguments()[2:5]).shape == (0,)


def test_vmap_over_one_argument():
    """A batch of log weights, and tensors whose vmapped dimension is not the first."""
    F, V, X, J, t, w = arguments()
    stacked = torch.stack([F, 2 * F], dim=2)
    actual = torch.func.vmap(
        lambda f, w: consistency_loss(f, V, X, J, t, w, reduction="none"), in_dims=(2, None)
    )(stacked, w)
    for a, f in zip(actual, (F, 2 * F), strict=True):
        close(a, consistency_loss(f, V, X, J, t, w, reduction="none"), rtol=1e-13)


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)]
)
def test_compile(backend, dynamic):
    """Forward and backward in one graph; a warm-up that moves at each step compiles twice only."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def both(*args, warmup):
        loss = consistency_loss(*args, warmup=warmup, nan_policy="zero")
        return loss, normalized_tangent(*args[:5], warmup=warmup, preset="rms")

    args = arguments((4, 3, 5))
    args[0].requires_grad_()
    args[5].requires_grad_()
    for step in range(3):
        warmup = 0.1 + step / 10
        loss, tangent = both(*args, warmup=warmup)
        expected = consistency_loss(*args, warmup=warmup, nan_policy="zero")
        close(loss.detach(), expected.detach(), rtol=1e-13)
        close(tangent, normalized_tangent(*args[:5], warmup=warmup, preset="rms"), rtol=1e-13)
        leaves = (args[0], args[5])
        for a, e in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            close(a, e, rtol=1e-13)
    assert counter.frame_count <= 2


def test_compile_keeps_the_layout():
    args = arguments((2, 3, 4, 5))
    args[0] = args[0].to(memory_format=torch.channels_last)
    compiled = torch.compile(normalized_tangent, fullgraph=True, backend="aot_eager")
    assert compiled(*args[:5]).stride() == args[0].stride()


def test_opcheck():
    F, V, X, J, t, w = arguments((3, 5))
    ops, check = torch.ops.scm_kernels, torch.library.opcheck
    options = (1.0, 0.5, 0.1, "sana", False, "")
    for requires_grad in (False, True):
        coefficients = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
        numbers = torch.rand(3, 3, dtype=torch.float64, device=DEVICE)
        inputs = (F.clone().requires_grad_(requires_grad), V, X, J)
        w = w.detach().requires_grad_(requires_grad)
        for warmup in (None, t):
            check(ops.tangent_loss, (*inputs, t, warmup, w, *options))
            check(ops.tangent_normalize, (F, V, X, J, t, warmup, *options))
        check(ops.tangent_loss, (*inputs, t, None, None, *options))
        check(ops.tangent_gradient, (F, V, X, J, coefficients, *numbers[:2], t, numbers[2], ""))
        check(ops.tangent_distance, (*inputs, coefficients, numbers[0], ""))
        coefficients.requires_grad_(requires_grad)
        check(ops.tangent_apply, (F, V, X, J, coefficients, ""))


def test_checkpoint():
    F, *rest = arguments()
    x = F.clone().requires_grad_()
    scale = torch.tensor(2.0, dtype=x.dtype, device=DEVICE, requires_grad=True)

    def loss(x):
        return consistency_loss(torch.tanh(scale * x), *rest)

    plain = torch.autograd.grad(loss(x), (x, scale))
    again = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), (x, scale))
    assert all(map(torch.equal, plain, again))


# --- backends -------------------------------------------------------------------------------------


def test_forced_backend(monkeypatch):
    args = arguments()
    with _backends.backend("reference"):
        forced = consistency_loss(*args)
    close(forced, consistency_loss(*args), rtol=1e-12)
    with pytest.raises(ValueError, match="name: got 'fast', expected one of"):
        _backends.backend("fast").__enter__()
    monkeypatch.setenv("SCM_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SCM_KERNELS_BACKEND: got 'fast', expected one of"):
        consistency_loss(*args)


def test_a_backend_plugs_in_behind_the_op(monkeypatch):
    """A planted one sees rows with a unit stride, every step, and its refusal is heard."""
    seen = []

    class Planted:
        refuses = staticmethod(lambda problem: "it is full" if len(problem.f) > 3 else None)

        @staticmethod
        def loss(problem):
            seen.append("loss")
            assert all(x.stride(1) == 1 for x in (problem.f, problem.v, problem.x, problem.j))
            reference.loss(problem)

        @staticmethod
        def gradient(problem):
            seen.append("gradient")
            problem.out.fill_(7.0)

        @staticmethod
        def normalize(problem):
            seen.append("normalize")
            problem.out.fill_(8.0)

    real = _backends._implementation
    monkeypatch.setattr(
        _backends,
        "_implementation",
        lambda op, name: (Planted, None) if name == "cpu" else real(op, name),
    )
    F, V, *rest = arguments()
    x, rest = F.requires_grad_(), [torch.stack([V, V], dim=-1)[..., 0], *rest]
    with _backends.backend("cpu"):
        loss = consistency_loss(x, *rest)
    with _backends.backend("reference"):  # the backward keeps the forward's backend
        (dF,) = torch.autograd.grad(loss, x)
        assert (dF == 7).all()
    with _backends.backend("cpu"):
        assert (normalized_tangent(F, *rest[:4]) == 8).all()
    assert seen == ["loss", "gradient", "normalize"]
    with (
        _backends.backend("cpu"),
        pytest.raises(NotImplementedError, match=r"'cpu' was forced.*it is full.*'reference'"),
    ):
        consistency_loss(*arguments((4, 5)))
    with _backends.backend("auto"):
        assert consistency_loss(*arguments((4, 5))).isfinite()
