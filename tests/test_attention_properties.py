"""Properties of attention over random shapes, strides, masks and dtypes: each draw is a `Case`.

What `test_attention.py` pins by name, this looks for in between. The draws are the same in every
run; `pytest -m 'slow or not slow'` makes many more of them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import LAYOUTS, NAMES, Case, draw
from attention_truth import THROUGH, eager, evaluate, expected
from budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import device_of

import scm_kernels
from scm_kernels import attention_jvp, scaled_dot_product_attention
from scm_kernels.attention import reference

BACKENDS = [  # but for the CUDA kernels, which refuse nearly all draws (test_attention_cuda.py)
    name
    for name, status in scm_kernels.backends().items()
    if status[:9] == "available" and name != "cuda"
]
FEW = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=1500)
DOUBLE = (torch.float64,)
MASK_SHAPES = ("bhmn", "b11n", "bh1n", "mn", "b1mn", "1hmn", "1h1n", "bhm1", "1n", "n", "1111")


@st.composite
def cases(draw_from, *, dtypes=(torch.float32, torch.bfloat16, torch.float16)) -> Case:
    """A problem that the op has to take, small enough to run hundreds of them."""
    pick = lambda *options: draw_from(st.sampled_from(options))  # noqa: E731
    length = st.one_of(st.integers(1, 9), st.integers(10, 70), st.integers(120, 150))
    m, n = draw_from(length), draw_from(length)
    # Wide heads only with many rows: a mean over a few rows says little, however wide they are.
    wide = st.integers(60, 80) if min(m, n) > 9 else st.integers(1, 33)
    width = st.one_of(st.integers(1, 33), st.integers(1, 33), wide)
    heads = pick((1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (3, 1), (4, 1))
    mask = pick("", "", "bool", "dead", "late", "bias", "padding", "inf")
    # Keys that are all alike: gradients are sums that cancel to nothing, and how nearly is chance.
    layouts = [name for name in LAYOUTS if n < 10 or name != "expanded_s"]
    case = Case(
        name="",
        dtype=pick(*dtypes),
        b=draw_from(st.integers(1, 3)),
        h=heads[0],
        hk=heads[1],
        m=m,
        n=n,
        d=draw_from(width),
        e=draw_from(width),
        tangents="".join(letter for letter in "qkv" if draw_from(st.booleans())),
        causal=not mask and draw_from(st.booleans()),
        scale=pick(None, None, 0.3, -0.5, 0.0),
        mask=mask,
        mask_shape=pick(*MASK_SHAPES),
        mask_dtype=pick(None, torch.float32) if dtypes[0] == torch.float32 else None,
        t_mask=mask in ("bias", "padding", "inf") and draw_from(st.booleans()),
        layout=pick(*layouts),
        t_layout=pick(*layouts),
        logits=pick(1.0, 3.0) if dtypes == DOUBLE else 1.0,
        shared=pick(0.0, 0.0, 8.0),
    )
    if mask in ("late", "dead", "inf") and case.mask_shape == "n":
        case = replace(case, mask_shape="mn")
    return replace(case, name=str(case.__reduce_ex__(2)[2]))  # the seed of its values


def arguments(inputs, case: Case) -> tuple[list, dict]:
    masks = {name: inputs[name] for name in NAMES[6:]}
    return [inputs[name] for name in NAMES[:6]], masks | case.options()


def run(case: Case, inputs, through: str = "") -> dict:
    def function(x):
        args, kwargs = arguments(x, case)
        return attention_jvp(*args, **kwargs)

    return evaluate(function, inputs, through)


def check_against_the_truth(case: Case, through: str, backend: str, slack: float) -> None:
    with scm_kernels.backend(backend):
        results = run(case, draw(case, device_of(backend)), through)
    for name, (truth, lo, magnitude) in expected(case, through).items():
        actual = results[name].cpu()
        assert_within_budget(
            actual, truth, lo, magnitude=magnitude, dtype=case.dtype, slack=slack, name=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(case=cases(), through=st.sampled_from(sorted(THROUGH)))
def test_within_the_error_budget(case, through, backend):
    check_against_the_truth(case, through, backend, slack=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if device_of(name) == "cpu"])
@MANY
@given(case=cases(), through=st.sampled_from(sorted(THROUGH)))
def test_many_within_the_error_budget(case, through, backend):
    """Not on a GPU, where every draw is compiled: hours."""
    check_against_the_truth(case, through, backend, slack=4.0)


@pytest.mark.parametrize("through", sorted(THROUGH))
@pytest.mark.parametrize("mask", ["", "late", "bias", "causal"])
@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_one_of_few_keys_takes_all(backend, n, mask, through):
    """Most rows have next to no gradient, and eager's formula gives it to nearly all digits."""
    sizes = {"b": 2, "h": 4, "hk": 2, "m": 64, "n": n, "d": 32, "e": 16}
    causal = mask == "causal"
    mask = {} if causal else {"mask": mask, "mask_shape": "bhmn", "t_mask": mask == "bias"}
    case = Case(f"few_{n}_{mask}", torch.float32, logits=30.0, causal=causal, **sizes, **mask)
    check_against_the_truth(case, through, backend, slack=2.0)


@FEW
@given(
    case=cases(dtypes=DOUBLE),
    through=st.sampled_from(sorted(THROUGH)),
    tiles=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_tiles_of_any_size_make_no_difference(case, through, tiles):
    inputs = draw(case)
    with pytest.MonkeyPatch.context() as patch, scm_kernels.backend("reference"):
        patch.setattr(reference, "reference_tiles", lambda *_: tiles)
        results = run(case, inputs, through)
    for name, (truth, lo, magnitude) in expected(case, through).items():
        assert_within_budget(
            results[name], truth, lo, magnitude=magnitude, dtype=case.dtype, slack=2.0, name=name
        )


@FEW
@given(case=cases(dtypes=DOUBLE))
def test_the_front_door_is_the_explicit_form(case):
    inputs = draw(case)
    pairs = [("query", "t_query"), ("key", "t_key"), ("value", "t_value")]
    pairs = [(p, t) for p, t in [*pairs, ("attn_mask", "t_attn_mask")] if inputs[t] is not None]
    if not pairs:
        return
    # `make_dual` refuses expanded tensors, so the front door meets its primals dense.
    primals = tuple(inputs[p].contiguous() for p, _ in pairs)
    tangents = tuple(inputs[t].contiguous() for _, t in pairs)

    def function(*moving):
        x = inputs | dict(zip((p for p, _ in pairs), moving, strict=True))
        mask = {"attn_mask": x["attn_mask"]}
        return scaled_dot_product_attention(
            x["query"], x["key"], x["value"], **mask, **case.options()
        )

    args, kwargs = arguments(inputs, case)
    actual = torch.func.jvp(function, primals, tangents)
    torch.testing.assert_close(actual, attention_jvp(*args, **kwargs), rtol=1e-12, atol=1e-12)


@FEW
@given(case=cases(dtypes=DOUBLE), factor=st.sampled_from([0.0, -1.0, 3.0]))
def test_the_tangent_is_linear(case, factor):
    inputs = draw(case)
    scaled = {n: factor * x if n[:2] == "t_" and x is not None else x for n, x in inputs.items()}
    x, y = run(case, inputs), run(case, scaled)
    size = 1e-12 * (1 + float(x["t_out"].abs().max()))
    torch.testing.assert_close(y["t_out"], factor * x["t_out"], rtol=1e-11, atol=size)
    assert torch.equal(x["out"], y["out"])


@FEW
@given(case=cases(dtypes=DOUBLE), seed=st.integers(0, 5))
def test_the_order_of_the_keys_does_not_matter(case, seed):
    if case.causal:
        return
    inputs = draw(case)
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(seed))
    shuffled = dict(inputs)
    for name in ("key", "value", "t_key", "t_value"):
        shuffled[name] = None if inputs[name] is None else inputs[name][:, :, order]
    for name in NAMES[6:]:
        mask = inputs[name]
        shuffled[name] = mask if mask is None or mask.shape[-1] == 1 else mask[..., order]
    x, y = run(case, inputs), run(case, shuffled)
    for name in x:
        size = 1e-12 * (1 + float(x[name].abs().max()))
        torch.testing.assert_close(x[name], y[name], rtol=1e-10, atol=size)


@FEW
@given(case=cases(dtypes=DOUBLE))
def test_causal_is_a_mask(case):
    case = replace(case, mask="", t_mask=False, causal=True)
    inputs = draw(case)
    below = torch.ones(case.m, case.n, dtype=torch.bool).tril()
    bias = torch.zeros(case.m, case.n, dtype=torch.float64).masked_fill(~below, -torch.inf)
    results = run(case, inputs, "both")
    plain = replace(case, causal=False)
    for mask in (below, bias):
        masked = run(plain, inputs | {"attn_mask": mask}, "both")
        for name, x in results.items():
            torch.testing.assert_close(x, masked[name], rtol=1e-11, atol=1e-11)


@FEW
@given(case=cases(dtypes=DOUBLE))
def test_shared_key_heads_are_repeated_ones(case):
    inputs = draw(case)
    groups = case.h // case.hk
    repeated = dict(inputs)
    for name in ("key", "value", "t_key", "t_value"):
        x = inputs[name]
        repeated[name] = None if x is None else x.repeat_interleave(groups, dim=1)
    x, y = run(case, inputs, "both"), run(replace(case, hk=case.h), repeated, "both")
    for name, value in x.items():
        other = y[name]
        if other.shape != value.shape:
            other = other.unflatten(1, (case.hk, groups)).sum(2)
        size = 1e-12 * (1 + float(value.abs().max()))
        torch.testing.assert_close(value, other, rtol=1e-10, atol=size)


@FEW
@given(case=cases(dtypes=DOUBLE))
def test_the_primal_is_eager_attention(case):
    inputs = draw(case)
    q, k, v, mask = (inputs[name] for name in ("query", "key", "value", "attn_mask"))
    out = eager(q, k, v, mask, causal=case.causal, scale=case.scale)
    torch.testing.assert_close(run(case, inputs)["out"], out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("logits", [1e4, 3e9])
@pytest.mark.parametrize("mask", ["", "bool", "zeros"])
@pytest.mark.parametrize("d", [64, 72])  # 1 / sqrt(64) is exact in float32, the other is not
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores_are_those_of_one_key(backend, d, mask, logits):
    """The largest score of a row is all of its softmax, however its product was rounded."""
    torch.manual_seed(0)
    device = device_of(backend)
    q, k, v, cotangent = (
        torch.randn(1, 2, n, d, dtype=torch.float64, device=device) for n in (24, 40, 40, 24)
    )
    q *= logits
    bias = {"": None, "bool": torch.rand(24, 40, device=device) > 0.3}
    bias = bias.get(mask, torch.zeros(24, 40, device=device))
    scores = q.float().double() @ k.float().double().mT
    if mask == "bool":
        scores = scores.masked_fill(~bias, -math.inf)
    chosen = torch.nn.functional.one_hot(scores.argmax(-1), 40).double()
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    with scm_kernels.backend(backend):
        out, t_out, lse, _ = attention_jvp(
            *leaves, leaves[0].detach(), None, None, attn_mask=bias, return_stats=True
        )
        dv = torch.autograd.grad(out, leaves[2], cotangent.float())[0]
    torch.testing.assert_close(out.double(), chosen @ v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dv.double(), chosen.mT @ cotangent, rtol=1e-4, atol=1e-4)
    largest = scores.amax(-1) / math.sqrt(d)
    torch.testing.assert_close(lse.double(), largest, rtol=1e-6, atol=0.0)
    assert t_out.isfinite().all()


@pytest.mark.parametrize("nothing", range(4), ids=["batch", "heads", "queries", "keys"])
def test_double_backward_of_nothing(nothing):
    """Without a batch, heads, queries or keys all second derivatives are there, and zeros."""
    b, h, m, n = (0 if i == nothing else size for i, size in enumerate((2, 2, 3, 5)))
    leaves = [torch.randn(b, h, length, 4).requires_grad_() for length in 2 * (m, n, n)]
    first = torch.autograd.grad(
        sum(x.square().sum() for x in attention_jvp(*leaves)), leaves, create_graph=True
    )
    second = torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)
    for leaf, gradient in zip(leaves, second, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_without_keys(backend, monkeypatch):
    """Are zeros, every element of them, that of a mask too."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    device, shapes = device_of(backend), ((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4), (2, 3, 1))
    q, k, v, mask = leaves = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    torch.use_deterministic_algorithms(True)
    try:
        with scm_kernels.backend(backend):
            out, t_out = attention_jvp(q, k, v, q, k, v, attn_mask=mask, t_attn_mask=mask)
            gradients = torch.autograd.grad((out, t_out), leaves, [out + 1, out + 1])
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (out, t_out, *gradients):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_that_float16_does_not_hold(backend):
    """Where nothing flows back to it, the gradients of the others are as if it were not there."""
    torch.manual_seed(0)
    q, k, v, *tangents = torch.randn(6, 1, 2, 7, 16, dtype=torch.float16, device=device_of(backend))
    tangents[0][:, :, 3] *= 1e4
    leaves = [y.requires_grad_() for y in (q, k, 64 * v)]
    cotangent = torch.randn_like(q)
    cotangent[:, :, 3] = 0
    with scm_kernels.backend(backend):
        t_out = attention_jvp(*leaves, *tangents)[1]
        assert t_out[:, :, 3].isinf().any()
        gradients = torch.autograd.grad(t_out, leaves, cotangent)
        tangents[0][:, :, 3] = 0
        t_out = attention_jvp(*leaves, *tangents)[1]
        expected = torch.autograd.grad(t_out, leaves, cotangent)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
