"""What the CUDA C++ kernels of all ops share on the host: availability and launches."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from scm_kernels import _native, _triton


def unavailable() -> str | None:
    """Why no CUDA kernel runs on this machine, None if one may: `fault` asks the driver."""
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm here, and the kernels are for NVIDIA's GPUs"
    reasons = []
    if not torch.cuda.is_available():
        reasons.append("PyTorch sees no GPU here")
    if not built():
        reasons.append(
            "this installation has no CUDA kernels; with NVIDIA's nvcc, "
            "`SCM_KERNELS_BUILD=cuda pip install .` in the source tree builds them or says why not"
        )
    return ", and ".join(reasons) or None


def fault() -> str | None:
    """What the driver has against the kernels on the current GPU.

    It wants a context there, which a call with tensors on a CPU is not to make, and a forked
    process cannot.
    """
    return _error(torch.cuda.current_device())


def refuses(x: Tensor) -> str | None:
    """Why the kernels do not run on the device of x, None if they do."""
    reason = _triton.refuses_device(x)  # the same GPUs: bfloat16 and asynchronous copies
    return reason or _error(x.device.index)


@cache
def _error(index: int) -> str | None:
    """What a GPU's driver has against the kernels; it may be older than what compiled them."""
    with torch.cuda.device(index):
        reason = _native.module().cuda_error(index)
    return None if reason is None else f"its kernels do not run on GPU {index} ({reason})"


def built() -> bool:
    """Whether the native module is there and has CUDA kernels."""
    return hasattr(_native.module(), "cuda_attention_forward")


def describe() -> str:
    """What runs the kernels, for `backends()`."""
    return torch.cuda.get_device_name()


def launch(function: Callable, tensors: Sequence[Tensor | None], *arguments) -> None:
    """Call a function of the native module that launches on a device and a stream, which are the
    first tensor's device and its current stream.

    `tensors` are all that the kernels read and write: who runs them elsewhere, as tests do in a
    simulator, has to know what memory they may touch.
    """
    index = tensors[0].device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(function, tensors, *arguments)
    # What torch.cuda.current_stream() asks, and Triton's launches; that makes a Python object.
    function(*arguments, index, torch._C._cuda_getCurrentRawStream(index))
