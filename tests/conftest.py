"""`pytest -m gpu`: every test that runs a backend on the GPU of this machine, if it has one.
`SCM_KERNELS_BACKEND=<name> pytest`: what that backend does not take is skipped, and says so.
"""

import os

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as error:
        forced = os.environ.get("SCM_KERNELS_BACKEND")
        if forced and f"backend {forced!r} was forced, but it does not take" in str(error):
            pytest.skip(str(error))
        raise
