"""`scm_kernels.jvp` of every function of its table, in every form of the call, against the truth.

The contract of the call is in `test_jvp_contract.py`, in-place operations are in
`test_jvp_inplace.py`, transforms of transforms in `test_jvp_transforms.py`, products and bytes in
`test_jvp_cost.py`.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from networks import check_jvp, stock_jvp, true_jvp
from torch import nn

import scm_kernels
from scm_kernels.transforms import arithmetic
from scm_kernels.transforms.rules import EAGER_RULES, RULES

torch.manual_seed(0)
PARAMETERS = {
    "square": torch.randn(6, 6),
    "wide": torch.randn(4, 6),
    "vector": torch.randn(6),
    "channels": torch.randn(4),
    "conv1d": torch.randn(4, 4, 3),
    "conv2d": torch.randn(4, 4, 3, 3),
    "conv3d": torch.randn(4, 2, 2, 1, 1),
}
X = {
    "rows": (4, 6),
    "batch": (2, 4, 6),
    "image": (2, 4, 5, 5),
    "video": (1, 4, 2, 3, 3),
    "tokens": (2, 3, 5, 4),
}


class Calls(nn.Module):
    """Parameters for one call, `self.call(self, x)`."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        for name, value in PARAMETERS.items():
            self.register_parameter(name, nn.Parameter(value.double()))

    def forward(self, x):
        return torch.sin(self.call(self, torch.tanh(x)))


# (function of the table, shape of x, call)
CALLS = [
    (F.linear, "batch", lambda p, x: F.linear(x, p.wide)),
    (F.linear, "batch", lambda p, x: F.linear(x, p.wide, p.channels)),
    (F.linear, "batch", lambda p, x: F.linear(x, p.wide, None)),
    (F.linear, "batch", lambda p, x: F.linear(input=x, weight=p.wide, bias=p.channels)),
    (F.linear, "batch", lambda p, x: F.linear(bias=None, weight=p.wide, input=x)),
    (F.linear, "batch", lambda p, x: F.linear(x[0, 0], p.wide, bias=p.channels)),
    (F.linear, "rows", lambda p, x: F.linear(p.square, x)),  # a dual weight
    (F.linear, "rows", lambda p, x: F.linear(p.square, p.wide, x[:, 0])),  # a dual bias
    (F.linear, "rows", lambda p, x: F.linear(x, x, x[:, 0])),
    (F.conv1d, "batch", lambda p, x: F.conv1d(x, p.conv1d)),
    (F.conv1d, "batch", lambda p, x: F.conv1d(x, p.conv1d, p.channels, 2, 1)),
    (F.conv1d, "batch", lambda p, x: F.conv1d(x, p.conv1d, bias=p.channels, padding="same")),
    (F.conv1d, "batch", lambda p, x: F.conv1d(x[0], p.conv1d, dilation=2)),  # no batch
    (F.conv2d, "image", lambda p, x: F.conv2d(x, p.conv2d, None, 1, 1)),
    (F.conv2d, "image", lambda p, x: F.conv2d(x, x[:, :, :2, :2], p.channels[:2])),
    (F.conv2d, "image", lambda p, x: F.conv2d(x, p.conv2d[:, :1], padding=1, groups=4)),
    (F.conv2d, "image", lambda p, x: F.conv2d(x.to(memory_format=torch.channels_last), p.conv2d)),
    (F.conv3d, "video", lambda p, x: F.conv3d(x, p.conv3d, bias=p.channels, groups=2)),
    (F.conv_transpose1d, "batch", lambda p, x: F.conv_transpose1d(x, p.conv1d, p.channels, 2)),
    (
        F.conv_transpose2d,
        "image",
        lambda p, x: F.conv_transpose2d(x, p.conv2d, stride=2, padding=1, output_padding=1),
    ),
    (F.conv_transpose3d, "video", lambda p, x: F.conv_transpose3d(x, p.conv3d, padding=0)),
    (torch.matmul, "batch", lambda p, x: torch.matmul(x, p.square)),
    (torch.matmul, "batch", lambda p, x: torch.matmul(input=p.square, other=x.mT)),
    (torch.matmul, "batch", lambda p, x: torch.matmul(x, x.sin().mT)),
    (torch.matmul, "rows", lambda p, x: torch.matmul(x[0], x[1])),  # a dot product
    (torch.mm, "rows", lambda p, x: torch.mm(x, p.square) + torch.mm(x, mat2=p.square)),
    (torch.bmm, "batch", lambda p, x: torch.bmm(x, x.cos().mT)),
    (torch.linalg.matmul, "batch", lambda p, x: torch.linalg.matmul(x, x.cos().mT)),
    (torch.einsum, "batch", lambda p, x: torch.einsum("bij,jk->bik", x, p.square)),
    (torch.einsum, "batch", lambda p, x: torch.einsum("bij,jk,bkl->bil", x, p.square, x.mT)),
    (torch.einsum, "batch", lambda p, x: torch.einsum("bij,jk->bik", [x, p.square])),
    (torch.einsum, "batch", lambda p, x: torch.einsum("...ij->...ji", x)),
    (torch.einsum, "batch", lambda p, x: torch.einsum(x, [0, 1, 2], p.square, [2, 3], [0, 1, 3])),
    (
        torch.Tensor.matmul,
        "batch",
        lambda p, x: x.matmul(p.square) + p.square.matmul(other=x[0].T)[0, 0],
    ),
    (torch.Tensor.mm, "rows", lambda p, x: x.mm(p.square) + x.mm(mat2=p.square)),
    (torch.Tensor.bmm, "batch", lambda p, x: x.bmm(x.cos().mT)),
    (torch.Tensor.__matmul__, "batch", lambda p, x: x @ p.square @ x.mT),
    (torch.Tensor.__matmul__, "rows", lambda p, x: p.wide @ x.T),
    (torch.Tensor.__rmatmul__, "rows", lambda p, x: x.T.__rmatmul__(p.wide)),
    (F.layer_norm, "batch", lambda p, x: F.layer_norm(x, (6,))),
    (F.layer_norm, "batch", lambda p, x: F.layer_norm(x, (6,), p.vector, p.vector, 1e-2)),
    (F.layer_norm, "batch", lambda p, x: F.layer_norm(x, normalized_shape=[4, 6], eps=1e-3)),
    (F.layer_norm, "batch", lambda p, x: F.layer_norm(p.square, (6,), x[0, 0], bias=x[0, 1])),
    (F.layer_norm, "batch", lambda p, x: F.layer_norm(p.square, (6,), bias=x[0, 1])),
    (torch.layer_norm, "batch", lambda p, x: torch.layer_norm(x, (6,), p.vector)),
    (F.rms_norm, "batch", lambda p, x: F.rms_norm(x, (6,))),
    (F.rms_norm, "batch", lambda p, x: F.rms_norm(x, (6,), p.vector, 1e-2)),
    (F.rms_norm, "batch", lambda p, x: F.rms_norm(x, (4, 6), weight=x[0], eps=1e-6)),
    (torch.rms_norm, "batch", lambda p, x: torch.rms_norm(x, (6,), p.vector)),
    (F.group_norm, "image", lambda p, x: F.group_norm(x, 2)),
    (F.group_norm, "image", lambda p, x: F.group_norm(x, 2, p.channels, p.channels, 1e-2)),
    (
        F.group_norm,
        "image",
        lambda p, x: F.group_norm(x.to(memory_format=torch.channels_last), 2, p.channels),
    ),
    (F.group_norm, "rows", lambda p, x: F.group_norm(x, num_groups=3, bias=p.vector)),
    (F.group_norm, "image", lambda p, x: F.group_norm(x, 4, weight=x[0, :, 0, 0])),
    (torch.group_norm, "image", lambda p, x: torch.group_norm(x, 2, p.channels)),
    (F.batch_norm, "image", lambda p, x: F.batch_norm(x, None, None, p.channels, training=True)),
    (
        F.batch_norm,
        "rows",
        lambda p, x: F.batch_norm(x, p.vector.detach(), p.vector.detach().exp(), bias=p.vector),
    ),
    (F.instance_norm, "image", lambda p, x: F.instance_norm(x, weight=p.channels)),
    (
        F.scaled_dot_product_attention,
        "tokens",
        lambda p, x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
    ),
    (
        F.scaled_dot_product_attention,
        "tokens",
        lambda p, x: F.scaled_dot_product_attention(
            query=x, key=x, value=x, is_causal=True, scale=0.3
        ),
    ),
    (
        scm_kernels.scaled_dot_product_attention,
        "tokens",
        lambda p, x: scm_kernels.scaled_dot_product_attention(x @ p.square[:4, :4], x, x),
    ),
    (
        F.multi_head_attention_forward,
        "batch",
        lambda p, x: F.multi_head_attention_forward(
            x, x, x, 6, 2, torch.cat([p.square] * 3), None, None, None, False, 0.0, p.square, None
        )[0],
    ),
]


def arithmetic_calls():
    def forms(function, p, x):
        a, b = x.exp(), p.vector.exp()
        numbers = function(a, 1.5) + function(a, 2)
        return function(a, b) - 2 * function(b, a) + 3 * function(a, a[:1].sin()) + numbers

    others = (F.silu, F.gelu, F.mish, F.hardsigmoid)
    others += (F.softmax, torch.softmax, torch.Tensor.softmax)
    for function in arithmetic.RULES:
        if function not in others:
            yield function, "batch", functools.partial(forms, function)
    yield F.glu, "batch", lambda p, x: F.glu(x @ p.square)[:, :2] + F.glu(x, dim=1)[..., :3]
    yield F.glu, "image", lambda p, x: F.glu(input=x * 4, dim=-3)
    yield F.hardsigmoid, "batch", lambda p, x: F.hardsigmoid(x @ p.square * 4) * x
    yield F.silu, "batch", lambda p, x: F.silu(x @ p.square) + F.silu(x.clone(), inplace=True)
    yield F.mish, "batch", lambda p, x: F.mish(x @ p.square) + F.mish(x.clone(), inplace=True)
    yield F.gelu, "batch", lambda p, x: F.gelu(x @ p.square) + F.gelu(x, approximate="tanh")


def softmax_calls():
    def forms(function, p, x):
        wide = function(x.float(), 0, dtype=torch.float64).to(x.dtype)
        return function(x @ p.square, -1) + function(x * 2, dim=1) + wide

    for function in (F.softmax, torch.softmax, torch.Tensor.softmax):
        yield function, "batch", functools.partial(forms, function)
    yield F.softmax, "batch", lambda p, x: F.softmax(input=x, dim=0) * F.softmax(x, -1, 3)


CALLS += [*arithmetic_calls(), *softmax_calls()]


def make(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *X[shape], generator=generator, dtype=torch.float64).to(dtype)


def tolerance(function):
    return 1e-7 if function is F.hardsigmoid else 1e-12  # its gradient has 1 / 6 in float32


def name(case):
    return f"{getattr(case[0], '__name__', case[0])}-{case[1]}"


@pytest.mark.parametrize("case", CALLS, ids=name)
def test_every_form_of_every_rule(case):
    function, shape, call = case
    network = Calls(call)
    x, tx = make(shape)
    check_jvp(network, (x,), (tx,), network.parameters(), rtol=tolerance(function))


def test_every_rule_is_tested():
    tested = {function for function, _, _ in CALLS}
    assert not {*RULES, *EAGER_RULES} - tested


@pytest.mark.parametrize("case", CALLS, ids=name)
def test_parameters_as_primals(case):
    """`functional_call`: weights and biases are dual, x is or is not."""
    function, shape, call = case
    network, rtol = Calls(call), tolerance(function)
    x, tx = make(shape)
    weights = {k: v.detach() for k, v in network.named_parameters()}
    directions = {k: torch.randn_like(v) for k, v in weights.items()}

    def both(weights, x):
        return torch.func.functional_call(network, weights, (x,))

    check_jvp(both, (weights, x), (directions, tx), rtol=rtol)
    check_jvp(lambda weights: both(weights, x), (weights,), (directions,), rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CALLS, ids=name)
def test_low_precision_is_as_near_to_the_truth_as_pytorch(case, dtype):
    _, shape, call = case
    network = Calls(call).to(dtype)
    x, tx = make(shape, dtype)
    out, t_out = scm_kernels.jvp(network, (x,), (tx,))
    assert out.dtype == t_out.dtype == dtype
    stock = true_jvp if case[0] is F.glu else stock_jvp  # PyTorch has none in half types
    eager = stock(network, (x,), (tx,))
    truth = true_jvp(network.double(), (x.double(),), (tx.double(),))
    eps = torch.finfo(dtype).eps
    for got, lo, true in zip((out, t_out), eager, truth, strict=True):
        error, lo_error = ((a.double() - true).abs().max() for a in (got, lo))
        assert error <= 2 * lo_error + 8 * eps * true.abs().max()


def test_rms_norm_takes_its_epsilon_from_the_dtype_it_computes_in():
    """Of small values in half precision the epsilon decides: float32's, not that of the input."""
    x, tx = 1e-2 * torch.randn(2, 4, 16, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        primals, tangents = (x.to(dtype),), (tx.to(dtype),)

        def norm(x):
            return F.rms_norm(x, (16,))

        want = stock_jvp(norm, primals, tangents)
        got = scm_kernels.jvp(norm, primals, tangents)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
