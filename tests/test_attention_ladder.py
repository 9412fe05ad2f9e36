"""The correctness ladder of attention, each rung against the one above, all in float64:

PyTorch's own function -> eager maths -> `reference.dense` -> the tiled recurrence, whose tiles are
forced to be small and not to divide the lengths.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, NAMES, Case, draw
from attention_truth import eager, eager_jvp, evaluate
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels
from scm_kernels import attention_jvp
from scm_kernels.attention import reference

EXACT = {"rtol": 1e-11, "atol": 1e-11}
TILES = [(1, 1), (3, 5), (4, 8), (16, 7), (64, 2)]

# One of each kind; dtypes and head dimensions make no difference to float64.
LADDER = [
    replace(case, dtype=torch.float64, mask_dtype=None)
    for case in CASES
    if case.dtype == torch.float32 and case.d <= 8 and case.m * case.n <= 4000
]
# The first tile masked for some rows and not for others, and every way to fix the shift c.
UNEVEN = [
    Case("uneven_late", torch.float64, mask="late", m=10, n=26),
    Case("uneven_late_shared", torch.float64, mask="late", m=10, n=26, shared=30.0),
    Case("uneven_late_gqa", torch.float64, mask="late", m=10, n=26, h=6, hk=2),
    Case("uneven_late_b1", torch.float64, mask="late", mask_shape="11mn", m=10, n=26),
    Case("uneven_inf", torch.float64, mask="inf", t_mask=True, m=10, n=26),
    Case("uneven_dead_gqa", torch.float64, mask="dead", h=4, hk=2, m=10, n=26),
    Case("uneven_causal", torch.float64, causal=True, m=26, n=10, shared=30.0),
    Case("uneven_causal_gqa", torch.float64, causal=True, m=10, n=26, h=4, hk=2),
    Case("uneven_bias_m1", torch.float64, mask="bias", mask_shape="bhm1", t_mask=True),
    Case("uneven_values_alone", torch.float64, mask="late", tangents="v", m=10, n=26),
    Case("uneven_sharp", torch.float64, mask="late", logits=30.0, m=10, n=26),
]


def close(actual: dict, truth: dict) -> None:
    for name, x in truth.items():
        torch.testing.assert_close(
            actual[name], x, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", [c for c in LADDER if c.b * c.h > 0], ids=str)
def test_eager_is_pytorchs_own(case):
    inputs = draw(case)
    q, k, v, mask = (inputs[NAMES[i]] for i in (0, 1, 2, 6))
    options = case.options()
    with sdpa_kernel(SDPBackend.MATH):
        stock = F.scaled_dot_product_attention(q, k, v, mask, **options)
    out = eager(q, k, v, mask, causal=case.causal, scale=case.scale)
    # A row without a key is 0 in both.
    torch.testing.assert_close(out, stock, **EXACT)


def dense(case: Case, inputs) -> tuple:
    """`reference.dense`, which takes masks with four dimensions."""
    values = [inputs[name] for name in NAMES]
    masks = [None if x is None else x[(None,) * (4 - x.ndim)] for x in values[6:]]
    scale = 1 / math.sqrt(case.d) if case.scale is None else case.scale
    return reference.dense(*values[:6], *masks, causal=case.causal, scale=scale)


@pytest.mark.parametrize("case", LADDER + UNEVEN, ids=str)
def test_closed_formula_is_eager(case):
    inputs = draw(case)
    truth = evaluate(lambda x: eager_jvp(case, x), inputs, "both")
    close(evaluate(lambda x: dense(case, x), inputs, "both"), truth)


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_closed_formula_has_right_second_derivatives(case):
    case = replace(case, b=1, m=3, n=5, d=2)
    inputs = draw(case)
    floats = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}

    def gradients(function):
        leaves = {name: x.detach().requires_grad_() for name, x in floats.items()}
        loss = sum(y.square().sum() for y in function(case, inputs | leaves)[:2])
        first = torch.autograd.grad(
            loss, [*leaves.values()], create_graph=True, materialize_grads=True
        )
        loss = sum(g.square().sum() for g in first)
        return torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True)

    actual, truth = gradients(dense), gradients(eager_jvp)
    largest = max(float(x.abs().max()) for x in truth)  # a mask shared by a row's keys has none
    for name, x, y in zip(floats, actual, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11 * largest, msg=name)


def tiled(case: Case, x) -> tuple:
    with scm_kernels.backend("reference"):
        masks = {name: x[name] for name in NAMES[6:]}
        return attention_jvp(*(x[name] for name in NAMES[:6]), **masks, **case.options())


@pytest.mark.parametrize("case", LADDER, ids=str)
def test_tiled_recurrence_is_the_closed_formula(case, monkeypatch):
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: (5, 6))
    inputs = draw(case)
    truth = evaluate(lambda x: dense(case, x), inputs, "both")
    close(evaluate(lambda x: tiled(case, x), inputs, "both"), truth)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("case", UNEVEN, ids=str)
@pytest.mark.parametrize("through", ["out", "t_out", "both"])
def test_tiles_of_any_size(case, tiles, through, monkeypatch):
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: tiles)
    inputs = draw(case)
    truth = evaluate(lambda x: dense(case, x), inputs, through)
    close(evaluate(lambda x: tiled(case, x), inputs, through), truth)


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_statistics_do_not_depend_on_the_tiles(case, monkeypatch):
    inputs = draw(case)
    *_, lse, mu = dense(case, inputs)
    for tiles in TILES:
        monkeypatch.setattr(reference, "reference_tiles", lambda *_, tiles=tiles: tiles)
        masks = {name: inputs[name] for name in NAMES[6:]}
        tensors = [inputs[name] for name in NAMES[:6]]
        with scm_kernels.backend("reference"):
            actual = attention_jvp(*tensors, **masks, **case.options(), return_stats=True)
        torch.testing.assert_close(actual[2:], (lse, mu), **EXACT)


def test_the_shift_is_fixed_by_live_keys_alone(monkeypatch):
    """In float32, where it shows: the first keys are masked and their T is huge."""
    monkeypatch.setattr(reference, "reference_tiles", lambda *_: (8, 16))
    case = Case("shift_live", m=8, n=48, d=8, mask="late")
    inputs = draw(case)
    inputs["t_key"][:, :, :24] *= 1e6  # only odd rows may see these
    inputs["attn_mask"][:, :, :, :24] = False
    tensors = [inputs[name] for name in NAMES[:6]]
    with scm_kernels.backend("reference"):
        _, t_out = attention_jvp(*tensors, attn_mask=inputs["attn_mask"])
    wide = {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()
    }
    truth = eager_jvp(case, wide)[1]
    torch.testing.assert_close(t_out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "m", "n"), [(1, 1, 1), (0, 5, 7), (16, 4096, 4096), (9, 3, 1)])
def test_tiles_of_the_reference_are_within_bounds(heads, m, n):
    block_m, block_n = reference.reference_tiles(heads, m, n)
    assert 1 <= block_m <= max(m, 1)
    assert 1 <= block_n <= max(n, 1)
    assert heads * block_m * block_n <= max(2**22, heads * 64 * 64)
