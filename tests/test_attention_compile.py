"""Attention under `torch.compile(fullgraph=True)`, and the ops before `torch.library.opcheck`."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from attention_cases import Case
from attention_cases import draw as draw_case
from stock_attention import EXACT, B, D, E, H, M, N, draw, same, stock_jvp
from torch.func import grad, jvp, vmap

import scm_kernels
from scm_kernels import _backends, attention_jvp, scaled_dot_product_attention

OPS = torch.ops.scm_kernels


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    """q, k, v, tq, tk, tv."""
    return draw()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def loss(outputs) -> torch.Tensor:
    return sum(y.square().sum() for y in outputs)


def by_jvp(*x, **options):
    def function(*y):
        return scaled_dot_product_attention(*y, **options)

    return jvp(function, tuple(x[:3]), tuple(x[3:]))


def by_dual_level(*x, **options):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, t) for y, t in zip(x[:3], x[3:], strict=True)]
        return tuple(forward_ad.unpack_dual(scaled_dot_product_attention(*duals, **options)))


FORMS = {"jvp": by_jvp, "dual_level": by_dual_level, "explicit": attention_jvp}


def check_forward_and_backward(function, x, **options) -> None:
    leaves = [y.clone().requires_grad_() for y in x]
    truth = stock_jvp(*leaves, **options)
    for total in (loss, lambda outputs: outputs[0].sum()):
        outputs = tuple(function(*leaves))  # a compiled graph gives back its buffers in a backward
        torch.testing.assert_close(outputs, truth, **EXACT)
        actual, expected = (
            torch.autograd.grad(total(y), leaves, retain_graph=y is truth, materialize_grads=True)
            for y in (outputs, truth)
        )
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}], ids=str)
def test_around_a_jvp(x, form, options):
    check_forward_and_backward(compiled(lambda *y: FORMS[form](*y, **options)), x, **options)


@pytest.mark.parametrize("shape", [(M, N), (B, 1, 1, N), (B, H, M, N)], ids=str)
@pytest.mark.parametrize("is_bool", [False, True])
def test_with_a_mask(x, shape, is_bool):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    mask = mask > -0.5 if is_bool else mask
    function = compiled(lambda *y: by_jvp(*y[:6], attn_mask=y[6]))
    check_forward_and_backward(lambda *y: function(*y, mask), x, attn_mask=mask)


def test_with_a_dual_mask_that_wants_a_gradient(x):
    mask, t_mask = torch.randn(2, 1, H, M, N, dtype=torch.float64)

    def function(f, q, m, tq, tm):
        return jvp(lambda q, m: f(q, *x[1:3], attn_mask=m), (q, m), (tq, tm))

    def run(f):
        leaves = [y.clone().requires_grad_() for y in (x[0], mask, x[3], t_mask)]
        step = function if f is not scaled_dot_product_attention else compiled(function)
        return torch.autograd.grad(loss(step(f, *leaves)), leaves)

    same(run)


@pytest.mark.parametrize("form", ["jvp", "explicit"])
def test_inside_a_jvp(x, form):
    """The compiled part is called under eager forward mode."""
    inner = compiled(lambda q, k, v, tq, tk, tv: FORMS[form](q * 2, k, v, tq * 2, tk, tv))
    check_forward_and_backward(lambda *y: inner(y[0] / 2, *y[1:3], y[3] / 2, *y[4:]), x)


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients(x, form):
    with torch.no_grad():
        outputs = compiled(FORMS[form])(*x)
    torch.testing.assert_close(tuple(outputs), stock_jvp(*x), **EXACT)


def test_stats_and_absent_tangents(x):
    function = compiled(
        lambda q, k, v, tq: attention_jvp(q, k, v, tq, None, None, return_stats=True)
    )
    eager = attention_jvp(*x[:4], None, None, return_stats=True)
    torch.testing.assert_close(function(*x[:4]), eager, **EXACT)


@pytest.mark.parametrize("form", ["jvp", "explicit"])
def test_lengths_that_vary_compile_once(form):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = compiled(FORMS[form], counter, dynamic=True)
    for batch, m, n in ((5, 7, 9), (6, 10, 8), (8, 9, 13)):  # equal sizes would be one symbol
        shapes = ((batch, H, m, D), (batch, H, n, D), (batch, H, n, E)) * 2
        x = [torch.randn(s, dtype=torch.float64) for s in shapes]
        check_forward_and_backward(function, x)
    assert counter.frame_count == 1


def test_options_that_follow_a_dynamic_shape(x):
    """As model code writes them: a scale and a causal flag computed from symbolic sizes."""

    def function(q, *rest):
        return by_jvp(q, *rest, is_causal=q.shape[2] > 1, scale=q.shape[3] ** -0.5)

    outputs = compiled(function, dynamic=True)(*x)
    torch.testing.assert_close(outputs, stock_jvp(*x, is_causal=True), **EXACT)


@pytest.mark.parametrize("layout", ["bshd", "packed", "expanded_b", "column"])
def test_strides(layout):
    case = Case("compiled", torch.float64, layout=layout, t_layout="bhsd")
    tensors = [*draw_case(case).values()][:6]
    actual, truth = compiled(attention_jvp)(*tensors), attention_jvp(*tensors)
    torch.testing.assert_close(actual, truth, **EXACT)
    assert [y.stride() for y in actual] == [y.stride() for y in truth]


def test_vmap_and_grad_inside(x):
    many = [torch.stack([y, -y]) for y in x]

    def run(f):
        def one(q, tq):
            return loss(jvp(lambda q: f(q, *x[1:3]), (q,), (tq,)))

        return vmap(grad(one, (0, 1)))(many[0], many[3])

    actual = compiled(lambda: run(scaled_dot_product_attention))()
    torch.testing.assert_close(actual, run(scaled_dot_product_attention), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("through", [0, 1])
def test_gradient_of_a_gradient(x, dtype, through):
    """In the layout [B, M, H, D] of packed projections, which is not that of the heads."""
    q, *rest = (y.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for y in x)

    def function(q):
        def inner(q):
            return attention_jvp(q, *rest)[through].float().sum()

        return grad(lambda q: grad(inner)(q).float().square().sum())(q)

    torch.testing.assert_close(compiled(function)(q), function(q))


def test_autocast(x):
    single = [y.float() for y in x]

    def function(*y):
        with torch.autocast("cpu", torch.bfloat16):
            return by_jvp(*y)

    assert all(map(torch.equal, compiled(function)(*single), function(*single)))
    assert compiled(function)(*single)[1].dtype == torch.bfloat16


def test_plain_inputs_are_pytorchs_own(x):
    actual = compiled(scaled_dot_product_attention)(*x[:3])
    assert torch.equal(actual, torch.nn.functional.scaled_dot_product_attention(*x[:3]))


def test_a_forced_backend_is_part_of_the_graph(x, monkeypatch):
    """It is neither frozen at the first call nor forgotten in the backward."""
    seen, plan = [], _backends.plan

    def spy(op, step, problem, request, *stand_in):
        seen.append((step, request))
        return plan(op, step, problem, request, *stand_in)

    monkeypatch.setattr(_backends, "plan", spy)
    function, leaves = compiled(attention_jvp), [y.requires_grad_() for y in x]
    with torch.no_grad():
        function(*x)
    with scm_kernels.backend("reference"):
        outputs = function(*leaves)
    loss(outputs).backward()
    with torch.no_grad():
        function(*x)
    forced = [("forward", "reference"), ("backward", "reference")]
    assert seen == [("forward", ""), *forced, ("forward", "")]


@pytest.mark.parametrize("form", ["jvp", "dual_level"])
def test_the_bare_op_refuses_duals(x, form):
    def bare(q):
        return OPS.attention_jvp(q, *x[1:], None, None, False, 0.5, True, "")[0]

    def dual_level(q, tq):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(bare(forward_ad.make_dual(q, tq)))

    function = dual_level if form == "dual_level" else lambda q, tq: jvp(bare, (q,), (tq,))
    with pytest.raises(Exception, match="got a dual tensor"):
        compiled(function)(x[0], x[3])


def test_a_second_forward_derivative_raises(x):
    def twice(q, tq):
        once = lambda q: jvp(lambda q: scaled_dot_product_attention(q, *x[1:3]), (q,), (tq,))  # noqa: E731
        return jvp(once, (q,), (tq,))

    with pytest.raises(Exception, match="would be lost"):
        compiled(twice)(x[0], x[3])


def test_jvp_of_vmap_raises(x):
    def function(q, tq):
        return jvp(vmap(lambda q: scaled_dot_product_attention(q, *x[1:3])), (q,), (tq,))

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(function)(x[0][None], x[3][None])


# --- opcheck, export, inductor --------------------------------------------------------------------

CHECKED = [
    Case("opcheck_plain"),
    Case("opcheck_bf16", torch.bfloat16),
    Case("opcheck_gqa_causal", h=4, hk=2, causal=True),
    Case("opcheck_bias", mask="bias", mask_shape="b1mn", t_mask=True, tangents="qv"),
    Case("opcheck_dead", torch.float64, mask="dead", layout="bshd", t_layout="wide"),
    Case("opcheck_empty", b=0),
]


def arguments_of(case: Case, grad: bool) -> list:
    tensors = [*draw_case(case).values()]
    return [
        y if y is None or not y.is_floating_point() else y.requires_grad_(grad) for y in tensors
    ]


@pytest.mark.parametrize("tangent_grad", [True, False])
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck(case, tangent_grad):
    tensors = arguments_of(case, grad=True)
    torch.library.opcheck(OPS.attention_jvp.default, (*tensors, case.causal, 0.4, tangent_grad, ""))


@pytest.mark.parametrize("through", ["out", "t_out", "both"])
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_opcheck_of_the_backward(case, through):
    tensors = arguments_of(case, grad=False)
    out, t_out, lse, mu, low = OPS.attention_jvp(*tensors, case.causal, 0.4, True, "")
    dout = None if through == "t_out" else torch.randn_like(out)
    dt_out = None if through == "out" else torch.randn_like(out)
    wanted = [y is not None and y.is_floating_point() for y in tensors]
    if through == "out":
        tensors[3:6], tensors[7], t_out, mu = [None] * 3, None, None, None
        wanted[3:6], wanted[7] = [False] * 3, False
    torch.library.opcheck(
        OPS.attention_jvp_backward.default,
        (dout, dt_out, *tensors, out, t_out, lse, mu, low, case.causal, 0.4, wanted, ""),
    )


def test_export(x):
    class Block(torch.nn.Module):
        def forward(self, *x):
            return attention_jvp(*x)

    program = torch.export.export(Block(), tuple(x))
    torch.testing.assert_close(program.module()(*x), stock_jvp(*x), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_inductor(x, form, dynamic):
    function = compiled(lambda *y: FORMS[form](*(z * 1.0 for z in y)), "inductor", dynamic=dynamic)
    check_forward_and_backward(function, x)


@pytest.mark.slow
def test_inductor_with_projections_around(x):
    """Views of one packed matrix product, as in a transformer block, with parameters."""
    weight = torch.randn(D, 3 * H * D, dtype=torch.float64, requires_grad=True)
    tokens, tangent = (torch.randn(B, M, D, dtype=torch.float64) for _ in range(2))

    def block(f, y):
        q, k, v = (y @ weight).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return f(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def run(f):
        def step(y, t):
            return jvp(lambda y: block(f, y), (y,), (t,))

        step = compiled(step, "inductor") if f is scaled_dot_product_attention else step
        outputs = step(tokens, tangent)
        return *outputs, *torch.autograd.grad(loss(outputs), weight)

    same(run)


def test_compiled_autograd():
    inputs = [torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    loss = sum(x.square().sum() for x in attention_jvp(*inputs))
    truth = torch.autograd.grad(loss, inputs, retain_graph=True)
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    torch.testing.assert_close(tuple(x.grad for x in inputs), truth)


@pytest.mark.parametrize("before", ["attention", "loss", "fused"])
def test_ops_before_a_jvp(before):
    """Dynamo keeps what it has seen of the level of a jvp before there is one."""
    x, t_x = torch.randn(2, 3, 2, 4, 8, dtype=torch.float64)
    rows = x.reshape(4, 6, 8).unbind()

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x.sin())

    def function(x, t_x):
        if before == "fused":
            with scm_kernels.fused():
                return attend(x), *torch.func.jvp(attend, (x,), (t_x,))
        if before == "loss":
            first = scm_kernels.consistency_loss(*rows, rows[0][:, 0].abs())
        else:
            first = scm_kernels.scaled_dot_product_attention(x, x, x)
        return first, *scm_kernels.jvp(attend, (x,), (t_x,))

    torch.testing.assert_close(compiled(function)(x, t_x), function(x, t_x))
