"""The error budget on itself: what is as good as eager passes, what is not fails."""

from __future__ import annotations

import pytest
import torch
from budget import SMALL, assert_within_budget

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rounded(dtype, n=4 * SMALL):
    """(truth, eager's result in the dtype): a product whose factors were rounded once."""
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=gen, dtype=torch.float64) for _ in range(2))
    x, y = x.to(dtype).double(), y.to(dtype).double()
    return x * y, (x * y).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [SMALL // 2, 4 * SMALL])
def test_eager_itself_and_a_little_noise_pass(dtype, n):
    truth, lo = rounded(dtype, n)
    noise = 1 + 0.5 * torch.finfo(dtype).eps * torch.randn(n, dtype=torch.float64).clamp(-2, 2)
    for actual in (lo, (truth * noise).to(dtype)):
        assert_within_budget(actual, truth, lo, magnitude=truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_error_everywhere_fails_by_the_mean(dtype):
    truth, lo = rounded(dtype)
    worse = truth + 3 * torch.finfo(dtype).eps * truth.abs().clamp(min=truth.abs().mean())
    with pytest.raises(AssertionError, match="mean error"):
        assert_within_budget(worse.to(dtype), truth, lo, magnitude=truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [SMALL // 2, 4 * SMALL])
def test_one_wrong_element_fails(dtype, n):
    truth, lo = rounded(dtype, n)
    actual = lo.clone()
    actual[7] += 16 * torch.finfo(dtype).eps * truth.abs().max()
    with pytest.raises(AssertionError, match=r"at \[7\]"):
        assert_within_budget(actual, truth, lo, magnitude=truth.abs().max())


def test_eager_that_happens_to_be_exact_is_no_reason_to_ask_for_the_same():
    truth = torch.full((8,), 0.5, dtype=torch.float64)
    lo = truth.float()
    eps = torch.finfo(torch.float32).eps
    assert_within_budget(lo + 3 * eps, truth, lo, magnitude=1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(lo + 6 * eps, truth, lo, magnitude=1.0)


def test_float64_is_held_to_rounding():
    truth, lo = rounded(torch.float64)
    assert_within_budget(lo, truth, lo, magnitude=1.0)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(lo + 1e-12, truth, lo, magnitude=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(value):
    truth, lo = rounded(torch.float32)
    actual = lo.clone()
    actual[3] = value
    with pytest.raises(AssertionError, match="1 not finite"):
        assert_within_budget(actual, truth, lo, magnitude=1.0)


def test_shape_and_dtype_are_part_of_it():
    truth, lo = rounded(torch.float32)
    with pytest.raises(AssertionError, match="not"):
        assert_within_budget(lo[:-1], truth, lo, magnitude=1.0)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(lo.double(), truth, lo, magnitude=1.0)
