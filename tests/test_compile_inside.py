"""Compiled functions with more than a network inside: a whole dual level, a checkpoint."""

import pytest
import torch
from networks import close, true_jvp
from test_compile import (
    AOT,
    attending,
    dual_level,
    fresh_dynamo,  # noqa: F401  (a fixture of every test)
    fused_jvp,
    ours,
    small,
)
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("func", [small, attending], ids=lambda f: f.__name__)
def test_a_dual_level(func):
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)
    compiled = torch.compile(lambda x, tx: dual_level(func, x, tx), backend=AOT, fullgraph=True)
    got, want = compiled(x, tx), true_jvp(func, (x,), (tx,))
    close([y.detach() for y in got], [y.detach() for y in want])


# --- checkpoints ----------------------------------------------------------------------------------


@torch.library.custom_op("scm_test_checkpoint::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize("func", [small, attending], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", [ours, fused_jvp], ids=lambda f: f.__name__)
def test_a_checkpoint_inside(way, func):
    """Dynamo gives a mode the whole checkpoint as one function."""
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)

    def network(x):
        return checkpoint(func, x, use_reentrant=False)

    compiled = torch.compile(lambda x, tx: way(network, x, tx), backend=AOT, fullgraph=True)
    got, want = compiled(x, tx), true_jvp(func, (x,), (tx,))
    close([y.detach() for y in got], [y.detach() for y in want])


def test_a_custom_op_in_a_checkpoint_raises():
    x, tx = torch.randn(2, 4, 8, dtype=torch.float64)

    def network(x):
        return checkpoint(lambda x: twice(x.sin()), x, use_reentrant=False)

    compiled = torch.compile(lambda x, tx: ours(network, x, tx), backend=AOT, fullgraph=True)
    with pytest.raises(RuntimeError, match="custom op got a dual tensor"):
        compiled(x, tx)
