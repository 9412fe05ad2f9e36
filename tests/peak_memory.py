"""The most memory that a call holds at once beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.device import peak_bytes


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes, from PyTorch's allocators: the CPU's by the profiler's record of each allocation."""
    if device != "cpu":
        return peak_bytes(function, "cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
