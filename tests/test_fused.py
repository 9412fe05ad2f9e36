"""`scm_kernels.fused()` around `torch.func.jvp` and `forward_ad`; modules of `torch.nn` in it."""

import copy
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import close, dit_case, gradients, stock_jvp, true_jvp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import scm_kernels

torch.manual_seed(0)


def fused_jvp(func, primals, tangents):
    with scm_kernels.fused():
        return torch.func.jvp(func, primals, tangents)


def fused_dual(func, primals, tangents):
    """The same by `forward_ad`, in which one output is a dual tensor."""
    with scm_kernels.fused(), forward_ad.dual_level():
        out = func(*map(forward_ad.make_dual, primals, tangents))
        return tuple(forward_ad.unpack_dual(out))


def ours(func, primals, tangents):
    return scm_kernels.jvp(func, primals, tangents, tangent_grad=True)


WAYS = pytest.mark.parametrize("way", [fused_jvp, fused_dual, ours], ids=lambda f: f.__name__)


def check(way, network, primals, tangents, rtol=1e-11, *, gradient=True):
    parameters = list(network.parameters())
    truth = true_jvp(network, primals, tangents)
    result = way(network, primals, tangents)
    close(tuple(result), tuple(truth), rtol)
    if not gradient:
        return
    want = gradients(*truth, parameters, through_tangent=True)
    close(gradients(*result, parameters, through_tangent=True), want, 10 * rtol, "gradient")


@WAYS
def test_a_whole_network(way):
    check(way, *dit_case())


def test_without_duals_it_is_pytorch_bitwise():
    network, primals, tangents = dit_case(torch.float32)
    want = network(*primals)
    with scm_kernels.fused():
        assert torch.equal(network(*primals), want)
        with forward_ad.dual_level():  # a level is open, and nothing in it is dual
            assert torch.equal(network(*primals), want)
            forward_ad.make_dual(primals[0], tangents[0])
            assert torch.equal(network(*primals), want)


def test_it_needs_no_eager_attention():
    network, primals, tangents = dit_case()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(network, primals, tangents)
    close(fused_jvp(network, primals, tangents), true_jvp(network, primals, tangents))


# --- nn.MultiheadAttention and what is built on it ------------------------------------------------

LENGTH, SOURCE, WIDTH = 5, 4, 8
FLOAT_MASK = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
PADDING = torch.tensor([[False] * LENGTH, [False] * (LENGTH - 2) + [True] * 2])

# (options of the module, options of the call, of what kind the keys and values are)
MULTIHEAD = {
    "weights": ({}, {}, "self"),
    "no weights": ({}, {"need_weights": False}, "self"),
    "weights per head": ({}, {"average_attn_weights": False}, "self"),
    "no bias": ({"bias": False}, {"need_weights": False}, "self"),
    "cross": ({}, {"need_weights": False}, "cross"),
    "kdim and vdim": ({"kdim": 3, "vdim": 6}, {"need_weights": False}, "other widths"),
    "bias_kv": ({"add_bias_kv": True}, {"need_weights": False}, "self"),
    "zero_attn": ({"add_zero_attn": True}, {"need_weights": False}, "self"),
    "bool mask": ({}, {"attn_mask": CAUSAL < 0, "need_weights": False}, "self"),
    "float mask": ({}, {"attn_mask": FLOAT_MASK, "need_weights": False}, "self"),
    "float mask, weights": ({}, {"attn_mask": FLOAT_MASK}, "self"),
    "mask per head": (
        {},
        {"attn_mask": FLOAT_MASK.expand(4, -1, -1), "need_weights": False},
        "self",
    ),
    "causal": ({}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, "self"),
    "padding": ({}, {"key_padding_mask": PADDING, "need_weights": False}, "self"),
    "padding and mask": (
        {},
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL < 0, "need_weights": False},
        "self",
    ),
}


class Multihead(nn.Module):
    """Attention of x, to itself or to keys and values made of it."""

    def __init__(self, options, call, kind, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **options)
        self.call, self.kind, self.batch_first = call, kind, batch_first

    def forward(self, x):  # x [B, L, C]
        key, value = {
            "self": (x, x),
            "cross": (x[:, :SOURCE].sin(), x[:, :SOURCE]),
            "other widths": (x[..., :3], x[..., :6].cos()),
        }[self.kind]
        inputs = (x, key, value)
        inputs = inputs if self.batch_first else [y.transpose(0, 1) for y in inputs]
        out, weights = self.attention(*inputs, **self.call)
        return out if weights is None else torch.cat([out.flatten(), weights.flatten()])


@WAYS
@pytest.mark.parametrize("batch_first", [False, True], ids=["LBC", "BLC"])
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention(name, batch_first, way):
    torch.manual_seed(1)
    network = Multihead(*MULTIHEAD[name], batch_first).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, tx = torch.randn(2, 2, LENGTH, WIDTH, dtype=torch.float64)
    # With weights it is PyTorch's softmax, whose tangent has no gradient in a plain dual level.
    explicit = network.call.get("need_weights", True)
    check(way, network, (x,), (tx,), gradient=not (explicit and way is fused_dual))


class Identity(TorchFunctionMode):
    """Any mode switches the fast path of `nn.MultiheadAttention` off."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_multihead_attention_without_duals_is_the_slow_path_bitwise(train):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True).train(train)
    x = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad(), Identity():
        want = layer(x, src_key_padding_mask=PADDING), layer.self_attn(x, x, x)
    with torch.no_grad(), scm_kernels.fused():
        got = layer(x, src_key_padding_mask=PADDING), layer.self_attn(x, x, x)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


@WAYS
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_transformer_encoder(norm_first, train, way):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    encoder = encoder.double().train(train)
    x, tx = torch.randn(2, 2, LENGTH, WIDTH, dtype=torch.float64)
    check(way, encoder, (x,), (tx,))
    with scm_kernels.fused():
        got = torch.func.jvp(lambda x: encoder(x, src_key_padding_mask=PADDING), (x,), (tx,))
    close(got, true_jvp(lambda x: encoder(x, src_key_padding_mask=PADDING), (x,), (tx,)))


@WAYS
def test_transformer_decoder(way):
    torch.manual_seed(1)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).double()
    x, tx = torch.randn(2, 2, LENGTH, WIDTH, dtype=torch.float64)
    memory, t_memory = torch.randn(2, 2, SOURCE, WIDTH, dtype=torch.float64)

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, x, memory):
            return self.decoder(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)

    check(way, Causal(), (x, memory), (tx, t_memory))


def test_attention_dropout_on_duals_is_refused():
    layer = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
    x = torch.randn(2, LENGTH, WIDTH)
    for way in (fused_jvp, fused_dual, ours):
        with pytest.raises(NotImplementedError, match=r"dropout_p: got 0\.1"):
            way(lambda x: layer(x, x, x, need_weights=False)[0], (x,), (x,))
    want = stock_jvp(lambda x: layer.eval()(x, x, x)[0], (x,), (x,))
    close(fused_jvp(lambda x: layer(x, x, x)[0], (x,), (x,)), want, 1e-5)


def test_batch_norm_updates_its_statistics_once():
    x, tx = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    norms = [nn.BatchNorm2d(4).double() for _ in range(2)]
    want = norms[0](x)
    out, _ = fused_dual(norms[1], (x,), (tx,))
    close(out, want)
    close(dict(norms[1].state_dict()), dict(norms[0].state_dict()))


def test_the_running_statistics_have_no_derivative():
    x, statistics = torch.randn(3, 4), torch.rand(4)
    with pytest.raises(NotImplementedError, match="running_mean, running_var: got a dual"):
        fused_jvp(lambda m: F.batch_norm(x, m, statistics), (statistics,), (statistics,))


# --- contexts -------------------------------------------------------------------------------------


def test_nested_modes():
    network, primals, tangents = dit_case()
    truth = true_jvp(network, primals, tangents)
    with scm_kernels.fused(), scm_kernels.fused():
        close(torch.func.jvp(network, primals, tangents), truth)
        close(scm_kernels.jvp(network, primals, tangents), truth)

    def fused_inside(x, t):
        with scm_kernels.fused():
            return network(x, t)

    for through in (False, True):
        got = scm_kernels.jvp(fused_inside, primals, tangents, tangent_grad=through)
        close(got, truth)
        assert got[1].requires_grad == through
    close(torch.func.jvp(fused_inside, primals, tangents), truth)
    with Identity(), scm_kernels.fused(), Identity():
        close(torch.func.jvp(network, primals, tangents), truth)


def test_one_mode_is_entered_more_than_once():
    network, primals, tangents = dit_case()
    truth = true_jvp(network, primals, tangents)
    mode = scm_kernels.fused()
    for _ in range(2):
        with mode, mode:
            close(torch.func.jvp(network, primals, tangents), truth)


@pytest.mark.parametrize("where", ["function", "attention", "multihead"])
def test_an_exception_leaves_no_mode(where):
    x = torch.randn(2, LENGTH, WIDTH)
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def fails(x):
        if where == "function":
            raise ZeroDivisionError
        if where == "attention":
            return F.scaled_dot_product_attention(x, x, x[:, 1:])
        return layer(x, x, x[:, 1:], need_weights=False)[0]

    for way in (fused_jvp, fused_dual, ours):
        with pytest.raises((ZeroDivisionError, ValueError, AssertionError, RuntimeError)):
            way(fails, (x,), (x,))
        assert torch.overrides._get_current_function_mode() is None
        assert forward_ad._current_level < 0
    good = fused_jvp(lambda x: layer(x, x, x)[0], (x,), (x,))
    close(good, stock_jvp(lambda x: layer(x, x, x)[0], (x,), (x,)), 1e-5)


def test_a_thread_has_modes_of_its_own():
    """One after the other: the levels of forward_ad are the process's, so jvps take turns."""
    network, primals, tangents = dit_case()
    results = {}

    def run(name, jvp):
        try:
            results[name] = jvp(network, primals, tangents)
        except NotImplementedError as error:
            results[name] = error

    with scm_kernels.fused():
        for name, jvp in (("ours", scm_kernels.jvp), ("pytorch", torch.func.jvp)):
            thread = threading.Thread(target=run, args=(name, jvp))
            thread.start()
            thread.join()
    close(results["ours"], true_jvp(network, primals, tangents))
    assert isinstance(results["pytorch"], NotImplementedError)  # the mode is not inherited


def test_a_model_is_left_unchanged():
    network, primals, tangents = dit_case()
    before = copy.deepcopy(network.state_dict())
    fused_jvp(network, primals, tangents)
    close(dict(network.state_dict()), dict(before))
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


# --- reverse mode inside of a level ---------------------------------------------------------------


def mixed(x, w):
    y = F.layer_norm(F.linear(x, w), (6,), w[0], w[1])
    y = F.rms_norm(F.conv1d(y, w[:4, :4, None]), (6,), w[4])
    y = F.batch_norm(F.instance_norm(y, weight=w[5, :4]), None, None, w[0, 2:], training=True)
    y = torch.einsum("bij,jk,kl->bil", y, w, w.sin())
    return torch.einsum("bij,jk->bik", y, w).tanh() @ w.T


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize("target", [0, 1], ids=["input", "weight"])
def test_forward_over_reverse(target, loss):
    """The gradient of a dual output is dual: the tangent of the gradient, not a part of it."""
    x, tx = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    w, tw = torch.randn(2, 6, 6, dtype=torch.float64)

    def run(context):
        with context, forward_ad.dual_level():
            inputs = [y.clone().requires_grad_() for y in (x, w)]
            duals = list(map(forward_ad.make_dual, inputs, (tx, tw)))
            (grad,) = torch.autograd.grad(loss(mixed(*duals)), duals[target])
            return [y.detach() for y in forward_ad.unpack_dual(grad)]

    close(run(scm_kernels.fused()), run(torch.enable_grad()), 1e-11)


def test_backward_inside_of_a_level():
    """The gradients of the parameters are those of an ordinary backward."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6)).double()
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
    want = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    with scm_kernels.fused(), forward_ad.dual_level():
        network(forward_ad.make_dual(x, tx)).square().sum().backward()
    close([p.grad.clone() for p in network.parameters()], list(want))


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_over_reverse_of_attention(loss, causal):
    """The gradient is dual inside of the level, in all its parts, and plain in a level after it."""
    q, k, v, tq, tk, tv = torch.randn(6, 1, 2, 4, 6, dtype=torch.float64)

    def run(attention, context):
        with context, forward_ad.dual_level():
            inputs = [y.clone().requires_grad_() for y in (q, k, v)]
            duals = list(map(forward_ad.make_dual, inputs, (tq, tk, tv)))
            out = attention(*duals, is_causal=causal)
            grads = torch.autograd.grad(loss(out), duals, retain_graph=True)
            pairs = [y.detach() for g in grads for y in forward_ad.unpack_dual(g)]
            primal = forward_ad.unpack_dual(out).primal
        with forward_ad.dual_level():
            later = torch.autograd.grad(loss(primal), inputs)
            assert all(forward_ad.unpack_dual(g).tangent is None for g in later)
        return pairs

    truth = run(F.scaled_dot_product_attention, sdpa_kernel(SDPBackend.MATH))
    close(run(F.scaled_dot_product_attention, scm_kernels.fused()), truth)
    close(run(scm_kernels.scaled_dot_product_attention, torch.enable_grad()), truth)


def test_eager_attention_forced_by_the_user_stays_rerouted():
    """`sdpa_kernel` chooses among PyTorch's kernels; on duals there is one path."""
    network, primals, tangents = dit_case()
    truth = true_jvp(network, primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):
        close(fused_jvp(network, primals, tangents), truth)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        close(fused_jvp(network, primals, tangents), truth)


class _LearnedBias(torch.nn.Module):
    """x and the attention of something else, with a bias of the scores that is learned."""

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.randn(1, 2, 5, 8, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(1, 2, 5, 5, dtype=torch.float64))

    def forward(self, x):
        c = self.context
        return x * F.scaled_dot_product_attention(c, c, c, attn_mask=self.bias)


@WAYS
def test_a_learned_bias_of_attention_without_duals(way):
    """The decoder of a T5 whose encoder has the tangent."""
    x, tx = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    check(way, _LearnedBias(), (x,), (tx,))
