"""Attention on NVIDIA's GPUs by the CUDA C++ kernels of csrc/cuda: the forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from scm_kernels import _cuda, _native, _triton
from scm_kernels.attention.problem import Backward, Forward

_DTYPES = {torch.bfloat16, torch.float16}
# What is compiled. Other problems take Triton's kernels, which are compiled as they come.
FEATURES = (64, 72, 96, 112, 128)
LONGEST = 2**31 - 128  # whose rows an int counts, to the end of a tile of 128


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
    """Whether Triton's kernels are faster: on Hopper, for which there are kernels of these with
    products of four warps where the tangents are those of q, k and v, or that of q alone. The
    others multiply warp by warp, as an A100 does, and Triton's kernels do not: these were 1.19
    times as fast at D = 64 and 1.24 times at 128 on an H200 if not causal (measured)."""
    p = problem
    if p.q.device.type != "cuda" or _triton.architecture(p.q.device) != "sm_90":
        return False
    hopper = p.tq is not None and (p.tk is None) == (p.tv is None)
    return not hopper and not p.causal


def plan_forward(problem: Forward) -> Callable[[Forward], None]:
    """One pass over the keys."""
    p = problem
    (b, h, m, d), (_, hk, n, e) = p.q.shape, p.v.shape
    inputs = p.q, p.k, p.v, p.tq, p.tk, p.tv
    function = _native.module().cuda_attention_forward(
        (b, h, hk, m, n, d, e),
        p.causal,
        p.scale,
        [*map(_native.address, inputs), None, None],  # no masks
        _native.address(p.out),
        _native.address(p.t_out),
    )

    def run(p: Forward) -> None:
        tensors = p.q, p.k, p.v, p.tq, p.tk, p.tv, p.out, p.t_out, p.lse, p.mu
        _cuda.launch(function, tensors, *[0 if x is None else x.data_ptr() for x in tensors])

    return run


def _aligned(x: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, which is what an asynchronous copy takes."""
    strides = x.stride()
    if (strides[0] | strides[1] | strides[2]) % 8:  # elements of two bytes
        # Of a dimension of length 1 the stride means nothing.
        rows = zip(x.shape[:3], strides[:3], strict=True)
        if any(stride % 8 for length, stride in rows if length > 1):
            return False
    return x.data_ptr() % 16 == 0
