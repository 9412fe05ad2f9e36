"""In-place operations and views of dual tensors inside `scm_kernels.jvp`: those of PyTorch's jvp.

The mode detaches tangents from their graphs on the way; a view has to stay a view, and a base has
to follow what is written to it.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import close, stock_jvp, true_jvp
from torch import nn

import scm_kernels

torch.manual_seed(0)
WEIGHT = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))


def set_item(x):
    y = x * WEIGHT[0]
    y[:, 0] = y[:, 1] * 2
    y[y > 1] = 0.5
    y[[0, 2]] = x[:2] @ WEIGHT
    return y @ WEIGHT


def scaled_view(x):
    y = x @ WEIGHT
    v = y[:, 0]
    v.mul_(2)
    return y, v


def chain_of_views(x):
    y = x @ WEIGHT
    v = y[:, :3].mul_(WEIGHT[0, 0])
    v.mul_(WEIGHT[1, 1])
    w = v[1:].add_(x[1:, :3])
    w.sin_()
    return y, v, w


def buffer(x):
    y = x.new_zeros(4, 6)
    y.add_(x * WEIGHT[0]).mul_(2).sin_()
    return y


def views_of_a_buffer(x):
    y = torch.zeros(4, 6, dtype=x.dtype)
    v = y[:, 0]
    v = v.copy_((x @ WEIGHT)[:, 1])
    v.mul_(WEIGHT[1, 1])
    v = v.add_(x[:, 2])
    v.sin_()
    y[:, 3:].copy_(x[:, :3])
    return y, v


def base_after_its_view(x):
    y = torch.zeros(4, 6, dtype=x.dtype)
    v = y[:, :3]
    v = v.copy_((x @ WEIGHT)[:, :3])
    y.mul_(WEIGHT[1])
    w = v.sin()
    y[:, 0] = 3.0
    return y, v, w


def accumulate(x):
    y = torch.zeros_like(x)
    for row in range(3):
        y += x * WEIGHT[row]
        y *= WEIGHT[row, 0]
    y -= x
    y /= 2
    return y


def rectified(x):
    y = (x @ WEIGHT).relu_()
    y = F.relu(y, inplace=True)
    y.masked_fill_(y > 2, 0.5)
    y.clamp_(max=1.5)
    return nn.Dropout(0.0, inplace=True)(nn.Hardtanh(inplace=True)(y))


def index_put(x):
    y = x @ WEIGHT
    y.index_put_((torch.tensor([0, 1]),), x[:2])
    y.index_add_(0, torch.tensor([0, 2]), x[:2])
    y.scatter_add_(1, torch.zeros(4, 1, dtype=torch.long), x[:, :1])
    return y


def einsum_view(x):
    y = x @ WEIGHT
    z = torch.einsum("ij->ji", y)
    z.mul_(WEIGHT[0, :, None])
    return y, z


def pieces(x):
    a, b, c = (x @ WEIGHT).split(2, dim=1)
    d, e = (x * WEIGHT[0]).chunk(2, dim=1)
    rows = (x @ WEIGHT).unbind(0)
    first, *_ = x * WEIGHT[1]
    return a * b, c + a, d - e, torch.stack(rows).sin(), first


def reshaped(x):
    y = (x @ WEIGHT).reshape(2, 2, 2, 3).permute(2, 0, 1, 3).flatten(1)
    y = y[None].expand(3, *y.shape).transpose(0, 1)[..., ::2]
    return y.contiguous().view(-1) * 2, y.unfold(-1, 2, 1), y.t() if y.ndim == 2 else y.mT


def expanded(x):
    row = (x @ WEIGHT)[:1].expand(4, 6)
    return (row * x).mul_(row), row


def transposed_in_place(x):
    y = x * WEIGHT[0]
    y.t_()
    y.unsqueeze_(0).squeeze_(0)
    return y


def dtypes(x):
    y = (x @ WEIGHT).float()
    y[0] = x[0].float()
    return y.double() @ WEIGHT


def complex_rotation(x):
    z = torch.view_as_complex((x @ WEIGHT).reshape(4, 3, 2))
    z = z * torch.polar(torch.ones_like(WEIGHT[0, :3]), WEIGHT[0, :3])
    z.mul_(1j)
    return torch.view_as_real(z).flatten(1), torch.fft.irfft(torch.fft.rfft(x) * WEIGHT[0, 0])


def detached(x):
    y = x * WEIGHT[0]
    z = y.detach().clone()
    z[0] = 1.0
    return y * z, y.data + y


FUNCTIONS = [
    set_item,
    scaled_view,
    chain_of_views,
    buffer,
    views_of_a_buffer,
    base_after_its_view,
    accumulate,
    rectified,
    index_put,
    einsum_view,
    pieces,
    reshaped,
    expanded,
    transposed_in_place,
    dtypes,
    complex_rotation,
    detached,
]


@pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])
@pytest.mark.parametrize("func", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_are_those_of_pytorch(func, through):
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
    want = stock_jvp(func, (x,), (tx,))
    got = scm_kernels.jvp(func, (x,), (tx,), tangent_grad=through)
    close(got, want, 1e-13)


@pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])
@pytest.mark.parametrize("func", FUNCTIONS, ids=lambda f: f.__name__)
def test_gradients_through_the_output_are_those_of_pytorch(func, through):
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)

    def gradient(jvp, **options):
        out, _ = jvp(func, (x,), (tx,), **options)
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((y * torch.arange(y.numel()).reshape(y.shape)).sum() for y in outs)
        return torch.autograd.grad(loss, WEIGHT)[0]

    try:
        want = gradient(stock_jvp)
    except RuntimeError as error:  # what it saved was overwritten: PyTorch's error is ours too
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(scm_kernels.jvp, tangent_grad=through)
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    close(gradient(scm_kernels.jvp, tangent_grad=through), want, 1e-12)


@pytest.mark.parametrize("split", ["chunk", "unbind", "iter"])
def test_writing_to_one_of_several_views_raises_as_in_pytorch(split):
    def func(x):
        y = x @ WEIGHT
        parts = {"chunk": lambda: y.chunk(2), "unbind": y.unbind, "iter": lambda: iter(y)}[split]()
        next(iter(parts)).mul_(2)
        return y

    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
    for jvp in (stock_jvp, scm_kernels.jvp):
        with pytest.raises(RuntimeError, match="view"):
            jvp(func, (x,), (tx,))


def test_parts_of_a_dual_tensor_are_found_out_again_once_it_is_written_to():
    """What a rule has made keeps its parts, of which a write may be no part of."""
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def function(x):
        y = x * w  # a rule's
        z = y[:2]
        z.mul_(x[:2])
        y.sin_()
        y = y + x
        y[1:] = x[1:] * 3
        return y * w

    out, t_out = scm_kernels.jvp(function, (x,), (tx,))
    truth = true_jvp(function, (x,), (tx,))
    close((out, t_out), truth)
    close(torch.autograd.grad(out.sum(), w), torch.autograd.grad(truth[0].sum(), w))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.ReLU(inplace=True)),
        lambda x: torch.einsum("bchw,dc->bdhw", x, torch.ones(3, 2)).mul_(2.0),
        lambda x: F.conv2d(x[0], torch.ones(3, 2, 1, 1)).div_(torch.tensor(2.0)),
        lambda x: (1 / (x.square() + 1)).mul_(2.0),
    ],
    ids=["group_norm", "einsum", "conv2d", "quotient"],
)
@pytest.mark.parametrize("tangent_grad", [False, True])
def test_writes_to_what_a_rule_has_made(network, tangent_grad):
    """A tangent may be a view that was made without a graph, or have what is written to in one."""
    x, tx = torch.randn(2, 2, 2, 5, 5)
    x.requires_grad_()
    ours = scm_kernels.jvp(network, (x,), (tx,), tangent_grad=tangent_grad)
    stock = stock_jvp(network, (x,), (tx,))
    close(tuple(ours), tuple(stock), 1e-5)
    close(*(torch.autograd.grad(y[tangent_grad].square().sum(), x)[0] for y in (ours, stock)), 1e-4)


NORMS = {
    "layer": lambda x, b: F.layer_norm(x, (6,), None, b),
    "group": lambda x, b: F.group_norm(x, 2, None, b),
    "batch": lambda x, b: F.batch_norm(x, torch.zeros(6), torch.ones(6), None, b),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tangent_grad", [False, True])
def test_writes_to_a_norm_of_a_constant_leave_its_bias(norm, tangent_grad):
    """Whose tangent is all that the result has for one."""

    def function(bias):
        y = NORMS[norm](torch.ones(1, 6), bias)
        y.mul_(3.0)
        return y, bias * 1.0

    bias, tangent = torch.randn(6), torch.ones(6)
    _, (t_out, t_bias) = scm_kernels.jvp(function, (bias,), (tangent,), tangent_grad=tangent_grad)
    close((t_out, t_bias, tangent), (torch.full((1, 6), 3.0), torch.ones(6), torch.ones(6)))


@pytest.mark.parametrize("tangent_grad", [False, True])
@pytest.mark.parametrize("outer", [1, 2])
def test_writes_inside_of_a_vmap_around_the_jvp(tangent_grad, outer):
    """Where a tangent may be a view, and does not tell."""
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)

    def network(x):
        y = F.silu(F.conv2d(x, weight), inplace=True)
        return torch.einsum("bchw,dc->bdhw", y, weight[..., 0, 0]).mul_(2.0)

    def function(jvp, **options):
        def run(x, tx):
            return jvp(network, (x,), (tx,), **options)

        for _ in range(outer):
            run = torch.func.vmap(run)
        return run(x, tx)

    x, tx = torch.randn(2, *(3, 2)[:outer], 1, 4, 5, 5)
    ours = function(scm_kernels.jvp, tangent_grad=tangent_grad)
    stock = function(stock_jvp)
    close(tuple(ours), tuple(stock), 1e-5)
    close(*(torch.autograd.grad(y[tangent_grad].sum(), weight)[0] for y in (ours, stock)), 1e-4)


@pytest.mark.parametrize("way", ["jvp", "fused"])
def test_the_data_of_a_parameter_may_be_set_inside(way):
    """Which what was computed inside would outlive the jvp in: it crashed."""
    layer, (x, t) = nn.Linear(4, 3), torch.randn(2, 2, 4)

    def f(x):
        layer.weight.data = torch.ones(3, 4) * 2
        return layer(x)

    def lost(x):
        layer.weight.data = x[:1].expand(3, 4)

    for _ in range(2):
        if way == "jvp":
            out, t_out = scm_kernels.jvp(f, (x,), (t,))
        else:
            with scm_kernels.fused():
                out, t_out = torch.func.jvp(f, (x,), (t,))
        torch.testing.assert_close(t_out, t @ torch.full((4, 3), 2.0))
        out.sum().backward()
    assert type(layer.weight.data) is torch.Tensor
    with pytest.raises(NotImplementedError, match=r"x\.data = y .* with a tangent"):
        scm_kernels.jvp(lost, (x,), (t,))
