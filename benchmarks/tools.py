"""What stands in for a GPU on a machine without one: where it is found, and what it says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "shared" / "tools"


def tool(name: str) -> ModuleType:
    """`ptxsim` or `sassmodel`, at $PTXSIM or $SASSMODEL, else in ../shared/tools beside the
    project; ModuleNotFoundError says where they are looked for."""
    place = os.environ.get(name.upper()) or str(TOOLS / name)
    if not Path(place, f"{name}.py").exists():
        raise ModuleNotFoundError(f"{name} is neither at ${name.upper()} nor in ../shared/tools")
    if place not in sys.path:
        sys.path.append(place)
    return importlib.import_module(name)


def cuobjdump(*arguments: object, cwd: str | None = None) -> str:
    """What NVIDIA's tool prints: the one that comes with Triton, else the toolkit's."""
    triton = importlib.util.find_spec("triton")  # not imported
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else ""
    command = shutil.which("cuobjdump", path=folder) or shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump is neither in Triton nor on PATH")
    return subprocess.run(
        [command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def dump(code: bytes, *options: str) -> str:
    """What NVIDIA's tool prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        return cuobjdump(*options, file.name)


def usage(code: bytes) -> dict[str, dict[str, int]]:
    """Of each kernel in a cubin: registers a thread ("REG"), bytes of local memory a thread
    ("STACK", "LOCAL"), bytes of static shared memory a block ("SHARED")."""
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\S+):\n(.*)", dump(code, "-res-usage"))
    }


def spilled(kernel: dict[str, int]) -> int:
    """Bytes of local memory a thread, which a kernel takes for want of registers."""
    return kernel["STACK"] + kernel["LOCAL"]
