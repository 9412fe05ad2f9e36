"""The presets: the four scalars, the normaliser and the weight of each relative of the sCM loss.

Every function takes and gives float64 tensors [B]. The derivation and s are in `reference.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scalars = tuple[Tensor, Tensor, Tensor, Tensor]


def _paper(t: Tensor, r: float | Tensor, sd: float) -> Scalars:
    """g = -cos^2 t (sd F - V) - r (cos t sin t X + sd J): arXiv 2410.11081, Algorithm 1."""
    cos = t.cos()
    front = cos * cos
    return -sd * front, front, -r * (cos * t.sin()), torch.full_like(t, -sd) * r


def _rcm(t: Tensor, r: float | Tensor, sd: float) -> Scalars:
    """g = -cos t sqrt(1 - r^2 sin^2 t) (sd F - V) - (r cos t sin t X + sd J): arXiv 2510.08431."""
    cos, sin = t.cos(), t.sin()
    # cos^2 + (1 - r^2) sin^2 is 1 - r^2 sin^2 without its cancellation near r = 1, t = pi/2.
    front = cos * (cos * cos + (1 - r * r) * sin * sin).sqrt()
    return -sd * front, front, -r * cos * sin, torch.full_like(t, -sd)


def _meanflow(t: Tensor, r: float | Tensor, sd: float) -> Scalars:
    """g = u_tgt - u = V - t J - F, t the interval: arXiv 2505.13447."""
    one = torch.ones_like(t)
    return -one, one, torch.zeros_like(t), -t


def _mean_weight(t: Tensor, squares: Tensor, size: int, sd: float, c: float) -> Tensor:
    return torch.full_like(t, 1 / size)


def _sana_weight(t: Tensor, squares: Tensor, size: int, sd: float, c: float) -> Tensor:
    return t.cos() / (size * sd * t.sin())  # 1 / (sd tan t), which has no pole at pi/2


def _rcm_weight(t: Tensor, squares: Tensor, size: int, sd: float, c: float) -> Tensor:
    return torch.full_like(t, 100.0)


def _meanflow_weight(t: Tensor, squares: Tensor, size: int, sd: float, c: float) -> Tensor:
    return 1 / (squares + c)


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table. `size` is D, the elements a sample."""

    scalars: Callable[[Tensor, float | Tensor, float], Scalars] = _paper  # (t, r, sd) -> a, b, k, d
    normalised: bool = True  # whether the target is s g, or g itself
    mean: bool = False  # s = 1 / (||g|| / sqrt(D) + c), not 1 / (||g|| + c)
    weight: Callable[..., Tensor] = (
        _mean_weight  # (t, ||g||^2, size, sd, c) -> p, the loss is exp(w) p ||.||^2 - w
    )
    c: float = 0.1
    nan_policy: str = "propagate"
    learned_weight: bool = True  # whether there is a w


PRESETS = {
    "paper": Preset(),
    "rms": Preset(mean=True),
    "sana": Preset(weight=_sana_weight),
    "rcm": Preset(scalars=_rcm, weight=_rcm_weight, nan_policy="zero", learned_weight=False),
    "meanflow": Preset(scalars=_meanflow, normalised=False, weight=_meanflow_weight, c=0.01),
}
