"""What is decided once for calls of one kind: tensors that differ in their numbers alone.

To check arguments, to choose a backend and its tiles, and to find a compiled kernel take longer
than to launch it. All of it depends on a call's kind, which is quick to tell.
"""

from collections.abc import Iterable

from torch import Tensor

_all: list["Plans"] = []


class Plans(dict):
    """The plans of the kinds that have been met: `plans[kind]`, or None."""

    MOST = 4096  # kinds; a program that meets more has new ones all the time, and starts afresh

    def __init__(self):
        super().__init__()
        _all.append(self)

    def __missing__(self, key: tuple) -> None:
        return None

    def __setitem__(self, key: tuple, plan: object) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(key, plan)


class Number(float):
    """A number that may be another at each call: no part of a kind."""


def kind(values: Iterable[Tensor | object]) -> tuple:
    """All that may be decided by: everything but the numbers in tensors, where these are, and every
    `Number`."""
    result = []
    for x in values:
        if isinstance(x, Tensor):
            x = x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15
        elif isinstance(x, Number):
            continue
        result.append(x)
    return tuple(result)


def pattern(x: Tensor | None) -> Tensor | None:
    """x without its memory: `empty_like` of it is the quickest way to a tensor of such strides."""
    if x is not None:
        x.untyped_storage().resize_(0)
    return x


def forget() -> None:
    """Start afresh, as after a change of what the machine has."""
    for plans in _all:
        plans.clear()
