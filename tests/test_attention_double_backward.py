"""The gradient of attention's gradient, inside of other transforms too, in float64."""

import itertools

import pytest
import torch
from torch.func import grad, jacrev, vjp, vmap

from scm_kernels import attention_jvp, scaled_dot_product_attention
from scm_kernels.attention import reference

NAMES = ("query", "key", "value", "t_query", "t_key", "t_value")
TANGENTS = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]


def inputs(have):
    torch.manual_seed(0)
    x = torch.randn(6, 1, 2, 3, 4, dtype=torch.float64)
    return [*x[:3], *(t if h else None for h, t in zip(have, x[3:], strict=True))]


def formula(*x):
    return reference.dense(*x, None, None, causal=False, scale=0.5)


def pullback(function, x, wanted, by, through):
    """Of the gradient in `wanted`, pulled back to `by`."""

    def pull(value):
        def gradient(value):
            y = [*x[:by], value, *x[by + 1 :]]

            def loss(z):
                return function(*y[:wanted], z, *y[wanted + 1 :])[through].pow(3).sum()

            return grad(loss)(y[wanted])

        out, back = vjp(gradient, value)
        return back(torch.ones_like(out))[0]

    return pull


def cases():
    """Tangents, an output, an input whose gradient is taken, and an input of that gradient."""
    for have in TANGENTS:
        given = [name for name, x in zip(NAMES, (1, 1, 1, *have), strict=True) if x]
        for wanted, by in itertools.product(given, given):
            yield have, "t_out", wanted, by
            if not wanted.startswith("t_"):
                yield have, "out", wanted, by


@pytest.mark.parametrize(("have", "through", "wanted", "by"), list(cases()), ids=str)
def test_gradients_of_gradients(have, through, wanted, by):
    """Also where one does not depend on an input: its gradient is zero then."""
    x, i = inputs(have), NAMES.index(by)
    ours, stock = (
        pullback(function, x, NAMES.index(wanted), i, ("out", "t_out").index(through))
        for function in (attention_jvp, formula)
    )
    many = torch.stack([x[i], 0.5 * x[i]])
    torch.testing.assert_close(ours(x[i]), stock(x[i]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(vmap(ours)(many), vmap(stock)(many), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacrev(ours)(x[i]), jacrev(stock)(x[i]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 4, 5])
def test_a_vectorised_jacobian_in_forward_mode(rank):
    """By PyTorch's older vmap, which has rules for some views alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *(1,) * (rank - 2), 3, 2, dtype=torch.float64)
    mask = torch.randn(*(1,) * (rank - 2), 3, 3, dtype=torch.float64)

    def eager(q, mask):
        return (q @ k.mT / 2**0.5 + mask).softmax(-1) @ v

    def ours(q, mask):
        return scaled_dot_product_attention(q, k, v, mask)

    options = {"vectorize": True, "strategy": "forward-mode"}
    pairs = [torch.autograd.functional.jacobian(f, (q, mask), **options) for f in (ours, eager)]
    for actual, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, expected)
