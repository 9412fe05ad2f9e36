"""`pytest -m gpu`: every test that runs a backend on the GPU of this machine, if it has one.
`SCM_KERNELS_BACKEND=<name> pytest`: what that backend does not take is skipped, and says so.
Fixtures that give Triton's kernels, and the CUDA kernels, a simulated GPU.
"""

import os

import pytest
import torch

from benchmarks import offline_cuda, tools
from scm_kernels import _cuda, _triton

# The compiled graphs on disk know an op by its name: none of another version of it is to be met.
torch.compiler.config.force_disable_caches = True

if _triton.interpreting() and _triton.unavailable() is None:
    import quick_interpreter

    quick_interpreter.install()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", "")
        name = backend if isinstance(backend, str) else backend[0]  # or with an instruction set
        if name in ("auto", "cuda", "triton"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def ptxsim():
    """The simulator of PTX."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the kernels itself")
    try:
        return tools.tool("ptxsim")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def launches(ptxsim):
    """A simulated GPU, and what is launched on it."""
    offline = pytest.importorskip("benchmarks.offline")  # it needs Triton
    with offline.gpu("sm_80", simulate=True) as launches:
        yield launches


@pytest.fixture
def cuda_launches(ptxsim):
    """A simulated GPU for the CUDA kernels of the native module, and what is launched on it."""
    if not _cuda.built():
        pytest.skip("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    with offline_cuda.gpu(simulate=True) as launches:
        yield launches


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        forced = os.environ.get("SCM_KERNELS_BACKEND")
        while error.__cause__ is not None:  # what opcheck raises has one
            error = error.__cause__
        if forced and f"backend {forced!r} was forced, but it does not take" in str(error):
            pytest.skip(str(error))
        raise
