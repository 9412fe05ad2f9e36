"""The native module: every instruction set, threads, memory, and what is said without it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, Case, draw
from attention_truth import expected
from native_build import ROOT, copy_project, python
from test_attention import check, run

import scm_kernels
from scm_kernels import _native, attention_jvp

native = _native.module()
needs_module = pytest.mark.skipif(native is None, reason="no native module")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def script(text: str, **environment: str | None) -> str:
    """What a program of its own prints."""
    done = python(ROOT, "-c", text, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- instruction sets -----------------------------------------------------------------------------


@pytest.fixture(params=native.instruction_sets() if native else [])
def instruction_set(request):
    before = native.instruction_set()
    native.select_instruction_set(request.param)
    yield request.param
    native.select_instruction_set(before)


@pytest.mark.parametrize("through", ["", "both"], ids=["values", "gradients"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(instruction_set, case, through):
    check(run("cpu", case, draw(case), through), case, through)


def test_wide_heads_are_as_near_to_the_truth_as_eagers(instruction_set):
    """A sum of 256 products in one go is off by 1.8 times what eager's is."""
    case = Case("sharp_d256", torch.float32, h=4, m=128, n=128, d=256, e=256, logits=30.0)
    results = run("cpu", case, draw(case), "both")
    for name, (truth, lo, _) in expected(case, "both").items():
        error, lo_error = ((x.double() - truth).abs().mean() for x in (results[name], lo))
        assert error <= 1.4 * lo_error, name


def test_backends_names_the_instruction_set(instruction_set):
    assert re.fullmatch(rf"available \(.*; {instruction_set}\)", scm_kernels.backends()["cpu"])


@needs_module
def test_the_best_instruction_set_is_chosen_unless_one_is_named():
    report = "import scm_kernels; print(scm_kernels.backends()['cpu'])"
    known = native.instruction_sets()
    assert known[-1] == "baseline"
    assert f"; {known[0]})" in script(report, SCM_KERNELS_CPU_ISA=None)
    assert "; baseline)" in script(report, SCM_KERNELS_CPU_ISA="baseline")
    done = python(ROOT, "-c", report, SCM_KERNELS_CPU_ISA="mmx")
    assert done.returncode != 0
    text = ", ".join(map(repr, known))
    assert f"SCM_KERNELS_CPU_ISA: got 'mmx', expected one of {text}" in done.stderr


def test_without_the_module_backends_says_how_to_build_it(tmp_path):
    text = """if True:
    import sys  # an editable install would give the copy its own module
    sys.meta_path[:] = [x for x in sys.meta_path if "editable" not in getattr(x, "__module__", "")]
    import torch, scm_kernels
    print(scm_kernels.__file__, scm_kernels.backends()["cpu"])
    scm_kernels.attention_jvp(*torch.randn(6, 1, 1, 4, 8))
    with scm_kernels.backend("cpu"):
        pass
    """
    done = python(copy_project(tmp_path), "-c", text)
    assert done.stdout.startswith(str(tmp_path))
    assert "not available: the native module scm_kernels._C was not built" in done.stdout
    assert "RuntimeError: name: backend 'cpu' is not available" in done.stderr
    assert "SCM_KERNELS_BUILD=cpu pip install ." in done.stderr


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_on_any_number_of_threads(set_threads, dtype):
    x = torch.randn(6, 2, 3, 150, 40).to(dtype)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        with scm_kernels.backend("cpu"):
            results.append(attention_jvp(*x, is_causal=True, return_stats=True))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_module
def test_other_python_threads_run_meanwhile(set_threads):
    set_threads(1)
    x = torch.randn(6, 1, 8, 2048, 64)

    def call():
        with scm_kernels.backend("cpu"):
            attention_jvp(*x)

    worker = threading.Thread(target=call)
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(1e-3)
        ticks += 1
    assert ticks > 20, "a GIL that is held stops this loop for the whole call"


THREADS = """if True:
    import glob, time, torch, scm_kernels
    def processor_time():
        tasks = {}
        for path in glob.glob("/proc/self/task/*/schedstat"):
            with open(path) as file:
                tasks[path] = int(file.read().split()[0])
        return tasks
    def call():
        with scm_kernels.backend("cpu"):
            scm_kernels.attention_jvp(*x)
    x = torch.randn(6, 1, 8, 1024, 64)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        call()
        time.sleep(0.2)  # threads that wait for work spin for a while
        before = processor_time()
        call()
        after = processor_time()
        print(sum(after[task] - before.get(task, 0) > 5e6 for task in after))
"""


@needs_module
@linux
def test_as_many_threads_work_as_torch_is_set_to():
    if b"GOMP_parallel" not in Path(native.__file__).read_bytes():
        pytest.skip("built without OpenMP: threads of one call alone have left no trace after it")
    assert script(THREADS, OMP_NUM_THREADS=None).split() == ["1", "2", "3"]


@needs_module
@linux
def test_one_pool_of_openmp_threads():
    """Torch's wheel brings libgomp, and the module takes the one that is loaded already."""
    text = """if True:
    import torch, scm_kernels
    scm_kernels.backends()
    with open("/proc/self/maps") as maps:
        print(*sorted({line.split()[-1] for line in maps if "omp" in line and ".so" in line}))
    """
    libraries = [path for path in script(text).split() if re.search(r"/lib[gi]?omp\b", path)]
    if not any("libgomp.so.1" in path for path in libraries):
        pytest.skip(f"torch is not built with GNU OpenMP here: {libraries}")
    assert len(libraries) == 1, libraries


# --- memory ---------------------------------------------------------------------------------------


PEAK = """if True:
    import torch, scm_kernels
    def status(name):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
    def call(n):
        with scm_kernels.backend("cpu"):
            return scm_kernels.attention_jvp(*(y[:, :, :n] for y in x), return_stats=True)
    torch.set_num_threads(2)
    x = torch.randn(6, 1, 1, 8192, 64)
    call(256)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again
    before = status("VmRSS")
    outputs = call(8192)
    print(status("VmHWM") - before - sum(y.nbytes for y in outputs))
"""
PEAK_OF_BACKWARD = PEAK.replace("set_num_threads(2)", "set_num_threads(64)").replace(
    "        return scm_kernels.attention_jvp(*(y[:, :, :n] for y in x), return_stats=True)",
    """        leaves = [y[:, :, :n].requires_grad_() for y in x]
        return torch.autograd.grad(sum(scm_kernels.attention_jvp(*leaves)).sum(), leaves)""",
)


@needs_module
@linux
def test_scratch_memory_does_not_grow_with_the_length():
    """Two threads: 2 MB each. A row of the scores of each query would be 256 MB."""
    assert int(script(PEAK)) < 2 * 2e6


@needs_module
@linux
def test_sums_of_many_threads_do_not_grow_with_both_lengths():
    """64 threads: sums of 64 MiB, and 1 MB each, beside out, t_out and their cotangents. With sums
    of its own for each thread it would be 0.5 GB."""
    assert int(script(PEAK_OF_BACKWARD)) < (64 << 20) + 64e6 + 6 * 4 * 8192 * 64


NO_MEMORY = """if True:
    import resource, torch, scm_kernels
    x = torch.randn(6, 1, 1, 1, 1 << 22)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), size + (100 << 20)))
    with scm_kernels.backend("cpu"):
        try:
            scm_kernels.attention_jvp(*x)
        except MemoryError:
            print("MemoryError")
"""


@needs_module
@linux
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="it reserves terabytes")
def test_no_memory_is_a_memory_error():
    assert script(NO_MEMORY) == "MemoryError\n"
