"""CUDA C++ kernels on a machine without a GPU: the native module's, run by a simulator of PTX.

    with offline_cuda.gpu(simulate=True) as launches:
        scm_kernels.attention_jvp(...)  # tensors on the CPU

The ops run as on a GPU, down to the launch, which is written down and, with `simulate`, executed by
ptxsim: with its checks of memory, races, initialisation and asynchronous copies. The simulator runs
the PTX that the native module holds for later GPUs; registers and spills are those of its machine
code. `offline.py` is the same for Triton's kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from benchmarks import tools
from scm_kernels import _backends, _cuda, _native


@dataclass
class Launch:
    """One launch that was written down."""

    name: str
    blocks: int
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory a block
    params: bytes  # of the kernel's one parameter
    stats: object = None  # of the simulator

    @property
    def cubin(self) -> bytes:
        """The binary that holds the kernel's machine code."""
        return next(code for code in _cubins() if self.name in _usage(code))

    @property
    def machine_code(self) -> str:
        """The machine code, as text."""
        return tools.dump(self.cubin, "-sass", "-fun", self.name)

    @property
    def usage(self) -> dict[str, int]:
        """What the machine code takes, as `tools.usage` names it."""
        return _usage(self.cubin)[self.name]

    def spilled(self) -> int:
        """Bytes of local memory a thread, for want of registers."""
        return tools.spilled(self.usage)


@contextmanager
def gpu(*, simulate: bool = False, **options) -> Iterator[list[Launch]]:
    """Give the CUDA backend a GPU that takes tensors on the CPU; yields the launches.

    `options` are those of `ptxsim.launch`. Without `simulate` nothing is computed.
    """
    if not _cuda.built():
        raise RuntimeError("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    launches = []

    def launch(function: Callable, tensors: Sequence[Tensor | None], *arguments) -> None:
        for record in function(*arguments, 0, None):
            current = Launch(*record)
            if simulate:
                current.stats = _simulate(current, tensors, options)
            launches.append(current)

    patches = {
        "unavailable": lambda: None,
        "fault": lambda: None,
        "refuses": lambda x: None,
        "describe": lambda: "simulated" if simulate else "written down alone",
        "launch": launch,
    }
    real = {name: getattr(_cuda, name) for name in patches}
    _set(patches)
    try:
        with _backends.backend("cuda"):
            yield launches
    finally:
        _set(real)


def _set(functions: dict) -> None:
    for name, function in functions.items():
        setattr(_cuda, name, function)
    _backends.forget()


def _simulate(launch: Launch, tensors: Sequence[Tensor | None], options: dict):
    ptxsim = tools.tool("ptxsim")
    reachable = [x for x in tensors if x is not None and x.numel()]
    for x in reachable:
        ptxsim.register(x)
    try:
        return ptxsim.launch(
            _module(launch.name),
            launch.name,
            launch.blocks,
            launch.threads,
            [launch.params],
            **{"dynamic_smem": launch.shared, **options},
        )
    finally:
        for x in reachable:
            ptxsim.unregister(x)


def _module(kernel: str) -> object:
    """The simulator's module that holds a kernel."""
    return next(module for module in _modules() if kernel in module.kernels)


@cache
def _modules() -> list:
    return [tools.tool("ptxsim").Module(text) for text in ptx()]


@cache
def _cubins() -> list[bytes]:
    return _extract("-xelf")


_usage = cache(tools.usage)


def ptx() -> list[str]:
    """Each piece of PTX that the native module holds."""
    return [text.decode() for text in _extract("-xptx")]


def _extract(what: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as place:
        tools.cuobjdump(what, "all", _native.module().__file__, cwd=place)
        return [path.read_bytes() for path in sorted(Path(place).iterdir())]
