"""`scm_kernels.jvp` of every function of its table, in every form of the call, against the truth.

In-place operations are in `test_jvp_inplace.py`, transforms of transforms in
`test_jvp_transforms.py`, products and bytes in `test_jvp_cost.py`.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import check_jvp, close, dit_case, stock_jvp, true_jvp
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

    for function in arithmetic.RULES:
        if function in (F.silu, F.gelu):
            continue
        yield function, "batch", functools.partial(forms, function)
    yield F.silu, "batch", lambda p, x: F.silu(x @ p.square) + F.silu(x.clone(), inplace=True)
    yield F.gelu, "batch", lambda p, x: F.gelu(x @ p.square) + F.gelu(x, approximate="tanh")


CALLS += arithmetic_calls()


def make(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *X[shape], generator=generator, dtype=torch.float64).to(dtype)


def name(case):
    return f"{getattr(case[0], '__name__', case[0])}-{case[1]}"


@pytest.mark.parametrize("case", CALLS, ids=name)
def test_every_form_of_every_rule(case):
    _, shape, call = case
    network = Calls(call)
    x, tx = make(shape)
    check_jvp(network, (x,), (tx,), network.parameters(), rtol=1e-12)


def test_every_rule_is_tested():
    tested = {function for function, _, _ in CALLS}
    assert not {*RULES, *EAGER_RULES} - tested


@pytest.mark.parametrize("case", CALLS, ids=name)
def test_parameters_as_primals(case):
    """`functional_call`: weights and biases are dual, x is or is not."""
    _, shape, call = case
    network = Calls(call)
    x, tx = make(shape)
    weights = {k: v.detach() for k, v in network.named_parameters()}
    directions = {k: torch.randn_like(v) for k, v in weights.items()}

    def both(weights, x):
        return torch.func.functional_call(network, weights, (x,))

    check_jvp(both, (weights, x), (directions, tx), rtol=1e-12)
    check_jvp(lambda weights: both(weights, x), (weights,), (directions,), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CALLS, ids=name)
def test_low_precision_is_as_near_to_the_truth_as_pytorch(case, dtype):
    _, shape, call = case
    network = Calls(call).to(dtype)
    x, tx = make(shape, dtype)
    out, t_out = scm_kernels.jvp(network, (x,), (tx,))
    assert out.dtype == t_out.dtype == dtype
    eager = stock_jvp(network, (x,), (tx,))
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


# --- the contract of torch.func.jvp ---------------------------------------------------------------


def test_a_whole_network():
    network, primals, tangents = dit_case()
    check_jvp(network, primals, tangents, network.parameters())


@pytest.mark.parametrize("moving", [m for m in itertools.product((0, 1), repeat=2) if any(m)])
def test_partial_tangents(moving):
    """What does not move is closed over, or moves by zero: the same result."""
    network, primals, tangents = dit_case()
    tangents = tuple(t * m for t, m in zip(tangents, moving, strict=True))
    want = scm_kernels.jvp(network, primals, tangents)
    indices = [i for i, m in enumerate(moving) if m]

    def some(*args):
        return network(*(args[indices.index(i)] if i in indices else primals[i] for i in range(2)))

    got = scm_kernels.jvp(
        some, tuple(primals[i] for i in indices), tuple(tangents[i] for i in indices)
    )
    close(got, want)


def test_aux():
    network, primals, tangents = dit_case()

    def func(x, t):
        out = network(x, t)
        return out, {"mean": out.mean(), "rows": torch.tensor(x.shape[0])}

    for through in (False, True):
        out, t_out, aux = scm_kernels.jvp(
            func, primals, tangents, has_aux=True, tangent_grad=through
        )
        close((out, t_out), stock_jvp(network, primals, tangents))
        close(aux, {"mean": out.mean(), "rows": torch.tensor(2)})
    with pytest.raises(RuntimeError, match="tuple"):
        scm_kernels.jvp(network, primals, tangents, has_aux=True)


def test_pytrees_in_and_out():
    network, (x, t), (tx, tt) = dit_case()

    def func(inputs, t):
        out = network(inputs["x"], t[0])
        return {"out": out, "parts": [out.sum(), (out.cos(),)]}

    primals, tangents = ({"x": x}, [t]), ({"x": tx}, [tt])
    check_jvp(func, primals, tangents, network.parameters())


def test_functions_of_more_than_the_inputs_and_of_less():
    x, tx = make("rows")
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    cases = [
        lambda x: (x, torch.ones(3)),  # a constant
        lambda x: (x, weight * 2),  # which may have a graph
        lambda x: x,  # the input
        lambda x: (x @ weight, (x @ weight).argmax(-1), x > 0),  # integers and bools
        lambda x: (x @ weight).max(-1),  # a named tuple
        lambda x: (x @ weight).topk(2),
        lambda x: list((x @ weight).unbind()),
        lambda x: (x.detach() @ weight).sin() + x,  # detached inside
    ]
    for func in cases:
        want = stock_jvp(func, (x,), (tx,))
        for through in (False, True):
            close(scm_kernels.jvp(func, (x,), (tx,), tangent_grad=through), want)
    close(scm_kernels.jvp(lambda x, y: y * 2, (x, x), (tx, tx)), (2 * x, 2 * tx))
    _, t_out = scm_kernels.jvp(lambda x: torch.ones(2), (x,), (tx,))
    assert torch.equal(t_out, torch.zeros(2))


def test_dropout_masks_primal_and_tangent_alike():
    network = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.GELU(), nn.Linear(32, 6)).double()
    x, tx = make("rows")
    torch.manual_seed(3)
    want = stock_jvp(network, (x,), (tx,))
    torch.manual_seed(3)
    close(scm_kernels.jvp(network, (x,), (tx,)), want)


# --- graphs ---------------------------------------------------------------------------------------


def test_the_tangent_is_detached_unless_asked_for():
    network, (x, t), (tx, tt) = dit_case()
    x, tx = x.requires_grad_(), tx.requires_grad_()
    out, t_out = scm_kernels.jvp(network, (x, t), (tx, tt))
    assert out.requires_grad
    assert not t_out.requires_grad
    assert torch.autograd.grad(out.sum(), [x, tx], allow_unused=True)[1] is None
    out, t_out = scm_kernels.jvp(network, (x, t), (tx, tt), tangent_grad=True)
    assert t_out.requires_grad
    want = torch.autograd.grad(true_jvp(network, (x, t), (tx, tt))[1].square().sum(), [x, tx])
    close(torch.autograd.grad(t_out.square().sum(), [x, tx]), tuple(want))


def test_under_no_grad_and_inference_mode():
    network, primals, tangents = dit_case()
    want = stock_jvp(network, primals, tangents)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = scm_kernels.jvp(network, primals, tangents)
        assert not any(x.requires_grad for x in got)
        close([x.clone() for x in got], [x.detach() for x in want])


def test_no_grad_inside():
    network, primals, tangents = dit_case()

    def func(x, t):
        with torch.no_grad():
            h = network(x, t)
        return network.embed(h[..., :2])

    check_jvp(func, primals, tangents, network.parameters())


def test_double_backward():
    network, (x, t), (tx, tt) = dit_case()
    x = x.requires_grad_()

    def second(jvp, **options):
        out, t_out = jvp(network, (x, t), (tx, tt), **options)
        (grad,) = torch.autograd.grad((out * t_out).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(network.parameters()))

    close(second(scm_kernels.jvp, tangent_grad=True), second(true_jvp))


def test_expanded_primals():
    """One time for a whole batch: PyTorch's jvp wants its tangent expanded too."""
    network, (x, _), (tx, tt) = dit_case()
    t = torch.tensor([0.3], dtype=torch.float64)
    for direction in (tt, tt[:1].expand(2)):
        want = stock_jvp(network, (x, t.repeat(2)), (tx, direction.clone()))
        close(scm_kernels.jvp(network, (x, t.expand(2)), (tx, direction)), want)
        close(scm_kernels.jvp(network, (x, t.repeat(2)), (tx, direction)), want)


# --- bad arguments --------------------------------------------------------------------------------

ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, (ONE,), (ONE,)), TypeError, "func: got NoneType None, expected a callable"),
        ((torch.sin, ONE, (ONE,)), TypeError, "primals: got a float32 tensor .* expected a tuple"),
        ((torch.sin, (ONE,), [ONE]), TypeError, "(?s)tangents: got list .* expected a tuple"),
        ((torch.sin, (), ()), TypeError, "primals: got tuple .* expected a tuple, one entry"),
        ((torch.sin, (ONE,), (ONE, ONE)), ValueError, "(?s)tangents: got the structure .* exp"),
        ((torch.sin, ({"a": ONE},), ({"b": ONE},)), ValueError, "tangents: got the structure"),
        ((torch.sin, (1.0,), (1.0,)), TypeError, r"primals\[0\]: got float 1.0, expected a tensor"),
        ((torch.sin, (ONE,), (None,)), TypeError, r"tangents\[0\]: got NoneType"),
        ((torch.sin, (ONE.int(),), (ONE.int(),)), TypeError, r"primals\[0\]: .*int32.* expected"),
        ((torch.add, (ONE, ONE), (ONE, ONE[0])), ValueError, r"tangents\[1\]: .*\[3\].*\[2, 3\]"),
        ((torch.sin, (ONE,), (ONE.double(),)), TypeError, r"tangents\[0\]: .*float64.*float32"),
        ((torch.sin, (ONE.to_sparse(),), (ONE,)), TypeError, r"primals\[0\]: .*sparse_coo.*dense"),
        ((torch.sin, (ONE,), (ONE.to_sparse(),)), TypeError, r"tangents\[0\]: .*sparse_coo.*dense"),
        ((torch.sin, (ONE,), (ONE.to("meta"),)), ValueError, r"tangents\[0\]: .*meta.*cpu"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        scm_kernels.jvp(*args)
