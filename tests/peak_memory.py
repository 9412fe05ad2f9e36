"""The most memory that a call holds at once beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes, from PyTorch's allocators: the CPU's by the profiler's record of each allocation."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
