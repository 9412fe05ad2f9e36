"""Builds of the project in copies of it, with other compilers, modes and flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "scm_kernels", "tests", "benchmarks", "examples")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copy_project(place: Path) -> Path:
    """The sources alone, nothing that was built from them."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in PARTS:
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for name in FILES:
        shutil.copy2(ROOT / name, place / name)
    return place


def python(place: Path, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Python in a copy of the project; a variable of the environment that is None is unset."""
    merged = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(place), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def build(place: Path, *command: str, **environment: str | None) -> str:
    """What `setup.py` says, by default building in place; it has to succeed."""
    done = python(place, "setup.py", *(command or ("build_ext", "--inplace")), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
