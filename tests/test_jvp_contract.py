"""The contract of `scm_kernels.jvp`: that of torch.func.jvp, graphs, bad arguments.

Functions one by one are in `test_jvp.py`.
"""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import check_jvp, close, dit_case, stock_jvp, true_jvp
from torch import nn

import scm_kernels


class Place:
    """Where a hook has put a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


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
    with pytest.raises(
        TypeError, match=r"func: returned a float64 .* expected a pair \(out, aux\)"
    ):
        scm_kernels.jvp(network, primals, tangents, has_aux=True)


def test_pytrees_in_and_out():
    network, (x, t), (tx, tt) = dit_case()

    def func(inputs, t):
        out = network(inputs["x"], t[0])
        return {"out": out, "parts": [out.sum(), (out.cos(),)]}

    primals, tangents = ({"x": x}, [t]), ({"x": tx}, [tt])
    check_jvp(func, primals, tangents, network.parameters())


def test_functions_of_more_than_the_inputs_and_of_less():
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
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
    x, tx = torch.randn(2, 4, 6, dtype=torch.float64)
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
        with scm_kernels.fused(), context():
            got = torch.func.jvp(network, primals, tangents)
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


def test_an_inference_mode_inside_has_no_derivative():
    network, (x, _), (tx, _) = nn.Linear(4, 4).double(), *torch.randn(2, 2, 3, 4).double()

    def function(x):
        with torch.inference_mode():
            frozen = network(x).sin() * 2 + F.layer_norm(x, (4,))
        return network(x) + frozen

    close(scm_kernels.jvp(function, (x,), (tx,)), stock_jvp(function, (x,), (tx,)))


def test_hooks_of_tensors():
    """Of the gradient of a primal, whatever else computes it."""
    torch.manual_seed(0)
    layer, x, tx = nn.Linear(4, 4), torch.randn(3, 4), torch.randn(3, 4)
    seen = []

    def function(x):
        h = layer(x).tanh()
        h.register_hook(lambda g: (seen.append(g), 2 * g)[1])
        return h.sin()

    expected = torch.autograd.grad(function(x).sum(), layer.weight)[0]
    for tangent_grad in (False, True):
        out, _ = scm_kernels.jvp(function, (x,), (tx,), tangent_grad=tangent_grad)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), layer.weight)[0], expected)
    assert all(torch.equal(g, seen[0]) for g in seen)
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="doesn't require grad"):
        scm_kernels.jvp(lambda x: x.register_hook(print), (x,), (tx,))


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(name):
    """PyTorch would leave them out, and what they do to gradients."""
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(3, 4)
    handle = getattr(network[1], name)(lambda module, *gradients: None)
    with pytest.raises(NotImplementedError, match=r"Tanh has a backward hook"):
        scm_kernels.jvp(network, (x,), (x,))
    with torch.no_grad():
        scm_kernels.jvp(network, (x,), (x,))
    handle.remove()
    scm_kernels.jvp(network, (x,), (x,))


@pytest.mark.parametrize("function", [torch.softmax, F.silu, F.mish], ids=lambda f: f.__name__)
def test_hooks_of_saved_tensors(function):
    """See what PyTorch's forward saves, and nothing is kept alive that they return."""
    weight, (x, tx) = torch.randn(4, 4, requires_grad=True), torch.randn(2, 3, 4)

    def network(x):
        return function(x @ weight, *((-1,) if function is torch.softmax else ()))

    def kept(call):
        refs = []

        def pack(x):
            place = Place(x)
            refs.append(weakref.ref(place))
            return place

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: place.tensor):
            out = call()
        out.sum().backward()
        del out
        return len(refs), sum(ref() is not None for ref in refs)

    assert kept(lambda: scm_kernels.jvp(network, (x,), (tx,))[0]) == kept(lambda: network(x))


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
        (
            (torch.sin, (ONE,), [ONE]),
            TypeError,
            "tangents: got a list of length 1, expected a tuple",
        ),
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
        ((lambda x: (x, 1), (ONE,), (ONE,)), TypeError, "func: returned int in out, expected a t"),
        ((lambda x: [], (ONE,), (ONE,)), TypeError, "func: returned no tensor, expected one"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        scm_kernels.jvp(*args)


@pytest.mark.parametrize("name", ["has_aux", "tangent_grad"])
def test_options_are_bools(name):
    with pytest.raises(TypeError, match=f"{name}: got str 'x', expected a bool"):
        scm_kernels.jvp(torch.sin, (ONE,), (ONE,), **{name: "x"})


@pytest.mark.parametrize("function", [F.glu, F.hardsigmoid], ids=lambda f: f.__name__)
def test_attention_after_what_has_no_second_derivative(function):
    """Autograd looks at the tangents of attention's inputs where their gradient is none, too."""
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    x, tx = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)

    def network(x):
        y = function(x @ weight)
        return F.scaled_dot_product_attention(y, y, y)

    check_jvp(network, (x,), (tx,), [weight], rtol=1e-7)
    with scm_kernels.fused():
        out, _ = torch.func.jvp(network, (x,), (tx,))
    torch.autograd.grad(out.sum(), weight)
    of_a_vmap = torch.func.vmap(function)
    close(scm_kernels.jvp(of_a_vmap, (x,), (tx,)), stock_jvp(of_a_vmap, (x,), (tx,)))
