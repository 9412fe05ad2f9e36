"""Builds the native module `scm_kernels._C` from csrc/ with ninja; everything else is in
pyproject.toml.

SCM_KERNELS_BUILD chooses what is built:

    auto    what the compilers on this machine allow; where there is none, a message (the default)
    none    nothing: the package is then pure Python
    cpu     the CPU kernels, or an error
    cuda    the CPU and the CUDA kernels, or an error

CXX names the compiler (GCC 12 or Clang 15 and later), CXXFLAGS and LDFLAGS are appended,
SCM_KERNELS_SANITIZE=address,undefined (or thread) builds with sanitizers. No torch is needed: the
kernels take plain pointers.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SOURCES = Path("csrc")
# csrc/cpu/<kernel>.cpp, once for each instruction set
KERNELS = ("isa", "attention_forward", "attention_backward", "tangent")
SHARED = ("module", "cpu/dispatch", "cpu/pages", "cpu/parallel")

AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
# Best first. "baseline" is what the compiler assumes: SSE2 on x86-64, NEON on AArch64.
X86_SETS = {
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma",
}
# No -ffast-math: infinities and NaN mean something. -psabi: vectors are never passed between files.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
# What the sources ask of a compiler beyond C++17.
PROBE = """
typedef float Vec __attribute__((vector_size(16)));
Vec f(Vec a, Vec b) { return a > b ? a : __builtin_shufflevector(a, b, 0, 4, 1, 5); }
"""


class BuildError(RuntimeError):
    """Why the native module cannot be built here."""


class Compiler:
    """A C++ compiler and the flags that it takes."""

    def __init__(self):
        names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
        self.command = next(
            (name for name in names if name and shutil.which(name.split()[0])), None
        )
        if self.command is None:
            raise BuildError("no C++ compiler found (CXX, c++, g++, clang++)")
        if sys.platform == "win32":
            raise BuildError("the kernels need GCC's vector extension, which MSVC does not have")
        if not self.takes(""):
            raise BuildError(f"{self.command!r} is too old, or lacks headers: GCC 12, Clang 15")
        sanitize = os.environ.get("SCM_KERNELS_SANITIZE")
        flags = [FLAGS, f"-fsanitize={sanitize} -g -fno-omit-frame-pointer" if sanitize else ""]
        # ThreadSanitizer does not see OpenMP's locks; without OpenMP the kernels start threads.
        self.openmp = "-fopenmp" if sanitize != "thread" and self.takes("-fopenmp") else ""
        self.flags = " ".join([*flags, self.openmp, os.environ.get("CXXFLAGS", "")])
        self.link_flags = " ".join([self.flags, os.environ.get("LDFLAGS", "")])

    def takes(self, flags: str) -> bool:
        """Whether the probe compiles with these flags."""
        with tempfile.TemporaryDirectory() as place:
            source = Path(place, "probe.cpp")
            source.write_text(PROBE)
            command = [
                *shlex.split(self.command),
                *FLAGS.split(),
                *flags.split(),
                "-c",
                str(source),
            ]
            done = subprocess.run(
                [*command, "-o", str(source.with_suffix(".o"))], capture_output=True, check=False
            )
            return done.returncode == 0

    def instruction_sets(self) -> dict[str, str]:
        """Those that this compiler knows, best first, and their flags."""
        x86 = platform.machine() in ("x86_64", "AMD64") and "arm64" not in self.flags
        known = {name: flags for name, flags in X86_SETS.items() if x86 and self.takes(flags)}
        return {**known, "baseline": ""}


class Build(build_ext):
    """Compiles the module with one run of ninja."""

    def build_extension(self, ext: Extension) -> None:
        place = Path(self.build_temp).absolute()
        place.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (place / "build.ninja").write_text(ninja_file(Compiler(), target))
        command = [*ninja(), "-C", str(place), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(f"{shlex.join(command)} failed")


def ninja() -> list[str]:
    """The ninja of PyPI, else that of the machine."""
    try:
        import ninja as package
    except ImportError:
        if shutil.which("ninja") is None:
            raise BuildError("ninja is missing: pip install ninja") from None
        return ["ninja"]
    return [os.path.join(package.BIN_DIR, "ninja")]


def ninja_file(compiler: Compiler, target: Path) -> str:
    """The build as a ninja file: each kernel for each instruction set, the bindings, the link."""
    import pybind11

    sets = compiler.instruction_sets()
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / SOURCES)]
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines = [
        f"cxx = {compiler.command}",
        f"flags = {compiler.flags} {' '.join('-I' + quote(path) for path in includes)}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {undefined} $in {compiler.link_flags} -o $out",
    ]
    objects = []

    def compile_source(stem: str, name: str, flags: str) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {escape(ROOT.absolute() / SOURCES / stem)}.cpp")
        lines.append(f"  isa = {flags}")

    for name, flags in sets.items():
        for kernel in KERNELS:
            compile_source(f"cpu/{kernel}", f"{kernel}.{name}", f"{flags} -DSCM_ISA={name}")
    names = "".join(f"X({name})" for name in sets)
    for stem in SHARED:
        compile_source(stem, Path(stem).name, f"'-DSCM_ISAS(X)={names}'")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    return "\n".join([*lines, f"default {escape(target)}", ""])


def quote(path: str) -> str:
    return shlex.quote(path).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The native module, or nothing and a message."""
    wanted = os.environ.get("SCM_KERNELS_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise ValueError(f"SCM_KERNELS_BUILD: got {wanted!r}, expected auto, none, cpu or cuda")
    if wanted == "cuda":
        raise BuildError("SCM_KERNELS_BUILD=cuda: this version has no CUDA kernels")
    if wanted == "none":
        return []
    try:
        Compiler()
    except BuildError as error:
        if wanted != "auto":
            raise
        print(f"scm_kernels: building without the native module: {error}", file=sys.stderr)
        return []
    # optional: under auto a build that fails is a message too.
    return [Extension("scm_kernels._C", [], optional=wanted == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
