"""What `torch.compile` may do with this package's own frames."""

from collections.abc import Callable

# The module in C: an import of torch._dynamo takes longer than that of this package.
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy


def never_compiled_alone(function: Callable) -> Callable:
    """Let Dynamo trace a function as a part of what it compiles, but not compile a call by itself.

    It does that after a graph break in a network whose jvp has begun outside of it. There it does
    not see that an argument is dual, and what is compiled would drop the tangent, silently.
    `torch.compiler.disable` would forbid the tracing too.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # it, and all that it calls
    set_code_exec_strategy(function.__code__, skip)
    return function
