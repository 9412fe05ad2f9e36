"""Attention's Triton kernels compiled for several kinds of GPU: what they take of registers and of
shared memory.
"""

import os

import pytest
import torch

from scm_kernels import _triton
from scm_kernels.attention.triton_backward_config import atomic_row

a100 = pytest.importorskip("benchmarks.a100")  # it needs Triton
pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")

slow = pytest.mark.slow
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def resources(job) -> list[tuple]:
    """(name, bytes of local memory, of shared memory) of a problem's kernels."""
    problem, target = job
    return [(x.name, x.spilled(), x.shared) for x in problem.launches(target)]


def every_problem(dtype: torch.dtype) -> list:
    """All that choose a row of the tables up to 128 features."""
    names = ("forward", "backward, out", "backward, both", "backward, both, six")
    of_masks = {
        "bias": ("backward, out, mask", "backward, both, mask"),
        "bias and tangent": ("backward, both, mask",),
    }
    atomics = [
        a100.Problem("backward, both, atomics", dtype, d, causal)
        for d in a100.HEAD_DIMS
        for causal in (False, True)
        if atomic_row("sm_80", dtype, d) is not None
    ]
    return atomics + [
        a100.Problem(name, dtype, d, causal, mask=mask)
        for mask in a100.MASKS
        for name in (*names, *of_masks.get(mask, ()))
        for d in a100.HEAD_DIMS
        for causal in ((False,) if mask else (False, True))
    ]


# A minute's worth of them. EVERY_KERNEL=1 takes them all: the better part of an hour.
MASKED = [
    a100.Problem(name, BF16, d, mask=mask)
    for name in ("forward", "backward, out", "backward, both")
    for d, mask in ((64, "rows"), (128, "bias and tangent"))
]
CHOSEN = {
    ("sm_80", BF16): [
        *(p for p in a100.problems([BF16]) if p.name == "forward" or not p.causal),
        *MASKED,
    ],
    ("sm_80", F16): [p for p in a100.problems([F16]) if p.name == "forward"],
    ("sm_90", BF16): [
        *(p for p in a100.problems([BF16]) if p.d in (64, 128) and not p.causal),
        a100.Problem("backward, both", BF16, 64, causal=True),
        a100.Problem("backward, both, six", BF16, 64, mask="padding"),
    ],
    ("sm_90", F16): [
        a100.Problem("forward", F16, 96),
        a100.Problem("backward, both, six", F16, 112, mask="bias and tangent"),
    ],
    ("sm_100", BF16): [
        a100.Problem("forward", BF16, 72, mask="bias"),
        a100.Problem("backward, both", BF16, 72, mask="padding"),
    ],
    ("gfx942", BF16): [  # where least is left of 512 registers, or of 102 scalar ones
        a100.Problem("forward", BF16, 128),
        a100.Problem("forward", BF16, 112, causal=True),
        a100.Problem("backward, both", BF16, 72, causal=True),
        a100.Problem("backward, both, six", BF16, 128),
        a100.Problem("backward, out", BF16, 72, mask="padding"),
        a100.Problem("forward", BF16, 128, mask="bias and tangent"),
    ],
}


@slow
@pytest.mark.parametrize(("target", "dtype"), CHOSEN)
def test_nothing_spills_in_half_precision(target, dtype):
    """And everything fits the target's shared memory, or a launch would raise."""
    every = os.environ.get("EVERY_KERNEL") == "1"
    problems = every_problem(dtype) if every else CHOSEN[target, dtype]
    jobs = [(problem, target) for problem in problems]
    spilled = [
        f"{problem}: {name} has {local} bytes of local memory"
        for (problem, _), kernels in zip(jobs, _in_processes(jobs), strict=True)
        for name, local, _ in kernels
        if local > 0
    ]
    assert not spilled, spilled


@slow
@pytest.mark.parametrize("target", ["sm_89", "sm_100"])
def test_compiles_for(target):
    """Within the shared memory of the target, or the launch would raise."""
    names = (("forward", 64), ("forward", 128), ("backward, both", 64), ("backward, out", 128))
    jobs = [(a100.Problem(name, BF16, d), target) for name, d in names]
    jobs.append((a100.Problem("forward", BF16, 128, mask="bias and tangent"), target))
    assert all(len(kernels) > 0 for kernels in _in_processes(jobs))


@slow
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_wide_heads_compile(dtype):
    """256 features, the most there are: on an A100, and in 99 KiB of shared memory. (The float32
    backward alone would take two minutes.)"""
    every = dtype == BF16 or os.environ.get("EVERY_KERNEL") == "1"
    names = ("forward", "backward, both, six") if every else ("forward",)
    jobs = [(a100.Problem(name, dtype, 256), "sm_80") for name in names]
    jobs.append((a100.Problem("forward", dtype, 256), "sm_89"))
    assert all(len(kernels) > 0 for kernels in _in_processes(jobs))


def _in_processes(jobs) -> list[list[tuple]]:
    with a100.processes() as pool:
        return list(pool.map(resources, jobs))
