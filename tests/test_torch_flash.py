"""PyTorch's own flash backward in the place of a backend: on a GPU, without one."""

from types import SimpleNamespace

import pytest
import torch

from scm_kernels import _triton
from scm_kernels.attention import reference, torch_flash, triton
from scm_kernels.attention.problem import Backward


@pytest.mark.parametrize(
    ("m", "causal", "taken"), [(8, False, True), (8, True, True), (9, True, False)]
)
def test_pytorchs_flash_backward_is_asked_as_it_wants(m, causal, taken, monkeypatch):
    """Its schema and shapes, on tensors without data; values are for `pytest -m gpu`."""
    q, k = (
        torch.zeros(1, 2, m, 64, dtype=torch.bfloat16),
        torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16),
    )
    problem = Backward(
        *(q, k, k, None, None, None, None, None, causal, 0.125, q, None, q[..., 0].float(), None),
        *(q, None, q, k, k, None, None, None, None, None),
    )
    monkeypatch.setattr(_triton, "refuses", lambda x: None)
    assert (torch_flash._refuses_on_gpu(problem) is None) == taken
    meta = Backward(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in problem))
    gradients = torch_flash._on_gpu(meta)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("architecture", "features", "served"),
    [("sm_80", 64, True), ("sm_90", 64, False), ("sm_90", 128, False), ("sm_90", 256, True)],
)
def test_pytorchs_flash_backward_stands_back_where_it_is_slower(
    architecture, features, served, monkeypatch
):
    q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 4, features))
    problem = SimpleNamespace(q=q)
    monkeypatch.setattr(torch_flash, "refuses", lambda problem: None)
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    assert torch_flash.serves(problem, triton) == served
    assert torch_flash.serves(problem, reference)
