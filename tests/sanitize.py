"""The test lists of attention and tangent on a native module that is built with sanitizers.

    python tests/sanitize.py address,undefined
    setarch -R python tests/sanitize.py thread

The module is built in a copy of the project. AddressSanitizer sees PyTorch's tensors: on the CPU
they come from the C library's allocator, one by one. ThreadSanitizer does not see OpenMP's locks:
its build starts threads itself, which share what the OpenMP threads share.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from native_build import build, copy_project, python

from scm_kernels import _native

# The lists of this backend; counting the bytes that PyTorch allocates has nothing to find here.
SUITE = (
    *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
    *("tests/test_attention.py", "tests/test_tangent.py", "tests/test_tangent_kernels.py"),
    "tests/test_native.py",
    *("-k", "(cpu or instruction_set or test_tangent) and not memory"),
)
RUNTIME = {"address,undefined": "asan", "thread": "tsan"}
REPORT = "99"  # the exit status of a program that a sanitizer has ended


def build_sanitized(place: Path, sanitizers: str) -> Path:
    """The native module of a copy, built in place with sanitizers."""
    here = " ".join(_native.module().instruction_sets())  # others would not be run
    build(place, SCM_KERNELS_BUILD="cpu", SCM_KERNELS_SANITIZE=sanitizers, SCM_KERNELS_ISAS=here)
    return place


def run_sanitized(place: Path, sanitizers: str, *arguments: str, **environment: str):
    """Python with the sanitizers' run-time library, which has to be the first one loaded.

    So has libstdc++, which Python does not load itself: the sanitizer looks for it at the start.
    """
    compiler = os.environ.get("CXX", "c++").split()
    names = [f"lib{RUNTIME[sanitizers]}.so", "libstdc++.so"]
    paths = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in names
    ]
    options = f"exitcode={REPORT}:detect_leaks=0"  # leaks: Python's own, at its end
    return python(
        place,
        *arguments,
        LD_PRELOAD=" ".join(paths),
        ASAN_OPTIONS=options,
        UBSAN_OPTIONS=f"{options}:print_stacktrace=1",
        # PyTorch, which is not instrumented, has OpenMP's locks too.
        TSAN_OPTIONS=f"exitcode={REPORT}:ignore_noninstrumented_modules=1",
        OMP_WAIT_POLICY="passive",  # threads that spin cost the others their processor
        **environment,
    )


def main() -> None:
    (sanitizers,) = sys.argv[1:]
    place = Path(tempfile.mkdtemp())
    try:
        done = run_sanitized(
            build_sanitized(copy_project(place), sanitizers),
            sanitizers,
            *SUITE,
            OMP_NUM_THREADS="3",
        )
    finally:
        shutil.rmtree(place)
    print(done.stdout + done.stderr)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
