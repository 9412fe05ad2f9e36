"""The tangent's Triton kernels on a machine without a GPU: compiled for several kinds, run by a
simulator of PTX with its checks of memory, races and initialisation, and interpreted.

The tests that run are those of `test_tangent_kernels.py`, which a GPU takes as they are; the bytes
that a launch moves, what is compiled for which sizes, and spills are tested here alone.
"""

import os
import re
import subprocess
import sys

import pytest
import test_tangent_kernels as shared
import torch

from scm_kernels import _triton
from scm_kernels.tangent import config

offline = pytest.importorskip("benchmarks.offline")  # it needs Triton
pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")

ops = torch.ops.scm_kernels
slow, ptx = pytest.mark.slow, pytest.mark.ptx


def steps(inputs, coefficients):
    """Each step, to be called."""
    return {
        "norm": lambda: ops.tangent_norm(*inputs, coefficients, "triton"),
        "apply": lambda: ops.tangent_apply(*inputs, coefficients, "triton"),
        "normalize": lambda: shared.normalize(inputs, coefficients, "triton"),
    }


def check(inputs, coefficients):
    """All steps against float64."""
    g = shared.combined(inputs, coefficients)
    terms = shared.combined([x.abs() for x in inputs], coefficients.abs())
    results = {name: step() for name, step in steps(inputs, coefficients).items()}
    torch.testing.assert_close(results["norm"], g.square().sum(1), rtol=1e-6, atol=1e-12)
    shared.close_rounded(results["apply"], g, terms)
    s = 1 / (g.norm(dim=1, keepdim=True) + 0.1)
    shared.close_rounded(results["normalize"], s * g, s * terms)


# --- values ---------------------------------------------------------------------------------------

# Beside those that all backends have: several samples a program and the last one not full; pieces
# that fill their tile and that do not; parts.
SHAPES = [(21, 24), (5, 1000), (2, 8192), (2, 12_296), (2, 32_760), (2, 40_000)]


def planned():
    """(test of `test_tangent_kernels.py`, its arguments, whether it is quick)"""
    for shape in (*shared.SHAPES, *SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            quick = dtype == torch.bfloat16 and shape[1] in (1, 7, 24, 12_296, 40_001)
            yield shared.test_steps, {"shape": shape, "dtype": dtype}, quick
    for dtype in shared.DTYPES:
        yield shared.test_strides, {"dtype": dtype}, dtype == torch.float16
        for size in (1, 3000, 40_001):
            arguments = {"dtype": dtype, "bad": torch.inf, "size": size}
            yield shared.test_bad_samples, arguments, dtype == torch.float16
    for dtype in shared.HALVES:
        yield shared.test_halves_survive, {"dtype": dtype}, True
        yield shared.test_halves_round_to_nearest_even, {"dtype": dtype}, True
    yield shared.test_sums_do_not_drift, {"shape": (1, 2_000_000)}, False
    yield shared.test_sums_do_not_drift, {"shape": (4096, 64)}, True
    yield shared.test_no_normaliser_of_nothing, {}, True


def named(test, arguments):
    return "-".join([test.__name__.removeprefix("test_"), *map(str, arguments.values())])


@ptx
@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        pytest.param(test, arguments, marks=() if quick else slow, id=named(test, arguments))
        for test, arguments, quick in planned()
    ],
)
def test_compiled(test, arguments):
    test(backend="triton", **arguments)


@ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_apart(launches, dtype):
    """Vectors of rows with gaps between them, of up to 2^31 elements."""
    inputs, coefficients = shared.make((2, 1032), dtype)
    room = torch.empty(2**31 + 4096, dtype=dtype)  # of which two rows are touched
    inputs[1] = room.as_strided((2, 1032), (2**31 + 8, 1)).copy_(inputs[1])
    inputs[2] = torch.full((2, 1040), torch.nan, dtype=dtype)[:, 8:].copy_(inputs[2])
    check(inputs, coefficients)
    assert {launch.constants["VEC"] for launch in launches} == {16 // dtype.itemsize}


@ptx
@pytest.mark.usefixtures("launches")
def test_zero_coefficients_in_one_alone():
    """Coefficients that are zero in float32 but not in float64 leave no sample out."""
    inputs, coefficients = shared.make((3, 5))
    inputs[0][0, 0] = torch.nan
    coefficients[0] = 1e-60
    applied = ops.tangent_apply(*inputs, coefficients, "triton")
    assert applied.isnan().sum() == 1


# --- bytes ----------------------------------------------------------------------------------------


def guarded(ptxsim, x):
    """x as a GPU would allocate it: aligned to 256 bytes, and nothing of ours around it."""
    raw = x.contiguous().view(torch.uint8).numpy()
    return torch.from_numpy(ptxsim.array(raw)).view(x.dtype)


@ptx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *((512, 32), (512, 64), (256, 128), (64, 512)),  # several samples a program
        *((8, 4096), (4, 16_384), (2, 32_768), (1, 262_144)),
    ],
    ids=str,
)
def test_each_byte_moves_once(ptxsim, launches, shape, dtype):
    """Sectors of inputs and outputs, in 16-byte accesses; twice where a sample is in parts."""
    inputs, coefficients = shared.make(shape, dtype)
    inputs, coefficients = [guarded(ptxsim, x) for x in inputs], guarded(ptxsim, coefficients)
    size = inputs[0].nbytes
    for name, step in steps(inputs, coefficients).items():
        launches.clear()
        step()
        reads = 2 if name == "normalize" and shape[1] > config.KEPT[-1].most else 1
        stats = [launch.stats for launch in launches]
        assert len(stats) <= 2
        lines = [line for x in stats for line in x.memory_lines]
        vectors = 32 * sum(x["sectors"] for x in lines if "global.v4.b32" in x["op"])
        assert vectors == size * (4 * reads + (name != "norm"))
        # What else there is: coefficients, sums, and those of parts.
        moved = 32 * sum(x.global_load_sectors + x.global_store_sectors for x in stats)
        sums = 8 * shape[0] if name == "norm" else 0
        assert moved <= 1.05 * (vectors + coefficients.nbytes + sums)


# --- what is compiled -----------------------------------------------------------------------------

SIZES = sorted({64, *(min(t.most, 40_000) for t in config.SUMMED + config.APPLIED + config.KEPT)})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(
            target,
            dtype,
            marks=() if (target, dtype) in (("sm_90", torch.bfloat16),) else slow,
            id=f"{target}-{dtype}",
        )
        for target in offline.TARGETS
        for dtype in shared.DTYPES
    ],
)
def test_nothing_spills(target, dtype, size):
    """Every row of the tables; on NVIDIA's GPUs in 16-byte accesses, but for the tiniest."""
    inputs = [torch.empty(2, size, dtype=dtype) for _ in range(4)]
    coefficients = torch.empty(2, 4, dtype=torch.float64)
    with offline.gpu(target) as launches:
        for step in steps(inputs, coefficients).values():
            step()
    for launch in launches:
        assert launch.spilled() == 0, launch.name
        vectors = size > config.TINY.most and launch.name != "tangent_sum_kernel"
        if target != "gfx942" and vectors:
            assert b"ld.global.v4.b32" in launch.code("ptx"), launch.name


def test_sizes_share_a_kernel():
    """No kernel for each number of samples, elements, parts, or value of c: Triton would make one
    for 1 and one for multiples of 16.
    """
    with offline.gpu("sm_80") as launches:
        for batch, size, c in ((1, 40_000, 1.0), (2, 2**20, 0.0), (16, 33_000, 0.1)):
            inputs = [torch.empty(batch, size, dtype=torch.bfloat16) for _ in range(4)]
            coefficients = torch.empty(batch, 4, dtype=torch.float64)
            for step in steps(inputs, coefficients).values():
                step()
            shared.normalize(inputs, coefficients, "triton", c=c, mean=True, zero=True)
    assert {launch.name: launch.metadata.hash for launch in launches}.keys() == {
        f"tangent_{name}_kernel" for name in ("norm", "sum", "apply", "scale")
    }
    assert len({launch.metadata.hash for launch in launches}) == 4


# --- interpreted ----------------------------------------------------------------------------------


def run(*command, **variables):
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | variables,
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "chosen",
    ["500 or strides or nothing or 64", pytest.param("not 300007 and not threads", marks=slow)],
)
def test_interpreted(chosen):
    """The shared tests on Triton's interpreter."""
    result = run(
        *("-m", "pytest", "-q", "-k", f"triton and ({chosen})", "tests/test_tangent_kernels.py"),
        TRITON_INTERPRET="1",
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout


def test_what_is_refused():
    inputs, coefficients = shared.make((2, 3))
    with offline.gpu("sm_80"):
        for wrong, message in (
            ((*(x.double() for x in inputs), coefficients), "not torch.float64"),
            ((*inputs, coefficients.float()), "coefficients in float64, not torch.float32"),
        ):
            with pytest.raises(NotImplementedError, match=message):
                ops.tangent_norm(*wrong, "triton")


@ptx
@pytest.mark.parametrize("shape", [(3, 40), (2, 5000), (1, 70001)], ids=str)
def test_a_second_launch_is_like_the_first(launches, shape):
    """It goes to the compiled kernel at once, with every argument that it has."""
    inputs, coefficients = shared.make(shape)
    steps = {
        "tangent_norm": (),
        "tangent_apply": (),
        "tangent_normalize": (0.1, False, False),
    }
    for step, options in steps.items():
        run = getattr(ops, step)
        first = run(*inputs, coefficients, *options, "triton")
        count = len(launches)
        assert torch.equal(first, run(*inputs, coefficients, *options, "triton")), step
        assert len(launches) == count + len({x.name for x in launches[:count]})
        assert launches[0].grid == launches[count].grid
        launches.clear()
