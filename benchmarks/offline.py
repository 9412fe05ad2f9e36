"""Triton kernels on a machine without a GPU: compiled for one, and run by a simulator of its PTX.

    with offline.gpu("sm_80", simulate=True) as launches:
        scm_kernels.attention_jvp(...)  # tensors on the CPU

The ops run as on a GPU, down to the launch, which is recorded and, with `simulate`, executed by
ptxsim: with its checks of memory, races, initialisation and asynchronous copies. `tools.py`
says where it is found, and `offline_cuda.py` is the same for the CUDA C++ kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from benchmarks.tools import spilled, tool, usage
from scm_kernels import _backends, _triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {  # bytes a block
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}


@dataclass
class Launch:
    """One launch that was recorded."""

    name: str
    metadata: object  # Triton's, of the compiled kernel
    signature: dict[str, object]  # the types of its parameters
    constants: dict[str, object]
    grid: tuple[int, int, int]
    args: list  # without constants, tuples flattened
    stats: object = None  # of the simulator

    @property
    def threads(self) -> int:
        return self.metadata.num_warps * self.metadata.target.warp_size

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block."""
        return self.metadata.shared

    def spilled(self) -> int:
        """What a kernel keeps in memory for want of registers: bytes of local memory a thread on
        NVIDIA's GPUs, vector registers on AMD's (scalar ones go to lanes of vector registers)."""
        if self.metadata.target.backend != "hip":
            return spilled(usage(self.code("cubin"))[self.name])
        found = re.findall(r"vgpr_spill_count: *(\d+)", self.code("amdgcn").decode())
        if len(found) != 1:
            raise ValueError(f"{self.name}: got {found} for what is spilled, expected one number")
        return int(found[0])

    def code(self, stage: str) -> bytes:
        """What the compiler made: "ptx", "cubin", "ttgir", ...; "amdgcn" and "hsaco" for AMD."""
        files = get_cache_manager(self.metadata.hash).get_group(f"{self.name}.json")
        return Path(files[f"{self.name}.{stage}"]).read_bytes()


class _Driver:
    """What Triton asks of a driver, and of its `utils` and launchers."""

    def __init__(self, target: str, simulate: dict | None, record: bool):
        self.target, self.simulate, self.record = target, simulate, record
        self.utils, self.launcher_cls = self, _launcher
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)  # Triton keeps its kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.target]}

    def load_binary(self, name, binary, shared, device) -> tuple:
        return name, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module) -> None:
        pass


def _launcher(src, metadata):
    """What launches a kernel: it is made once a kernel, and kept as long as that."""
    name, types = metadata.name, list(src.signature.values())
    names = list(src.signature)
    constants = {names[place[0]]: x for place, x in src.constants.items() if len(place) == 1}

    def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        current = driver.active
        if not current.record:
            return
        record = Launch(
            name, metadata, src.signature, constants, (x, y, z), list(_flat(types, args))
        )
        if current.simulate is not None:
            record.stats = _simulate(record, current.simulate)
        current.launches.append(record)

    return run


def _flat(types, args) -> Iterator:
    """The arguments that are no constants."""
    for kind, arg in zip(types, args, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, arg)
        elif kind != "constexpr":
            yield arg


_modules: dict[str, object] = {}


def _simulate(launch: Launch, options: dict):
    ptxsim, key = tool("ptxsim"), launch.metadata.hash
    if key not in _modules:
        _modules[key] = ptxsim.Module(launch.code("ptx").decode())
    options = {"dynamic_smem": launch.shared, **options}
    return ptxsim.launch(
        _modules[key], launch.name, launch.grid, launch.threads, launch.args, **options
    )


@contextmanager
def gpu(
    target: str, *, simulate: bool = False, record: bool = True, **options
) -> Iterator[list[Launch]]:
    """Give Triton a GPU of this kind that takes tensors on the CPU; yields the launches.

    `options` are those of `ptxsim.launch`. Without `simulate` nothing is computed; without `record`
    a launch ends where the driver would take it.
    """
    if _triton.interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are not compiled")
    before, current = driver._active, _Driver(target, options if simulate else None, record)
    names = ("unavailable", "refuses", "describe", "architecture")
    real = {name: getattr(_triton, name) for name in names}
    _triton.unavailable, _triton.refuses = lambda: None, lambda x: None
    _triton.architecture = lambda device: target
    _triton.describe = lambda: f"{target}, {'simulated' if simulate else 'compiled alone'}"
    _backends.forget()
    driver.set_active(current)
    try:
        with _backends.backend("triton"):
            yield current.launches
    finally:
        driver.set_active(before)
        for name, function in real.items():
            setattr(_triton, name, function)
        _backends.forget()
