"""`normalized_tangent` and `consistency_loss`: the front door, its checks, and the scalars a sample.

Symbols and derivation in `reference.py`, the presets in `presets.py`, the ops in `library.py`.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scm_kernels import _backends, _checks
from scm_kernels.tangent.library import wide_dtype
from scm_kernels.tangent.presets import PRESETS, Preset

_ops = torch.ops.scm_kernels


def normalized_tangent(
    output: Tensor,
    dxdt: Tensor,
    x_t: Tensor,
    jvp: Tensor,
    t: Tensor,
    *,
    warmup: float | Tensor = 1.0,
    sigma_data: float = 0.5,
    c: float | None = None,
    preset: str = "paper",
    nan_policy: str | None = None,
) -> Tensor:
    """The sCM tangent g of each sample, normalised: g / (||g|| + c)  (arXiv 2410.11081, section 4.2, Algorithm 1).

        g = -cos^2 t (sd F - dx/dt) - r (cos t sin t x_t + sd J)

    It is a target: a constant, through which no gradient flows. `consistency_loss` uses it without storing it.

    Args:
        output: F [B, ...], the network at (x_t / sd, t); float16, bfloat16, float32 or float64, any strides.
        dxdt: dx_t/dt, like output: cos t z - sin t x0 (training) or sd F_teacher(x_t / sd, t) (distillation).
        x_t: Noisy data, like output.
        jvp: J, like output: the tangent of F along (cos t sin t dxdt / sd, cos t sin t), as
            `trigflow.tangent_inputs` and `scm_kernels.jvp` give it.
        t: Times [B] in radians, in [0, pi/2]; any floating dtype.
        warmup: r in [0, 1], the tangent warm-up min(1, step / 10000); a number, or a floating tensor of shape [] or
            [B], whose values are not checked (that would wait for the device).
        sigma_data: sd > 0, the standard deviation of the data.
        c: >= 0; None is 0.1. At c = 0 a sample with g = 0 is 0 / 0.
        preset: "paper", "rms" (||g|| / sqrt(D) for ||g||), "sana" (the same tangent as "paper") or "rcm"
            (g = -cos t sqrt(1 - r^2 sin^2 t) (sd F - dx/dt) - (r cos t sin t x_t + sd J)).
        nan_policy: "propagate", or "zero": a sample whose g or F has a NaN or an infinity becomes zeros. None is
            "propagate", for "rcm" "zero". Either way it never touches another sample.

    Returns:
        Tensor like output, in the memory order of output.

    Raises:
        TypeError: not a tensor, or a wrong dtype (dxdt, x_t, jvp must have output's).
        ValueError: a wrong shape or device, no elements a sample, an unknown name, a number out of its range, or the
            preset "meanflow", which has no normalised tangent.
        NotImplementedError: dual tensors (forward-mode AD), or a forced backend that does not take the input.
    """
    chosen = _preset(preset)
    if preset == "meanflow":
        others = ", ".join(repr(name) for name in PRESETS if name != preset)
        raise ValueError(
            f"preset: got 'meanflow', which has no normalised tangent, expected {others}"
        )
    inputs, order = _rows(output, dxdt, x_t, jvp)
    options = _options(chosen, output, t, warmup, sigma_data, c, nan_policy)
    coefficients, _, _ = _scalars(inputs, options)
    tangent = _ops.tangent_apply(*inputs, coefficients, options.backend)
    tangent = tangent.reshape(output.shape[:1] + tuple(output.shape[i] for i in order))
    return tangent.permute(0, *(1 + order.index(i) for i in range(1, output.ndim))).to(output.dtype)


def consistency_loss(
    output: Tensor,
    dxdt: Tensor,
    x_t: Tensor,
    jvp: Tensor,
    t: Tensor,
    log_weight: Tensor | None = None,
    *,
    warmup: float | Tensor = 1.0,
    sigma_data: float = 0.5,
    c: float | None = None,
    preset: str = "paper",
    nan_policy: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The sCM loss  L = exp(w) / D ||F - F^- - g / (||g|| + c)||^2 - w  (arXiv 2410.11081, Eq. 8, Algorithm 1).

    F^- is F with its gradient stopped, g the tangent of `normalized_tangent`, D the elements a sample. Gradients
    reach `output` and `log_weight` only. The value takes one read of the four inputs, the gradient one more pass;
    nothing is saved but the inputs and a few numbers a sample.

    | preset | differs from the above in |
    |---|---|
    | "paper" | |
    | "rms" | ||g|| / sqrt(D) in place of ||g|| |
    | "sana" | the loss, without w, times 1 / (sd tan t); infinite at t = 0 (arXiv 2503.09641) |
    | "rcm" | g as in `normalized_tangent`; 100 ||.||^2, a sum over D; no w (arXiv 2510.08431) |
    | "meanflow" | exp(w) q / (q + c) - w with q = ||F - sg(u_tgt)||^2, a sum over D, the denominator held constant, \
and u_tgt = dxdt - t jvp (arXiv 2505.13447, Eq. 10-11 and 22, p = 1) |

    Args:
        output: F [B, ...], the network at (x_t / sd, t); float16, bfloat16, float32 or float64, any strides.
            "meanflow": u.
        dxdt: dx_t/dt, like output. "meanflow": v.
        x_t: Noisy data, like output. "meanflow" does not use it: None will do.
        jvp: J, like output: the tangent of F along (cos t sin t dxdt / sd, cos t sin t). "meanflow": du/dt, the
            tangent of u along (v, 0, 1).
        t: Times [B] in radians, in [0, pi/2]; any floating dtype. "meanflow": the interval t - r.
        log_weight: w [B], any floating dtype, a learned function of t (-logvar of others); None is 0, and all that
            "rcm" takes.
        warmup: r in [0, 1], the tangent warm-up min(1, step / 10000); a number, or a floating tensor of shape [] or
            [B], whose values are not checked. "meanflow" has none: 1.
        sigma_data: sd > 0, the standard deviation of the data. "meanflow" does not use it.
        c: >= 0; None is 0.1, for "meanflow" 0.01. At c = 0 a sample with g = 0 is 0 / 0.
        preset: A row of the table.
        nan_policy: "propagate", or "zero": a sample whose g or F has a NaN or an infinity gives 0 to the loss and
            no gradient, to log_weight neither, and still counts in the mean. None is "propagate", for "rcm" "zero".
            Either way it never touches another sample.
        reduction: "mean" over samples (NaN for B = 0), or "none".

    Returns:
        The loss: a scalar, or [B] for "none"; float32, float64 for a float64 output.

    Raises:
        TypeError: not a tensor, or a wrong dtype (dxdt, x_t, jvp must have output's).
        ValueError: a wrong shape or device, no elements a sample, an unknown name, a number out of its range, or an
            argument that the preset does not have.
        NotImplementedError: dual tensors (forward-mode AD), or a forced backend that does not take the input.
    """
    chosen = _preset(preset)
    # meanflow has no term in x_t: dxdt in its place is read from cache, times zero.
    inputs, _ = _rows(output, dxdt, dxdt if preset == "meanflow" else x_t, jvp)
    options = _options(chosen, output, t, warmup, sigma_data, c, nan_policy)
    _check_loss(preset, output, log_weight, warmup, reduction)
    coefficients, squares, weight = _scalars(inputs, options)
    loss = weight * _ops.tangent_distance(*inputs, coefficients, squares, options.backend)
    if log_weight is not None:
        w = torch.where(coefficients.eq(0).all(1), 0.0, log_weight.to(weight.dtype))
        loss = loss * w.exp() - w
    loss = loss.mean() if reduction == "mean" else loss
    return loss.to(torch.promote_types(output.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class _Options:
    """What a call asks for, checked and with the preset's own values filled in."""

    preset: Preset
    t: Tensor
    warmup: float | Tensor
    sigma_data: float
    c: float
    zero: bool
    backend: str


@torch.no_grad()
def _scalars(inputs: tuple[Tensor, ...], options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample: s (a, b, k, d) [B, 4], (s n)^2 [B], and p [B]; all zero where nan_policy leaves it out."""
    preset, sd, c = options.preset, options.sigma_data, options.c
    size = inputs[0].shape[1]
    t = options.t.to(wide_dtype(options.t))
    r = options.warmup
    r = r.to(t.dtype) if isinstance(r, Tensor) else r
    coefficients = torch.stack(preset.scalars(t, r, sd), dim=1)
    squares = _ops.tangent_norm(*inputs, coefficients, options.backend)
    scale = preset.scale(squares, size, c)
    weight = preset.weight(t, squares, size, sd, c)
    scaled = scale.unsqueeze(1) * coefficients, scale * scale * squares, weight
    if not options.zero:
        return scaled
    left_out = ~squares.isfinite()
    return tuple(x.masked_fill(left_out.view(-1, *[1] * (x.ndim - 1)), 0.0) for x in scaled)


# --- arguments ------------------------------------------------------------------------------------


def _preset(name: object) -> Preset:
    _one_of("preset", name, PRESETS)
    return PRESETS[name]


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")


def _rows(output, dxdt, x_t, jvp) -> tuple[tuple[Tensor, ...], list[int]]:
    """The four inputs, checked, as [B, D] in the memory order of output, and that order of its dimensions."""
    tensors = {"output": output, "dxdt": dxdt, "x_t": x_t, "jvp": jvp}
    for name, x in tensors.items():
        _checks.tensor(name, x)
    if torch.is_autocast_enabled(output.device.type):
        # As PyTorch's own ops of several inputs do under autocast: the widest dtype.
        wide = functools.reduce(torch.promote_types, (x.dtype for x in tensors.values()))
        tensors = {name: x.to(wide) for name, x in tensors.items()}
    for name, x in tensors.items():
        _checks.like(name, x, "output", tensors["output"])
    if output.ndim < 1 or math.prod(output.shape[1:]) == 0:
        raise ValueError(
            f"output: got {_checks.describe(output)}, expected [B, ...] with an element or more a sample"
        )
    order = _memory_order(output)
    shape = (output.shape[0], math.prod(output.shape[1:]))
    return tuple(x.permute(0, *order).reshape(shape) for x in tensors.values()), order


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of x after the first, outermost in memory first.

    By hand, because `sorted` stops torch.compile where strides are symbolic.
    """
    order = []
    for i in range(1, x.ndim):
        order.insert(len([j for j in order if x.stride(j) >= x.stride(i)]), i)
    return order


def _options(preset, output, t, warmup, sigma_data, c, nan_policy) -> _Options:
    _check_scalar("t", t, output)
    if isinstance(warmup, Tensor):
        _checks.tensor("warmup", warmup)
        if warmup.ndim > 0:
            _check_scalar("warmup", warmup, output)
    else:
        _checks.number("warmup", warmup, low=0.0, high=1.0)
    _checks.number("sigma_data", sigma_data, above=0.0)
    c = preset.c if c is None else c
    _checks.number("c", c, low=0.0)
    nan_policy = preset.nan_policy if nan_policy is None else nan_policy
    _one_of("nan_policy", nan_policy, ("propagate", "zero"))
    zero = nan_policy == "zero"
    return _Options(preset, t, warmup, sigma_data, c, zero, _backends.requested())


def _check_loss(preset, output, log_weight, warmup, reduction) -> None:
    if log_weight is not None:
        if not PRESETS[preset].learned_weight:
            raise ValueError(
                f"log_weight: got one for preset {preset!r}, which has none, expected None"
            )
        _check_scalar("log_weight", log_weight, output)
    if preset == "meanflow" and (isinstance(warmup, Tensor) or warmup != 1):
        raise ValueError(
            f"warmup: got {warmup!r} for preset 'meanflow', which has none, expected 1.0"
        )
    _one_of("reduction", reduction, ("mean", "none"))


def _check_scalar(name: str, value: object, output: Tensor) -> None:
    """`value` must be floating point, one number a sample of output."""
    _checks.tensor(name, value)
    if value.shape != output.shape[:1]:
        raise ValueError(
            f"{name}: got {_checks.describe(value)}, expected one value a sample, shape {list(output.shape[:1])}"
        )
    if value.device != output.device:
        raise ValueError(
            f"{name}: got {_checks.describe(value)}, expected output's device, {output.device}"
        )
