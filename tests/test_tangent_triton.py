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


def steps(inputs, t):
    """Each step, to be called."""
    batch = len(t)
    numbers = [torch.rand(shape, dtype=torch.float64) for shape in ((batch, 4), batch, batch)]
    dlosses = torch.ones(batch)
    return {
        "loss": lambda: shared.loss(inputs, t, "triton", w=dlosses),
        "gradient": lambda: ops.tangent_gradient(*inputs, *numbers, dlosses, dlosses, "triton"),
        "normalize": lambda: shared.normalize(inputs, t, "triton"),
        "apply": lambda: ops.tangent_apply(*inputs, numbers[0], "triton"),
    }


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
    inputs, t = shared.make((2, 1032), dtype)
    room = torch.empty(2**31 + 4096, dtype=dtype)  # of which two rows are touched
    inputs[1] = room.as_strided((2, 1032), (2**31 + 8, 1)).copy_(inputs[1])
    inputs[2] = torch.full((2, 1040), torch.nan, dtype=dtype)[:, 8:].copy_(inputs[2])
    shared.check_preset("triton", "paper", inputs, t)
    widths = {launch.constants["VEC"] for launch in launches if "VEC" in launch.constants}
    assert widths == {16 // dtype.itemsize}


@ptx
@pytest.mark.usefixtures("launches")
def test_zero_coefficients_in_one_alone():
    """Coefficients that are zero in float32 but not in float64 leave no sample out."""
    inputs, coefficients = shared.make((3, 5))[0], shared.random_coefficients(3)
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
    inputs, t = shared.make(shape, dtype)
    inputs = [guarded(ptxsim, x) for x in inputs]
    size = inputs[0].nbytes
    for name, step in steps(inputs, t).items():
        launches.clear()
        step()
        reads = 2 if name == "normalize" and shape[1] > config.KEPT[-1].most else 1
        numbers = [x.stats for x in launches if "SAMPLES" in x.constants]
        stats = [x.stats for x in launches if "SAMPLES" not in x.constants]
        assert len(stats) <= 2
        lines = [line for x in stats for line in x.memory_lines]
        vectors = 32 * sum(x["sectors"] for x in lines if "global.v4.b32" in x["op"])
        assert vectors == size * (4 * reads + (name != "loss"))
        # What else there is: coefficients, sums, and those of parts.
        sums = 8 * shape[0] if name == "loss" else 0
        assert moved(stats) <= 1.05 * (vectors + 32 * shape[0] + sums)
        assert len(numbers) == {"loss": 2, "apply": 0}.get(name, 1)
        # A tenth of it are the constants of a sine.
        assert moved(numbers) <= 160 * shape[0] + 2048


def moved(stats):
    """Bytes of sectors."""
    return 32 * sum(x.global_load_sectors + x.global_store_sectors for x in stats)


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
    with offline.gpu(target) as launches:
        for step in steps(inputs, torch.ones(2)).values():
            step()
    for launch in launches:
        assert launch.spilled() <= shared.sines_array(launch.name), launch.name
        vectors = size > config.TINY.most and "VEC" in launch.constants
        if target != "gfx942" and vectors:
            assert b"ld.global.v4.b32" in launch.code("ptx"), launch.name


def test_sizes_share_a_kernel():
    """No kernel for each number of samples, elements, parts, or value of c: Triton would make one
    for 1 and one for multiples of 16.
    """
    with offline.gpu("sm_80") as launches:
        for batch, size, c in ((1, 40_000, 1.0), (2, 2**20, 0.0), (16, 33_000, 0.1)):
            inputs, t = [torch.empty(batch, size, dtype=torch.bfloat16) for _ in range(4)], [0.5]
            t = torch.tensor(t * batch)
            for step in steps(inputs, t).values():
                step()
            shared.normalize(inputs, t, "triton", c=c, preset="rms", zero=True)
    passes, numbers = ("norm", "sum", "apply", "scale"), ("coefficients", "loss", "gradient")
    assert {launch.name for launch in launches} == {
        f"tangent_{name}_kernel" for name in (*passes, *numbers)
    }
    assert len({launch.metadata.hash for launch in launches}) == 7


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
    inputs, t = shared.make((2, 3))
    with offline.gpu("sm_80"):
        for step in steps([x.double() for x in inputs], t).values():
            with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
                step()


@ptx
@pytest.mark.parametrize("shape", [(3, 40), (2, 5000), (1, 70001)], ids=str)
def test_a_second_launch_is_like_the_first(launches, shape):
    """It goes to the compiled kernel at once, with every argument that it has."""
    inputs, t = shared.make(shape)
    for name, step in steps(inputs, t).items():
        first, count = step(), len(launches)
        again = step()
        if isinstance(first, torch.Tensor):
            first, again = [first], [again]
        assert all(map(torch.equal, first, again)), name
        assert len(launches) == count + len({x.name for x in launches[:count]})
        assert launches[0].grid == launches[count].grid
        launches.clear()
