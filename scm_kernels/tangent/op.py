"""`normalized_tangent` and `consistency_loss`: the front door, its checks, the scalars of a sample.

Symbols and derivation are in `reference.py`, the presets in `presets.py`, the ops in `library.py`.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scm_kernels import _backends, _checks, _plans
from scm_kernels._duals import level_is_open
from scm_kernels.tangent import library
from scm_kernels.tangent.presets import PRESETS

_calls = _plans.Plans()  # kinds of calls that passed the checks, and whose tensors need views alone


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
    """The tangent g of each sample, normalised: g / (||g|| + c), with one norm a sample.

        g = -cos^2 t (sd F - dx/dt) - r (cos t sin t x_t + sd J)

    It is a target, so a constant: no gradient flows through it. `consistency_loss` uses it without
    ever storing it.

    Args:
        output: F [B, ...], the network at (x_t / sd, t), with an element or more a sample; float16,
            bfloat16, float32 or float64; any strides.
        dxdt: dx_t/dt, like output: `trigflow.velocity` in consistency training,
            sd F_teacher(x_t / sd, t) in distillation.
        x_t: The noisy data, like output.
        jvp: J, like output: the tangent of F along (cos t sin t dxdt / sd, cos t sin t), as
            `trigflow.tangent_inputs` and `scm_kernels.jvp` give it.
        t: Times [B] in radians, in [0, pi/2], which is not checked; any floating dtype.
        warmup: r in [0, 1], the paper's min(1, step / 10000); a number, or a floating tensor of
            shape [] or [B], whose values are not checked (that would wait for the device).
        sigma_data: sd > 0, the standard deviation of the data.
        c: At least 0; None is 0.1. Where c = 0, a sample with g = 0 is 0 / 0, also under "zero".
        preset: "paper" or "sana", as above; "rms", which has ||g|| / sqrt(D) for ||g||, D the
            elements a sample; "rcm", which has
            g = -cos t sqrt(1 - r^2 sin^2 t) (sd F - dx/dt) - (r cos t sin t x_t + sd J).
        nan_policy: "propagate": a sample whose g or F has a NaN or an infinity, or a ||g||^2 beyond
            float64, becomes NaN; "zero": it becomes zeros; None: "zero" for "rcm", else
            "propagate". No other sample is touched.

    Returns:
        A tensor like output, each sample in output's order of memory. Where autocast is on, the
        four inputs may differ in dtype, and are taken in the widest.

    Raises:
        TypeError: an argument of a wrong type, or a tensor of a wrong dtype.
        ValueError: a wrong shape or device, an unknown name, a number out of its range, or the
            preset "meanflow", which has no normalised tangent.
        NotImplementedError: a dual tensor (its tangent would be lost), or a forced backend that
            does not take these inputs.

    Source: Lu & Song, arXiv 2410.11081, sections 4.2, 5.1, Algorithm 1; "rcm": arXiv 2510.08431.
    """
    tensors = output, dxdt, x_t, jvp, t, warmup if isinstance(warmup, Tensor) else None
    kind = _kind(tensors, ("", preset, sigma_data, c, nan_policy))
    call = None if kind is None else _calls[kind]
    if call is not None:
        return call.normalize(*tensors, _rate(warmup))
    _one_of("preset", preset, PRESETS)
    if preset == "meanflow":
        others = ", ".join(repr(name) for name in PRESETS if name != preset)
        raise ValueError(
            f"preset: got 'meanflow', which has no normalised tangent, expected one of {others}"
        )
    inputs, order = _rows(output, dxdt, x_t, jvp)
    options = _options(preset, output, t, warmup, sigma_data, c, nan_policy)
    tangent = library.tangent_normalize(
        *inputs, options.t, options.warmup, *options.numbers, options.backend
    )
    _remember(kind, tensors, options)
    # Detached, or it would be a view, which not everything may be written to.
    return _from_rows(tangent, output.shape, order).to(output.dtype).detach()


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
    """The sCM loss: L = exp(w) / D ||F - F^- - G||^2 - w a sample, with G the normalised tangent.

    F^- is F with its gradient stopped, so ||F - F^- - G||^2 is ||G||^2 in value, and a regression
    of F to the constant F^- + G in its gradient, which reaches `output` and `log_weight` only. The
    value takes one read of the four inputs and the gradient one more; nothing is saved but the
    inputs and a few numbers a sample. D is the number of elements a sample; ||.||^2 sums over them.

    =========== =================================================================================
    preset      what differs
    =========== =================================================================================
    "paper"     nothing
    "rms"       G as in `normalized_tangent`
    "sana"      exp(w) / (D sd tan t) for exp(w) / D (arXiv 2503.09641); infinite at t = 0
    "rcm"       100 ||F - F^- - G||^2, no w; G as in `normalized_tangent` (arXiv 2510.08431)
    "meanflow"  F - F^- - G is delta = u - stop(u_tgt), u_tgt = v - (t - r) du/dt, and the loss is
                exp(w) p ||delta||^2 - w, p = 1 / (||delta||^2 + c) held constant (arXiv 2505.13447,
                whose code sums ||.||^2 over the elements too)
    =========== =================================================================================

    Args:
        output: F [B, ...], the network at (x_t / sd, t), with an element or more a sample; float16,
            bfloat16, float32 or float64; any strides. "meanflow": u.
        dxdt: dx_t/dt, like output: `trigflow.velocity` in consistency training,
            sd F_teacher(x_t / sd, t) in distillation. "meanflow": v.
        x_t: The noisy data, like output. "meanflow" does not use it: None will do.
        jvp: J, like output: the tangent of F along (cos t sin t dxdt / sd, cos t sin t), as
            `trigflow.tangent_inputs` and `scm_kernels.jvp` give it. "meanflow": du/dt, the tangent
            of u along (v, 0, 1).
        t: Times [B] in radians, in [0, pi/2], which is not checked; any floating dtype. "meanflow":
            the interval t - r.
        log_weight: w [B], learned as a function of t (minus the logvar of others); any floating
            dtype. None is 0, and all that "rcm" takes.
        warmup: r in [0, 1], the paper's min(1, step / 10000); a number, or a floating tensor of
            shape [] or [B], whose values are not checked (that would wait for the device).
            "meanflow": 1, it has none.
        sigma_data: sd > 0, the standard deviation of the data. "meanflow" does not use it.
        c: At least 0; None is 0.1, for "meanflow" 0.01. Where c = 0, a sample with g = 0 is 0 / 0,
            also under "zero".
        preset: A row of the table.
        nan_policy: "propagate": a sample whose g or F has a NaN or an infinity, or a ||g||^2 beyond
            float64, has the loss NaN; "zero": it gives 0 to the loss, no gradient to output or
            log_weight, and still counts in the mean; None: "zero" for "rcm", else "propagate". No
            other sample is touched.
        reduction: "mean" over samples (NaN if B = 0), or "none".

    Returns:
        The loss, a scalar, or [B] for "none"; float32, or float64 if output is. Where autocast is
        on, the four inputs may differ in dtype, and output is taken in the widest, too.

    Raises:
        TypeError: an argument of a wrong type, or a tensor of a wrong dtype.
        ValueError: a wrong shape or device, an unknown name, a number out of its range, or an
            argument that the preset does not have.
        NotImplementedError: a dual tensor other than log_weight (its tangent would be lost), or a
            forced backend that does not take these inputs.

    Source: Lu & Song, arXiv 2410.11081, Eq. 8 and Algorithm 1.
    """
    _one_of("preset", preset, PRESETS)
    only = None  # what warmup has to be
    if preset == "meanflow":
        # It has no term in x_t: dxdt in its place is read from cache, times zero.
        x_t, only = dxdt, warmup
    tensors = output, dxdt, x_t, jvp, t, warmup if isinstance(warmup, Tensor) else None, log_weight
    kind = _kind(tensors, (reduction, preset, sigma_data, c, nan_policy, only))
    call = None if kind is None else _calls[kind]
    if call is not None:
        loss = call.loss(*tensors, _rate(warmup))
        return loss.mean() if reduction == "mean" else loss
    inputs, _ = _rows(output, dxdt, x_t, jvp)
    options = _options(preset, output, t, warmup, sigma_data, c, nan_policy)
    _check_loss(preset, output, log_weight, warmup, reduction)
    w = None if log_weight is None else _number(log_weight)
    loss = _losses(inputs, options, w)
    if w is log_weight:
        _remember(kind, tensors, options)
    return loss.mean() if reduction == "mean" else loss


def _losses(inputs: tuple[Tensor, ...], options: "_Options", w: Tensor | None) -> Tensor:
    """The loss of each sample."""
    times = options.t, options.warmup
    if not level_is_open():
        arguments = *inputs, *times, w, *options.numbers, options.backend
        return library.tangent_loss(*arguments)[0]
    # Where w may have a tangent: all that it takes part in by PyTorch.
    loss, *rest = library.tangent_loss(*inputs, *times, None, *options.numbers, options.backend)
    coefficients, distances, weights = rest
    q = library.tangent_distance(*inputs, coefficients, distances, options.backend)
    if w is None:
        w = torch.zeros_like(weights)
    w = w.to(weights.dtype).masked_fill(weights == 0, 0.0)
    return (w.exp() * (weights * q) - w).to(loss.dtype)


@dataclass(frozen=True, slots=True)
class _Options:
    """What a call asks for, checked and with the preset's own values filled in."""

    t: Tensor  # [B], float32 or float64
    warmup: Tensor | None  # the same
    numbers: tuple  # r (for all samples, where there is no warmup), sigma_data, c, preset, zero
    backend: str


# --- calls like others ----------------------------------------------------------------------------


def _kind(tensors: tuple, options: tuple) -> tuple | None:
    """What a call has in common with those that may go where it went; None where it is to be looked
    at from the start. A number for all samples is no part of it: r is another at each step.
    """
    if level_is_open() or torch._C._is_any_autocast_enabled():
        return None
    return _backends.kind_of_call(tensors, options)


def _rate(warmup: object) -> float:
    """r for all samples, 1 where `warmup` is a tensor."""
    if isinstance(warmup, Tensor):
        return 1.0
    return _checks.number("warmup", warmup, low=0.0, high=1.0)


def _remember(kind: tuple | None, tensors: tuple, options: "_Options") -> None:
    """Calls of a kind that has passed the checks, if views make rows of its inputs."""
    output, t, warmup = tensors[0], tensors[4], tensors[5]
    if kind is None or options.t is not t or options.warmup is not warmup or output.numel() == 0:
        return
    if all(x.is_contiguous() for x in tensors[:4]):
        _calls[kind] = library.Call(output.shape, *options.numbers[1:], options.backend)


# --- arguments ------------------------------------------------------------------------------------


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")


def _rows(output, dxdt, x_t, jvp) -> tuple[tuple[Tensor, ...], list[int] | None]:
    """The four inputs, checked, as [B, D] in output's order of memory, and that order, None where
    it is the ordinary one.
    """
    tensors = {"output": output, "dxdt": dxdt, "x_t": x_t, "jvp": jvp}
    for name, x in tensors.items():
        _checks.dense(name, x)
        _checks.tensor(name, x)
    if output.ndim < 1 or math.prod(output.shape[1:]) == 0:
        raise ValueError(
            f"output: got {_checks.describe(output)}, expected [B, ...] with an element or more "
            "a sample"
        )
    if _checks.under_autocast(output):
        # As PyTorch's own ops of several inputs do under autocast: the widest dtype.
        wide = functools.reduce(torch.promote_types, (x.dtype for x in tensors.values()))
        tensors = {name: x.to(wide) for name, x in tensors.items()}
    for name, x in tensors.items():
        _checks.like(name, x, "output", tensors["output"])
    order, inputs = _memory_order(output), tensors.values()
    if order is not None:
        inputs = (x.permute(0, *order) for x in inputs)
    if output.ndim != 2:
        shape = (output.shape[0], math.prod(output.shape[1:]))
        inputs = (x.reshape(shape) for x in inputs)
    return tuple(inputs), order


def _from_rows(x: Tensor, shape: torch.Size, order: list[int] | None) -> Tensor:
    """x [B, D], whose elements are in this order of memory, in the shape that they had."""
    if order is None:
        return x.reshape(shape)
    x = x.reshape(shape[:1] + tuple(shape[i] for i in order))
    return x.permute(0, *(1 + order.index(i) for i in range(1, len(shape))))


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of x after the first, outermost in memory first; None where they are so.

    By hand, because `sorted` stops torch.compile where strides are symbolic.
    """
    if x.is_contiguous():
        return None
    order = []
    for i in range(1, x.ndim):
        order.insert(len([j for j in order if x.stride(j) >= x.stride(i)]), i)
    return order


def _options(name, output, t, warmup, sigma_data, c, nan_policy) -> _Options:
    _check_scalar("t", t, output)
    r, wide = 1.0, _checks.wide_dtype(t)
    if isinstance(warmup, Tensor):
        _checks.dense("warmup", warmup)
        _checks.tensor("warmup", warmup)
        if warmup.ndim > 0:
            _check_scalar("warmup", warmup, output)
        elif warmup.device.type != "cpu" and warmup.device != output.device:
            raise ValueError(
                f"warmup: got {_checks.describe(warmup)}, expected output's device, "
                f"{output.device}, or the CPU"
            )
        if warmup.ndim == 0:
            # A product, since a copy from the CPU would wait for the device.
            same = warmup.device == t.device
            warmup = warmup.expand_as(t) if same else warmup * torch.ones_like(t, dtype=wide)
        warmup = _number(warmup)
    else:
        r, warmup = _checks.number("warmup", warmup, low=0.0, high=1.0), None
        if torch.compiler.is_compiling():  # no graph for each value of a number that moves
            r, warmup = 1.0, r * torch.ones_like(t, dtype=wide)
    sigma_data = _checks.number("sigma_data", sigma_data, above=0.0)
    preset = PRESETS[name]
    c = _checks.number("c", preset.c if c is None else c, low=0.0)
    nan_policy = preset.nan_policy if nan_policy is None else nan_policy
    _one_of("nan_policy", nan_policy, ("propagate", "zero"))
    backend = _backends.requested()
    numbers = r, sigma_data, c, name, nan_policy == "zero"
    return _Options(_number(t), warmup, numbers, backend)


def _number(x: Tensor) -> Tensor:
    """In a dtype that the ops take."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check_loss(preset, output, log_weight, warmup, reduction) -> None:
    if log_weight is not None:
        if not PRESETS[preset].learned_weight:
            raise ValueError(
                f"log_weight: got {_checks.describe(log_weight)}, expected None: preset {preset!r} "
                "has no learned weight"
            )
        _check_scalar("log_weight", log_weight, output)
    if preset == "meanflow" and (isinstance(warmup, Tensor) or warmup != 1):
        raise ValueError(
            f"warmup: got {_checks.describe(warmup)}, expected 1.0: preset {preset!r} has none"
        )
    _one_of("reduction", reduction, ("mean", "none"))


def _check_scalar(name: str, value: object, output: Tensor) -> None:
    """`value` must be floating point, one number a sample of output."""
    _checks.dense(name, value)
    _checks.tensor(name, value)
    if value.shape != output.shape[:1]:
        raise ValueError(
            f"{name}: got {_checks.describe(value)}, expected one value a sample, shape "
            f"{list(output.shape[:1])}"
        )
    if value.device != output.device:
        raise ValueError(
            f"{name}: got {_checks.describe(value)}, expected output's device, {output.device}"
        )
