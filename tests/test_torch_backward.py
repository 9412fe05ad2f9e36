"""PyTorch's own backward in the place of a backend: on a GPU, without one."""

from types import SimpleNamespace

import pytest
import torch

from scm_kernels import _triton
from scm_kernels.attention import reference, torch_backward, triton
from scm_kernels.attention.problem import Backward

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def nvidia(monkeypatch):
    monkeypatch.setattr(_triton, "refuses", lambda x: None)


def problem(dtype=BF16, m=8, n=8, d=64, e=None, mask=None, causal=False) -> Backward:
    """Of tensors without data; values are for `pytest -m gpu`."""
    q, k, v, out = (
        torch.zeros(1, 2, *shape, dtype=dtype)
        for shape in ((m, d), (n, d), (n, e or d), (m, e or d))
    )
    given = (q, k, v, None, None, None, mask, None, causal, 0.125, out, None, q[..., 0].float())
    return Backward(*given, None, None, out, None, q, k, v, None, None, None, None, None)


def meta(p: Backward) -> Backward:
    return Backward(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in p))


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ({}, True),
        ({"causal": True}, True),
        ({"causal": True, "m": 9}, False),
        ({"e": 32}, False),
        ({"d": 68}, False),
        ({"mask": torch.zeros(1, 1, 8, 8, dtype=BF16)}, False),
        ({"dtype": F32}, False),
    ],
)
def test_pytorchs_flash_backward_is_asked_as_it_wants(wanted, taken):
    """Its schema and shapes."""
    p = problem(**wanted)
    assert (torch_backward._flash_refuses(p) is None) == taken
    if taken:
        gradients = torch_backward._flash(meta(p))
        assert [x.shape for x in gradients] == [x.shape for x in (p.q, p.k, p.v)]


@pytest.mark.parametrize(
    ("architecture", "features", "served"),
    [("sm_80", 64, True), ("sm_90", 64, False), ("sm_90", 128, False), ("sm_90", 256, True)],
)
def test_pytorchs_backward_stands_back_where_it_is_slower(
    architecture, features, served, monkeypatch
):
    q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 4, features))
    problem = SimpleNamespace(q=q)
    monkeypatch.setattr(torch_backward, "refuses", lambda problem: None)
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    assert torch_backward.serves(problem, triton) == served
    assert torch_backward.serves(problem, reference)
