"""The compiled module `scm_kernels._C`, if there is one, and what its functions take."""

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

INSTRUCTION_SET = "SCM_KERNELS_CPU_ISA"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # Type in problems.h


def unavailable() -> str | None:
    """Why the compiled module is not there, None if it is."""
    if module() is None:
        return (
            "the native module scm_kernels._C was not built; with a C++ compiler, "
            "`SCM_KERNELS_BUILD=cpu pip install .` in the source tree builds it or says why not"
        )
    return None


@cache
def module() -> ModuleType | None:
    """The compiled module. It is imported after torch, so that both share one pool of threads."""
    try:
        module = importlib.import_module("scm_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "scm_kernels._C":
            raise
        return None
    name = os.environ.get(INSTRUCTION_SET)
    if name:
        known = module.instruction_sets()
        if name not in known:
            expected = ", ".join(map(repr, known))
            raise ValueError(f"{INSTRUCTION_SET}: got {name!r}, expected one of {expected} here")
        module.select_instruction_set(name)
    return module


def instruction_set() -> str:
    """The one that the kernels in use were compiled for, "" without kernels."""
    return "" if module() is None else module().instruction_set()


def address(x: Tensor | None) -> tuple[int, ...] | None:
    """A tensor of four dimensions as the kernels take it: address, type, strides in elements."""
    return None if x is None else (x.data_ptr(), TYPES[x.dtype], *x.stride())
