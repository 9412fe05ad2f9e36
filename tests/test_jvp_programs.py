"""Random programs of functions, views and writes inside a jvp.

What the other files pin by name, this looks for in between: a function after any other, of tensors
that are views of each other and are written to. The draws are the same in every run.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from networks import close, gradients, true_jvp
from torch.utils.checkpoint import checkpoint

import scm_kernels

B, T, C = 2, 6, 8
_GEN = torch.Generator().manual_seed(0)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_GEN, dtype=torch.float64)


W, V = ((_randn(C, C) / 3).requires_grad_() for _ in range(2))
G, S = (_randn(C).requires_grad_() for _ in range(2))
X, Y, TX, TY = (_randn(B, T, C) for _ in range(4))
PARAMETERS = [W, V, G, S]


def _heads(x):
    return x.reshape(B, T, 2, C // 2).transpose(1, 2)


def _rotated(x):
    angles = torch.polar(*torch.tensor([1.0, 0.1], dtype=x.dtype).expand(T, C // 2, 2).unbind(-1))
    pairs = torch.view_as_complex(x.reshape(B, T, C // 2, 2).contiguous())
    return torch.view_as_real(pairs * angles).flatten(2)


def _channels(function, x):
    return function(x.transpose(1, 2)).transpose(1, 2)


# Of two values [B, T, C], a new one.
FUNCTIONS = {
    "linear": lambda x, y: F.linear(x, W, S),
    "matmul": lambda x, y: x @ V,
    "scores": lambda x, y: (x @ y.mT).softmax(-1) @ y,
    "einsum": lambda x, y: torch.einsum("btc,dc->btd", x, W),
    "addmm": lambda x, y: torch.addmm(S, x.reshape(-1, C), W).view(B, T, C),
    "baddbmm": lambda x, y: torch.baddbmm(x, x @ y.mT, y, beta=0.5, alpha=0.1),
    "bilinear": lambda x, y: F.bilinear(x, y, W.expand(C, C, C) / 8, S),
    "sum": lambda x, y: x + y,
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "quotient": lambda x, y: x / (y.square() + 1),
    "shift": lambda x, y: S + x,
    "scale": lambda x, y: x * G,
    "from one": lambda x, y: 1 - x,
    "reciprocal": lambda x, y: 1 / (x.square() + 1),
    "addcmul": lambda x, y: torch.addcmul(x, y, S, value=0.2),
    "layer_norm": lambda x, y: F.layer_norm(x, (C,), G, S),
    "plain layer_norm": lambda x, y: F.layer_norm(x, (C,)),
    "rms_norm": lambda x, y: F.rms_norm(x, (C,), G),
    "batch_norm": lambda x, y: _channels(lambda z: F.batch_norm(z, None, None, G, S, True), x),
    "conv1d": lambda x, y: _channels(lambda z: F.conv1d(z, W[:, :, None], S), x),
    "depthwise": lambda x, y: _channels(
        lambda z: F.conv1d(z, W[:, None, :3], padding="same", groups=C), x
    ),
    "gelu": lambda x, y: F.gelu(x, approximate="tanh"),
    "silu": lambda x, y: F.silu(x),
    "gate": lambda x, y: torch.sigmoid(x) * y,
    "sin": lambda x, y: x.sin() + y.cos(),
    "glu": lambda x, y: F.glu(torch.cat([x, y], -1)),
    "softmax": lambda x, y: x.softmax(1),
    "attention": lambda x, y: (
        F.scaled_dot_product_attention(_heads(x), _heads(y), _heads(x)).transpose(1, 2).flatten(2)
    ),
    "causal": lambda x, y: F.scaled_dot_product_attention(
        x[:, None], y[:, None], x[:, None], is_causal=True
    )[:, 0],
    "biased": lambda x, y: F.scaled_dot_product_attention(
        x[:, None], y[:, None], y[:, None], (x @ y.mT)[:, None] / 4
    )[:, 0],
    "rotary": lambda x, y: _rotated(x),
    "swap halves": lambda x, y: torch.cat(x.chunk(2, -1)[::-1], -1),
    "roll": lambda x, y: x.roll(1, 1),
    "index": lambda x, y: x[:, torch.tensor([0, 2, 1, 3, 5, 4])],
    "gather": lambda x, y: x.gather(1, torch.arange(T).flip(0)[None, :, None].expand(B, T, C)),
    "where": lambda x, y: torch.where(x > y, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 1, 0.0),
    "clamp": lambda x, y: x.clamp(-1, 1),
    "cumsum": lambda x, y: x.cumsum(1) / T,
    "centre": lambda x, y: x - x.mean(1, keepdim=True),
    "normalize": lambda x, y: x / (x.norm(dim=-1, keepdim=True) + 1),
    "unbind": lambda x, y: torch.stack([z * i for i, z in enumerate(x.unbind(1))], 1) / T,
    "first": lambda x, y: x[:, :1].expand(B, T, C) + y,
    "pad": lambda x, y: F.pad(x, (0, 0, 1, 0))[:, :T],
    "fft": lambda x, y: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=T, dim=1),
    "detach": lambda x, y: x + y.detach(),
    "view": lambda x, y: x[..., None, :].squeeze(-2),
    "same": lambda x, y: x.swapaxes(1, 2).mT,
}
# Of two values, a write to the first.
WRITES = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(G),
    "iadd": lambda x, y: x.__iadd__(S),
    "row": lambda x, y: x.__setitem__((slice(None), 0), y[:, 1]),
    "rows": lambda x, y: x[:, 1:3].mul_(2.0),
    "columns": lambda x, y: x[..., :2].add_(y[..., 2:4]),
    "copy_": lambda x, y: x[:, 0].copy_(y[:, 0]),
    "relu_": lambda x, y: x.relu_(),
    "silu_": lambda x, y: F.silu(x, inplace=True),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0.5, 0.0),
    "index_add_": lambda x, y: x.index_add_(1, torch.tensor([0, 1]), y[:, :2]),
    "sub_": lambda x, y: x.sub_(y.mean(1, keepdim=True)),
    "zero_": lambda x, y: x[:, 5].zero_(),
    "lerp_": lambda x, y: x.lerp_(y, 0.2),
    "transposed": lambda x, y: x.transpose(1, 2)[:, 1].mul_(1.5),
}
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*FUNCTIONS, *FUNCTIONS, *WRITES]), st.integers(0, 9), st.integers(0, 9)
    ),
    min_size=2,
    max_size=8,
)


def program(steps):
    def function(x, y):
        values = [x, y]
        for name, i, j in steps:
            i, j = i % len(values), j % len(values)
            if name in FUNCTIONS:
                values.append(FUNCTIONS[name](values[i], values[j]))
                continue
            if i < 2:  # what a jvp is of is not written to
                values.append(1.0 * values[i])
                i = -1
            WRITES[name](values[i], values[j] if values[j] is not values[i] else y)
        return sum(values[2:], start=values[-1])

    return function


def _dual_level(function, primals, tangents):
    with scm_kernels.fused(), forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, primals, tangents))
        return tuple(forward_ad.unpack_dual(out))


def _checkpointed(function, primals, tangents):
    def inside(*args):
        return checkpoint(function, *args, use_reentrant=False)

    return scm_kernels.jvp(inside, primals, tangents)


# (jvp, whether a gradient goes through the tangent)
WAYS = {
    "jvp": (scm_kernels.jvp, False),
    "tangent_grad": (lambda *args: scm_kernels.jvp(*args, tangent_grad=True), True),
    "dual_level": (_dual_level, True),
    "checkpoint": (_checkpointed, False),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_random_programs(way, steps):
    # In a dual level PyTorch's softmax writes to what the graph of its tangent has saved.
    assume(way != "dual_level" or not {name for name, _, _ in steps} & {"scores", "softmax"})
    function, (jvp, through) = program(steps), WAYS[way]
    primals = tuple(x.clone().requires_grad_() for x in (X, Y))
    leaves = [*primals, *PARAMETERS]
    try:
        torch.autograd.grad(function(*primals).sum(), leaves, allow_unused=True)
        truth = true_jvp(function, primals, (TX, TY))
        gradient = gradients(*truth, leaves, through_tangent=through)
    except RuntimeError:  # of what is written to, without a jvp or with it
        assume(False)
    assume(all(x.isfinite().all() and x.abs().max() < 1e6 for x in (*truth, *gradient)))
    results = tuple(jvp(function, primals, (TX, TY)))
    close(results, truth, 1e-9)
    close(gradients(*results, leaves, through_tangent=through), gradient, 1e-9, "gradient")
