"""`torch.compile(fullgraph=True)` around `scm_kernels.jvp` and `fused()`, and inside of them."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import close, dit_case, gradients, layer_norm, stock_jvp, true_jvp
from torch import nn
from torch.utils.checkpoint import checkpoint

import scm_kernels

AOT, INDUCTOR = "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Function(nn.Module):
    """A function of x [2, 4, 8] and of a weight [8, 8]."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.function(x, self.weight)


class Multihead(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(8, 2, batch_first=True), call

    def forward(self, x):
        return self.attention(x, x, x, **self.call)[0]


def attend(x, weight, **options):
    q, k = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in (x @ weight, x))
    return F.scaled_dot_product_attention(q, k, k.sin() * weight[0, :4], **options)


def convolutional():
    return nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.InstanceNorm1d(4, affine=True),
        nn.ConvTranspose1d(4, 4, 3, padding=1),
    )


def in_place(x, weight):
    y = (x @ weight).relu_()
    y[:, 0] = y[:, 1] * 2
    v = y[:, 2]
    v.mul_(3)
    buffer = torch.zeros_like(y)
    buffer[:, :2].copy_(y[:, :2])
    return y + buffer


def norms_in_channels_last(x, w):
    """What the compiler believes of the strides of PyTorch's group norm is not true here."""
    x = (x * w[0]).unflatten(2, (2, 4)).to(memory_format=torch.channels_last)
    return F.group_norm(F.group_norm(x, 1).sin(), 1)


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)


MASK = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) > 0.3
PADDING = torch.arange(4) >= torch.tensor([[4], [2]])
BIAS = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

NETWORKS = {
    "layer_norm": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8)
    ),
    "rms_norm": lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8, bias=False), nn.RMSNorm(8)),
    "convolutions": convolutional,
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Conv1d(4, 4, 1)),
    "group_norm": lambda: Function(norms_in_channels_last),
    "multihead": lambda: Multihead(need_weights=False),
    "multihead weights": Multihead,
    "multihead padding": lambda: Multihead(need_weights=False, key_padding_mask=PADDING),
    "encoder": encoder,
    "attention": lambda: Function(attend),
    "causal": lambda: Function(lambda x, w: attend(x, w, is_causal=True)),
    "bool mask": lambda: Function(lambda x, w: attend(x, w, attn_mask=MASK)),
    "float mask": lambda: Function(lambda x, w: attend(x, w, attn_mask=BIAS, scale=0.3)),
    "einsum": lambda: Function(lambda x, w: torch.einsum("bnd,de->bne", x, w).sin()),
    "elementwise": lambda: Function(lambda x, w: torch.tanh(x * w[0]) * w[1]),
    "constant": lambda: Function(lambda x, w: ((x @ w).sin(), w * 2)),
    "tree": lambda: Function(lambda x, w: {"a": (x @ w).sin(), "b": [x]}),
    "jvp inside": lambda: Function(
        lambda x, w: torch.func.jvp(lambda x: torch.tanh(x @ w), (x,), (x.sin(),))[1]
    ),
    "vmap inside": lambda: Function(lambda x, w: torch.vmap(lambda x: torch.tanh(x * w[0]))(x)),
}
# What no other test of this file compiles with both values of tangent_grad.
BOTH_WAYS = ("layer_norm", "attention", "jvp inside")


def ways(network):
    """Functions of (x, tx): the three ways to run the network's jvp."""

    def detached(x, tx):
        return scm_kernels.jvp(network, (x,), (tx,))

    def recorded(x, tx):
        return scm_kernels.jvp(network, (x,), (tx,), tangent_grad=True)

    def fused(x, tx):
        with scm_kernels.fused():
            return torch.func.jvp(network, (x,), (tx,))

    return detached, recorded, fused


def check_compiled(network, backend, way, *, through):
    network = network.double()
    parameters = list(network.parameters())
    x, tx = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    compiled = torch.compile(ways(network)[way], backend=backend, fullgraph=True)
    for shift in (0.0, 0.5):  # the second call runs what the first has compiled
        truth = true_jvp(network, (x + shift,), (tx,))
        result = compiled(x + shift, tx)
        close(tuple(result), tuple(truth), 1e-11)
        want = gradients(*truth, parameters, through_tangent=through)
        close(gradients(*result, parameters, through_tangent=through), want, 1e-10, "gradient")


@pytest.mark.parametrize("name", NETWORKS)
def test_recorded(name):
    check_compiled(NETWORKS[name](), AOT, 1, through=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "multihead", "attention", "tree"])
def test_recorded_by_inductor(name):
    check_compiled(NETWORKS[name](), "inductor", 1, through=True)


@pytest.mark.parametrize("backend", [AOT, INDUCTOR])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_detached(name, backend):
    check_compiled(NETWORKS[name](), backend, 0, through=False)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_fused(name):
    check_compiled(NETWORKS[name](), AOT, 2, through=True)


@pytest.mark.parametrize("way", [0, 1, 2], ids=["detached", "recorded", "fused"])
def test_in_place_operations(way):
    """Values; PyTorch cannot differentiate this function in reverse."""
    network = Function(in_place).double().requires_grad_(False)
    x, tx = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    compiled = torch.compile(ways(network)[way], backend=AOT, fullgraph=True)
    close(compiled(x, tx), stock_jvp(network, (x,), (tx,)))


@pytest.mark.parametrize("backend", [AOT, INDUCTOR])
def test_a_diffusion_transformer(backend):
    network, primals, tangents = dit_case(depth=1)
    parameters = list(network.parameters())

    @torch.compile(backend=backend, fullgraph=True)
    def step(primals, tangents):
        return scm_kernels.jvp(network, primals, tangents)

    truth = true_jvp(network, primals, tangents)
    result = step(primals, tangents)
    close(tuple(result), tuple(truth), 1e-11)
    assert not result[1].requires_grad
    want = gradients(*truth, parameters, through_tangent=False)
    close(gradients(*result, parameters, through_tangent=False), want, 1e-10)


def test_lengths_that_change():
    network = Function(attend).double()

    @torch.compile(backend=AOT, fullgraph=True, dynamic=True)
    def step(x, tx):
        return scm_kernels.jvp(network, (x,), (tx,))

    for batch, tokens in ((2, 5), (3, 7)):
        x, tx = torch.randn(2, batch, tokens, 8, dtype=torch.float64)
        close(step(x, tx), true_jvp(network, (x,), (tx,)))


def test_primals_that_are_views():
    """PyTorch's own compiled jvp fails at a view of a primal that is itself a view."""

    @torch.compile(backend=AOT, fullgraph=True)
    def step(x, t, tx, tt):
        return scm_kernels.jvp(lambda x, t: (x * t[:, None]).reshape(-1).sin(), (x, t), (tx, tt))

    (x, tx), (t, tt) = torch.randn(2, 4, 8), torch.rand(2, 4)
    want = stock_jvp(lambda x, t: (x * t[:, None]).reshape(-1).sin(), (x, t), (tx, tt))
    close(step(x, t, tx, tt), want, 1e-6)
    close(step(x, t[:1].expand(4), tx, tt)[0], (x * t[0]).reshape(-1).sin(), 1e-6)


def test_has_aux():
    network = nn.Linear(8, 8).double()
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)

    @torch.compile(backend=AOT, fullgraph=True)
    def step(x, tx):
        def func(x):
            out = network(x)
            return out, out.mean()

        return scm_kernels.jvp(func, (x,), (tx,), has_aux=True)

    out, t_out, aux = step(x, tx)
    close((out, t_out), true_jvp(network, (x,), (tx,)))
    close(aux, out.mean())


def test_a_gate_whose_tangent_is_recorded():
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)

    @torch.compile(backend=AOT, fullgraph=True)
    def step(x, tx):
        return scm_kernels.jvp(lambda x: F.glu(x @ weight), (x,), (tx,), tangent_grad=True)

    truth, result = true_jvp(lambda x: F.glu(x @ weight), (x,), (tx,)), step(x, tx)
    close(result, truth)
    close(*(gradients(*x, [weight], through_tangent=True) for x in (result, truth)))


def test_gradient_of_a_jvp_inside():
    weight = torch.randn(8, 8, dtype=torch.float64)
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)

    def network(w, x):
        return torch.tanh(F.layer_norm(x @ w, (8,), w[0])) @ w

    def total(jvp, w, **options):
        out, t_out = jvp(lambda x: network(w, x), (x,), (tx,), **options)
        return (out * t_out).sum()

    @torch.compile(backend=AOT, fullgraph=True)
    def gradient(w):
        return torch.func.grad(lambda w: total(scm_kernels.jvp, w, tangent_grad=True))(w)

    want = torch.func.grad(lambda w: total(true_jvp, w))(weight)
    close(gradient(weight), want)


@pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])
def test_a_jvp_of_a_jvp_is_right_or_raises(through):
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    x, tx = (torch.randn(4, 8, dtype=torch.float64) for _ in range(2))  # not views of one tensor

    def twice(inner, **options):
        def once(x):
            return inner(lambda x: torch.tanh(layer_norm(x, (8,)) @ weight), (x,), (tx,), **options)

        return torch.func.jvp(once, (x,), (tx,))

    compiled = torch.compile(twice, backend=AOT, fullgraph=True)
    if through:
        close(compiled(scm_kernels.jvp, tangent_grad=True), twice(torch.func.jvp))
    else:
        with pytest.raises(RuntimeError, match="NotImplementedError"):
            compiled(scm_kernels.jvp)


def test_bad_arguments_raise():
    compiled = torch.compile(scm_kernels.jvp, backend=AOT, fullgraph=True)
    with pytest.raises((ValueError, RuntimeError), match=r"ValueError|tangents"):
        compiled(torch.sin, (torch.ones(3),), (torch.ones(2),))


# --- compiled parts inside of a jvp ---------------------------------------------------------------


def small(x):
    return torch.tanh(F.layer_norm(F.linear(x, WEIGHT), (8,), WEIGHT[0])) @ WEIGHT


def attending(x):
    q = F.linear(x, WEIGHT).unflatten(1, (2, 4)).transpose(0, 1)
    return F.scaled_dot_product_attention(q, q, q).sum(0)


WEIGHT = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double())


def dual_level(func, x, tx):
    with scm_kernels.fused(), forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(func(forward_ad.make_dual(x, tx))))


def fused_jvp(func, x, tx):
    with scm_kernels.fused():
        return torch.func.jvp(func, (x,), (tx,))


def ours(func, x, tx):
    return scm_kernels.jvp(func, (x,), (tx,))


@pytest.mark.parametrize("warm", ["cold", "warm", "warm without grad", "warm in the level"])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
@pytest.mark.parametrize("way", [ours, dual_level], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), AOT, INDUCTOR])
def test_a_compiled_function_inside_is_right_or_raises(backend, way, fullgraph, warm):
    """Never a silent zero, even where the function was compiled for plain tensors before."""
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)
    functions = (small, attending) if backend == "eager" else (small,)
    for func in functions:
        torch._dynamo.reset()
        compiled = torch.compile(func, backend=backend, fullgraph=fullgraph)
        if warm == "warm":
            compiled(x)
        elif warm == "warm without grad":
            with torch.no_grad():
                compiled(x)

        def inside(x, compiled=compiled):
            if warm == "warm in the level":
                compiled(torch.ones(4, 8, dtype=torch.float64))
            return compiled(x)

        with torch.set_grad_enabled(warm != "warm without grad"):
            try:
                got = way(inside, x, tx)
            except (RuntimeError, NotImplementedError):
                assert fullgraph or warm == "warm in the level", "a graph break falls back to eager"
                continue
        close([y.detach() for y in got], [y.detach() for y in true_jvp(func, (x,), (tx,))])


@pytest.mark.parametrize("way", [ours, fused_jvp, dual_level], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["eager", AOT])
def test_graph_breaks_inside_keep_every_tangent(way, backend):
    """Dynamo must not compile a rule by itself: it does not see the tangents of its arguments."""
    x, tx = torch.randn(2, 2, 4, 8, dtype=torch.float64)

    def func(x):
        shift = F.linear(F.silu(x[:, 0]), WEIGHT)[:, None]
        return F.layer_norm(x, (8,)) * (1 + shift) + shift

    compiled = torch.compile(func, backend=backend)
    truth = true_jvp(func, (x,), (tx,))
    for _ in range(3):  # the first call fills Dynamo's cache
        close([y.detach() for y in way(compiled, x, tx)], [y.detach() for y in truth])


@pytest.mark.parametrize("way", [ours, fused_jvp], ids=lambda f: f.__name__)
def test_a_compiled_module_inside(way):
    """`module.compile()`: Dynamo steps aside inside of functorch's transforms."""
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)).double()
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)
    truth = true_jvp(network, (x,), (tx,))
    network[0].compile(backend=AOT)
    network.compile(backend=AOT)
    network(x)
    close(way(network, x, tx), truth)


def test_a_compiled_function_around_a_compiled_function():
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)
    inner = torch.compile(small, backend=AOT)
    outer = torch.compile(lambda x, tx: ours(inner, x, tx), backend=AOT, fullgraph=True)
    close(outer(x, tx), true_jvp(small, (x,), (tx,)))


@pytest.mark.parametrize("tangent_grad", [False, True])
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_a_checkpoint_around_a_jvp(tangent_grad):
    """Dynamo lets no checkpoint enter a mode, unless it is told that the backward need not."""
    network = nn.Sequential(nn.LayerNorm(8), Function(attend), nn.Linear(4, 8)).double()
    x, t_x = torch.randn(2, 2, 4, 8, dtype=torch.float64)

    def function(x, t_x):
        return scm_kernels.jvp(network, (x,), (t_x,), tangent_grad=tangent_grad)

    def checkpointed(x, t_x):
        return checkpoint(function, x, t_x, use_reentrant=False)

    results = []
    for run in (function, torch.compile(checkpointed, backend=AOT, fullgraph=True)):
        out, t_out = run(x, t_x)
        loss = (out + t_out).sin().sum()
        results.append((out, t_out, *torch.autograd.grad(loss, list(network.parameters()))))
    torch.testing.assert_close(*results)
