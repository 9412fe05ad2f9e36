"""The steps of the tangent on every backend that is available: norm, apply, normalize.

The truth is float64 on the rounded inputs. A backend that is compiled for several instruction sets
runs with each of them. What the public functions make of the steps is in `test_tangent.py`.
"""

import math

import pytest
import torch
from test_tangent import DEVICE

from scm_kernels import _backends, _native

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
    """f, v, x, j and coefficients."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for _ in range(4)]
    coefficients = torch.randn(shape[0], 4, generator=generator, dtype=torch.float64)
    return [x.to(DEVICE, dtype) for x in inputs], coefficients.to(DEVICE)


def combined(inputs, coefficients):
    """g in float64."""
    return sum(c[:, None] * x.double() for c, x in zip(coefficients.T, inputs, strict=True))


def normalize(inputs, coefficients, backend, *, c=0.1, mean=False, zero=False):
    return ops.tangent_normalize(*inputs, coefficients, c, mean, zero, backend)


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
    inputs, coefficients = make(shape, dtype)
    g, terms = (
        combined(inputs, coefficients),
        combined([x.abs() for x in inputs], coefficients.abs()),
    )
    squares = ops.tangent_norm(*inputs, coefficients, backend)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, g.square().sum(1), rtol=1e-6, atol=1e-12)
    close_rounded(ops.tangent_apply(*inputs, coefficients, backend), g, terms)
    for mean in (False, True):
        norm = (g.square().mean(1) if mean else g.square().sum(1)).sqrt()
        s = (1 / (norm + 0.3))[:, None]
        close_rounded(normalize(inputs, coefficients, backend, c=0.3, mean=mean), s * g, s * terms)


@pytest.mark.parametrize("shape", [(1, 2_000_000), (4096, 64)], ids=["one large", "many small"])
def test_sums_do_not_drift(backend, shape):
    """Squares near 9: a plain float32 sum of 2e6 of them would be wrong by about 1e-4."""
    inputs, coefficients = make(shape)
    coefficients = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64, device=DEVICE)
    coefficients = coefficients.expand(shape[0], 4).contiguous()
    inputs[0] += 3
    truth = inputs[0].double().square().sum(1)
    squares = ops.tangent_norm(*inputs, coefficients, backend)
    torch.testing.assert_close(squares, truth, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, dtype):
    """Rows apart, rows repeated, a start that no vector is aligned to, one tensor twice."""
    inputs, coefficients = make((6, 301), dtype)
    wide = torch.full((6, 640), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 3:304] = inputs[0]
    views = [wide[:, 3:304], inputs[1][:1].expand(6, -1), inputs[2], inputs[2]]
    plain = [x.contiguous().clone() for x in views]
    for call in (
        lambda x: ops.tangent_norm(*x, coefficients, backend),
        lambda x: ops.tangent_apply(*x, coefficients, backend),
        lambda x: normalize(x, coefficients, backend),
    ):
        assert torch.equal(call(views), call(plain))


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
    return ops.tangent_apply(x, zeros, zeros, zeros, coefficients, backend)


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
    actual = ops.tangent_apply(*rows, coefficients.to(DEVICE), backend)
    scale = coefficients[:, 1:2].to(DEVICE, torch.float32)
    expected = (x.float() + scale * ulp.float()).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- bad samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 40_001, 300_007])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_samples(backend, dtype, bad, size):
    """A bad sample is bad alone, NaN or zeros; one of zero coefficients is zeros."""
    inputs, coefficients = make((4, size), dtype)
    good = (
        ops.tangent_norm(*inputs, coefficients, backend),
        ops.tangent_apply(*inputs, coefficients, backend),
        normalize(inputs, coefficients, backend),
    )
    inputs[2][1, size // 2] = bad
    inputs[3][2] = bad
    squares = ops.tangent_norm(*inputs, coefficients, backend)
    assert squares.isfinite().tolist() == [True, False, False, True]
    tangent = normalize(inputs, coefficients, backend)
    assert tangent[1:3].isnan().all()
    assert (normalize(inputs, coefficients, backend, zero=True)[1:3] == 0).all()
    coefficients[1:3] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    applied = ops.tangent_apply(*inputs, coefficients, backend)
    assert (applied[1:3] == 0).all()
    for actual, expected in zip((squares, applied, tangent), good, strict=True):
        assert torch.equal(actual[::3], expected[::3])


def test_no_normaliser_of_nothing(backend):
    """c = 0 and g = 0: 0 / 0, not a sample that is left out."""
    zeros = torch.zeros(2, 5, device=DEVICE)
    coefficients = torch.ones(2, 4, dtype=torch.float64, device=DEVICE)
    assert normalize([zeros] * 4, coefficients, backend, c=0.0, zero=True).isnan().all()
    assert (normalize([zeros] * 4, coefficients, backend, c=0.1) == 0).all()


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the CPU")
@pytest.mark.parametrize("shape", [(300, 64), (3, 40_001), (1, 300_007)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_show(backend, shape, dtype):
    if backend == "reference":
        pytest.skip("its threads are PyTorch's")
    inputs, coefficients = make(shape, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            squares = ops.tangent_norm(*inputs, coefficients, backend)
            applied = ops.tangent_apply(*inputs, coefficients, backend)
            results.append((squares, applied, normalize(inputs, coefficients, backend)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
