"""Attention with its tangent on every available backend: values, tangents, gradients, memory.

A backend that joins `scm_kernels.backends()` runs through all of this without a change here.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, NAMES, Case, at_strides, draw
from attention_truth import THROUGH, eager, evaluate, expected
from budget import assert_within_budget
from peak_memory import peak_memory

import scm_kernels
from scm_kernels import _backends, _native, _triton, attention_jvp
from scm_kernels.attention import reference

AVAILABLE = [name for name, status in scm_kernels.backends().items() if status[:9] == "available"]
BACKENDS = ["auto", *AVAILABLE]
HALF = (torch.float16, torch.bfloat16)


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def run(backend: str, case: Case, inputs, through: str = "", **options) -> dict:
    """The results of `attention_jvp` on a backend."""
    with forced(backend, case.dtype):
        return evaluate(
            lambda x: attention_jvp(*_arguments(x), **_masks(x), **case.options(), **options),
            inputs,
            through,
        )


@contextmanager
def forced(backend: str, dtype: torch.dtype):
    """A backend; float64, and what the CUDA kernels leave to Triton's, it may refuse."""
    with scm_kernels.backend(backend):
        try:
            yield
        except NotImplementedError as error:
            if backend == "cuda" or (backend in ("cpu", "triton") and dtype == torch.float64):
                pytest.skip(str(error))
            raise


def _arguments(inputs) -> list:
    return [inputs[name] for name in NAMES[:6]]


def _masks(inputs) -> dict:
    return {name: inputs[name] for name in NAMES[6:]}


def check_far_addresses(backend: str) -> None:
    """Batches, heads, and rows of one tile that are more than 2^31 elements apart."""
    case = Case("far", torch.bfloat16, b=2, h=2, m=20, n=40, d=64)
    near = draw(case)
    for strides in ((2**32, 4096, 64), (4096, 2**32, 64), (128, 64, 2**27)):
        far = {name: x if x is None else at_strides(x, strides) for name, x in near.items()}
        check(run(backend, case, far), case)


def check(results, case: Case, through: str = "") -> None:
    for name, (truth, lo, magnitude) in expected(case, through).items():
        actual = results[name].cpu()
        assert_within_budget(
            actual, truth, lo, magnitude=magnitude, dtype=case.dtype, name=f"{case}: {name}"
        )


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend, case, poisoned):
    assert torch.empty(1).isnan(), "the poison works"
    check(run(backend, case, draw(case, device_of(backend))), case)


@pytest.mark.parametrize("through", ["", *THROUGH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_under_the_least_number(backend, dtype, through):
    """lse cannot hold the logarithm of a count beside it."""
    device = device_of(backend)
    case = Case("least", dtype, m=40, n=90, d=64, h=4, hk=2, mask="least")
    check(run(backend, case, draw(case, device), through), case, through)


@pytest.mark.parametrize(("mask", "size"), [(-1e9, 1e-5), (-1e8, 2e3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cotangents_of_rows_under_a_large_number_stay_in_range(backend, mask, size):
    """Each counts 1 / n for a key, or, where lse was rounded up, P by its inverse: no float16."""
    if backend in ("triton", "cuda"):
        pytest.skip("a GPU's products want cotangents in float16")
    torch.manual_seed(0)
    m, n, d = 64, 90 if size > 1 else 512, 16
    q, k, v = (torch.randn(1, 1, length, d).half() for length in (m, n, n))
    v.requires_grad_()
    dout = (size * torch.rand(1, 1, m, d)).half()
    with scm_kernels.backend(backend):
        out, _ = attention_jvp(q, k, v, q, k, v, attn_mask=torch.full((m, n), mask))
        (dv,) = torch.autograd.grad(out, v, dout)
    scores = (q.float() @ k.float().mT / d**0.5 + mask).double()
    truth = scores.softmax(-1).mT @ dout.double()
    torch.testing.assert_close(dv.double(), truth, rtol=3e-2, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cotangents_whose_elements_overlap(backend):
    """Under a mask that loses scores, where cotangents are multiplied first."""
    device = device_of(backend)
    case = Case("overlap", m=5, n=40, d=24, h=2, b=1, mask="least")
    x = {name: y if y is None else y.requires_grad_() for name, y in draw(case, device).items()}
    dout = torch.randn(1, 2, 5 + 24, device=device).unfold(2, 24, 1)[:, :, :5]
    with forced(backend, case.dtype):
        outputs = attention_jvp(*_arguments(x), **_masks(x), **case.options())[:2]
        overlapping, dense = (
            torch.autograd.grad(outputs, _arguments(x), (y, y), retain_graph=True)
            for y in (dout, dout.contiguous())
        )
    for one, other in zip(overlapping, dense, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_and_device_do_not_matter(backend):
    case = Case("defaults", d=72, logits=4.0)
    inputs = draw(case, device_of(backend))
    _backends.forget()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            results = run(backend, case, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
        _backends.forget()
    check(results, case)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, case, through, poisoned):
    check(run(backend, case, draw(case, device_of(backend)), through), case, through)


@pytest.fixture
def no_native_module(monkeypatch):
    monkeypatch.setattr(_native, "unavailable", lambda: "hidden by a test")
    _backends.forget()
    yield
    monkeypatch.undo()
    _backends.forget()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_out_without_a_compiler(case, no_native_module, poisoned):
    """The reference's forward, and PyTorch's own flash backward where that takes the problem."""
    assert "hidden by a test" in scm_kernels.backends()["cpu"]
    check(run("auto", case, draw(case), "out"), case, "out")


def test_list_of_cases_is_unambiguous():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


# --- statistics -----------------------------------------------------------------------------------

STATS = [
    Case("stats", h=4, hk=2),
    Case("stats_bf16", torch.bfloat16, n=90, d=64),
    Case("stats_dead", mask="dead", t_layout="wide"),
    Case("stats_bias", mask="bias", t_mask=True, mask_shape="1n"),
    Case("stats_shared", shared=16.0, causal=True),
    Case("stats_f64", torch.float64),
]


@pytest.mark.parametrize("case", STATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_and_mu(backend, case, poisoned):
    inputs = draw(case, device_of(backend))
    with forced(backend, case.dtype):
        *_, lse, mu = attention_jvp(
            *_arguments(inputs), **_masks(inputs), **case.options(), return_stats=True
        )
    wide = [None if x is None else x.cpu().double() for x in _arguments(inputs)]
    mask, t_mask = (None if x is None else x.cpu() for x in _masks(inputs).values())
    scale = 1 / math.sqrt(case.d)
    *_, true_lse, true_mu = reference.dense(*wide, mask, t_mask, causal=case.causal, scale=scale)
    assert lse.dtype == mu.dtype == (case.dtype if case.dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    assert not mu.requires_grad
    torch.testing.assert_close(lse.cpu().double(), true_lse, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(mu.cpu().double(), true_mu, rtol=2e-6, atol=2e-5)
    if case.mask == "dead":
        assert lse[:, :, 0].isneginf().all()
        assert (mu[:, :, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [STATS[0], STATS[2], STATS[3]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_results_merge(backend, case, dtype):
    """The formula for split KV and ring attention, with what `return_stats` returns."""
    case = replace(case, name=f"merge_{case}", dtype=dtype, mask_shape="bhmn", m=9, n=30)
    inputs = draw(case, device_of(backend))
    parts = []
    for keys in (slice(0, 7), slice(7, 8), slice(8, 30)):
        part = {name: x if x is None else x[:, :, keys] for name, x in inputs.items()}
        part |= {name: inputs[name] for name in ("query", "t_query")}
        part |= {name: x if x is None else x[..., keys] for name, x in _masks(inputs).items()}
        with forced(backend, dtype):
            options = _masks(part) | case.options()
            parts.append(attention_jvp(*_arguments(part), **options, return_stats=True))
    out, t_out, lse, mu = map(torch.stack, zip(*parts, strict=True))
    total = lse.logsumexp(0)
    weight = (lse - total.masked_fill(total.isneginf(), 0.0)).exp()
    merged_out = (weight[..., None] * out).sum(0)
    merged_mu = (weight * mu).sum(0)
    merged_t = (weight[..., None] * (t_out + (mu - merged_mu)[..., None] * out)).sum(0)
    whole = attention_jvp(
        *_arguments(inputs), **_masks(inputs), **case.options(), return_stats=True
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for x, y in zip((merged_out, merged_t, total, merged_mu), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_the_tangent(backend):
    case = Case("linear", m=40, n=70, mask="bias", t_mask=True)
    first = draw(case, device_of(backend))
    second = draw(replace(case, name="linear_2"), device_of(backend))
    mixed, zero = dict(first), dict(first)
    for name in NAMES[3:6] + NAMES[7:]:
        mixed[name] = 3 * first[name] - 0.5 * second[name]
        zero[name] = torch.zeros_like(first[name])
        second[name[2:]] = first[name[2:]]
    t1, t2, t3, t0 = (run(backend, case, x)["t_out"] for x in (first, second, mixed, zero))
    torch.testing.assert_close(t3, 3 * t1 - 0.5 * t2, rtol=1e-5, atol=2e-5)
    assert (t0 == 0).all(), "exactly zero for a zero tangent"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_in_a_row_changes_nothing(backend):
    """Of the scores: out and t_out; of the scores' tangent: t_out."""
    case = Case("shift", mask="bias", t_mask=True)
    inputs = draw(case, device_of(backend))
    shifted = dict(inputs)
    rows = torch.randn(case.m, 1, generator=torch.Generator().manual_seed(0))
    rows = rows.to(inputs["query"].device)
    shifted["attn_mask"] = inputs["attn_mask"] + 5 * rows
    shifted["t_attn_mask"] = inputs["t_attn_mask"] - 3 * rows
    x, y = run(backend, case, inputs), run(backend, case, shifted)
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mask", ["", "few", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_component_that_all_of_t_key_shares_costs_no_accuracy(backend, dtype, mask):
    """It cancels in the maths; without the shift c, or with a c of masked keys, digits go."""
    errors = {}
    for shared in (0.0, 100.0):
        case = Case(
            f"common_{mask}",
            dtype,
            b=1,
            h=4,
            m=64,
            n=130,
            d=64,
            tangents="k",
            mask=mask,
            shared=shared,
        )
        results = run(backend, case, draw(case, device_of(backend)))
        truth = expected(case)["t_out"][0]
        errors[shared] = float((results["t_out"].cpu() - truth).abs().mean() / truth.abs().mean())
    # t_key itself, rounded to the dtype, is what `truth` sees: only the kernel's error is left.
    limit = 3 * errors[0.0] if dtype in HALF else 60 * errors[0.0]
    assert errors[100.0] <= limit, errors


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_mask_keeps_its_digits_beside_half_inputs(backend, dtype):
    """A bias of the size of ALiBi's, whose rounding to the inputs' dtype would be seen."""
    case = Case("digits", dtype, m=64, n=64, d=32, mask="bias", mask_dtype=torch.float32)
    inputs = draw(case)
    inputs["attn_mask"] *= 100
    truth = eager(*(inputs[name].double() for name in (*NAMES[:3], "attn_mask")))
    lo = eager(*(inputs[name] for name in (*NAMES[:3], "attn_mask")))
    moved = {name: None if x is None else x.to(device_of(backend)) for name, x in inputs.items()}
    out = run(backend, case, moved)["out"].cpu()
    assert_within_budget(out, truth, lo, magnitude=float(inputs["value"].abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_have_no_influence(backend):
    """Neither their values nor their tangents, however large; also not through the shift c."""
    case = Case("masked", mask="bool", mask_shape="b11n", m=40, n=70)
    inputs = draw(case, device_of(backend))
    wild = dict(inputs)
    dead = ~inputs["attn_mask"].transpose(-1, -2)  # [B, 1, N, 1]
    for name in ("key", "value", "t_key", "t_value"):
        wild[name] = torch.where(dead, 1e4 * inputs[name], inputs[name])
    x, y = (run(backend, case, i, "both") for i in (inputs, wild))
    for name in ("out", "t_out", "d_query", "d_t_query"):
        torch.testing.assert_close(x[name], y[name], rtol=1e-5, atol=1e-5)
    for name in ("d_key", "d_value", "d_t_key", "d_t_value"):
        assert (y[name].masked_select(dead) == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absent_tangent_is_a_zero_one(backend):
    case = Case("absent", tangents="qv", mask="bias")
    inputs = draw(case, device_of(backend))
    zeros = inputs | {"t_key": torch.zeros_like(inputs["key"])}
    zeros["t_attn_mask"] = torch.zeros_like(inputs["attn_mask"])
    x, y = run(backend, case, inputs, "both"), run(backend, case, zeros, "both")
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    case = Case("twice", torch.bfloat16, m=70, n=65, d=64)
    inputs = draw(case, device_of(backend))
    x, y = run(backend, case, inputs, "both"), run(backend, case, inputs, "both")
    assert all(torch.equal(x[name], y[name]) for name in x)


# --- more leading dimensions, memory --------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 2), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("mask", [None, "full", "rows"])
def test_any_number_of_leading_dimensions(lead, mask):
    """As in PyTorch's function: none, heads alone, or more than batch and heads."""
    torch.manual_seed(0)
    shapes = [(*lead, 5, 4), (*lead, 7, 4), (*lead, 7, 3)]
    x = [torch.randn(s, dtype=torch.float64) for s in (*shapes, *shapes)]
    masks = {None: None, "full": torch.randn(*lead, 5, 7), "rows": torch.rand(5, 7) > 0.3}
    bias = masks[mask]

    def folded(q, k, v):
        q, k, v = (y.reshape(-1, 1, *y.shape[-2:]) for y in (q, k, v))
        bias = masks[mask] if mask != "full" else masks[mask].reshape(-1, 1, 5, 7)
        return eager(q, k, v, bias).reshape(*lead, 5, 3)

    truth = torch.func.jvp(folded, tuple(x[:3]), tuple(x[3:]))
    out, t_out, lse, mu = attention_jvp(*x, attn_mask=bias, return_stats=True)
    torch.testing.assert_close((out, t_out), truth, rtol=1e-12, atol=1e-12)
    assert lse.shape == mu.shape == (*lead, 5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": "b11n"}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_m_times_n(backend, options, monkeypatch):
    """Forward, and the gradient through both outputs, in well under one matrix [M, N]."""
    if backend == "triton" and _triton.interpreting():
        pytest.skip("what Triton's interpreter takes is its own")
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: (256, 256))
    if backend == "cuda":
        pytest.skip("its kernels allocate nothing, and gradients are those of other backends")
    length, device = 2048, device_of(backend)
    torch.manual_seed(0)
    x = [torch.randn(1, 1, length, 8, device=device, requires_grad=True) for _ in range(6)]
    mask = torch.rand(1, 1, 1, length, device=device) > 0.2 if "mask" in options else None

    def job():
        with scm_kernels.backend(backend):
            out, t_out = attention_jvp(*x, attn_mask=mask, is_causal="is_causal" in options)
        (out.sum() + t_out.sum()).backward()

    assert peak_memory(job, device) < length * length * 4 / 3
