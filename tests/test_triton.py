"""What `backends()` says of Triton, with and without it, with and without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scm_kernels
from scm_kernels import _triton

STATUS = "import scm_kernels; print(scm_kernels.backends()['triton'])"
WITHOUT = "import sys; sys.modules['triton'] = None; "


def status(code: str, **environment: str) -> str:
    """What the code prints in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available() or _triton.interpreting(), reason="it is available")
def test_without_a_gpu():
    assert scm_kernels.backends()["triton"].startswith("not available: PyTorch sees no GPU here")
    with (
        pytest.raises(RuntimeError, match=r"'triton' is not available: PyTorch sees no GPU"),
        scm_kernels.backend("triton"),
    ):
        pass


def test_interpreted():
    pytest.importorskip("triton")
    expected = "available (attention, tangent; interpreted on the CPU)"
    assert status(STATUS, TRITON_INTERPRET="1") == expected


def test_without_triton():
    doors = "import scm_kernels.attention.triton, scm_kernels.tangent.triton; "
    printed = status(WITHOUT + doors + STATUS, TRITON_INTERPRET="1")
    assert "Triton cannot be imported" in printed
    assert "`pip install triton`" in printed


def test_a_gpu_that_is_too_old(monkeypatch):
    class Tensor:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(_triton, "interpreting", lambda: False)
    monkeypatch.setattr(_triton, "_capability", lambda index: (7, 5))
    assert _triton.refuses(Tensor()) == "it wants compute capability 8.0 and later, not 7.5"
    monkeypatch.setattr(_triton, "_capability", lambda index: (8, 6))
    assert _triton.refuses(Tensor()) is None


def test_tensors_elsewhere(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setattr(_triton, "interpreting", lambda: False)
    assert _triton.refuses(x) == "it runs on a GPU, not on cpu"
    monkeypatch.setattr(_triton, "interpreting", lambda: True)
    assert _triton.refuses(x) is None
    assert "on the CPU" in _triton.refuses(x.to("meta"))


@pytest.mark.parametrize("stride", [0, 1, 16, 64, 2**31])
def test_strides_are_odd(stride):
    """Triton compiles once more for 1, and for what 16 divides."""
    coded = _triton.coded(stride)
    assert coded % 2 == 1
    assert coded > 1
    assert (coded - 3) >> 1 == stride
