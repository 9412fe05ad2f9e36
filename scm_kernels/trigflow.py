"""TrigFlow: the diffusion process, its time proposal, its samplers (arXiv 2410.11081, section 3).

Symbols: sd = sigma_data, the standard deviation of the data; z ~ N(0, sd^2 I); F the network.

    x_t = cos t x0 + sin t z            dx_t/dt = cos t z - sin t x0         t in [0, pi/2], radians
    PF-ODE: dx/dt = sd F(x / sd, t)     f(x, t) = cos t x - sd sin t F(x / sd, t)

Everything here is plain, differentiable PyTorch. Trigonometry is done in float64, sums in float32
(float64 for float64), and a result has the dtype of the tensors given.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scm_kernels import _checks

Network = Callable[[Tensor, Tensor], Tensor]

SIGMA_MAX = (
    80.0  # t_max = arctan(SIGMA_MAX / sd), the largest noise level of EDM (arXiv 2206.00364)
)
T_MAX = math.pi / 2 + 1e-5  # the largest time that is accepted: pi/2, however a user has rounded it


def sample_time(
    n: int,
    *,
    p_mean: float,
    p_std: float,
    sigma_data: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw n training times: t = arctan(exp(tau) / sd), tau ~ N(p_mean, p_std^2).

    The proposal of arXiv 2410.11081, Algorithm 1; exp(tau) = sd tan t is the noise level.

    Args:
        n: How many, >= 0.
        p_mean: Mean of tau. CIFAR-10 and ImageNet-64 -1.0, ImageNet-512 -0.8.
        p_std: Standard deviation of tau, >= 0. CIFAR-10 1.4, ImageNet 1.6.
        sigma_data: sd, > 0.
        generator: Source of randomness, of the device's kind.
        device: Where t lies; None is PyTorch's default.

    Returns:
        t [n] float32, in radians, in [0, pi/2] as float32 rounds it.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: PyTorch has no such device, or the generator is of another kind.
    """
    n = _checks.integer("n", n, low=0)
    p_mean = _checks.number("p_mean", p_mean)
    p_std = _checks.number("p_std", p_std, low=0.0)
    sigma_data = _checks.number("sigma_data", sigma_data, above=0.0)
    _generator(generator)
    if device is not None and not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device: got {_checks.describe(device)}, expected a device or its name")
    z = torch.randn(n, generator=generator, device=device, dtype=torch.float32)
    tau = p_mean + p_std * z.to(_checks.wide_dtype(z))
    return (tau.exp() / sigma_data).atan().float()


def interpolate(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t z.

    Args:
        x0: Data [B, ...], floating point.
        z: Noise, N(0, sd^2 I), like x0.
        t: Times [B] in radians, any floating dtype.

    Returns:
        x_t, like x0.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.

    Source: Lu & Song, arXiv 2410.11081, section 3.
    """
    cos, sin = _cos_sin(x0, "x0", t, z=z)
    return _sum(cos, x0, sin, z)


def velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = cos t z - sin t x0: the diffusion target v_t, and dxdt of consistency training.

    Arguments, result, errors and source are those of `interpolate`.
    """
    cos, sin = _cos_sin(x0, "x0", t, z=z)
    return _sum(cos, z, -sin, x0)


def tangent_inputs(
    x_t: Tensor, dxdt: Tensor, t: Tensor, *, sigma_data: float = 0.5
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Primals and tangents of the network for `scm_kernels.jvp`.

        ((x_t / sd, t), (cos t sin t dxdt / sd, cos t sin t))

    Multiplying the tangent by cos t sin t before the network is the paper's rearrangement of the
    JVP (arXiv 2410.11081, section 5.1): tangents stay small enough for half precision. The tangent
    of the network's output is then J = cos t sin t dF/dt, the `jvp` that `normalized_tangent` and
    `consistency_loss` take.

    Args:
        x_t: Noisy data [B, ...], floating point.
        dxdt: dx_t/dt, like x_t: `velocity(x0, z, t)` in consistency training,
            sd F_teacher(x_t / sd, t) in distillation.
        t: Times [B] in radians, any floating dtype.
        sigma_data: sd, > 0.

    Returns:
        Two pairs; each tangent has the shape and dtype of its primal. Where autocast is on, dxdt
        may be of another dtype than x_t.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or sigma_data.
    """
    sigma_data = _checks.number("sigma_data", sigma_data, above=0.0)
    _floating("x_t", x_t)
    _checks.dense("dxdt", dxdt)
    _checks.tensor("dxdt", dxdt)
    if _checks.under_autocast(x_t):  # a teacher's output is in the low precision
        dxdt = dxdt.to(x_t.dtype)
    cos, sin = _cos_sin(x_t, "x_t", t, dxdt=dxdt)
    rate = cos * sin
    tangent = ((rate / sigma_data).to(_sum_dtype(x_t)) * dxdt).to(x_t.dtype)
    return (x_t / sigma_data, t), (tangent, rate.reshape(t.shape).to(t.dtype))


def sample(
    network: Network,
    noise: Tensor,
    times: Sequence[float],
    *,
    sigma_data: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Few-step sampling with the consistency function f (arXiv 2410.11081, section 3).

        at times[0]:            x = noise,                                 x0 = f(x, t)
        at each further time:   x = cos t x0 + sin t z, z fresh noise;     x0 = f(x, t)

    One network evaluation a time. The paper's two steps are times = (arctan(80 / sd), 1.1).
    Gradients flow through every step: call it under `torch.no_grad()` to sample only.

    Args:
        network: (x / sd, t) -> F, like x; x / sd [B, ...] in noise's dtype, t [B] in float32
            (float64 for float64).
        noise: x at times[0] [B, ...], drawn from N(0, sd^2 I).
        times: Decreasing times in (0, pi/2], radians; at least one.
        sigma_data: sd, > 0.
        generator: Source of the fresh noise, of the device's kind.

    Returns:
        x0, like noise.

    Raises:
        TypeError, ValueError: a wrong type, an empty or not decreasing `times`, or a network that
            returns no floating tensor of x's shape and device.
    """
    _callable(network)
    _floating("noise", noise)
    _generator(generator)
    sigma_data = _checks.number("sigma_data", sigma_data, above=0.0)
    times = _times(times)
    x = noise.to(_sum_dtype(noise))
    x0 = _consistency(network, x, times[0], sigma_data, noise.dtype)
    for t in times[1:]:
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = math.cos(t) * x0 + math.sin(t) * sigma_data * z
        x0 = _consistency(network, x, t, sigma_data, noise.dtype)
    return x0.to(noise.dtype)


def solve_ode(
    network: Network,
    noise: Tensor,
    *,
    steps: int,
    sigma_data: float = 0.5,
    method: str = "heun",
    t_max: float | None = None,
    t_min: float = 0.0,
) -> Tensor:
    """Solve the PF-ODE dx/dt = sd F(x / sd, t) from t_max down to t_min: the teacher's sampler.

    The times are uniform in t: t_i = t_max + (t_min - t_max) i / steps. With the exact F of a
    mixture of narrow Gaussians around the digits of scikit-learn, Heun on this grid ended 2 to 5
    times closer to the solution (root mean square, 8 to 64 steps) than on EDM's rho = 7 grid.

    As in EDM's sampler (arXiv 2206.00364, Algorithm 1) a Heun step that ends at t = 0 is an Euler
    step: networks are not trained at t = 0, and the order of the whole stays 2. So 32 steps are 63
    evaluations.

    Gradients flow through every step: call it under `torch.no_grad()` to sample only.

    Args:
        network: (x / sd, t) -> F, like x; x / sd [B, ...] in noise's dtype, t [B] in float32
            (float64 for float64).
        noise: x at t_max [B, ...], drawn from N(0, sd^2 I).
        steps: Steps of the solver, >= 1.
        sigma_data: sd, > 0.
        method: "euler", first order, `steps` evaluations; "heun", second order, 2 steps
            evaluations, or 2 steps - 1 where t_min is 0.
        t_max: Start, radians, in (0, pi/2]; None is arctan(80 / sd).
        t_min: End, radians, in [0, t_max).

    Returns:
        x at t_min (x0 for t_min = 0), like noise.

    Raises:
        TypeError, ValueError: an argument is not as above, or the network returns no floating
            tensor of x's shape and device.
    """
    _callable(network)
    _floating("noise", noise)
    steps = _checks.integer("steps", steps, low=1)
    sigma_data = _checks.number("sigma_data", sigma_data, above=0.0)
    if not isinstance(method, str) or method not in ("heun", "euler"):
        error = ValueError if isinstance(method, str) else TypeError
        raise error(f"method: got {method!r}, expected 'heun' or 'euler'")
    t_max = math.atan(SIGMA_MAX / sigma_data) if t_max is None else t_max
    t_max = _checks.number("t_max", t_max, above=0.0, high=T_MAX)
    t_min = _checks.number("t_min", t_min, low=0.0)
    if t_min >= t_max:
        raise ValueError(f"t_min: got {t_min}, expected less than t_max = {t_max}")
    x = noise.to(_sum_dtype(noise))
    grid = [t_max + (t_min - t_max) * i / steps for i in range(steps)] + [t_min]
    for t, s in itertools.pairwise(grid):
        slope = _slope(network, x, t, sigma_data, noise.dtype)
        end = x + (s - t) * slope
        if method == "heun" and s > 0:
            slope = (slope + _slope(network, end, s, sigma_data, noise.dtype)) / 2
            end = x + (s - t) * slope
        x = end
    return x.to(noise.dtype)


def _slope(network: Network, x: Tensor, t: float, sigma_data: float, dtype: torch.dtype) -> Tensor:
    """sd F(x / sd, t): the network sees `dtype`, the state x stays wide."""
    output = network((x / sigma_data).to(dtype), x.new_full((x.shape[0],), t))
    _checks.dense("network's result", output)
    _checks.tensor("network's result", output)
    if output.shape != x.shape or output.device != x.device:
        raise ValueError(
            f"network's result: got {_checks.describe(output)}, expected shape {list(x.shape)} on "
            f"{x.device}"
        )
    return sigma_data * output.to(x.dtype)


def _consistency(network: Network, x: Tensor, t: float, sigma_data: float, dtype) -> Tensor:
    return math.cos(t) * x - math.sin(t) * _slope(network, x, t, sigma_data, dtype)


def _cos_sin(x: Tensor, name: str, t: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    """cos t and sin t, shaped to broadcast over x; checks all arguments."""
    _floating(name, x)
    for other, value in others.items():
        _checks.dense(other, value)
        _checks.like(other, value, name, x)
    _checks.dense("t", t)
    _checks.tensor("t", t)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: got {_checks.describe(t)}, expected shape {list(x.shape[:1])}")
    if t.device != x.device:
        raise ValueError(f"t: got {_checks.describe(t)}, expected the device of {name}, {x.device}")
    wide = t.to(_checks.wide_dtype(t)).reshape(-1, *[1] * (x.ndim - 1))
    return wide.cos(), wide.sin()


def _sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, rounded once, like x."""
    wide = _sum_dtype(x)
    return (a.to(wide) * x + b.to(wide) * y).to(x.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _floating(name: str, x: object) -> None:
    _checks.dense(name, x)
    _checks.tensor(name, x)
    if x.ndim < 1:
        raise ValueError(f"{name}: got {_checks.describe(x)}, expected [B, ...]")


def _callable(network: object) -> None:
    if not callable(network):
        raise TypeError(f"network: got {_checks.describe(network)}, expected a callable")


def _generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: got {_checks.describe(generator)}, expected a torch.Generator or None"
        )


def _times(times: object) -> list[float]:
    """`times` as a list, checked."""
    if isinstance(times, (str, bytes)) or not isinstance(times, Sequence):
        raise TypeError(f"times: got {_checks.describe(times)}, expected a sequence of numbers")
    if not times:
        raise ValueError("times: got none, expected at least one")
    times = [_checks.number("times", t, above=0.0, high=T_MAX) for t in times]
    if any(s >= t for t, s in itertools.pairwise(times)):
        raise ValueError(f"times: got {times}, expected decreasing times")
    return times
