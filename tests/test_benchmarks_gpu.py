"""The benchmarks on a machine with a GPU, as far as one without shows them."""

import pytest
import torch

from benchmarks import graphs, providers


@pytest.mark.parametrize("built", [False, True])
def test_a_gpu_measures_what_users_get(built, monkeypatch):
    """Where it is none of the backends alone: CUDA's forward and Triton's backward."""
    status = {"triton": "available (H200)", "reference": "available"}
    status["cuda"] = "available (H200)" if built else "not available: not built"
    monkeypatch.setattr(providers.scm_kernels, "backends", lambda: status)
    monkeypatch.setattr(providers._triton, "interpreting", lambda: False)
    names = ["auto", "cuda", "triton", "reference"] if built else ["cuda", "triton", "reference"]
    assert list(providers.ours("cuda")) == names
    assert (providers.ours("cuda")["cuda"] is None) == built


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
def test_graphs_want_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["graphs"])
    with pytest.raises(SystemExit):
        graphs.main()
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
