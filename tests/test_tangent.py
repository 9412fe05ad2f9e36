"""`normalized_tangent` and `consistency_loss`: values, gradients, dtypes, layouts, bad samples.

The truth is a formula written here once more, element by element in float64, and differentiated by
PyTorch's autograd. Transforms are in `test_tangent_transforms.py`, bad input in
`test_tangent_errors.py`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm_kernels.tangent import consistency_loss, normalized_tangent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = ("paper", "rms", "sana", "rcm", "meanflow")
NORMALISED = PRESETS[:-1]
INPUTS = ("output", "dxdt", "x_t", "jvp")


def make(shape, dtype=torch.float64, seed=0):
    """F, V, X, J [B, ...] and t, w [B], of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in INPUTS]
    t = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 1.4 + 0.1
    w = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return [x.to(DEVICE, dtype) for x in tensors], t.to(DEVICE), w.to(DEVICE)


def rows(x):
    """[B, ...] as [B, D]."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def eager_tangent(F, V, X, J, t, *, preset, warmup=1.0, sigma_data=0.5, c=0.1):
    """The normalised tangent, in the tensors' dtype; a warm-up may have the shape of t."""
    column = (-1, *[1] * (F.ndim - 1))
    r = torch.as_tensor(warmup, dtype=t.dtype, device=t.device).expand_as(t)
    cos, sin, r = (x.reshape(column).to(F.dtype) for x in (t.cos(), t.sin(), r))
    if preset == "rcm":
        g = -cos * (1 - r**2 * sin**2).sqrt() * (sigma_data * F - V)
        g = g - (r * cos * sin * X + sigma_data * J)
    else:
        g = -(cos**2) * (sigma_data * F - V) - r * (cos * sin * X + sigma_data * J)
    squares = rows(g.square())
    total = squares.mean(1) if preset == "rms" else squares.sum(1)
    return g / (total.sqrt().reshape(column) + c)


def eager_loss(F, V, X, J, t, w=None, *, preset="paper", c=None, sigma_data=0.5, warmup=1.0):
    """[B], by autograd: the loss as a paper or its code writes it."""
    F_minus, size = F.detach(), math.prod(F.shape[1:])
    if preset == "meanflow":
        c = 0.01 if c is None else c
        target = V - t.reshape(-1, *[1] * (F.ndim - 1)).to(F.dtype) * J
        squares = rows((F - target).square()).sum(1)
        loss = squares / (squares.detach() + c)
    else:
        c = 0.1 if c is None else c
        options = {"preset": preset, "warmup": warmup, "sigma_data": sigma_data, "c": c}
        tangent = eager_tangent(F_minus, V, X, J, t, **options).detach()
        squares = rows((F - F_minus - tangent).square())
        loss = 100 * squares.sum(1) if preset == "rcm" else squares.sum(1) / size
        if preset == "sana":
            loss = loss / (sigma_data * t.tan())
    return loss if w is None else w.exp() * loss - w


def value_and_gradients(function, tensors, t, w, **options):
    """The loss, dF and dw (None where the preset has no w)."""
    F, w = tensors[0].detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    learned = () if options["preset"] == "rcm" else (w,)
    loss = function(F, *tensors[1:], t, *learned, **options)
    return loss, *torch.autograd.grad(loss.sum(), (F, *learned))


def close(actual, expected, *, rtol, scale=None):
    """|actual - expected| <= rtol max|expected|, and both finite."""
    scale = expected.abs().max().item() if scale is None else scale
    assert actual.isfinite().all()
    assert (actual.double() - expected.double()).abs().max().item() <= rtol * scale


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (4, 33), (5,), (1, 1), (2, 3, 4, 2, 2)])
@pytest.mark.parametrize("warmup", [0.0, 0.37, 1.0])
def test_loss_is_the_formula(preset, shape, warmup):
    tensors, t, w = make(shape)
    options = {"preset": preset, "sigma_data": 0.7, "c": 0.03}
    if preset != "meanflow":
        options["warmup"] = warmup
    actual = value_and_gradients(consistency_loss, tensors, t, w, reduction="none", **options)
    expected = value_and_gradients(eager_loss, tensors, t, w, **options)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, rtol=1e-12)


@pytest.mark.parametrize("preset", NORMALISED)
@pytest.mark.parametrize("warmup", [0.0, 0.37, 1.0])
def test_tangent_is_the_formula(preset, warmup):
    tensors, t, _ = make((3, 2, 5, 7))
    options = {"preset": preset, "warmup": warmup, "sigma_data": 0.7, "c": 0.03}
    expected = eager_tangent(*tensors, t, **options)
    actual = normalized_tangent(*tensors, t, **options)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    close(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_defaults(preset):
    """c, warmup, sigma_data, reduction and log_weight are the specification's."""
    tensors, t, w = make((3, 10))
    close(
        consistency_loss(*tensors, t, preset=preset),
        eager_loss(*tensors, t, preset=preset).mean(),
        rtol=1e-12,
    )
    if preset == "paper":
        close(consistency_loss(*tensors, t, w), eager_loss(*tensors, t, w).mean(), rtol=1e-12)
        close(
            normalized_tangent(*tensors, t), eager_tangent(*tensors, t, preset="paper"), rtol=1e-12
        )


@pytest.mark.parametrize("preset", ["paper", "rcm"])
@pytest.mark.parametrize("kind", ["scalar", "samples"])
def test_warmup_may_be_a_tensor(kind, preset):
    tensors, t, _ = make((4, 6))
    warmup = torch.tensor(0.3) if kind == "scalar" else torch.tensor([0.0, 0.1, 0.9, 1.0])
    options = {"preset": preset, "warmup": warmup.to(DEVICE)}
    actual = consistency_loss(*tensors, t, reduction="none", **options)
    options["warmup"] = options["warmup"].double()
    close(actual, eager_loss(*tensors, t, **options), rtol=1e-12)


def test_tangent_is_the_derivative_of_the_consistency_function():
    """At r = 1, g before normalising is cos t df/dt along the PF-ODE (arXiv 2410.11081, Eq. 6)."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64)
    x, V = torch.randn(2, 3, 8, dtype=torch.float64)
    t = torch.tensor([0.2, 0.8, 1.5], dtype=torch.float64)
    sd = 0.5

    def network(x, t):
        return torch.tanh(x @ weight + t[:, None]) * t.cos()[:, None]

    def consistency(x, t):
        return t.cos()[:, None] * x - sd * t.sin()[:, None] * network(x / sd, t)

    _, slope = torch.func.jvp(consistency, (x, t), (V, torch.ones_like(t)))
    rate = t.cos() * t.sin()
    F, J = torch.func.jvp(network, (x / sd, t), (rate[:, None] * V / sd, rate))
    g = t.cos()[:, None] * slope
    expected = g / (g.norm(dim=1, keepdim=True) + 0.1)
    actual = normalized_tangent(*(y.to(DEVICE) for y in (F, V, x, J, t)))
    close(actual, expected.to(DEVICE), rtol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_ends_of_time(preset):
    """t = 0 and pi/2, in float32 as in float64; the weight of sana is infinite at 0."""
    tensors, _, _w = make((3, 12))
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([0.0, math.pi / 2, 1e-3], device=DEVICE, dtype=dtype)
        actual = consistency_loss(*tensors, t, None, preset=preset, reduction="none")
        expected = eager_loss(*tensors, t.double(), preset=preset)
        if preset == "sana":
            assert actual[0] == torch.inf
            assert abs(actual[1]) < 1e-6
            actual, expected = actual[2:], expected[2:]
        close(actual, expected, rtol=1e-9)


# --- sizes, dtypes, layouts -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2_000_000), (4096, 64)], ids=["one large", "many small"])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_extreme_sizes(shape, offset):
    """A plain float32 sum of 2e6 squares near 9 would be wrong by about 1e-4."""
    tensors, t, w = make(shape, torch.float32)
    tensors = [x + offset for x in tensors]
    options = {"preset": "paper", "reduction": "none"}
    loss, dF, dw = value_and_gradients(consistency_loss, tensors, t.float(), w.float(), **options)
    wide = [x.double() for x in tensors]
    truth = value_and_gradients(eager_loss, wide, t.float().double(), w.double(), preset="paper")
    assert loss.dtype == torch.float32
    close(loss, truth[0], rtol=1e-6)
    close(dF, truth[1], rtol=2e-6)
    close(dw, truth[2], rtol=1e-6)
    again = consistency_loss(*tensors, t.float(), w.float(), reduction="none")
    assert torch.equal(again, loss)


def test_squares_do_not_overflow():
    tensors, t, _ = make((2, 100), torch.float32)
    tensors = [x * 1e25 for x in tensors]
    expected = eager_tangent(*(x.double() for x in tensors), t, preset="paper")
    close(normalized_tangent(*tensors, t), expected, rtol=1e-6)


def within_budget(actual, low, truth):
    """The error budget: twice (mean) or five times (maximum) that of eager in the same dtype."""
    eps = torch.finfo(actual.dtype).eps
    error, floor = (actual.double() - truth).abs(), eps * truth.abs()
    low = (low.double() - truth).abs()
    assert error.mean() <= 2 * low.mean() + 2 * floor.mean()
    assert error.max() <= 5 * low.max() + 2 * floor.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_low_precision(dtype, preset):
    tensors, t, w = make((8, 3, 32, 32), dtype)
    wide = [x.double() for x in tensors]
    if preset != "meanflow":
        tangent = normalized_tangent(*tensors, t, preset=preset)
        assert tangent.dtype == dtype
        truth = eager_tangent(*wide, t, preset=preset)
        within_budget(tangent, eager_tangent(*tensors, t, preset=preset), truth)
    truth = value_and_gradients(eager_loss, wide, t, w, preset=preset)
    options = {"preset": preset, "reduction": "none"}
    loss, dF, *dw = value_and_gradients(consistency_loss, tensors, t, w, **options)
    assert loss.dtype == torch.float32
    assert dF.dtype == dtype
    close(loss, truth[0], rtol=1e-6)
    low = value_and_gradients(eager_loss, tensors, t.to(dtype), w.to(dtype), preset=preset)
    within_budget(dF, low[1], truth[1])
    for a, e in zip(dw, truth[2:], strict=True):
        close(a, e, rtol=1e-6)


def test_dtypes_of_t_and_log_weight_are_their_own():
    tensors, t, w = make((4, 6), torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        t_, w_ = t.to(dtype), w.to(dtype).requires_grad_()
        loss = consistency_loss(*tensors, t_, w_)
        (dw,) = torch.autograd.grad(loss, w_)
        assert loss.dtype == torch.float32
        assert dw.dtype == dtype


def test_autocast_takes_the_widest_dtype():
    (F, V, X, J), t, w = make((4, 3, 32), torch.float32)
    F, J = F.bfloat16().requires_grad_(), J.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = consistency_loss(F, V, X, J, t, w)
        tangent = normalized_tangent(F, V, X, J, t)
    (dF,) = torch.autograd.grad(loss, F)
    wide = F.detach().float().requires_grad_()
    expected = consistency_loss(wide, V, X, J.float(), t, w)
    assert loss.dtype == torch.float32
    assert loss == expected
    assert tangent.dtype == dF.dtype == torch.bfloat16
    assert torch.equal(dF, torch.autograd.grad(expected, wide)[0].bfloat16())
    with pytest.raises(TypeError, match=r"dxdt: got .*float32.*dtype of output"):
        consistency_loss(F, V, X, J, t, w)


@st.composite
def layouts(draw):
    """A shape and, for each of the four tensors, how it lies in memory."""
    rank = draw(st.integers(0, 3))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=rank + 1, max_size=rank + 1)))
    kinds = st.sampled_from(["plain", "permuted", "sliced", "expanded", "expanded batch"])
    plans = [(draw(kinds), draw(st.permutations(range(rank + 1)))) for _ in INPUTS]
    return shape, plans


def lay_out(x, kind, order):
    if kind == "permuted":
        inverse = [order.index(i) for i in range(x.ndim)]
        return x.permute(order).contiguous().permute(inverse)
    if kind == "sliced":
        wide = torch.full([2 * n + 1 for n in x.shape], torch.nan, dtype=x.dtype, device=x.device)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if kind == "expanded":
        return x[..., :1].expand_as(x)
    return x[:1].expand_as(x) if kind == "expanded batch" else x


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(["paper", "meanflow"]))
def test_layouts(plan, preset):
    shape, plans = plan
    tensors, t, w = make(shape)
    tensors = [lay_out(x, *p) for x, p in zip(tensors, plans, strict=True)]
    for x, e in zip(
        value_and_gradients(consistency_loss, tensors, t, w, preset=preset, reduction="none"),
        value_and_gradients(eager_loss, tensors, t, w, preset=preset),
        strict=True,
    ):
        close(x, e, rtol=1e-11)
    close(normalized_tangent(*tensors, t), eager_tangent(*tensors, t, preset="paper"), rtol=1e-11)


def test_tangent_lies_as_output_does():
    tensors, t, _ = make((2, 3, 4, 5))
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    assert normalized_tangent(*tensors, t).stride() == tensors[0].stride()


def test_no_samples_and_no_elements():
    tensors, t, w = make((0, 3, 4))
    assert normalized_tangent(*tensors, t).shape == (0, 3, 4)
    loss, dF, dw = value_and_gradients(
        consistency_loss, tensors, t, w, preset="paper", reduction="none"
    )
    assert loss.shape == dw.shape == (0,)
    assert dF.shape == (0, 3, 4)
    assert consistency_loss(*tensors, t, w).isnan()
    tensors, t, _ = make((3, 0))
    with pytest.raises(ValueError, match=r"output: got .* an element or more a sample"):
        consistency_loss(*tensors, t)


# --- bad samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("nan_policy", ["propagate", "zero", None])
@pytest.mark.parametrize(
    ("preset", "where"),
    [(p, x) for p in PRESETS for x in INPUTS if (p, x) != ("meanflow", "x_t")],  # it reads no x_t
)
def test_a_bad_sample_touches_no_other(bad, where, nan_policy, preset):
    tensors, t, w = make((4, 3, 5))
    options = {"preset": preset, "nan_policy": nan_policy}
    good = value_and_gradients(consistency_loss, tensors, t, w, reduction="none", **options)
    tensors[INPUTS.index(where)][1, 2, 3] = bad
    actual = value_and_gradients(consistency_loss, tensors, t, w, reduction="none", **options)
    others, zero = [0, 2, 3], (nan_policy or ("zero" if preset == "rcm" else "")) == "zero"
    for a, g in zip(actual, good, strict=True):
        assert torch.equal(a[others], g[others])
        assert (a[1] == 0).all() if zero else a[1].isnan().all()
    mean = consistency_loss(*tensors, t, None if preset == "rcm" else w, **options)
    assert torch.allclose(mean, good[0][others].sum() / 4) if zero else mean.isnan()
    if preset != "meanflow":
        tangent = normalized_tangent(*tensors, t, **options)
        assert (tangent[1] == 0).all() if zero else tangent[1].isnan().all()
        assert tangent[others].isfinite().all()


def test_a_left_out_sample_has_no_second_derivative():
    tensors, t, w = make((3, 4))
    tensors[3][1, 0] = torch.nan
    tensors[0][2, 1] = torch.inf
    F, w = tensors[0].requires_grad_(), w.requires_grad_()
    weights = torch.ones(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss = consistency_loss(F, *tensors[1:], t, w, nan_policy="zero", reduction="none")
    first = torch.autograd.grad(loss, (F, w), weights, create_graph=True)
    for second in torch.autograd.grad(sum(x.sum() for x in first), (F, w, weights)):
        assert (second[1:] == 0).all()
        assert second[0].abs().sum() > 0


def test_saves_its_inputs_and_numbers_a_sample():
    tensors, t, w = make((4, 64, 64))
    F = tensors[0].requires_grad_()
    saved = {}
    inputs = {x.untyped_storage().data_ptr() for x in tensors}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        consistency_loss(F, *tensors[1:], t, w.requires_grad_())
    assert sum(n for pointer, n in saved.items() if pointer not in inputs) <= 4 * 8 * 32
