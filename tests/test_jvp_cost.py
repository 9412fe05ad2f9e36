"""What a pass costs: two products where PyTorch runs three, and the memory of one forward."""

import gc

import pytest
import torch
import torch.nn.functional as F
from networks import Ops, dit_case, stock_jvp
from torch import nn
from torch.utils.checkpoint import checkpoint

import scm_kernels
from benchmarks.memory import AllocatedBytes

torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def products(run) -> int:
    with Ops() as ops:
        run()
    return ops.products


# (network, shape of x, products of an ordinary forward)
LAYERS = {
    "linear": (nn.Linear(8, 4), (3, 8), 1),
    "linear without bias": (nn.Linear(8, 4, bias=False), (2, 3, 8), 1),
    "matmul": (lambda x: x @ torch.ones(8, 8), (3, 8), 1),
    "bmm": (lambda x: torch.bmm(x, torch.ones(2, 8, 5)), (2, 3, 8), 1),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", x, torch.ones(8, 8)), (3, 8), 1),
    "conv1d": (nn.Conv1d(8, 4, 3), (2, 8, 5), 1),
    "conv2d": (nn.Conv2d(8, 4, 3), (2, 8, 5, 5), 1),
    "conv3d": (nn.Conv3d(2, 4, 1), (2, 2, 3, 3, 3), 1),
    "conv_transpose2d": (nn.ConvTranspose2d(8, 4, 3), (2, 8, 5, 5), 1),
    "perceptron": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (3, 8), 2),
}


@pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_products_where_pytorch_runs_three(name, through):
    network, shape, layers = LAYERS[name]
    x, tx = torch.randn(2, *shape)
    assert products(lambda: network(x)) == layers
    ours = products(lambda: scm_kernels.jvp(network, (x,), (tx,), tangent_grad=through))
    assert ours == 2 * layers
    assert products(lambda: stock_jvp(network, (x,), (tx,))) >= 2 * layers
    if isinstance(network, nn.Linear):
        assert products(lambda: stock_jvp(network, (x,), (tx,))) == 3 * layers


def test_multihead_attention_projects_twice():
    """In and out projection, primal and tangent; attention itself is one op."""
    network, (x, tx) = Attention(), torch.randn(2, 2, 3, 8)
    with Ops() as ops:
        scm_kernels.jvp(network, (x,), (tx,))
    attention = products(
        lambda: torch.ops.scm_kernels.attention_jvp(
            *torch.randn(6, 2, 2, 3, 4), None, None, False, 0.5, False, ""
        )
    )
    assert ops.products == 4 + attention


def test_a_constant_operand_costs_no_product():
    x, tx = torch.randn(2, 3, 8)
    layer = nn.Linear(8, 8)
    constant = torch.randn(3, 8)
    assert products(lambda: scm_kernels.jvp(lambda x: x + layer(constant), (x,), (tx,))) == 1


def softmax(x):
    return x.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.mish, softmax])
def test_the_tangent_of_an_activation_is_one_operation(activation, dtype):
    x, tx = torch.randn(2, 3, 8).to(dtype)
    with Ops() as ops:
        scm_kernels.jvp(activation, (x,), (tx,))
    primal = next(i for i, name in enumerate(ops.names) if activation.__name__ in name)
    assert "backward" in ops.names[primal + 1]
    assert ops.names[primal + 2] == "alias"  # of what is made dual


def test_the_backward_through_the_output_is_that_of_a_forward():
    network, primals, tangents = dit_case(torch.float32)
    parameters = list(network.parameters())
    forward = network(*primals).sum()
    pass_ = scm_kernels.jvp(network, primals, tangents)[0].sum()
    want = products(lambda: torch.autograd.grad(forward, parameters))
    assert products(lambda: torch.autograd.grad(pass_, parameters)) <= want


# --- memory ---------------------------------------------------------------------------------------


def kept_and_peak(run) -> tuple[int, int]:
    gc.collect()
    with AllocatedBytes() as memory:
        results = run()
        kept = memory.kept
    del results
    return kept, memory.peak


@pytest.fixture(scope="module")
def passes():
    network, primals, tangents = dit_case(torch.float32, batch=4, tokens=96, depth=4, width=64)

    def ours(through):
        return scm_kernels.jvp(network, primals, tangents, tangent_grad=through)

    return {
        "forward": kept_and_peak(lambda: network(*primals)),
        "ours": kept_and_peak(lambda: ours(False)),
        "recorded": kept_and_peak(lambda: ours(True)),
        "pytorch": kept_and_peak(lambda: stock_jvp(network, primals, tangents)),
    }


def test_the_meter():
    """It counts what lives, not what is allocated, and no view twice."""
    weight = torch.randn(256, 256, requires_grad=True)
    kept, peak = kept_and_peak(lambda: (weight * 2).view(-1)[::2].sum() * 3)
    assert kept < 100
    assert 4 * 256**2 <= peak <= 2.1 * 4 * 256**2
    kept, _ = kept_and_peak(lambda: (weight * 2).sin())  # which saves its input
    assert kept == 2 * 4 * 256**2


def test_a_pass_keeps_no_more_than_a_forward(passes):
    """Within 10%, in which t_out is contained."""
    assert passes["ours"][0] <= 1.1 * passes["forward"][0]


def test_a_pass_that_records_the_tangent_keeps_far_more(passes):
    assert passes["recorded"][0] > 1.5 * passes["forward"][0]
    assert passes["pytorch"][0] > 2 * passes["forward"][0]
    assert passes["recorded"][0] < passes["pytorch"][0]


def test_peak_memory(passes):
    """On the way a pass holds a few tangents of the layer at hand, not those of the network."""
    assert passes["ours"][1] <= 1.35 * passes["forward"][1]
    assert passes["ours"][1] < 0.5 * passes["pytorch"][1]


CHAINS = {  # what a pass may hold at its peak, in units of an ordinary forward
    "elementwise": (lambda x, w: torch.tanh(x * w[0]) * w[1].sin(), 2.0),
    "linear": (F.linear, 1.5),
    "norms": (lambda x, w: F.rms_norm(F.layer_norm(x, (64,), w[0]), (64,), w[1]), 1.75),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x @ w, x @ w, x @ w), 1.5),
}


@pytest.mark.parametrize("name", CHAINS)
def test_no_graph_of_the_tangent_grows_on_the_way(name):
    """PyTorch's own, which records it, is beyond the bound."""
    layer, bound = CHAINS[name]
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(8)]

    def network(x):
        for weight in weights:
            x = layer(x, weight / 8)
        return x

    x, tx = torch.randn(2, 1, 1, 256, 64)
    forward, ours, pytorch = (
        kept_and_peak(run)[1]
        for run in (
            lambda: network(x),
            lambda: scm_kernels.jvp(network, (x,), (tx,)),
            lambda: stock_jvp(network, (x,), (tx,)),
        )
    )
    assert ours <= bound * forward < pytorch, f"{ours / forward:.2f}, {pytorch / forward:.2f}"


@pytest.mark.parametrize("inside", ["relu_", "add_", "view"])
def test_in_place_operations_keep_no_graph_of_the_tangent(inside):
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]

    def network(x):
        for weight in weights:
            x = F.linear(x, weight)
            if inside == "relu_":
                x = x.relu_()
            elif inside == "add_":
                x = x + 1
                x += weight[0]
            else:
                x = x.unflatten(1, (8, 8)).transpose(1, 2).flatten(1)
        return x

    x, tx = torch.randn(2, 64, 64)
    forward, _ = kept_and_peak(lambda: network(x))
    ours, _ = kept_and_peak(lambda: scm_kernels.jvp(network, (x,), (tx,)))
    assert ours <= forward + 1.1 * 4 * x.numel()  # and t_out


def test_a_checkpoint_around_a_jvp_costs_no_second_forward():
    """Its forward is that of the jvp alone."""
    weight = torch.randn(8, 8, requires_grad=True)
    x, tx = torch.randn(2, 8, 8)

    def run(x):
        return scm_kernels.jvp(lambda x: F.gelu(F.linear(x, weight)).tanh(), (x,), (tx,))

    counts = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        with Ops() as ops:
            call(x)
        counts.append(ops.names.count("gelu"))
    assert counts[0] == counts[1]
