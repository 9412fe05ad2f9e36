"""Activation checkpoints (non-reentrant) in an open dual level, with a backward inside of it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from networks import close
from test_jvp_checkpoint import inside_case

import scm_kernels

BACKWARDS = {
    "Tensor.backward": lambda loss, leaves: loss.backward(inputs=leaves),
    "backward": lambda loss, leaves: torch.autograd.backward(loss, inputs=leaves),
    "grad": lambda loss, leaves: torch.autograd.grad(loss, leaves),
    "grad of a list": lambda loss, leaves: torch.autograd.grad(
        [loss.sum()], leaves, grad_outputs=[torch.ones_like(loss)], create_graph=True
    ),
}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("name", ["attention", "multi-head", "feed-forward", "quotient"])
def test_backward_in_a_level(name, backward):
    """The backward runs in the mode, and so does what a checkpoint computes again in it."""
    kept, function, x, tx, leaves = inside_case(name)
    results = []
    for run in (kept, function):
        with scm_kernels.fused(), forward_ad.dual_level():
            out, t_out = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tx)))
            loss = out.sin().sum() + (t_out * t_out.cos()).sum()
            if run is kept:
                got = BACKWARDS[backward](loss, leaves) or [y.grad for y in leaves]
            else:
                got = torch.autograd.grad(loss, leaves)
        results.append([forward_ad.unpack_dual(y)[0] for y in got])
    close(*results)


@pytest.mark.parametrize("name", ["feed-forward", "quotient", "product", "halves", "softmax"])
def test_the_tangent_of_a_gradient_in_a_level(name):
    """What is computed again has tangents that reach it."""
    kept, function, x, tx, leaves = inside_case(name)
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, tx))
        truth = torch.autograd.grad(out.sin().sum(), leaves)
        with scm_kernels.fused():
            out = kept(forward_ad.make_dual(x, tx))
            got = torch.autograd.grad(out.sin().sum(), leaves)
        close(*([tuple(forward_ad.unpack_dual(y)) for y in z] for z in (got, truth)))
