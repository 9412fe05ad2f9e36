"""Builds the native module `scm_kernels._C` from csrc/ with ninja; everything else is in
pyproject.toml.

SCM_KERNELS_BUILD chooses what is built:

    auto    what the compilers on this machine allow; where there is none, a message (the default)
    none    nothing: the package is then pure Python
    cpu     the CPU kernels, or an error
    cuda    the CPU and the CUDA kernels, or an error

CXX names the compiler (GCC 12 or Clang 16 and later), CXXFLAGS and LDFLAGS are appended,
SCM_KERNELS_SANITIZE=address,undefined (or thread) builds with sanitizers. No torch is needed: the
kernels take plain pointers.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path(__file__).parent.absolute() / "csrc"
# csrc/cpu/<kernel>.cpp, once for each instruction set
KERNELS = ("isa", "attention_forward", "attention_backward", "tangent")
SHARED = ("module", "cpu/dispatch", "cpu/pages", "cpu/parallel")

AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
# Best first. "baseline" is what the compiler assumes: SSE2 on x86-64, NEON on AArch64.
INSTRUCTION_SETS = {
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma",
    "baseline": "",
}
# No -ffast-math: infinities and NaN mean something. -psabi: vectors are never passed between files.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
# -O1: builds in a fifth of the time. Expensive optimisations: fused multiply-adds, the same digits.
SANITIZE = "-fsanitize={} -fno-sanitize-recover=all -g -O1 -fexpensive-optimizations"
# What the sources ask of a compiler beyond C++17.
PROBE = """
typedef float Vec __attribute__((vector_size(16)));
Vec f(Vec a, Vec b) { return a > b ? a : __builtin_shufflevector(a, b, 0, 4, 1, 5); }
"""


class BuildError(CompileError):
    """Why the native module cannot be built here."""


class Compiler:
    """A C++ compiler and the flags that it takes."""

    def __init__(self):
        if sys.platform == "win32":
            raise BuildError("the kernels need GCC's vector extension, which MSVC does not have")
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        found = [name for name in names if shutil.which(shlex.split(name)[0])]
        if not found:
            raise BuildError(f"no C++ compiler found ({', '.join(names)}; CXX names one)")
        self.command = shlex.split(found[0])  # such as "ccache g++"
        self.flags = [*FLAGS.split(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.link_flags = ["-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
        if sys.platform == "darwin":
            self.link_flags += ["-undefined", "dynamic_lookup"]
        complaint = self.refuses()
        if complaint:
            raise BuildError(f"{found[0]!r} fails on a probe for GCC 12, Clang 16:\n{complaint}")
        sanitize = os.environ.get("SCM_KERNELS_SANITIZE")
        if sanitize:
            self.flags += SANITIZE.format(sanitize).split()
        # ThreadSanitizer does not see OpenMP's locks; without OpenMP the kernels start threads.
        if sanitize != "thread" and not self.refuses("-fopenmp"):
            self.flags.append("-fopenmp")

    def refuses(self, flags: str = "") -> str:
        """What it says against the probe with these flags, also that one is unused; "" if none."""
        with tempfile.TemporaryDirectory() as place:
            source = Path(place, "probe.cpp")
            source.write_text(PROBE)
            command = [*self.command, *self.flags, "-Werror", *flags.split(), str(source)]
            command += [*self.link_flags, "-o", f"{source}.so"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return (done.stderr or "no reason given") if done.returncode else ""


class Build(build_ext):
    """Compiles the module with one run of ninja, which compiles again what has changed."""

    def build_extension(self, ext: Extension) -> None:
        place = Path(self.build_temp).absolute()
        place.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (place / "build.ninja").write_text(ninja_file(compiler(), target))
        loudness = {0: ["--quiet"], 1: []}.get(self.verbose, ["-v"])
        command = [*ninja(), *loudness, "-C", str(place)]
        if subprocess.run(command, check=False).returncode != 0:
            target.unlink(missing_ok=True)  # nothing, sooner than an old one
            raise BuildError(f"{shlex.join(command)} failed, see above")


@cache
def compiler() -> Compiler:
    return Compiler()


def ninja() -> list[str]:
    """The ninja of PyPI, else that of the machine."""
    try:
        import ninja as package
    except ImportError:
        if shutil.which("ninja") is None:
            raise BuildError("ninja is missing: pip install ninja") from None
        return ["ninja"]
    return [os.path.join(package.BIN_DIR, "ninja")]


def ninja_file(cxx: Compiler, target: Path) -> str:
    """The build as a ninja file: each kernel for each instruction set, the bindings, the link."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing: pip install pybind11") from None
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise BuildError(f"Python.h is missing in {python}: install Python's development files")
    includes = [f"-I{path}" for path in (pybind11.get_include(), python, SOURCES)]
    sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if not cxx.refuses(flags)}
    call = shell(cxx.command + cxx.flags)
    lines = [
        "rule compile",
        f"  command = {call} {shell(includes)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {call} $in {shell(cxx.link_flags)} -o $out",
        "  description = link $out",
    ]
    objects = []

    def compile_source(stem: str, name: str, flags: list[str]) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {path(SOURCES / stem)}.cpp")
        lines.append(f"  flags = {shell(flags)}")

    for name, flags in sets.items():
        for kernel in KERNELS:
            compile_source(
                f"cpu/{kernel}", f"{kernel}.{name}", [*flags.split(), f"-DSCM_ISA={name}"]
            )
    names = "".join(f"X({name})" for name in sets)
    for stem in SHARED:
        compile_source(stem, Path(stem).name, [f"-DSCM_ISAS(X)={names}"])
    lines.append(f"build {path(target)}: link {' '.join(objects)}")
    return "\n".join([*lines, ""])


def shell(words: list[str]) -> str:
    """Words as a ninja file's commands want them."""
    return shlex.join(map(str, words)).replace("$", "$$")


def path(name: Path) -> str:
    """A path as a ninja file's inputs and outputs want it."""
    return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The native module, or nothing and a message."""
    wanted = os.environ.get("SCM_KERNELS_BUILD") or "auto"
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"SCM_KERNELS_BUILD: got {wanted!r}, expected 'auto', 'none', 'cpu' or 'cuda'")
    if wanted == "none":
        return []
    try:
        if wanted == "cuda":
            raise BuildError("this version has no CUDA kernels")
        compiler()
    except BuildError as error:
        if wanted != "auto":
            sys.exit(f"SCM_KERNELS_BUILD={wanted}: {error}")
        print(f"scm_kernels: building without the native module: {error}", file=sys.stderr)
        return []
    # optional: under auto a build that fails is a message too.
    return [Extension("scm_kernels._C", [], optional=wanted == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
