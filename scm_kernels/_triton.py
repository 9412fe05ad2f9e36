"""What the Triton kernels of all ops share on the host: what they run on, and how one is launched.

Triton is imported where a kernel is first needed: `import scm_kernels` asks for torch alone.
"""

import functools
import math
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: bfloat16 and asynchronous copies
MOST_ROWS = 256  # of a tile


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU, for debugging and for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why no Triton kernel runs on this machine, None if one does."""
    if not interpreting() and not torch.cuda.is_available():
        return (
            "PyTorch sees no GPU here (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter "
            "on the CPU, slowly, for debugging)"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install triton` brings it"
    return None


def refuses(x: Tensor) -> str | None:
    """Why the kernels do not run on the device of x, None if they do."""
    if interpreting():
        return None if x.device.type == "cpu" else "Triton's interpreter takes tensors on the CPU"
    return refuses_device(x)


def refuses_device(x: Tensor) -> str | None:
    """Why x is on no GPU that has what the kernels use, None if it is on one."""
    if x.device.type != "cuda":
        return f"it runs on a GPU, not on {x.device.type}"
    if torch.version.hip is None and _capability(x.device.index) < LEAST_CAPABILITY:
        least, have = (
            ".".join(map(str, c)) for c in (LEAST_CAPABILITY, _capability(x.device.index))
        )
        return f"it wants compute capability {least} and later, not {have}"
    return None


def architecture(device: torch.device) -> str:
    """What kernels are compiled for: "sm_80", "gfx942"; "" for the interpreter."""
    return "" if interpreting() else _architecture(device.index)


@cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*_capability(index))


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def describe() -> str:
    """What runs the kernels, for `backends()`."""
    if interpreting():
        return "interpreted on the CPU"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


class Launch:
    """A kernel to be launched with arguments of one kind, `programs` programs of it.

    Triton looks at every argument of a launch to find the variant that was compiled for its like,
    which takes longer than the launch; from its second call on this takes the variant of the first.
    """

    __slots__ = ("again", "constants", "kernel", "options", "programs")

    def __init__(self, kernel, programs: int, **options):
        self.kernel, self.programs, self.options = kernel, programs, options
        self.again = None
        self.constants = ()  # those of the kernel's arguments that are among the options

    @property
    def known(self) -> bool:
        """Whether there is a compiled variant, for which a named tuple is as good as any other."""
        return self.again is not None

    def __call__(self, like: Tensor, *args) -> None:
        """On the device of `like`, on its current stream."""
        index = like.get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._run(args)
        else:
            self._run(args)

    def _run(self, args: tuple) -> None:
        if self.again is not None:
            self.again(*args, *self.constants)
            return
        compiled = self.kernel[(self.programs,)](*args, **self.options)
        if compiled is not None:  # not interpreted
            rest = self.kernel.arg_names[len(args) :]
            self.constants = tuple(self.options[name] for name in rest)
            self.again = compiled[(self.programs, 1, 1)]


def vector(*tensors: Tensor | None) -> int:
    """The elements that one access may take, at most 16 bytes: all rows start at multiples of it.

    Kernels take strides in units of this, and multiply by it as a constant: so the compiler knows
    how they are aligned, which it cannot see in a stride of 72.
    """
    width = 0
    for x in tensors:
        if x is not None:
            size = x.element_size()
            rows = (s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
            width = math.gcd(width, 16 // size, x.data_ptr() // size, *rows)
    return width


def strides(x: Tensor | None, width: int) -> tuple[int | None, ...] | None:
    """All strides but the last, which is 1, in units of `width` elements, as `coded` numbers.

    Where a tile of rows spans 2^31 elements, a None follows: its length tells a kernel, when it is
    compiled, that addresses inside a tile want 64 bits.
    """
    if x is None:
        return None
    result = tuple(coded(s // width) for s in x.stride()[:-1])
    return (*result, None) if x.stride(-2) * MOST_ROWS >= 2**31 else result


def coded(stride: int) -> int:
    """An odd number above 1, which a kernel decodes as (it - 3) // 2.

    Triton compiles a kernel once more for a number that is 1, and for one that 16 divides; inside
    of a tuple it cannot be told not to.
    """
    return 2 * stride + 3


def without_bfloat16(*outputs: str) -> Callable:
    """A decorator of a backend's `plan_<step>`: where Triton's interpreter would run it in
    bfloat16, it runs in float32, and PyTorch rounds the outputs of these names.

    The interpreter truncates float32 to bfloat16, where a GPU rounds to nearest even, and its
    `tl.dot` multiplies the bits of bfloat16. To widen is exact.
    """

    def decorate(plan: Callable) -> Callable:
        @functools.wraps(plan)
        def planned(problem):
            return run if interpreting() else plan(problem)

        def run(problem):
            wide = {
                # Contiguous: of rows that overlap, PyTorch would keep no order of dimensions.
                name: x.to(torch.float32, memory_format=torch.contiguous_format)
                for name, x in problem._asdict().items()
                if isinstance(x, Tensor) and x.dtype == torch.bfloat16
            }
            widened = problem._replace(**wide)
            result = plan(widened)(widened)
            for name in wide.keys() & set(outputs):
                getattr(problem, name).copy_(wide[name])
            return result

        return planned

    return decorate
