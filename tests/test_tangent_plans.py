"""What is decided once for calls of the tangent and of the loss of one kind: for no others."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import scm_kernels
from scm_kernels import _backends, consistency_loss, normalized_tangent


@pytest.fixture(autouse=True)
def afresh():
    _backends.forget()
    yield
    _backends.forget()


def draw(*shape: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = shape or (3, 2, 4, 5)
    x = {name: torch.randn(shape) for name in ("output", "dxdt", "x_t", "jvp")}
    return x | {"t": 1.5 * torch.rand(shape[0]), "log_weight": torch.randn(shape[0])}


def doubled(x: dict) -> dict:
    return {k: y.double() if isinstance(y, torch.Tensor) else y for k, y in x.items()}


def truth(function, x: dict):
    """The function in float64."""
    with scm_kernels.backend("reference"):
        return function(doubled(x))


def losses(x: dict):
    return consistency_loss(**x, reduction="none")


def tangent(x: dict):
    return normalized_tangent(**{name: y for name, y in x.items() if name != "log_weight"})


def variants() -> list[dict]:
    """Calls, each of which differs from the first in one thing or two."""
    x = draw()
    last = {
        name: y.contiguous(memory_format=torch.channels_last) for name, y in x.items() if y.ndim > 1
    }
    shifted = torch.randn(3 * 2 * 4 * 5 + 1)[1:].view(3, 2, 4, 5)
    every_other = torch.rand(6)[::2]
    return [
        x,
        *({**x, "warmup": r} for r in (0, 0.25, 1.0, torch.tensor(0.5), torch.rand(3))),
        *({**x, "sigma_data": sd} for sd in (1, 2.0)),
        *({**x, "c": c} for c in (0, 1.5)),
        *({**x, "preset": preset} for preset in ("rms", "sana", "paper")),
        {**x, "preset": "rcm", "log_weight": None},
        {**x, "log_weight": None},
        {**x, "nan_policy": "zero"},
        {**x, "log_weight": x["log_weight"].double()},
        {**x, "t": every_other},
        {**x, "t": x["t"].half()},
        {**x, "x_t": shifted},
        {**x, "jvp": x["jvp"].transpose(2, 3).contiguous().transpose(2, 3)},
        {**x, **last},
        {name: None if y is None else y[:2] for name, y in x.items()},
        {name: y.flatten(1) if y.ndim > 1 else y for name, y in x.items()},
        draw(3, 40),
        draw(3),
    ]


@pytest.mark.parametrize("function", [losses, tangent])
def test_a_call_after_another_that_differs_in_one_thing(function):
    """Each right, in any order, the second time too."""
    calls = variants()
    for x in [*calls, *reversed(calls)]:
        actual, right = function(x), truth(function, x)
        assert actual.shape == right.shape
        tolerance = 1e-3 if x["t"].dtype == torch.float16 else 1e-5
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)


def test_a_tangent_may_be_written_to():
    """The first one of a kind too: none is a view."""
    weight = torch.ones(1, requires_grad=True)
    for x in (draw(), draw(3, 40), draw(3), *variants()):
        for _ in range(2):
            with torch.no_grad():
                g = tangent(x)
            assert not g._is_view()
            g.detach_().mul_(weight.to(g.dtype))


def test_another_mean_after_the_losses():
    x = draw()
    for _ in range(2):
        torch.testing.assert_close(consistency_loss(**x), losses(x).mean())


@pytest.mark.parametrize("leaves", [["output"], ["log_weight"], ["output", "log_weight"]], ids=str)
def test_a_known_kind_sees_whether_a_gradient_is_wanted(leaves):
    x = draw()
    with torch.inference_mode():
        losses(x)
        losses(x)
    assert not losses(x).requires_grad

    def gradients(inputs):
        inputs = inputs | {name: inputs[name].clone().requires_grad_() for name in leaves}
        with torch.no_grad():
            assert not losses(inputs).requires_grad
        assert not tangent(inputs).requires_grad
        return torch.autograd.grad(losses(inputs).square().sum(), [inputs[name] for name in leaves])

    for actual, right in zip(gradients(x), truth(gradients, x), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-4, atol=1e-5)


def test_a_known_kind_is_checked_as_any_other():
    """What equals a good argument, and is none; and a number that is another at each call."""
    x = draw()
    for function in (losses, tangent):
        function(x | {"warmup": 1.0, "sigma_data": 1.0})
        for warmup in (1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match="warmup: got"):
                function(x | {"warmup": warmup, "sigma_data": 1.0})
        for name in ("warmup", "sigma_data", "c"):
            with pytest.raises(TypeError, match=f"{name}: got bool True"):
                function(x | {"warmup": 1.0, "sigma_data": 1.0, name: True})
        with pytest.raises(TypeError, match="sigma_data: got a list of length"):
            function(x | {"sigma_data": [1.0]})
        with pytest.raises(TypeError, match="x_t: got"):
            function(x | {"x_t": None})
        with pytest.raises(TypeError, match="jvp: got"):
            function(x | {"jvp": x["jvp"].double()})
    meanflow = x | {"preset": "meanflow"}
    losses(meanflow)
    with pytest.raises(ValueError, match=r"warmup: got float 0.5, expected 1.0"):
        losses(meanflow | {"warmup": 0.5})


def test_a_known_kind_still_refuses_dual_tensors():
    x = draw()
    for function in (losses, tangent):
        function(x)
        with forward_ad.dual_level():
            dual = x | {"output": forward_ad.make_dual(x["output"], x["jvp"])}
            with pytest.raises(NotImplementedError, match="got a dual tensor"):
                function(dual)


def test_a_known_kind_under_autocast():
    x = {name: y.bfloat16() for name, y in draw().items()} | {"x_t": draw()["x_t"]}
    for function in (losses, tangent):
        function({**x, "x_t": x["x_t"].bfloat16()})
        with pytest.raises(TypeError, match="x_t: got"):
            function(x)
        with torch.autocast("cpu", torch.bfloat16):
            wide = function(x)
        right = truth(function, x)
        torch.testing.assert_close(wide.double(), right, rtol=2e-2, atol=2e-2)
