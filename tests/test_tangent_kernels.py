"""The steps of the tangent on every backend that is available: loss, gradient, apply, normalize.

The truth is float64 on the rounded inputs. A backend that is compiled for several instruction sets
runs with each of them. What the public functions make of the steps is in `test_tangent.py`.
"""

import math

import pytest
import torch
from test_tangent import DEVICE

from scm_kernels import _backends, _native
from scm_kernels.tangent.presets import PRESETS

ops = torch.ops.scm_kernels
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
# One element; less than a vector; vectors and a rest; whole chunks; chunks and a rest; more than
# one thread's share.
SHAPES = [(5, 1), (3, 7), (2, 257), (70, 500), (3, 16384), (3, 40_001), (1, 300_007)]


def kernels():
    """(backend, instruction set) of all that is available here."""
    for name in _backends.NAMES:
        if "tangent" in _backends.backends()[name].partition(":")[0]:
            yield from ((name, isa) for isa in (sets() if name == "cpu" else ("",)))


def sets():
    return _native.module().instruction_sets()


@pytest.fixture(params=kernels(), ids="-".join)
def backend(request):
    """The name of a backend, with one of its instruction sets selected."""
    name, isa = request.param
    if isa == "":
        yield name
        return
    module = _native.module()
    before = module.instruction_set()
    module.select_instruction_set(isa)
    yield name
    module.select_instruction_set(before)


def make(shape, dtype=torch.float32, seed=0):
    """f, v, x, j and t."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for _ in range(4)]
    t = 0.1 + 1.4 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return [x.to(DEVICE, dtype) for x in inputs], t.to(DEVICE)


def random_coefficients(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, generator=generator, dtype=torch.float64).to(DEVICE)


def combined(inputs, coefficients):
    """g in float64."""
    return sum(c[:, None] * x.double() for c, x in zip(coefficients.T, inputs, strict=True))


R, SD = 0.7, 0.5


def coefficients_of(preset, t):
    return torch.stack(PRESETS[preset].scalars(t.double(), R, SD), dim=1)


def loss(inputs, t, backend, *, preset="paper", w=None, c=0.1, zero=False):
    """losses, s times the coefficients, distances, weights."""
    return ops.tangent_loss(*inputs, t, None, w, R, SD, c, preset, zero, backend)


def squares_of(inputs, t, backend):
    """The sums of squares of meanflow's g, V - F - t J."""
    return loss(inputs, t, backend, preset="meanflow")[2]


def apply(inputs, coefficients, backend):
    return ops.tangent_apply(*inputs, coefficients, backend)


def normalize(inputs, t, backend, *, preset="paper", c=0.1, zero=False):
    return ops.tangent_normalize(*inputs, t, None, R, SD, c, preset, zero, backend)


def sines_array(kernel):
    """Bytes of local memory of the sine of a large float64 number, where no t in radians comes."""
    return 48 if kernel in ("tangent_coefficients_kernel", "tangent_loss_kernel") else 0


def close_rounded(actual, truth, terms):
    """Within float32's roundings of the terms, and within one to the dtype's nearest."""
    bound = 4 * torch.finfo(torch.float32).eps * terms
    if actual.dtype != torch.float32:
        bound = bound + torch.finfo(actual.dtype).eps / 2 * (truth.abs() + bound)
        bound = bound + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    assert ((actual.double() - truth).abs() <= bound).all()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps(backend, shape, dtype):
    inputs, coefficients = make(shape, dtype)[0], random_coefficients(shape[0])
    magnitudes = [x.abs() for x in inputs]
    close_rounded(
        apply(inputs, coefficients, backend),
        combined(inputs, coefficients),
        combined(magnitudes, coefficients.abs()),
    )
    presets = PRESETS if shape[1] <= 500 else ("paper", "rms")
    for preset in presets:
        check_preset(backend, preset, *make(shape, dtype))


def check_preset(backend, preset, inputs, t):
    """The loss, its gradient and the normalised tangent."""
    size, row, c = inputs[0].shape[1], PRESETS[preset], 0.3
    raw = coefficients_of(preset, t)
    squares = combined(inputs, raw).square().sum(1)
    s = torch.ones_like(squares)
    if row.normalised:
        s = 1 / ((squares / size if row.mean else squares).sqrt() + c)
    scaled, q = s[:, None] * raw, s * s * squares
    p, w = row.weight(t, squares, size, SD, c), torch.linspace(-2, 2, len(t)).to(DEVICE)
    losses = loss(inputs, t, backend, preset=preset, c=c, w=w)
    assert [x.dtype for x in losses] == [torch.float32, *[torch.float64] * 3]
    truth = w.double().exp() * p * q - w
    assert (losses[0] - truth).abs().le(1e-6 * (truth + w).abs() + 1e-6 * w.abs()).all()
    for actual, expected in zip(losses[1:], (scaled, q, p), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)
    dlosses = torch.linspace(0.5, -1, len(t)).to(DEVICE)
    dF, dw = ops.tangent_gradient(*inputs, *losses[1:], w, dlosses, backend)
    rates = w.double().exp() * losses[3]
    torch.testing.assert_close(dw, (dlosses * (rates * losses[2] - 1)).float(), rtol=1e-6, atol=0)
    factors = (-2 * dlosses * rates)[:, None] * losses[1]
    magnitudes = [x.abs() for x in inputs]
    terms = combined(magnitudes, factors.abs())
    close_rounded(dF, combined(inputs, factors), terms)
    if row.normalised:
        terms = combined(magnitudes, scaled.abs())
        tangent = normalize(inputs, t, backend, preset=preset, c=c)
        close_rounded(tangent, combined(inputs, scaled), terms)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_of_any_stride_and_type(backend, preset, wide):
    """t, warmup, log_weight and the cotangents: apart, repeated, in float32 and float64."""
    inputs, _ = make((300, 5))
    dtype = torch.float64 if wide else torch.float32
    room = torch.full((300, 3), torch.nan, dtype=dtype, device=DEVICE)
    apart, r, log_weight = (room[:, i].copy_(torch.linspace(0.2, 1, 300)) for i in range(3))
    one = torch.tensor(0.5, dtype=dtype, device=DEVICE).expand(300)
    for t, warmup, w, dlosses in (
        (apart, r, log_weight, one),
        (one, one, one, log_weight),
        (apart, None, None, one),
    ):
        results = []
        for name in ("reference", backend):
            options = R, SD, 0.1, preset, False, name
            losses = ops.tangent_loss(*inputs, t, warmup, w, *options)
            gradients = ops.tangent_gradient(*inputs, *losses[1:], w, dlosses, name)
            results.append((*losses, *gradients))
            if PRESETS[preset].normalised:
                tangent = ops.tangent_normalize(*inputs, t, warmup, *options)
                results[-1] = (*results[-1], tangent)
        for actual, expected in zip(*results, strict=True):
            size = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize("shape", [(1, 2_000_000), (4096, 64)], ids=["one large", "many small"])
def test_sums_do_not_drift(backend, shape):
    """Squares near 9: a plain float32 sum of 2e6 of them would be wrong by about 1e-4."""
    inputs, t = make(shape)
    inputs[1] += 3
    inputs[0].zero_(), inputs[3].zero_()
    truth = inputs[1].double().square().sum(1)
    torch.testing.assert_close(squares_of(inputs, t, backend), truth, rtol=1e-13, atol=0)


@pytest.mark.parametrize("batch", [1, 40])
def test_one_size_after_another(backend, batch):
    """What a kernel was given for one size is not what the next one needs."""
    for size in (20_736, 24_576, 20_736, 25_601, 60_000, 65_536):
        inputs, t = make((batch, size))
        g = combined(inputs, coefficients_of("paper", t))
        truth = g / (g.norm(dim=1, keepdim=True) + 0.1)
        torch.testing.assert_close(
            normalize(inputs, t, backend).double(), truth, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, dtype):
    """Rows apart, rows repeated, a start that no vector is aligned to, one tensor twice."""
    (inputs, t), coefficients = make((6, 301), dtype), random_coefficients(6)
    wide = torch.full((6, 640), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 3:304] = inputs[0]
    views = [wide[:, 3:304], inputs[1][:1].expand(6, -1), inputs[2], inputs[2]]
    plain = [x.contiguous().clone() for x in views]
    for call in (
        lambda x: squares_of(x, t, backend),
        lambda x: apply(x, coefficients, backend),
        lambda x: normalize(x, t, backend),
    ):
        assert torch.equal(call(views), call(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_overlap(backend, dtype):
    (inputs, t), base = make((3, 64), dtype), torch.randn(66).to(DEVICE, dtype)
    inputs[0] = base.as_strided((3, 64), (1, 1))
    plain = [x.contiguous().clone() for x in inputs]
    for actual, expected in zip(loss(inputs, t, backend), loss(plain, t, backend), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(normalize(inputs, t, backend), normalize(plain, t, backend))


# --- rounding -------------------------------------------------------------------------------------


def every_half(dtype):
    """All values of a 16-bit type, a row each of two samples."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).to(DEVICE).reshape(2, -1)


def identity(x, backend):
    """x through `tangent_apply`: as f, times one, and zeros; signed zeros are not asked for."""
    zeros = torch.zeros_like(x)
    coefficients = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64, device=DEVICE)
    coefficients = coefficients.expand(len(x), 4).contiguous()
    return apply((x, zeros, zeros, zeros), coefficients, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_survive(backend, dtype):
    """Denormals, infinities and NaN too."""
    x = every_half(dtype)
    torch.testing.assert_close(identity(x, backend), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_round_to_nearest_even(backend, dtype):
    """Sums of two halves that are exact in float32, among them ties, denormals and overflows."""
    x = every_half(dtype)
    x = x[x.isfinite()]
    ulp = (x.float().abs() * torch.finfo(dtype).eps).to(dtype)
    zeros, coefficients = torch.zeros_like(x), torch.zeros(4, 4, dtype=torch.float64)
    coefficients[:, 0] = 1
    coefficients[:, 1] = torch.tensor([0.25, 0.5, 0.75, -0.5])
    rows = [y.expand(4, -1) for y in (x, ulp, zeros, zeros)]
    actual = apply(rows, coefficients.to(DEVICE), backend)
    scale = coefficients[:, 1:2].to(DEVICE, torch.float32)
    expected = (x.float() + scale * ulp.float()).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- bad samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 40_001, 300_007])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_samples(backend, dtype, bad, size):
    """A bad sample is bad alone, NaN or zeros; one of zero coefficients is zeros."""
    (inputs, t), coefficients = make((4, size), dtype), random_coefficients(4)
    w, dlosses = torch.rand(4).to(DEVICE), torch.tensor([1.0, torch.inf, torch.nan, 1.0]).to(DEVICE)

    def results(zero):
        losses = loss(inputs, t, backend, w=w, zero=zero)
        gradients = ops.tangent_gradient(*inputs, *losses[1:], w, dlosses, backend)
        return *losses, *gradients, normalize(inputs, t, backend, zero=zero)

    good, applied = results(False), apply(inputs, coefficients, backend)
    inputs[2][1, size // 2] = bad
    inputs[3][2] = bad
    for zero in (False, True):
        for i, (actual, expected) in enumerate(zip(results(zero), good, strict=True)):
            assert torch.equal(actual[::3], expected[::3])
            if zero:
                assert (actual[1:3] == 0).all()
            elif i != 3:  # but for weights, which are those of the time alone
                assert actual[1:3].isnan().all()
    coefficients[1:3] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    actual = apply(inputs, coefficients, backend)
    assert (actual[1:3] == 0).all()
    assert torch.equal(actual[::3], applied[::3])


def test_no_normaliser_of_nothing(backend):
    """c = 0 and g = 0: 0 / 0, not a sample that is left out."""
    zeros, t = torch.zeros(2, 5, device=DEVICE), torch.ones(2, device=DEVICE)
    assert normalize([zeros] * 4, t, backend, c=0.0, zero=True).isnan().all()
    assert loss([zeros] * 4, t, backend, c=0.0, zero=True)[0].isnan().all()
    assert (normalize([zeros] * 4, t, backend, c=0.1) == 0).all()


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the CPU")
@pytest.mark.parametrize("shape", [(3000, 64), (3, 40_001), (1, 300_007)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_show(backend, shape, dtype):
    if backend == "reference":
        pytest.skip("its threads are PyTorch's")
    inputs, t = make(shape, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            losses = loss(inputs, t, backend)
            gradients = ops.tangent_gradient(*inputs, *losses[1:], None, t, backend)
            results.append((*losses, *gradients, normalize(inputs, t, backend)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
