"""The error budget: how far a kernel's output may be from the truth, as one function.

The truth is the same maths in float64 on the rounded inputs, `lo` the eager maths in the dtype:

    mean:       err(kernel) <= 2 err(lo) + 2 eps |truth|
    maximum:    err(kernel) <= 5 err(lo) + 2 eps |truth|

(a correct program exceeds twice the maximum in 2% of draws). Below 2,048 elements the mean has no
meaning, and the maximum has a floor of 4 eps times the magnitude of the summed terms: a draw in
which eager happens to be exact is no reason to ask for the same. So it is where the terms cancel
to nothing throughout (one key; keys that are all alike). float64 has no finer truth, so
there only a floor counts, of 64 eps: the truth itself is off by as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2048


def assert_within_budget(
    actual: Tensor,
    truth: Tensor,
    lo: Tensor,
    *,
    magnitude: float,
    dtype: torch.dtype | None = None,
    slack: float = 1.0,
    name: str = "output",
) -> None:
    """Fail with the numbers if `actual` is farther from `truth` than the budget allows.

    `magnitude` is that of the terms that are summed into an element, at least max |truth|. `dtype`
    is the problem's, where a result is wider than that (the gradient of a float32 mask). `slack`
    widens the budget for a search through thousands of draws, where the rarest one decides.
    """
    assert actual.shape == truth.shape == lo.shape, f"{name}: {actual.shape}, not {truth.shape}"
    assert actual.dtype == lo.dtype, f"{name}: dtype {actual.dtype}, not {lo.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} not finite"
    eps = torch.finfo(dtype or actual.dtype).eps
    error, lo_error = ((x.double() - truth).abs() for x in (actual, lo))
    most = slack * 5 * lo_error.max() + 2 * eps * truth.abs().max()
    if actual.dtype == torch.float64:
        most = torch.as_tensor(64 * eps * magnitude)
    elif actual.numel() < SMALL or truth.abs().max() < eps * magnitude:
        most = most.clamp(min=4 * eps * magnitude)
    else:
        mean = slack * 2 * lo_error.mean() + 2 * eps * truth.abs().mean()
        assert error.mean() <= mean, f"{name}: mean error {error.mean():.3e} > {mean:.3e}"
    where = tuple(torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= most, (
        f"{name}: error {error.max():.3e} > {most:.3e} at {[int(i) for i in where]}: "
        f"{actual[where].item():.6g}, truth {truth[where].item():.6g}"
    )
