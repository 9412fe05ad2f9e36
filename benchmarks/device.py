"""What a measurement needs to know of a device: its name, a timer, memory that is free and used."""

import importlib
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import scm_kernels
from benchmarks.common import machine, output_of, wall
from benchmarks.memory import AllocatedBytes


def about(device: str) -> dict[str, object]:
    """The device, driver, versions and commit of a run."""
    known = machine()
    gpu = device == "cuda"
    if gpu:
        known["device"] = torch.cuda.get_device_name()
    return known | {
        "kind": device,
        "driver": f"driver {_driver()}" if gpu else f"{platform.system()} {platform.release()}",
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda if gpu else None,
        "triton": _triton(),
        "python": platform.python_version(),
        "scm_kernels": _version("scm_kernels"),
        "backends": scm_kernels.backends(),
    }


class Neighbours:
    """How many of the cores that this process wants other processes take, from its making on."""

    def __init__(self):
        self.start = self._now()

    def cores(self) -> float | None:
        """On average, at most PyTorch's threads; None where the system does not tell."""
        if not Path("/proc/stat").exists():
            return None
        seconds, busy = (new - old for new, old in zip(self._now(), self.start, strict=True))
        threads = torch.get_num_threads()
        taken = busy / seconds + threads - os.cpu_count()
        return round(min(max(taken, 0.0), threads), 2)

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds, and seconds that cores were busy with something else than this process."""
        path, own = Path("/proc/stat"), os.times()
        if not path.exists():
            return own.elapsed, 0.0
        user, nice, system, _, _, irq, soft, *_ = map(int, path.read_text().split()[1:9])
        ticks = user + nice + system + irq + soft
        return own.elapsed, ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _driver() -> str:
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return output_of("nvidia-smi", *query).partition("\n")[0] or "unknown"


def _triton() -> str | None:
    """The version that is imported; PyTorch brings one, and a path may have another before it."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """What takes the milliseconds of a call on this device, with cold caches.

    Something else goes through them before, as it does where a layer of a network runs: on a GPU
    twice its L2 cache, on a CPU 64 MiB. A GPU's time is that between two events in its stream, a
    CPU's that of the clock on the wall.
    """
    gpu = device == "cuda"
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size if gpu else 2**26
    flush = torch.zeros(size // 4, device=device)
    clock = between_events if gpu else wall

    def cold(run: Callable[[], object]) -> float:
        flush.add_(1)
        return clock(run)

    return cold


def between_events(run: Callable[[], object]) -> float:
    """Milliseconds of one call in the current stream of a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that a call holds beyond what was there before.

    Of CUDA by PyTorch's allocator, of a CPU by a count of what ops allocate (`memory.py`).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with AllocatedBytes() as memory:
        run()
    return memory.peak


def free_bytes(device: str) -> int | None:
    """Memory that is free on the device; None where that cannot be told."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(sizes[0]) if sizes else None
