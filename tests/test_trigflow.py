"""`scm_kernels.trigflow`: the process, its time proposal, its tangents, its samplers.

Data from a Gaussian N(mu, s^2) have F, the PF-ODE's solution and the consistency function in closed
form: with v = cos^2 t s^2 + sin^2 t sd^2, the variance of x_t, it keeps (x - cos t mu) / sqrt v.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from scm_kernels import trigflow

SD, MU, S = 0.5, 0.8, 0.2
T_MAX = math.atan(80 / SD)


def variance(t):
    return math.cos(t) ** 2 * S**2 + math.sin(t) ** 2 * SD**2


def velocity_field(x_scaled, t):
    """F of the Gaussian: sd F = E[dx_t/dt | x_t]."""
    x, t = SD * x_scaled, t.reshape(-1, 1)
    cos, sin = t.cos(), t.sin()
    v = cos**2 * S**2 + sin**2 * SD**2
    residual = (x - cos * MU) / v
    x0, z = MU + cos * S**2 * residual, sin * SD**2 * residual
    return (cos * z - sin * x0) / SD


def flow(x, t, s):
    """The PF-ODE's exact map from time t to time s."""
    return math.cos(s) * MU + math.sqrt(variance(s) / variance(t)) * (x - math.cos(t) * MU)


def consistency_network(x_scaled, t):
    """The F whose consistency function f = cos t x - sd sin t F is the exact map to time 0."""
    x, time = SD * x_scaled, float(t[0])
    x0 = flow(x, time, 0.0)
    return (math.cos(time) * x - x0) / (SD * math.sin(time))


def noise(n=64, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SD * torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype)


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 5), (0, 3)])
@pytest.mark.parametrize("time_dtype", [torch.float32, torch.float64])
def test_interpolate_and_velocity(shape, time_dtype):
    x0, z = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.linspace(0, math.pi / 2, shape[0], dtype=time_dtype)
    column = t.double().reshape(-1, *[1] * (len(shape) - 1))
    expected = column.cos() * x0 + column.sin() * z
    torch.testing.assert_close(trigflow.interpolate(x0, z, t), expected, rtol=0, atol=1e-15)
    expected = column.cos() * z - column.sin() * x0
    torch.testing.assert_close(trigflow.velocity(x0, z, t), expected, rtol=0, atol=1e-15)


def test_velocity_is_the_derivative_of_interpolate():
    x0, z = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64)
    x_t, slope = torch.func.jvp(
        lambda t: trigflow.interpolate(x0, z, t), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(slope, trigflow.velocity(x0, z, t))
    assert torch.autograd.gradcheck(
        lambda *a: (trigflow.interpolate(*a), trigflow.velocity(*a)),
        [x.requires_grad_() for x in (x0, z, t)],
        check_forward_ad=True,
    )
    assert x_t.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_rounds_once(dtype):
    x0, z = torch.randn(2, 8, 100).to(dtype)
    t = torch.rand(8) * 1.5
    truth = trigflow.interpolate(x0.double(), z.double(), t)
    actual = trigflow.interpolate(x0, z, t)
    assert actual.dtype == dtype
    error = (actual.double() - truth).abs()
    # Half an eps of the result, and a float32 eps of the two terms before it.
    terms = x0.double().abs() + z.double().abs()
    assert (error <= 0.5 * torch.finfo(dtype).eps * truth.abs() * 1.001 + 3e-7 * terms).all()


def test_time_proposal():
    generator = torch.Generator().manual_seed(0)
    t = trigflow.sample_time(
        200_000, p_mean=-0.8, p_std=1.6, sigma_data=0.7, generator=generator, device="cpu"
    )
    assert t.shape == (200_000,)
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() <= math.pi / 2
    tau = (0.7 * t.double().tan()).log()
    assert abs(tau.mean() + 0.8) < 5 * 1.6 / 200_000**0.5
    assert abs(tau.std() - 1.6) < 5 * 1.6 / 400_000**0.5
    generator.manual_seed(0)
    again = trigflow.sample_time(
        200_000, p_mean=-0.8, p_std=1.6, sigma_data=0.7, generator=generator
    )
    assert torch.equal(t, again)
    assert trigflow.sample_time(0, p_mean=-1, p_std=1.4).shape == (0,)
    assert (trigflow.sample_time(3, p_mean=0.0, p_std=0.0, sigma_data=1) == math.pi / 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tangent_inputs(dtype):
    x, dxdt = torch.randn(2, 3, 4, 5).to(dtype)
    t = torch.tensor([0.0, 0.7, 1.5])
    (x_in, t_in), (x_tangent, t_tangent) = trigflow.tangent_inputs(x, dxdt, t, sigma_data=0.25)
    rate = t.double().cos() * t.double().sin()
    assert t_in is t
    assert x_in.dtype == x_tangent.dtype == dtype
    assert t_tangent.dtype == t.dtype
    assert torch.equal(x_in, x / 0.25)
    torch.testing.assert_close(t_tangent.double(), rate, rtol=1e-7, atol=0)
    expected = (rate.reshape(-1, 1, 1) * dxdt.double() / 0.25).to(dtype)
    torch.testing.assert_close(x_tangent, expected, rtol=torch.finfo(dtype).eps, atol=0)
    primal, tangent = torch.func.jvp(
        lambda x, t: x * t[:, None, None], (x_in, t_in), (x_tangent, t_tangent)
    )
    assert primal.shape == tangent.shape == x.shape


def test_tangent_inputs_under_autocast():
    x, dxdt, t = torch.randn(3, 4), torch.randn(3, 4).bfloat16(), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        _, (tangent, _) = trigflow.tangent_inputs(x, dxdt, t)
    assert tangent.dtype == torch.float32
    with pytest.raises(TypeError, match=r"dxdt: got a bfloat16.*dtype of x_t"):
        trigflow.tangent_inputs(x, dxdt, t)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def both(x0, z, t):
        x_t, dxdt = trigflow.interpolate(x0, z, t), trigflow.velocity(x0, z, t)
        return trigflow.tangent_inputs(x_t, dxdt, t)

    x0, z, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    expected = trigflow.tangent_inputs(
        trigflow.interpolate(x0, z, t), trigflow.velocity(x0, z, t), t
    )
    torch.testing.assert_close(both(x0, z, t), expected)


# --- the samplers ---------------------------------------------------------------------------------


def test_one_step_of_the_exact_consistency_function_is_exact():
    x = noise()
    x0 = trigflow.sample(consistency_network, x, [T_MAX], sigma_data=SD)
    torch.testing.assert_close(x0, flow(x, T_MAX, 0.0), rtol=1e-12, atol=1e-12)


def test_two_steps_are_the_recursion():
    x, generator = noise(), torch.Generator().manual_seed(3)
    actual = trigflow.sample(
        consistency_network, x, (T_MAX, 1.1), sigma_data=SD, generator=generator
    )
    z = SD * torch.randn(x.shape, generator=generator.manual_seed(3), dtype=x.dtype)
    noisy = math.cos(1.1) * flow(x, T_MAX, 0.0) + math.sin(1.1) * z
    torch.testing.assert_close(actual, flow(noisy, 1.1, 0.0), rtol=1e-12, atol=1e-12)


def test_many_steps_keep_the_distribution():
    x = noise(20_000)
    generator = torch.Generator().manual_seed(1)
    times = [math.pi / 2, 1.3, 1.1, 0.6]
    x0 = trigflow.sample(consistency_network, x, times, sigma_data=SD, generator=generator)
    assert abs(x0.mean() - MU) < 5 * S / 200
    assert abs(x0.std() - S) < 5 * S / 280


@pytest.mark.parametrize(
    ("method", "order", "end"), [("euler", 1, 0.0), ("heun", 2, 0.0), ("heun", 2, 0.3)]
)
def test_order_of_convergence(method, order, end):
    x = noise()
    exact = flow(x, T_MAX, end)
    errors = []
    for steps in (64, 128, 256):
        actual = trigflow.solve_ode(
            velocity_field, x, steps=steps, sigma_data=SD, method=method, t_min=end
        )
        errors.append((actual - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.2 < math.log2(coarse / fine) < order + 0.2
    assert errors[-1] < (1e-4 if method == "heun" else 1e-2)


@pytest.mark.parametrize(
    ("method", "t_min", "evaluations"),
    [("euler", 0.0, 5), ("euler", 0.1, 5), ("heun", 0.0, 9), ("heun", 0.1, 10)],
)
def test_network_evaluations(method, t_min, evaluations):
    """How often, where, and on what: t [B] on a uniform grid, x / sd."""
    calls = []

    def network(x, t):
        calls.append((x, t))
        return torch.zeros_like(x)

    x = noise(3)
    out = trigflow.solve_ode(
        network, x, steps=5, sigma_data=SD, method=method, t_max=1.5, t_min=t_min
    )
    assert torch.equal(out, x)
    assert len(calls) == evaluations
    assert all(t.shape == (3,) and torch.equal(y, x / SD) for y, t in calls)
    grid = torch.linspace(1.5, t_min, 6, dtype=torch.float64)
    times = torch.stack([t[0] for _, t in calls])
    expected = grid[:-1] if method == "euler" else grid.repeat_interleave(2)[1 : evaluations + 1]
    torch.testing.assert_close(times, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_samplers_keep_the_dtype_and_a_wide_state(dtype):
    x = noise(dtype=dtype)

    def network(x, t):
        assert x.dtype == dtype
        assert t.dtype == torch.float32
        return velocity_field(x.double(), t.double()).to(dtype)

    out = trigflow.solve_ode(network, x, steps=200, sigma_data=SD)
    assert out.dtype == dtype
    error = (out.double() - flow(x.double(), T_MAX, 0.0)).abs().max()
    # Rounding F each time averages out; rounding the state at each of 200 steps would not.
    assert error < 4 * torch.finfo(dtype).eps + 1e-3
    assert trigflow.sample(network, x, [1.5, 0.5], sigma_data=SD).dtype == dtype


def test_gradients_flow_through_the_samplers():
    x = noise(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: trigflow.solve_ode(velocity_field, x, steps=3, sigma_data=SD), (x,)
    )
    assert torch.autograd.gradcheck(
        lambda x: trigflow.sample(velocity_field, x, [1.2], sigma_data=SD), (x,)
    )


def test_meta_tensors_and_numbers_of_other_types():
    x, t = noise(2), torch.rand(2)
    quarter = trigflow.tangent_inputs(x, x, t, sigma_data=Fraction(1, 4))
    for a, b in zip(quarter, trigflow.tangent_inputs(x, x, t, sigma_data=0.25), strict=True):
        assert all(map(torch.equal, a, b))
    (x_meta, _), (tangent, _) = trigflow.tangent_inputs(x.to("meta"), x.to("meta"), t.to("meta"))
    assert x_meta.shape == tangent.shape == x.shape
    assert tangent.is_meta
    drawn = trigflow.sample_time(2, p_mean=Fraction(-1), p_std=0, sigma_data=Fraction(1, 2))
    assert torch.equal(drawn, trigflow.sample_time(2, p_mean=-1.0, p_std=0.0))


# --- bad input ------------------------------------------------------------------------------------

A, T = torch.zeros(3, 2), torch.zeros(3)
TIME = {"n": 3, "p_mean": -1.0, "p_std": 1.4}


def ode(network=velocity_field, **change):
    return trigflow.solve_ode(network, **{"noise": A, "steps": 2, **change})


def few(times, noise=A, network=velocity_field, **options):
    return trigflow.sample(network, noise, times, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trigflow.sample_time(**TIME | {"n": 3.0}), TypeError, "n: got float 3.0"),
        (lambda: trigflow.sample_time(**TIME | {"n": -1}), ValueError, "n: got -1, .*least 0"),
        (lambda: trigflow.sample_time(**TIME | {"n": 10**30}), ValueError, "n: got 10+, .*than 2"),
        (lambda: trigflow.sample_time(**TIME | {"p_std": -1}), ValueError, "p_std: got -1"),
        (lambda: trigflow.sample_time(**TIME | {"p_mean": T}), TypeError, "p_mean: got a float"),
        (lambda: trigflow.sample_time(**TIME, sigma_data=0), ValueError, "sigma_data: got 0"),
        (lambda: trigflow.interpolate(1.0, A, T), TypeError, "x0: got float 1.0"),
        (lambda: trigflow.interpolate(A.int(), A, T), TypeError, "x0: got a int32.*dtypes"),
        (lambda: trigflow.interpolate(A[0, 0], A, T), ValueError, r"x0: got .*\[B, ...\]"),
        (lambda: trigflow.interpolate(A, A.double(), T), TypeError, "z: got a float64.*of x0"),
        (lambda: trigflow.velocity(A, A[:1], T), ValueError, r"z: got .*\[1, 2\].*shape of x0"),
        (lambda: trigflow.velocity(A, A, 0.5), TypeError, "t: got float 0.5, expected a tensor"),
        (lambda: trigflow.velocity(A, A, A), ValueError, r"t: got .*\[3, 2\].*shape \[3\]"),
        (lambda: trigflow.velocity(A, A, T.to("meta")), ValueError, "t: got .*meta.*device of x0"),
        (lambda: trigflow.tangent_inputs(A, None, T), TypeError, "dxdt: got NoneType"),
        (lambda: trigflow.tangent_inputs(A, A[0], T), ValueError, "dxdt: got .*shape of x_t"),
        (lambda: trigflow.tangent_inputs(A, A, T, sigma_data=-1), ValueError, "sigma_data: got -1"),
        (lambda: few([]), ValueError, "times: got none, expected at least one"),
        (lambda: few(1.5), TypeError, "times: got float 1.5, expected a sequence"),
        (lambda: few([1.1, 1.5]), ValueError, "times: got .*1.1, 1.5.*decreasing"),
        (lambda: few([1.1, 1.1]), ValueError, "times: got .*decreasing"),
        (lambda: few([1.1, 0.0]), ValueError, "times: got 0.0, .*above 0"),
        (lambda: few([80.0]), ValueError, "times: got 80.0, .*at most 1.57"),
        (lambda: few(["1"]), TypeError, "times: got str '1', expected a number"),
        (lambda: few([1.1], noise=A.int()), TypeError, "noise: got a int32"),
        (
            lambda: few([1.1], network=lambda x, t: x[:1]),
            ValueError,
            "network's result: got .*1, 2",
        ),
        (lambda: few([1.1], network=lambda x, t: (x, t)), TypeError, "network's result: got a tu"),
        (lambda: few([1.1], network=lambda x, t: 1j * x), TypeError, "network's result: .*complex"),
        (
            lambda: few([1.1], network=lambda x, t: x.to("meta")),
            ValueError,
            "network's result: got .* on meta, expected .* on cpu",
        ),
        (lambda: few([1.1], network=None), TypeError, "network: got NoneType None, .*a callable"),
        (lambda: ode(network=3), TypeError, "network: got int 3, expected a callable"),
        (lambda: few([1.1], generator=3), TypeError, "generator: got int 3, expected a torch.Gen"),
        (lambda: few([1.1], noise=A.to_sparse()), TypeError, "noise: got .*layout sparse_coo"),
        (lambda: trigflow.sample_time(**TIME, device=1.5), TypeError, "device: got float 1.5"),
        (lambda: trigflow.velocity(A, A, T.to_sparse()), TypeError, "t: got .*layout sparse_coo"),
        (lambda: trigflow.velocity(A, A.to_sparse(), T), TypeError, "z: got .*layout sparse_coo"),
        (
            lambda: trigflow.tangent_inputs(A.to_sparse(), A, T),
            TypeError,
            "x_t: got .*layout sparse_coo",
        ),
        (lambda: ode(steps=0), ValueError, "steps: got 0, expected at least 1"),
        (lambda: ode(steps=2.0), TypeError, "steps: got float 2.0, expected an int"),
        (lambda: ode(method="rk4"), ValueError, "method: got 'rk4', expected 'heun' or 'euler'"),
        (lambda: ode(t_max=2.0), ValueError, "t_max: got 2.0, .*at most 1.57"),
        (lambda: ode(t_max=0.5, t_min=0.5), ValueError, "t_min: got 0.5, expected less than t_max"),
        (lambda: ode(t_min=-0.1), ValueError, "t_min: got -0.1, .*at least 0"),
        (lambda: ode(sigma_data=10**400), ValueError, "sigma_data: got .*beyond all floats"),
        (lambda: ode(sigma_data="x"), TypeError, "sigma_data: got str 'x'"),
        (lambda: ode(noise=None), TypeError, "noise: got NoneType"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_integers_of_numpy():
    assert trigflow.sample_time(**TIME | {"n": np.int64(3)}).shape == (3,)
    torch.testing.assert_close(ode(steps=np.int32(2)), ode(steps=2), rtol=0, atol=0)
