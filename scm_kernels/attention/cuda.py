"""Attention on NVIDIA's GPUs by the CUDA C++ kernels of csrc/cuda: the forward."""

import torch
from torch import Tensor

from scm_kernels import _cuda, _native, _triton
from scm_kernels.attention.problem import Backward, Forward

_DTYPES = {torch.bfloat16, torch.float16}
# What is compiled. Other problems take Triton's kernels, which are compiled as they come.
FEATURES = (64, 72, 96, 112, 128)
LONGEST = 2**31 - 64  # whose number of tiles an int holds


def unavailable() -> str | None:
    """Why no CUDA kernel runs on this machine."""
    return _cuda.unavailable()


def refuses(problem: Forward | Backward) -> str | None:
    """The backward, tensors elsewhere, and what is not compiled."""
    if isinstance(problem, Backward):
        return "it has no backward"
    p, q, v = problem, problem.q, problem.v
    reason = _cuda.refuses(q)
    if reason is not None:
        return reason
    if q.dtype not in _DTYPES:
        return f"it has bfloat16 and float16, not {q.dtype}"
    if p.mask is not None or p.tmask is not None:
        return "it has no masks"
    features = q.shape[3], v.shape[3]
    if features[0] != features[1] or features[0] not in FEATURES:
        known = ", ".join(map(str, FEATURES))
        return f"it has D = E of {known}, not D = {features[0]}, E = {features[1]}"
    longest = max(q.shape[2], v.shape[2])
    if longest > LONGEST:
        return f"it has lengths up to {LONGEST}, not {longest}"
    tensors = q, p.k, v, p.tq, p.tk, p.tv, p.out, p.t_out
    if not all(x is None or _aligned(x) for x in tensors):
        return "it has rows at multiples of 16 bytes"
    return None


def yields(problem: Forward | Backward) -> bool:
    """Whether Triton's kernels are faster: on an H200 they are, if not causal, 1.19 times at D = 64
    and 1.24 times at 128 (measured). These multiply warp by warp, as an A100 does; a Hopper GPU has
    products of four warps, at a higher rate, and Triton uses them."""
    device = problem.q.device
    on_hopper = device.type == "cuda" and _triton.architecture(device) == "sm_90"
    return on_hopper and not problem.causal


def forward(problem: Forward) -> None:
    """One pass over the keys."""
    p = problem
    (b, h, m, d), (_, hk, n, e) = p.q.shape, p.v.shape
    inputs, outputs = (p.q, p.k, p.v, p.tq, p.tk, p.tv), (p.out, p.t_out, p.lse, p.mu)
    _cuda.launch(
        "cuda_attention_forward",
        (*inputs, *outputs),
        (b, h, hk, m, n, d, e),
        p.causal,
        p.scale,
        [*map(_native.address, inputs), None, None],  # no masks
        _native.address(p.out),
        _native.address(p.t_out),
        p.lse.data_ptr(),
        p.mu.data_ptr(),
    )


def _aligned(x: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, which is what an asynchronous copy takes."""
    strides = x.stride()
    if (strides[0] | strides[1] | strides[2]) % 8:  # elements of two bytes
        # Of a dimension of length 1 the stride means nothing.
        rows = zip(x.shape[:3], strides[:3], strict=True)
        if any(stride % 8 for length, stride in rows if length > 1):
            return False
    return x.data_ptr() % 16 == 0
