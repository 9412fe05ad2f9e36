"""setup.py: the modes of SCM_KERNELS_BUILD, what it says, and what a wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_build import build, copy_project, python

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
NO_COMPILER = {"PATH": "/nowhere", "CXX": None}
NO_NVCC = {"CUDA_HOME": "/nowhere"}
MOST = "cuda" if shutil.which("nvcc") else "cpu"  # of what can be built here


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SCM_KERNELS_BUILD": "gpu"}, r"got 'gpu', expected 'auto', 'none', 'cpu' or 'cuda'"),
        ({"SCM_KERNELS_ISAS": "baseline avx9"}, "got 'baseline avx9', expected baseline and"),
        ({"SCM_KERNELS_BUILD": "cpu", **NO_COMPILER}, r"cpu: no C\+\+ compiler found \(c\+\+, g"),
        ({"SCM_KERNELS_BUILD": "cpu", "CXX": "icc9 -w"}, r"no C\+\+ compiler found \(icc9 -w; CXX"),
        ({"SCM_KERNELS_BUILD": "cpu", "CXX": "false"}, "'false' fails on a probe"),
        ({"SCM_KERNELS_BUILD": "cuda", **NO_COMPILER}, r"cuda: no C\+\+ compiler found"),
        pytest.param(
            {"SCM_KERNELS_BUILD": "cuda", **NO_NVCC},
            r"cuda: no /nowhere/bin/nvcc found \(CUDA_HOME",
            marks=needs_compiler,
        ),
    ],
)
def test_what_cannot_be_built_is_an_error_that_says_why(project, environment, message):
    done = python(project, "setup.py", "--name", **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@needs_compiler
def test_an_nvcc_that_fails_is_an_error_or_a_message(project, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho planted >&2; exit 1\n")
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tmp_path)}
    done = python(project, "setup.py", "--name", SCM_KERNELS_BUILD="cuda", **environment)
    assert done.returncode != 0
    assert (
        f"SCM_KERNELS_BUILD=cuda: '{nvcc}' fails on a probe for sm_80, sm_90a:\nplanted"
        in done.stderr
    )
    text = build(project, "--name", SCM_KERNELS_BUILD="auto", **environment)
    assert f"building without the CUDA kernels: '{nvcc}' fails" in text


@needs_compiler
def test_without_nvcc_auto_builds_for_the_cpu_and_says_so(project):
    text = build(project, "--name", SCM_KERNELS_BUILD="auto", **NO_NVCC)
    assert "building without the CUDA kernels: no /nowhere/bin/nvcc found" in text
    assert "without the native module" not in text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SCM_KERNELS_BUILD": "none"}, ""),
        (NO_COMPILER, "building without the native module: no C"),
    ],
)
def test_a_wheel_without_the_module_is_pure(tmp_path, environment, message):
    environment = {"SCM_KERNELS_BUILD": "auto"} | environment
    text = build(copy_project(tmp_path), "bdist_wheel", **environment)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert ("without the native module" in text) == bool(message)
    assert message in text


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build from the sdist, by a compiler of two words, in a place with a space: (it, text)."""
    place = tmp_path_factory.mktemp("a place")
    build(copy_project(place), "sdist", SCM_KERNELS_BUILD="none")
    (sdist,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place)
    inner = place / sdist.name.removesuffix(".tar.gz")
    options = {"SCM_KERNELS_BUILD": MOST, "CXX": "env c++"}
    return inner, build(inner, "bdist_wheel", **options, NVCC_APPEND_FLAGS="-Werror all-warnings")


@pytest.mark.slow
@needs_compiler
def test_the_wheel_of_an_sdist_has_the_module_and_no_sources(built):
    place, text = built
    assert not re.findall(r"\S+\.(?:cpp|h|cu|cuh)[:(]\d+.*warning.*", text)
    (wheel,) = (place / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        kinds = {Path(name).suffix for name in archive.namelist() if ".dist-info" not in name}
    assert kinds == {".py", ".so", ".typed"}


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_module_is_loaded_where_there_is_no_cuda(built):
    (module,) = built[0].glob("build/lib*/scm_kernels/*.so")
    text = subprocess.check_output(["readelf", "-d", module], text=True)
    libraries = re.findall(r"NEEDED.*\[(.+)\]", text)
    assert libraries
    assert not [name for name in libraries if "cuda" in name]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_code_of_an_instruction_set_is_shared(built):
    """A linker keeps one of several weak definitions: code of AVX-512 could serve a processor that
    has none. Objects of an instruction set define what is in their namespace, and no more.
    """
    objects = list(built[0].glob("build/temp*/*.*.o"))
    assert len(objects) >= 1
    for path in objects:
        text = subprocess.check_output(["nm", "--defined-only", "-g", path], text=True)
        for line in text.splitlines():
            kind, name = line.split()[-2:]
            isa = path.name.split(".")[1]
            if name == "DW.ref.__gxx_personality_v0":
                continue  # the address of libstdc++'s handler of exceptions: no code
            assert kind in "TDR", line  # code or data, and strong
            assert f"3scm{len(isa)}{isa}" in name, line


@pytest.mark.slow
@needs_compiler
def test_only_what_has_changed_is_compiled_again(built):
    place, _ = built
    environment = {"SCM_KERNELS_BUILD": MOST, "CXX": "env c++"}
    assert "compile" not in build(place, "build_ext", **environment)
    changed = {"cpu/parallel.cpp": "parallel.o"}
    if MOST == "cuda":
        changed["cuda/tangent_norm.cu"] = "cuda/tangent_norm.o"
    for source in changed:
        os.utime(place / "csrc" / source)
    compiled = re.findall(r"compile (\S+)", build(place, "build_ext", **environment))
    assert sorted(compiled) == sorted(changed.values())


@pytest.mark.slow
@pytest.mark.skipif(MOST != "cuda", reason="no nvcc")
def test_cuda_kernels_that_do_not_compile_are_a_message_or_an_error(built):
    place, _ = built
    source = place / "csrc" / "cuda" / "queue.cpp"
    text = source.read_text()
    source.write_text(f"{text}#error planted\n")
    done = python(place, "setup.py", "build_ext", SCM_KERNELS_BUILD="cuda", CXX="env c++")
    assert done.returncode != 0
    assert "#error planted" in done.stdout + done.stderr
    text = build(place, "build_ext", SCM_KERNELS_BUILD="auto", CXX="env c++")
    assert "building without the CUDA kernels, see above" in text
    (module,) = place.glob("build/lib*/scm_kernels/*.so")
    assert b"cuda_attention_forward" not in module.read_bytes()


@pytest.mark.slow
@needs_compiler
def test_a_compiler_that_fails_is_a_message_or_an_error(built):
    """And no module of an earlier build is left for the wheel."""
    place, _ = built
    with (place / "csrc" / "module.cpp").open("a") as source:
        source.write("#error planted\n")
    for name in ("dist", "scm_kernels.egg-info"):
        shutil.rmtree(place / name, ignore_errors=True)
    text = build(place, "bdist_wheel", SCM_KERNELS_BUILD="auto", CXX="env c++")
    assert re.search(r'building extension "scm_kernels._C" failed: .*ninja.* failed, see', text)
    (wheel,) = (place / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    done = python(place, "setup.py", "build_ext", SCM_KERNELS_BUILD="cpu", CXX="env c++")
    assert done.returncode != 0
    assert "#error planted" in done.stdout + done.stderr


@pytest.mark.slow
@needs_compiler
def test_pairs_of_bfloat16_where_there_is_no_instruction_for_them(tmp_path):
    """The list of attention on the kernels for AVX-512 with bfloat16, which few machines run."""
    place = copy_project(tmp_path)
    report = build(place, SCM_KERNELS_BUILD="cpu", CXXFLAGS="-DSCM_EMULATE_PAIRS -Werror")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_attention.py")
    done = python(place, *arguments, "-k", "cpu and not memory")
    assert done.returncode == 0, report + done.stdout[-5000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400
