"""`pytest -m gpu`: every test that runs a backend on the GPU of this machine, if it has one."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", "")
        name = backend if isinstance(backend, str) else backend[0]  # or with an instruction set
        if name in ("auto", "cuda", "triton"):
            item.add_marker(pytest.mark.gpu)
