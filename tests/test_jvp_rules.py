"""Rules inside of `scm_kernels.jvp` at their edges: options, layouts, refusals, cancellation."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import close, true_jvp

import scm_kernels

D = torch.float64


def pair(*shape, dtype=D, offset=0.0):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) + offset for _ in range(2))


@pytest.mark.parametrize("tangent_grad", [False, True])
@pytest.mark.parametrize(
    "func",
    [
        lambda x: 1 - x,
        lambda x: 2 / x,
        lambda x: x.__radd__(1) * 3,
        lambda x: x.__rmatmul__(torch.ones(2, 3, dtype=D)),
    ],
    ids=["rsub", "rtruediv", "radd", "rmatmul"],
)
def test_reflected_operators_compile(func, tangent_grad):
    torch._dynamo.reset()
    x, t = pair(3, 4)

    def run(x, t):
        return scm_kernels.jvp(func, (x,), (t,), tangent_grad=tangent_grad)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    close(compiled(x, t), true_jvp(func, (x,), (t,)))


_EPS = torch.tensor(1e-3, dtype=D)
_TWO = torch.tensor(2)
_KERNEL = torch.ones(2, 3, 3, dtype=D)


@pytest.mark.parametrize("tangent_grad", [False, True])
@pytest.mark.parametrize(
    "func",
    [
        lambda x: F.layer_norm(x, (4,), eps=_EPS),
        lambda x: F.layer_norm(x, [2 * _TWO]),
        lambda x: F.rms_norm(x, (4,), None, _EPS),
        lambda x: F.group_norm(x, 2, eps=_EPS),
        lambda x: F.batch_norm(x, None, None, None, None, True, 0.1, _EPS),
        lambda x: F.instance_norm(x[None], eps=_EPS),
        lambda x: F.conv1d(x[None], _KERNEL, None, _TWO),
        lambda x: F.conv1d(x[None], _KERNEL, padding=[_TWO]),
    ],
    ids=["layer", "shape", "rms", "group", "batch", "instance", "stride", "padding"],
)
def test_options_may_be_tensors(func, tangent_grad):
    x, t = pair(3, 4)
    close(
        scm_kernels.jvp(func, (x,), (t,), tangent_grad=tangent_grad),
        torch.func.jvp(func, (x,), (t,)),
    )


def test_a_tensor_for_an_option_of_attention_is_named():
    x, t = pair(1, 1, 3, 4)
    with pytest.raises(TypeError, match="scale: got a float32 tensor"):
        scm_kernels.jvp(
            lambda x: F.scaled_dot_product_attention(x, x, x, scale=torch.tensor(0.5)), (x,), (t,)
        )


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize(
    "func",
    [lambda x: F.layer_norm(x, (512,)), lambda x: F.group_norm(x, 4)],
    ids=["layer", "group"],
)
def test_means_of_input_and_tangent_cancel(func, offset):
    x, t = pair(8, 512, dtype=torch.float32, offset=offset)
    _, truth = true_jvp(func, (x.double(),), (t.double(),))
    _, stock = torch.func.jvp(func, (x,), (t,))
    _, got = scm_kernels.jvp(func, (x,), (t,))
    assert (got - truth).norm() <= 3 * (stock - truth).norm()


@pytest.mark.parametrize("layout", ["coo", "csr", "nested", "jagged", "mkldnn"])
def test_arithmetic_of_other_layouts_beside_a_dual_tensor(layout):
    rows = [torch.ones(2), torch.ones(3)]
    y = {
        "coo": lambda: torch.eye(3).to_sparse(),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor(rows),
        "jagged": lambda: torch.nested.nested_tensor(rows, layout=torch.jagged),
        "mkldnn": lambda: torch.ones(3, 4).to_mkldnn(),
    }[layout]()
    x, t = pair(3, 4)
    with scm_kernels.fused(), forward_ad.dual_level():
        forward_ad.make_dual(x, t)
        assert (y * 2).layout == (y + y).layout == y.layout


def test_group_norm_keeps_its_own_refusals():
    x, t = pair(1, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        scm_kernels.jvp(lambda x: F.group_norm(x, 4), (x,), (t,))
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        scm_kernels.jvp(lambda x: F.group_norm(x[0], 2), (x,), (t,))
