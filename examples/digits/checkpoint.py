"""Checkpoints: written whole or not at all, every so many seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"
FORMAT = 1


def write(path: Path, state: dict[str, Any]) -> None:
    """Write beside the old file, reach the disk, then take its place in one step."""
    scratch = path.with_suffix(".tmp")
    with open(scratch, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--resume: no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is in the file
        raise ValueError(f"--resume: {path} is no checkpoint ({error!r})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"--resume: {path} has format {found}, expected {FORMAT}")
    return state


class Saver:
    """Saves what ``collect`` returns, when it is due or when it must."""

    def __init__(
        self, path: Path, collect: Callable[[], dict[str, Any]], seconds: float, active: bool
    ) -> None:
        self.path, self.collect, self.seconds, self.active = path, collect, seconds, active
        self.last = time.monotonic()

    def __call__(self, now: bool = False) -> None:
        if not self.active or not (now or time.monotonic() - self.last >= self.seconds):
            return
        write(self.path, self.collect())
        self.last = time.monotonic()
