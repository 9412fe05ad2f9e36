"""AddressSanitizer and UndefinedBehaviorSanitizer over the native module, and that they see."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from native_build import copy_project
from sanitize import REPORT, SUITE, build_sanitized, run_sanitized

from scm_kernels import _native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.module() is None, reason="no native module"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="GCC on Linux"),
]
SANITIZERS = "address,undefined"

# Bugs for the copy alone, each asleep until the environment names it.
KERNEL_CALL = "return kernels().attention_forward(p);"
PLANTED = """
  const Status status = kernels().attention_forward(p);
  const std::string bug = std::getenv("PLANTED_BUG") ? std::getenv("PLANTED_BUG") : "";
  if (bug == "write") p.lse[p.b * p.h * p.m] = 0.0f;  // one element past an output
  if (bug == "read") {                                // one vector past an input
    volatile float x[4];
    const char* end = p.q.data + p.b * p.q.stride[0] * sizeof(float);
    for (int i = 0; i < 4; ++i) x[i] = reinterpret_cast<const float*>(end)[i];
  }
  volatile int many = 2147483647;
  if (bug == "overflow") many = many + 1;
  return status;
"""
SCRIPT = """
import torch, scm_kernels
with scm_kernels.backend("cpu"):
    scm_kernels.attention_jvp(*(torch.randn(2, 3, 37, 16) for _ in range(6)))
print("not seen")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy whose native module is built with sanitizers, and has the planted bugs."""
    place = copy_project(tmp_path_factory.mktemp("sanitized"))
    source = place / "csrc" / "cpu" / "dispatch.cpp"
    text = source.read_text()
    assert text.count(KERNEL_CALL) == 1
    text = text.replace(KERNEL_CALL, PLANTED)
    source.write_text("#include <cstdlib>\n#include <string>\n" + text)
    return build_sanitized(place, SANITIZERS)


def test_lists_run_clean(sanitized):
    done = run_sanitized(sanitized, SANITIZERS, *SUITE, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("", ""),
        ("write", "heap-buffer-overflow .*\n.*WRITE of size 4"),
        ("read", "heap-buffer-overflow .*\n.*READ of size"),
        ("overflow", "runtime error: signed integer overflow"),
    ],
)
def test_a_planted_bug_is_seen(sanitized, bug, report):
    done = run_sanitized(sanitized, SANITIZERS, "-c", SCRIPT, PLANTED_BUG=bug)
    assert ("not seen" in done.stdout) == (bug == ""), done.stderr
    assert done.returncode == (int(REPORT) if bug else 0)
    assert re.search(report, done.stderr), done.stderr
