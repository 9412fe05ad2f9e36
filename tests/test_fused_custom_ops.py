"""Ops that other code registers with `torch.library`, and functions of its own, on dual tensors.

PyTorch gives such an op a zero tangent, silently. Here it is right, or `NotImplementedError`.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from networks import close
from torch import nn

import scm_kernels

LIBRARY = torch.library.Library("scm_kernels_tests", "DEF")


def define(schema, function, key="CompositeExplicitAutograd", fake=None):
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, key)
    if fake is not None:
        torch.library.register_fake(f"scm_kernels_tests::{name}", fake, lib=LIBRARY)


def write_double(x):
    x.mul_(2)


def write_to(x, out):
    out.copy_(x * 2)


define("double(Tensor x) -> Tensor", lambda x: x * 2, fake=torch.empty_like)
define("double_cpu(Tensor x) -> Tensor", lambda x: x * 2, "CPU", torch.empty_like)
define("double_list(Tensor[] x) -> Tensor[]", lambda x: [y * 2 for y in x], "CPU")
define("double_write(Tensor(a!) x) -> ()", write_double, "CPU", lambda x: None)
define("double_to(Tensor x, Tensor(a!) out) -> ()", write_to, "CPU", lambda x, out: None)
define("composite(Tensor x) -> Tensor", lambda x: torch.sin(x) * 2, "CompositeImplicitAutograd")
define("composite_write(Tensor(a!) x) -> ()", write_double, "CompositeImplicitAutograd")
define("rank(Tensor x) -> Tensor", lambda x: x.argsort(), "CPU")


@torch.library.custom_op("scm_kernels_tests::custom", mutates_args=())
def custom(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("scm_kernels_tests::custom_with_gradient", mutates_args=())
def custom_with_gradient(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("scm_kernels_tests::custom_two", mutates_args=())
def custom_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x.sum()


@torch.library.custom_op("scm_kernels_tests::custom_write", mutates_args=("x",))
def custom_write(x: torch.Tensor) -> None:
    x.mul_(2)


for op in (custom, custom_with_gradient):
    op.register_fake(torch.empty_like)
custom_two.register_fake(lambda x: (torch.empty_like(x), x.new_empty(())))
custom_with_gradient.register_autograd(lambda ctx, grad: grad * 2)


class Jvp(torch.autograd.Function):
    """x / |x| with a made-up derivative, so that what uses it can be told from what does not."""

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


class NoJvp(torch.autograd.Function):
    forward, setup_context = Jvp.forward, Jvp.setup_context

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


OPS = torch.ops.scm_kernels_tests


def written(op):
    def run(x):
        y = x.clone()
        op(y)
        return y

    return run


def written_to(x):
    out = torch.empty_like(x)
    OPS.double_to(x, out)
    return out


LOSING = {
    "define": OPS.double,
    "overload": OPS.double.default,
    "keyword": lambda x: OPS.double(x=x),
    "one device": OPS.double_cpu,
    "lists": lambda x: OPS.double_list([x, x])[0],
    "custom_op": custom,
    "register_autograd": custom_with_gradient,
    "two outputs": lambda x: custom_two(x)[0],
    "writes to a dual": written(OPS.double_write),
    "writes to its output": written_to,
    "custom_op that writes": written(custom_write),
}
X, TX = torch.randn(2, 3, 4)


def dual_level(func, x, tx):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(func(forward_ad.make_dual(x, tx))))


def fused_jvp(func, x, tx):
    with scm_kernels.fused():
        return torch.func.jvp(func, (x,), (tx,))


def detached(func, x, tx):
    return scm_kernels.jvp(func, (x,), (tx,))


def recorded(func, x, tx):
    return scm_kernels.jvp(func, (x,), (tx,), tangent_grad=True)


WAYS = pytest.mark.parametrize("way", [detached, recorded, fused_jvp], ids=lambda f: f.__name__)


@WAYS
@pytest.mark.parametrize("name", LOSING)
def test_a_custom_op_that_would_lose_the_tangent_raises(name, way):
    with pytest.raises(NotImplementedError, match="this custom op got a dual tensor"):
        way(lambda x: LOSING[name](x.sin()) + 1, X, TX)


@pytest.mark.parametrize("name", ["custom_op", "register_autograd", "two outputs"])
def test_it_raises_in_a_plain_dual_level(name):
    with scm_kernels.fused(), pytest.raises(NotImplementedError, match="got a dual tensor"):
        dual_level(LOSING[name], X, TX)


@pytest.mark.parametrize("name", ["define", "one device", "writes to its output"])
def test_in_a_plain_dual_level_it_is_right_or_raises(name):
    """An op without autograd of its own is seen through there."""
    with scm_kernels.fused():
        try:
            out, t_out = dual_level(LOSING[name], X, TX)
        except NotImplementedError:
            return
    close((out, t_out), (2 * X, 2 * TX))


@WAYS
@pytest.mark.parametrize("name", LOSING)
def test_without_a_dual_input_it_runs(name, way):
    constant = torch.randn(3, 4)
    out, t_out = way(lambda x: LOSING[name](constant) * x, X, TX)
    close((out, t_out), (2 * constant * X, 2 * constant * TX), 1e-6)


@WAYS
def test_ops_that_keep_the_tangent_run(way):
    close(way(OPS.composite, X, TX), (2 * X.sin(), 2 * X.cos() * TX), 1e-6)
    close(way(written(OPS.composite_write), X, TX), (2 * X, 2 * TX))
    out, t_out = way(lambda x: x + OPS.rank(x), X, TX)  # indices have no tangent
    close((out, t_out), (X + X.argsort(), TX))


@WAYS
def test_detaching_says_that_it_is_constant(way):
    close(way(lambda x: custom(x.detach()) * x, X, TX), (2 * X * X, 2 * X * TX), 1e-6)


class Straight(torch.autograd.Function):
    """An op of one's own with a forward-mode formula: `torch.library` below an autograd key."""

    @staticmethod
    def forward(ctx, x):
        with torch._C._AutoDispatchBelowAutograd():
            return OPS.own_formula(x)

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


define("own_formula(Tensor x) -> Tensor", lambda x: x * 2, "CPU")
LIBRARY.impl("own_formula", Straight.apply, "Autograd")


def test_a_custom_op_with_its_own_formula_is_used():
    with scm_kernels.fused():
        close(dual_level(OPS.own_formula, X, TX), (2 * X, 2 * TX))


@WAYS
def test_autograd_function(way):
    close(way(Jvp.apply, X, TX), (X.sign(), 3 * TX))
    with pytest.raises((RuntimeError, NotImplementedError)):
        way(NoJvp.apply, X, TX)


def test_libraries_of_others():
    """Ops of torchvision and of PyTorch's own namespaces outside of aten."""
    torchvision = pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.9, 1.9], [5.0, 5.0, 6.0, 6.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])

    def kept(boxes):
        return boxes[torchvision.ops.nms(boxes, scores, 0.5)]

    close(detached(kept, boxes, boxes), (boxes[[0, 2]], boxes[[0, 2]]))
    image, t_image = torch.randn(2, 1, 3, 8, 8)
    with pytest.raises((NotImplementedError, RuntimeError)):
        detached(lambda x: torchvision.ops.roi_align(x, [boxes], 2), image, t_image)


# --- under torch.compile --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


COMPILED = ["define", "custom_op", "register_autograd", "writes to a dual", "custom_op that writes"]


@WAYS
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_raises_too(name, way):
    """Dynamo has its own words around ours."""
    compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
    with pytest.raises((NotImplementedError, RuntimeError)) as raised:
        compiled(LOSING[name], X, TX)
    assert "NotImplementedError" in str(raised.value)


@WAYS
def test_compiled_ops_that_keep_the_tangent_run(way):
    def func(x):
        return OPS.composite(x) + torch.ops.aten.sin(x) + custom(torch.ones(3, 4))

    compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
    close(compiled(func, X, TX), (3 * X.sin() + 2, 3 * X.cos() * TX), 1e-6)


@WAYS
def test_compiled_autograd_function_without_a_formula_is_traced_or_raises(way):
    """Dynamo differentiates the forward itself, which has the right derivative or none."""
    compiled = torch.compile(way, backend="aot_eager", fullgraph=True)

    class Double(NoJvp):
        @staticmethod
        def forward(x):
            return x * 2

    try:
        got = compiled(Double.apply, X, TX)
    except (RuntimeError, NotImplementedError):
        return
    close(got, (2 * X, 2 * TX))


def test_a_module_with_a_custom_op_in_the_middle():
    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.layers[1](custom_with_gradient(self.layers[0](x)))

    network = Middle()
    with pytest.raises(NotImplementedError, match=r"scm_kernels_tests\.custom_with_gradient"):
        detached(network, X, TX)
    assert torch.isfinite(network(X)).all()
