"""Builds the native module `scm_kernels._C` from csrc/ with ninja; everything else is in
pyproject.toml.

SCM_KERNELS_BUILD chooses what is built:

    auto    what the compilers on this machine allow; where one is missing, a message (the default)
    none    nothing: the package is then pure Python
    cpu     the CPU kernels, or an error
    cuda    the CPU and the CUDA kernels, or an error

CXX names the compiler (GCC 12 or Clang 16 and later), CXXFLAGS and LDFLAGS are appended, CUDA_HOME
names the folder of NVIDIA's toolkit (else nvcc is looked for on PATH), to whose nvcc
NVCC_APPEND_FLAGS are appended, SCM_KERNELS_SANITIZE=address,undefined (or thread) builds with
sanitizers, SCM_KERNELS_ISAS="avx2 baseline" for these instruction sets alone. Neither torch nor a
GPU is needed: the kernels take plain pointers.
"""

import itertools
import os
import re
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

SOURCES = Path(__file__).parent.absolute() / "csrc"
# csrc/cpu/<kernel>.cpp, once for each instruction set
KERNELS = ("isa", "attention_forward", "attention_backward", "tangent")
SHARED = ("module", "cpu/dispatch", "cpu/pages", "cpu/parallel", "cpu/tangent_steps")
# Machine code for an A100, and PTX that a driver compiles for later GPUs; and for Hopper alone.
AMPERE = "-gencode arch=compute_80,code=[sm_80,compute_80]"
HOPPER = "-gencode arch=compute_90a,code=sm_90a"
HEAD_DIMS = (64, 72, 96, 112, 128)
# csrc/cuda/<kernel>.cu, attention once for each head dimension, and what is C++ there
CUDA_KERNELS = {
    **{f"attention_forward.d{d}": f"{AMPERE} -DSCM_HEAD_DIM={d}" for d in HEAD_DIMS},
    **{f"attention_forward_hopper.d{d}": f"{HOPPER} -DSCM_HEAD_DIM={d}" for d in HEAD_DIMS},
    **{f"tangent_{step}": AMPERE for step in ("steps", "norm", "apply", "normalize", "scale")},
}
CUDA_SHARED = ("attention_dispatch", "bindings", "queue")

AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
# Best first. "baseline" is what the compiler assumes: SSE2 on x86-64, NEON on AArch64.
INSTRUCTION_SETS = {
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
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

CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
# Static, so that the module is loaded where there is no CUDA; it looks for a driver when called.
CUDA_RUNTIME = "-lcudart_static -ldl -lrt -lpthread"
CUDA_PROBE = """
__global__ void kernel(const __grid_constant__ int x, int* y) { *y = x; }
void run(int* y) { kernel<<<1, 1>>>(1, y); }
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


class Nvcc:
    """NVIDIA's compiler, with the C++ compiler for the host's part, and what its objects want."""

    def __init__(self, cxx: Compiler):
        home = os.environ.get("CUDA_HOME")
        name = os.path.join(home, "bin", "nvcc") if home else "nvcc"
        if shutil.which(name) is None:
            raise BuildError(f"no {name} found (CUDA_HOME names the toolkit's folder)")
        words = itertools.takewhile(lambda word: not word.startswith("-"), cxx.command)
        host = [*words][-1]  # of "ccache g++ -m64"
        self.command = [name, "-ccbin", host, *CUDA_FLAGS.split()]
        with tempfile.TemporaryDirectory() as place:
            source = Path(place, "probe.cu")
            source.write_text(CUDA_PROBE)
            architectures = f"{AMPERE} {HOPPER}".split()
            compiling = [*self.command, *architectures, "-c", str(source), "-o", f"{source}.o"]
            # Lines such as `#$ INCLUDES="-I/usr/local/cuda/include"`, of what it would do.
            plan = dict(
                re.findall(r"^#\$ (\w+)=(.*)", self._run(name, [*compiling, "--dryrun"]), re.M)
            )
            self.include_flags = shlex.split(plan.get("INCLUDES", ""))
            self.link_flags = shlex.split(plan.get("LIBRARIES", "")) + CUDA_RUNTIME.split()
            self._run(name, compiling)
            linking = [*cxx.command, f"{source}.o", "-shared", *self.link_flags]
            self._run(name, [*linking, "-o", f"{source}.so"])

    def _run(self, name: str, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(
                f"{name!r} fails on a probe for sm_80, sm_90a:\n{done.stdout}{done.stderr}"
            )
        return done.stderr


class Module(Extension):
    """The native module and the compilers that build it."""

    def __init__(self, cxx: Compiler, nvcc: Nvcc | None, **options):
        super().__init__("scm_kernels._C", [], **options)
        self.cxx, self.nvcc = cxx, nvcc


class Build(build_ext):
    """Compiles the module with one run of ninja, which compiles again what has changed."""

    def build_extension(self, ext: Module) -> None:
        place = Path(self.build_temp).absolute()
        place.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        loudness = {0: ["--quiet"], 1: []}.get(self.verbose, ["-v"])
        command = [*ninja(), *loudness, "-C", str(place)]

        def build(nvcc: Nvcc | None) -> bool:
            (place / "build.ninja").write_text(ninja_file(ext.cxx, nvcc, target))
            return subprocess.run(command, check=False).returncode == 0

        done = build(ext.nvcc)
        if not done and ext.nvcc and ext.optional:
            print("scm_kernels: building without the CUDA kernels, see above", file=sys.stderr)
            done = build(None)
        if not done:
            target.unlink(missing_ok=True)  # nothing, sooner than an old one
            raise BuildError(f"{shlex.join(command)} failed, see above")


def ninja() -> list[str]:
    """The ninja of PyPI, else that of the machine."""
    try:
        import ninja as package
    except ImportError:
        if shutil.which("ninja") is None:
            raise BuildError("ninja is missing: pip install ninja") from None
        return ["ninja"]
    return [os.path.join(package.BIN_DIR, "ninja")]


def ninja_file(cxx: Compiler, nvcc: Nvcc | None, target: Path) -> str:
    """The build as a ninja file: each kernel for each instruction set, the bindings, the link."""
    sets = {name: INSTRUCTION_SETS[name] for name in instruction_sets()}
    sets = {name: flags for name, flags in sets.items() if not cxx.refuses(flags)}
    call, link_flags = [*cxx.command, *cxx.flags], cxx.link_flags
    lines = compile_rule("compile", [*call, *includes()])
    objects = []

    def compile_source(stem: str, name: str, flags: list[str], rule: str = "compile") -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: {rule} {path(SOURCES / stem)}")
        lines.append(f"  flags = {shell(flags)}")

    if nvcc:  # first, for these take longest
        lines += compile_rule("compile_cuda", [*nvcc.command, f"-I{SOURCES}"])
        for name, flags in CUDA_KERNELS.items():
            source = f"cuda/{name.partition('.')[0]}.cu"
            compile_source(source, f"cuda/{name}", flags.split(), "compile_cuda")
        for stem in CUDA_SHARED:
            compile_source(f"cuda/{stem}.cpp", f"cuda/{stem}", nvcc.include_flags)
        link_flags = [*link_flags, *nvcc.link_flags]
    for name, flags in sets.items():
        for kernel in KERNELS:
            options = [*flags.split(), f"-DSCM_ISA={name}"]
            compile_source(f"cpu/{kernel}.cpp", f"{kernel}.{name}", options)
    names = "".join(f"X({name})" for name in sets)
    for stem in SHARED:
        options = [f"-DSCM_ISAS(X)={names}", *(["-DSCM_CUDA"] if nvcc else [])]
        compile_source(f"{stem}.cpp", Path(stem).name, options)
    lines += [
        "rule link",
        f"  command = {shell(call)} $in {shell(link_flags)} -o $out",
        "  description = link $out",
        f"build {path(target)}: link {' '.join(objects)}",
    ]
    return "\n".join([*lines, ""])


def instruction_sets() -> list[str]:
    """Those to compile for, best first; a compiler may not know all of them."""
    wanted = (os.environ.get("SCM_KERNELS_ISAS") or " ".join(INSTRUCTION_SETS)).split()
    unknown = set(wanted) - set(INSTRUCTION_SETS)
    if unknown or "baseline" not in wanted:
        known = " ".join(INSTRUCTION_SETS)
        sys.exit(
            f"SCM_KERNELS_ISAS: got {' '.join(wanted)!r}, expected baseline and some of {known}"
        )
    return [name for name in INSTRUCTION_SETS if name in wanted]


def compile_rule(name: str, command: list[str]) -> list[str]:
    """A rule of a ninja file; what a source includes is found out on the way."""
    return [
        f"rule {name}",
        f"  command = {shell(command)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def includes() -> list[str]:
    """Where the C++ sources find pybind11, Python and each other."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing: pip install pybind11") from None
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise BuildError(f"Python.h is missing in {python}: install Python's development files")
    return [f"-I{path}" for path in (pybind11.get_include(), python, SOURCES)]


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
    instruction_sets()  # before anything is built
    try:
        cxx = Compiler()
        nvcc = Nvcc(cxx) if wanted == "cuda" else None
    except BuildError as error:
        if wanted != "auto":
            sys.exit(f"SCM_KERNELS_BUILD={wanted}: {error}")
        print(f"scm_kernels: building without the native module: {error}", file=sys.stderr)
        return []
    if wanted == "auto":
        try:
            nvcc = Nvcc(cxx)
        except BuildError as error:
            print(f"scm_kernels: building without the CUDA kernels: {error}", file=sys.stderr)
    # optional: under auto a build that fails is a message too.
    return [Module(cxx, nvcc, optional=wanted == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
