"""The project around the code: lint, packaging, the import, the snippets of the README."""

import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import clang_format
import pytest

import scm_kernels

ROOT = Path(__file__).parents[1]

# Imports scm_kernels with everything but torch and the standard library out of reach, and uses it.
IMPORT_ALONE = """
import sys, time, torch
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"torch", "scm_kernels"} | sys.stdlib_module_names:
            raise ImportError(f"{name} is out of reach in this test")
sys.meta_path.insert(0, Blocker())
start = time.process_time()  # not what the machine does beside it
import scm_kernels
seconds = time.process_time() - start
q = torch.randn(1, 2, 8, 4)
out, t_out = scm_kernels.attention_jvp(q, q, q, q, None, q)
assert t_out.isfinite().all()
print(seconds)
"""


def run(*command: str, **kwargs) -> str:
    """The output of a command that has to succeed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_lint(arguments):
    run(sys.executable, "-m", "ruff", *arguments, ".", cwd=ROOT)


def test_lint_of_the_kernels():
    sources = [str(path) for path in (ROOT / "csrc").rglob("*.*")]
    assert len(sources) >= 11
    assert {Path(path).suffix for path in sources} <= {".cpp", ".h", ".cu", ".cuh"}
    run(clang_format.get_executable("clang-format"), "--dry-run", "--Werror", *sources, cwd=ROOT)


def test_import_needs_torch_alone_and_is_quick():
    seconds = [float(run(sys.executable, "-c", IMPORT_ALONE, cwd=ROOT)) for _ in range(3)]
    assert min(seconds) < 0.2


def test_what_a_user_calls_is_typed():
    """For type checkers, which py.typed sends to these annotations."""
    functions = [getattr(scm_kernels, name) for name in scm_kernels.__all__]
    functions += [x for name, x in vars(scm_kernels.trigflow).items() if not name.startswith("_")]
    for function in filter(inspect.isfunction, functions):
        signature = inspect.signature(function)
        for x in signature.parameters.values():
            assert x.annotation is not x.empty, (function.__name__, x.name)
        assert signature.return_annotation is not signature.empty, function.__name__


def test_wheel_and_sdist_build(tmp_path):
    """Pure Python; test_native_build.py has the same with the native module."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    run(*command, env=os.environ | {"SCM_KERNELS_BUILD": "none"})
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    places = [ROOT / name for name in ("scm_kernels", "tests", "examples", "benchmarks")]
    code = [*(ROOT / "csrc").rglob("*.*"), *(x for place in places for x in place.rglob("*.py"))]
    code += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    assert {str(path.relative_to(ROOT)) for path in code} <= names
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    sources = [*(ROOT / "scm_kernels").rglob("*.py"), ROOT / "scm_kernels" / "py.typed"]
    assert packed == {str(path.relative_to(ROOT)) for path in sources}
    place = "import scm_kernels; print(scm_kernels.__file__)"
    assert str(tmp_path) in run(sys.executable, "-c", place, cwd=tmp_path / "site")


def test_readme_snippets_run():
    """All Python blocks of the README, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
