"""Whether a provider's values are right: no speed is given to wrong ones.

The error budget of the tests: with the truth in float64 on the inputs as they are rounded, and `lo`
the eager mathematics in the dtype itself,

    mean:       err <= 2 err(lo) + 2 eps |truth|
    maximum:    err <= 5 err(lo) + 2 eps |truth|

and below 2,048 elements, where a mean says nothing, 4 eps |truth| at least for the maximum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 2048


def verdict(actual: Tensor, truth: Tensor, lo: Tensor) -> str | None:
    """Why `actual` is outside of the budget; None if it is within."""
    if actual.shape != truth.shape:
        return f"shape {list(actual.shape)}, not {list(truth.shape)}"
    if not torch.isfinite(actual).all():
        return f"{int((~torch.isfinite(actual)).sum())} values are not finite"
    eps, size = torch.finfo(actual.dtype).eps, truth.abs()
    error, lo_error = ((x.double() - truth).abs() for x in (actual, lo))
    most = 5 * lo_error.max() + 2 * eps * size.max()
    if actual.numel() < SMALL:
        most = most.clamp(min=4 * eps * size.max())
    elif error.mean() > (mean := 2 * lo_error.mean() + 2 * eps * size.mean()):
        return f"mean error {error.mean():.1e}, above the budget of {mean:.1e}"
    if error.max() > most:
        return f"error {error.max():.1e}, above the budget of {most:.1e}"
    return None


def verdict_of_all(names: Sequence[str], actual, truth, lo) -> str | None:
    """The first reason among several outputs, with the name of its output."""
    for name, *values in zip(names, actual, truth, lo, strict=True):
        reason = "no value" if values[0] is None else verdict(*values)
        if reason is not None:
            return f"wrong {name}: {reason}"
    return None
