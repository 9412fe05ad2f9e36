"""Activation checkpoints (non-reentrant) around and inside of a jvp."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import DiT, close, dit_case, gradients, true_jvp
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts

import scm_kernels

THROUGH = pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])
WIDTH = 8
keep = partial(checkpoint, use_reentrant=False)


# --- around ---------------------------------------------------------------------------------------


@THROUGH
@pytest.mark.parametrize("selective", [False, True])
def test_around_a_jvp(through, selective):
    """What is computed again is the whole jvp, on the paths of the first time."""
    network, primals, tangents = dit_case()
    options = {}
    if selective:
        matmuls.seen = [0, 0]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, matmuls)

    def run(x, t, tx, tt):
        return scm_kernels.jvp(network, (x, t), (tx, tt), tangent_grad=through)

    truth = true_jvp(network, primals, tangents)
    result = keep(run, *primals, *tangents, **options)
    close(result, truth)
    parameters = list(network.parameters())
    got = gradients(*result, parameters, through_tangent=through)
    close(got, gradients(*truth, parameters, through_tangent=through))


# --- inside ---------------------------------------------------------------------------------------


def rotate(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attend(q, k, **options):
    return F.scaled_dot_product_attention(q[None, None], k[None, None], q[None, None], **options)


def multi_head(h, w, x, *, need_weights):
    return F.multi_head_attention_forward(
        *(h[:, None], h[:, None], x[:, None], WIDTH, 2, torch.cat([w, w + 1, w.sin()]), None),
        *(None, None, False, 0.0, w.cos(), None, True),
        need_weights=need_weights,
    )[0]


def scaled_in_place(h, w, x):
    h = h * 2
    h *= w[0]
    h.add_(x).sin_().mul_(x.cos()).div_(2.0)
    h[:2].mul_(w[1])
    return F.silu(F.relu(h, True).add(1), inplace=True)


def view_written_to(h, w, x):
    h = h * 2
    h[:, 1:].relu_()
    return h * w[0]


def added_to(h, w, x):
    h = h * 2
    h += x * w[0]
    h -= x
    return h.sin()


def elements_written_to(h, w, x):
    h = h * 2
    h[:, 1:] = x[:, 1:]
    return h * w[0]


INDICES = torch.tensor([3, 1, 4, 0, 5, 2, 6, 7])
WRITING = {
    "in place": scaled_in_place,
    "view written to": view_written_to,
    "added to": added_to,
    "elements written to": elements_written_to,
}
# name: function of h = x w + b, which has a tangent, of w, b and of x.
FUNCTIONS = {
    "attention": lambda h, w, x: attend(h, x),
    "causal attention": lambda h, w, x: attend(h, h @ w, is_causal=True, scale=0.3),
    "learned mask": lambda h, w, x: attend(h, x, attn_mask=w[:, :1] + w[:, 1]),
    "op of this package": lambda h, w, x: scm_kernels.scaled_dot_product_attention(
        h[None, None], x[None, None], h[None, None]
    ),
    "multi-head": partial(multi_head, need_weights=False),
    "multi-head with weights": partial(multi_head, need_weights=True),
    "layer norm": lambda h, w, x: F.layer_norm(h, (WIDTH,), w[0], w[1]),
    "rms norm": lambda h, w, x: F.rms_norm(h, (WIDTH,), w[0]),
    "group norm": lambda h, w, x: F.group_norm(h.T[None], 2, w[0], w[1]),
    "batch norm": lambda h, w, x: F.batch_norm(h, None, None, w[0], training=True),
    "by hand": lambda h, w, x: rms(h) * w[0],
    "modulated": lambda h, w, x: x + w[0] * F.layer_norm(h, (WIDTH,)) * (1 + w[1]) + w[2],
    "feed-forward": lambda h, w, x: F.linear(F.gelu(F.linear(h, w), approximate="tanh"), w) + x,
    "gated": lambda h, w, x: F.silu(h) * F.linear(x, w),
    "rotated": lambda h, w, x: h * w[0].cos() + rotate(h) * w[0].sin(),
    "convolution": lambda h, w, x: F.conv1d(h[None], w[:, :, None], padding="same").tanh(),
    "softmax": lambda h, w, x: torch.einsum("ij,jk->ik", torch.softmax(h, -1), w).sigmoid(),
    "quotient": lambda h, w, x: 1 / (2 + h.square()) + h / (3 + w[0] ** 2) - 2**x,
    "several outputs": lambda h, w, x: torch.cat([h.max(dim=0)[0], *torch.var_mean(h, 0)]),
    "normalized": lambda h, w, x: F.normalize(h, dim=-1) @ w + F.softplus(h).cumsum(0),
    "constant": lambda h, w, x: F.softmax(w, -1)[0] + h,
    "constant linear": lambda h, w, x: F.linear(w.detach()[None].mT, w)[0] + h,
    "constant product": lambda h, w, x: (w[None] @ w.mT[:, :1])[0] * h,
    "constant multi-head": lambda h, w, x: multi_head(w, w, w.T, need_weights=False) + h,
    "guarded": lambda h, w, x: h.clamp(-9, 9) * w[0] if h.isfinite().all() else h,
    "angles": lambda h, w, x: torch.polar(1 + h.square(), x).imag * w[0],
    "remainder": lambda h, w, x: F.softshrink(torch.remainder(h, 1 + x.square())) @ w,
    "product": lambda h, w, x: h * h.sigmoid() * w[0],
    "matrices": lambda h, w, x: torch.linalg.solve(w, h) + torch.linalg.matrix_norm(h) * w,
    "other names": lambda h, w, x: (0.3 * torch.arctan2(h, w[0])).arcsin() + torch.ger(h[0], x[0]),
    "special": lambda h, w, x: torch.special.entr(h.sigmoid()) + torch.special.i1e(h) * w,
    "vectors": lambda h, w, x: F.soft_margin_loss(h, w.detach()) * torch.linalg.vecdot(h, x),
    "inverse": lambda h, w, x: torch.linalg.inv_ex(h).inverse + torch.trapezoid(h, w[0])[:, None],
    "pooled": lambda h, w, x: F.max_pool2d(F.avg_pool1d(h[None], 3, 1, 1), 3, 1, 1)[0] * w,
    "moved": lambda h, w, x: (torch.tile(h[:1], (8, 1)) + h.sort(0)[0]).ravel()[8:].frac().sin(),
    "joined": lambda h, w, x: torch.hstack([h, w]).as_strided((8, 8), (8, 1)).sin(),
    "looked up": lambda h, w, x: F.embedding(INDICES, h).index_add(0, INDICES, w).sin(),
    "put": lambda h, w, x: h.index_put((INDICES,), w).scatter(0, INDICES[None], h[:1]).sin(),
    "transformed": lambda h, w, x: torch.fft.irfft(torch.fft.rfft(h) * w[:, :5], n=8).sin(),
    "halves": lambda h, w, x: F.glu(torch.cat([h, w], dim=-1)) * h.sin(),
    "one operand": lambda h, w, x: torch.einsum("ij->ji", h).sin() * torch.linalg.matmul(h, w),
    **WRITING,
    "dropout": lambda h, w, x: F.dropout(F.dropout(h * 1, 0.5, True, True).sin() * w[0], 0.3),
    "dropout2d": lambda h, w, x: F.dropout2d(h[None, None], 0.5)[0, 0].sin(),
    "alpha_dropout": lambda h, w, x: F.alpha_dropout(h, 0.5).sin(),
}


def matmuls(context, op, *args, **kwargs):
    """Every second product is kept, and all of attention."""
    name = op.overloadpacket.__name__
    if name in ("mm", "addmm", "bmm"):
        matmuls.seen[context.is_recompute] += 1
        return matmuls.seen[context.is_recompute] % 2 == 1
    return "attention" in name


def everything(context, op, *args, **kwargs):
    """But what writes to its input, and the means that `F.rms_norm` adds epsilon to in place."""
    return not op._schema.is_mutable and op is not torch.ops.aten.mean.dim


POLICIES = {"plain": None, "matmuls": matmuls, "everything": everything}


def inside_case(name, policy=None):
    """(the function in a checkpoint, the function, x, tx, what to differentiate in)"""
    torch.manual_seed(0)
    w, x, tx = torch.randn(3, WIDTH, WIDTH, dtype=torch.float64)
    b = torch.randn(WIDTH, dtype=torch.float64)
    leaves = [y.requires_grad_() for y in (w, b, x)]

    def function(x):
        return FUNCTIONS[name](F.linear(x, w, b), w, x)

    matmuls.seen = [0, 0]
    options = {}
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return partial(keep, function, **options), function, x, tx, leaves


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        (name, policy)
        for name in FUNCTIONS
        for policy in POLICIES
        if "dropout" not in name and (name not in WRITING or policy == "plain")
    ],
)
def test_inside_a_jvp(name, policy):
    """What is computed again are primals alone, and autograd finds the tensors that it saved."""
    kept, function, x, tx, leaves = inside_case(name, POLICIES[policy])
    plain = scm_kernels.jvp(function, (x,), (tx,))
    result = scm_kernels.jvp(kept, (x,), (tx,))
    close(result, true_jvp(function, (x,), (tx,)))
    assert not result[1].requires_grad
    got = gradients(*result, leaves, through_tangent=False)
    close(got, gradients(function(x), plain[1], leaves, through_tangent=False))
    assert max(y.abs().max() for y in got) > 0


@pytest.mark.parametrize("name", WRITING)
def test_what_writes_is_refused_in_a_selective_checkpoint(name):
    kept, _, x, tx, _ = inside_case(name, matmuls)
    with pytest.raises(NotImplementedError, match="selective checkpoint"):
        scm_kernels.jvp(kept, (x,), (tx,))


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout"])
@pytest.mark.parametrize("policy", ["plain", "matmuls"])
def test_random_numbers_are_drawn_once(name, policy):
    """Primal and tangent share them, and so does what is computed again."""
    kept, function, x, tx, leaves = inside_case(name, POLICIES[policy])
    results = []
    for run in (kept, function):
        torch.manual_seed(1)
        out, t_out = scm_kernels.jvp(run, (x,), (tx,))
        after = torch.rand(())
        results.append((out, t_out, after, torch.autograd.grad(out.sum(), leaves)))
    close(*results)


DROPOUT = {
    "channels_last": lambda x: F.dropout(x.contiguous(memory_format=torch.channels_last)),
    "transposed": lambda x: F.dropout(input=x.mT),
    "slice": lambda x: F.dropout(x[:, 1:, ::2]),
    "in place": lambda x: F.dropout(x.transpose(0, 1) * 1.0, inplace=True),
    "evaluated": lambda x: F.dropout(x.mT, training=False),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_random_numbers_of_any_layout(name):
    """With the tangent in another one."""
    x = torch.ones(2, 4, 3, 6, dtype=torch.float64)
    tx = torch.ones(6, 3, 4, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    x.requires_grad_()
    for function, moves in ((DROPOUT[name], 1), (lambda z: DROPOUT[name](x) + 0 * z.sum(), 0)):
        out, t_out = scm_kernels.jvp(partial(keep, function), (x,), (tx,))
        assert torch.equal(t_out, moves * out)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0].sum(), out.sum())


def among_hooks(function, x):
    """Hooks that copy, as `save_on_cpu` does what is elsewhere."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return keep(function, x * 0.5).sin()


everything_kept = partial(create_selective_checkpoint_contexts, everything)
AROUND = {
    "checkpoint": lambda function, x: keep(lambda h: keep(function, h * x[0]).sin(), x * 0.5),
    "selective": lambda function, x: keep(
        lambda h: keep(function, h * x[0]).sin(), x * 0.5, context_fn=everything_kept
    ),
    "hooks": among_hooks,
}


@pytest.mark.parametrize(
    ("name", "around"),
    [
        (name, around)
        for name in FUNCTIONS
        for around in AROUND
        if "dropout" not in name and (name not in WRITING or around != "selective")
    ],
)
def test_one_in_another(name, around):
    """What the inner one keeps says whether it has a graph outside of the jvp."""
    _, function, x, tx, leaves = inside_case(name)

    def nested(x):
        return AROUND[around](function, x)

    def plain(x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "keep", lambda f, *args, **options: f(*args))
            return nested(x)

    result, truth = scm_kernels.jvp(nested, (x,), (tx,)), true_jvp(plain, (x,), (tx,))
    close(result, truth)
    got = gradients(*result, leaves, through_tangent=False)
    close(got, gradients(*truth, leaves, through_tangent=False))
    assert max(y.abs().max() for y in got) > 0


def test_what_a_checkpoint_keeps():
    """Its inputs, of all that a block computes."""
    network, primals, tangents = dit_case(depth=3)

    def saved(network, run):
        shapes = []
        hooks = lambda x: (shapes.append(x.shape), x)[1], lambda x: x
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            run(network)
        return shapes

    def ours(network):
        return scm_kernels.jvp(network, primals, tangents)

    kept = checkpointed(network)
    assert saved(kept, ours) == saved(kept, lambda network: network(*primals))
    assert len(saved(kept, ours)) < len(saved(network, ours)) / 4


class Checkpointed(DiT):
    def forward(self, x, t):
        c = self.embed(torch.stack([t.cos(), t.sin()], dim=-1))
        for block in self.blocks:
            x = keep(block, x, c)
        return x


def checkpointed(network):
    copy = Checkpointed(depth=len(network.blocks)).double()
    copy.load_state_dict(network.state_dict())
    return copy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_a_network(dtype):
    network, primals, tangents = dit_case()
    network, kept = network.to(dtype), checkpointed(network).to(dtype)
    primals, tangents = ([x.to(dtype) for x in xs] for xs in (primals, tangents))
    parameters = list(network.parameters()), list(kept.parameters())
    plain, result = (scm_kernels.jvp(f, tuple(primals), tuple(tangents)) for f in (network, kept))
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    close(result, plain, rtol)
    want = gradients(*plain, parameters[0], through_tangent=False)
    close(gradients(*result, parameters[1], through_tangent=False), want, rtol)


def test_a_gate_in_a_half_type():
    """All of its tangent is out of the sight of a selective checkpoint, which numbers the casts."""
    weight = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    scale, (x, tx) = torch.randn(4, 8), torch.randn(2, 4, 8, dtype=torch.bfloat16)

    def function(x):
        return F.glu(x @ weight) * scale.to(x.dtype)

    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten._to_copy.default])
    out, t_out = scm_kernels.jvp(partial(keep, function, context_fn=contexts), (x,), (tx,))
    close((out, t_out), scm_kernels.jvp(function, (x,), (tx,)))
    got = torch.autograd.grad(out.sum(), weight)
    close(got, torch.autograd.grad(function(x).sum(), weight))


def test_a_block_under_autocast():
    network, primals, tangents = dit_case(torch.float32)
    kept = checkpointed(network).float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, result = (scm_kernels.jvp(f, primals, tangents) for f in (network, kept))
    close(result, plain, 4e-2)
    want = gradients(*plain, list(network.parameters()), through_tangent=False)
    close(gradients(*result, list(kept.parameters()), through_tangent=False), want, 4e-2)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_recorded_tangent_cannot_be_computed_again(policy):
    """The level is closed by the time of the backward: values are right, the backward raises."""
    kept, function, x, tx, leaves = inside_case("feed-forward", POLICIES[policy])
    out, t_out = scm_kernels.jvp(kept, (x,), (tx,), tangent_grad=True)
    close((out, t_out), true_jvp(function, (x,), (tx,)))
    with pytest.raises(CheckpointError):
        torch.autograd.grad(out.sum() + t_out.sum(), leaves)


def test_an_identity_in_a_selective_checkpoint():
    """A dropout of nothing draws nothing."""
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
    x, tx = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64)
    block = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Identity())

    def function(x):
        return block(F.linear(x, weight)).sin()

    contexts = partial(create_selective_checkpoint_contexts, everything)
    out, t_out = scm_kernels.jvp(partial(keep, function, context_fn=contexts), (x,), (tx,))
    close((out, t_out), true_jvp(function, (x,), (tx,)))
    got = torch.autograd.grad(out.square().sum(), weight)
    close(got, torch.autograd.grad(function(x).square().sum(), weight))
