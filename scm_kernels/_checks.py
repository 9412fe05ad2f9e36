"""Checks of arguments: each names the argument, what was got and what was expected."""

import math
import numbers

import torch
from torch import Tensor

_LONGEST = 60  # characters of a value in a message
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """A short description for an error message: no numbers of tensors, nor of what holds them."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list, dict)) and value:
        return f"a {type(value).__name__} of length {len(value)}"
    kind = type(value).__qualname__
    if type(value).__module__ != "builtins":
        kind = f"{type(value).__module__}.{kind}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:  # an array of another library
        return f"a {kind} of shape {list(shape)}"
    text = " ".join(repr(value).split())  # of a module: many lines
    return f"{kind} {text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'}"


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a few numbers a sample: float64, which every device but Apple's has."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; of some devices, as "meta", it does not know."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def tensor(name: str, value: object, *, dtypes: tuple = FLOATS) -> None:
    """`value` must be a tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: got {describe(value)}, expected one of the dtypes {names}")


def dense(name: str, value: object) -> None:
    """`value`, if it is a tensor, must not be sparse, nested or in a layout of MKL-DNN."""
    if not isinstance(value, Tensor) or (value.layout is torch.strided and not value.is_nested):
        return
    layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    raise TypeError(f"{name}: got a tensor of layout {layout}, expected a dense (strided) one")


def like(name: str, value: object, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """`value` must be a tensor like `other`: dtype, device and, unless told otherwise, shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor")
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: got {describe(value)}, expected the dtype of {other_name}, {describe(other)}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name}: got {describe(value)}, expected the device of {other_name}, {describe(other)}"
        )
    if shape and value.shape != other.shape:
        raise ValueError(
            f"{name}: got {describe(value)}, expected the shape of {other_name}, {describe(other)}"
        )


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> float:
    """`value`, a finite real number with low <= value <= high and value > above, as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {describe(value)}, expected a number")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: got {type(value).__name__} beyond all floats, expected a finite number"
        ) from None
    if not (-math.inf < result < math.inf and low <= result <= high and result > above):
        bounds = {"at least": low, "above": above, "at most": high}
        limits = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        raise ValueError(
            f"{name}: got {value}, expected a finite number {' and '.join(limits)}".rstrip()
        )
    return result


def bare(
    op: str, name: str, value: Tensor | None, like: Tensor, shape: tuple, *dtypes: torch.dtype
) -> None:
    """`value`, an argument of an op called as such, must fit, or be None."""
    if value is None or (
        value.shape == shape and value.dtype in dtypes and value.device == like.device
    ):
        return
    names = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
    expected = f"shape {list(shape)}, {names}, on {like.device}" if dtypes else "None"
    raise ValueError(
        f"torch.ops.scm_kernels.{op}, {name}: got {describe(value)}, expected {expected}"
    )


def flag(name: str, value: object) -> None:
    """`value` must be a bool."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: got {describe(value)}, expected a bool")


def integer(name: str, value: object, *, low: int) -> int:
    """`value`, an integer of at least `low`, as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {describe(value)}, expected an int")
    if not low <= value < 2**63:
        raise ValueError(f"{name}: got {value}, expected at least {low} and less than 2^63")
    return int(value)
