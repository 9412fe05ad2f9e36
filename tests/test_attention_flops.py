"""What `torch.utils.flop_counter.FlopCounterMode` counts for attention and its gradient."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import scm_kernels
from scm_kernels.attention import reference

B, H, M, N, D, E = 2, 4, 5, 7, 8, 3
PRODUCT = 2 * B * H * M * N  # a feature


def tensors(have=(1, 1, 1)) -> list[torch.Tensor | None]:
    shapes = (M, D), (N, D), (N, E)
    primals, tangents = ([torch.randn(B, H, *shape) for shape in shapes] for _ in range(2))
    return primals + [x if h else None for h, x in zip(have, tangents, strict=True)]


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def dense(*x):
    return reference.dense(*x, None, None, causal=False, scale=0.3)[:2]


@pytest.mark.parametrize("have", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_forward(have):
    """What the formula's products take, but that H V is none where the scores have no tangent."""
    x = tensors(have)
    expected = counted(lambda: dense(*x)) - (have[:2] == (0, 0)) * PRODUCT * E
    assert counted(lambda: scm_kernels.attention_jvp(*x)) == expected


@pytest.mark.parametrize(
    ("through", "wanted"),
    [
        ("out", (0, 1, 2)),
        *(("t_out", wanted) for wanted in ((0, 1, 2), (0, 1, 2, 3, 4, 5))),
        *(("both", wanted) for wanted in ((0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 1, 4))),
    ],
    ids=str,
)
def test_backward(through, wanted):
    """What PyTorch's gradient of the formula takes, and the scores and their tangent again; but
    the formula makes t_out of out, whose own gradient ours does not take."""
    x = tensors()
    leaves = [x[i].requires_grad_() for i in wanted]
    chosen = {"out": slice(0, 1), "t_out": slice(1, 2), "both": slice(0, 2)}[through]

    def gradient(function):
        outputs = function(*x)[chosen]
        total = sum(y.sum() for y in outputs)
        return lambda: torch.autograd.grad(total, leaves, allow_unused=True)

    more = {"out": D, "t_out": 3 * D - 2 * E, "both": 3 * D}[through]
    expected = counted(gradient(dense)) + PRODUCT * more
    assert counted(gradient(scm_kernels.attention_jvp)) == expected


def test_a_network():
    """Attention of a jvp beside PyTorch's own layers, which it counted alone."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x, t_x = torch.randn(2, B, 6, 16)
    with FlopCounterMode(display=False) as counter:
        out, _ = scm_kernels.jvp(layer, (x,), (t_x,))
        out.sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    product = 2 * B * 6 * 6 * 16
    assert counts["scm_kernels.attention_jvp"] == 6 * product
    assert counts["scm_kernels.attention_jvp_backward"] == 5 * product
