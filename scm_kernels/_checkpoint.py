"""Activation checkpoints, `torch.utils.checkpoint` (non-reentrant), on dual tensors.

A checkpoint keeps its inputs, and its backward computes the forward again for what autograd had
saved. It insists on as many tensors, in the order of the first time.

Inside of `scm_kernels.jvp` with no graph for the tangents, what is computed again are the primals,
by PyTorch's own functions, as the level is closed by then. So where a checkpoint looks on, autograd
records the primal of each function as PyTorch's own, and the tangent is computed beside it.

A selective checkpoint numbers the ops that it sees, and hands out what it has kept by number: there
all tangents are computed out of its sight, and a function for which that cannot be is refused.

Inside of an open `forward_ad.dual_level`, the backward runs within `scm_kernels.fused()` too, and
computes dual tensors again on the paths of the first time.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
    *("logsigmoid", "log_softmax", "mish", "prelu", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softmin", "softplus", "softsign", "tanh", "tanhshrink"),
    *("hardshrink", "softshrink", "threshold"),
)
_POINTWISE = (
    *("abs", "acos", "addcdiv", "addcmul", "asin", "atan", "atan2", "clamp", "clamp_max"),
    *("clamp_min", "clip", "cos", "cosh", "div", "divide", "erf", "erfc", "erfinv", "exp", "exp2"),
    *("expm1", "float_power", "hypot", "lerp", "lgamma", "log", "log10", "log1p", "log2"),
    *("logaddexp", "logit", "maximum", "minimum", "mul", "multiply", "pow", "reciprocal"),
    *("rsqrt", "sin", "sinc", "sinh", "sqrt"),
    *("square", "tan", "true_divide", "xlogy", "__mul__", "__pow__", "__rmul__", "__rpow__"),
    *("__rtruediv__", "__truediv__"),
    *("angle", "asinh", "acosh", "atanh", "digamma", "fmax", "fmin", "fmod", "i0", "ldexp"),
    *("nan_to_num", "polar", "remainder", "xlog1py", "__mod__", "__rmod__"),
)
_OVER_DIMENSIONS = (
    *("amax", "amin", "cosine_similarity", "cumprod", "logcumsumexp", "logsumexp", "max", "min"),
    *("norm", "normalize", "prod", "std", "std_mean", "var", "var_mean", "vector_norm"),
    *("addbmm", "addmm", "addmv", "baddbmm", "bilinear", "cross", "dot", "inner", "kron", "mv"),
    *("outer", "tensordot", "cross_entropy", "huber_loss", "l1_loss", "local_response_norm"),
    *("mse_loss", "smooth_l1_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "cdist", "corrcoef", "cov"),
    *("cosine_embedding_loss", "dist", "gaussian_nll_loss", "kl_div", "pairwise_distance"),
    *("quantile", "nanquantile", "renorm", "lp_pool1d", "lp_pool2d", "lp_pool3d"),
    *("gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"),
)
_OF_MATRICES = (
    *("cholesky", "det", "eigh", "eigvalsh", "inv", "inverse", "logdet", "lu_factor"),
    *("matrix_exp", "matrix_norm", "matrix_power", "pinv", "qr", "slogdet", "solve"),
    *("solve_triangular", "svd", "svdvals"),
)


def functions(names: Iterable[str]) -> frozenset:
    """PyTorch's functions of these names, methods among them."""
    places = (torch, Tensor, F, torch.linalg, torch.special)
    return frozenset(getattr(place, n) for n in names for place in places if hasattr(place, n))


# Functions that draw random numbers, and whose Jacobian is diagonal.
RANDOM = functions(
    ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
)
# Functions that PyTorch computes otherwise inside of a transform of functorch.
DECOMPOSED = RANDOM | functions(["gru", "lstm", "rnn_relu", "rnn_tanh"])
_NAMES = (*_ACTIVATIONS, *_POINTWISE, *_OVER_DIMENSIONS, *_OF_MATRICES)
IN_PLACE = functions(
    [f"{name}_" for name in _NAMES] + ["__imul__", "__ipow__", "__itruediv__", "__idiv__"]
)
# Functions that may be called twice. Linear ones need not be in here: their tangents save nothing.
REPEATABLE = functions(_NAMES) | IN_PLACE | RANDOM


def is_in_place(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call of one of them writes to its first argument."""
    if func in IN_PLACE or kwargs.get("inplace"):
        return True
    place = _place_of_inplace(func)
    return place is not None and len(args) > place and bool(args[place])


@functools.cache
def _place_of_inplace(func: Callable) -> int | None:
    """Of the parameter `inplace` of some of `torch.nn.functional`."""
    if getattr(func, "__module__", None) != F.__name__:
        return None
    names = list(inspect.signature(func).parameters)
    return names.index("inplace") if "inplace" in names else None


def random_tangent(call: Callable, x: Tensor, tx: Tensor) -> Tensor:
    """The tangent of `call(x)`, where `call` is one of `RANDOM`, by the numbers that the next call
    of it draws.

    As the Jacobian is diagonal, that is the gradient at tx. A call with tx would draw the same
    numbers, but give them to other elements, should tx lie otherwise in memory.
    """
    devices = [] if x.device.type == "cpu" else [x.device]
    same_numbers = torch.random.fork_rng(
        devices, device_type="cuda" if not devices else x.device.type
    )
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with same_numbers, unseen, torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x), x, tx)[0]


# What was there when the jvp at work began: a checkpoint around it computes all of it again.
_around: ContextVar[tuple] = ContextVar("scm_kernels_around", default=(None, 0))


@contextmanager
def inside_of_a_jvp() -> Iterator[None]:
    """Where a new checkpoint is one inside of the jvp that begins here."""
    token = _around.set((_hook(), _selecting()))
    try:
        yield
    finally:
        _around.reset(token)


def looks_on() -> bool:
    """Whether a checkpoint inside of the jvp takes the place of what autograd saves."""
    return not torch.compiler.is_compiling() and _hook() not in (None, _around.get()[0])


def selects() -> bool:
    """Whether a selective one (`create_selective_checkpoint_contexts`) numbers the ops."""
    return not torch.compiler.is_compiling() and _selecting() > _around.get()[1]


def _hook() -> Callable | None:
    """The innermost checkpoint's, which is another for each of them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or getattr(hooks[0], "__module__", "") != torch.utils.checkpoint.__name__:
        return None
    return hooks[0]


def _selecting() -> int:
    """How many selective ones there are."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return 0
    modes = _get_current_dispatch_mode_stack()
    return sum(isinstance(x, _CachingTorchDispatchMode) for x in modes)


def unrecorded() -> AbstractContextManager:
    """Where tangents are computed that nothing is to be kept of."""
    return _out_of_sight() if selects() else torch.no_grad()


@contextmanager
def _out_of_sight():
    with torch.no_grad(), _disable_current_modes():
        yield


def _blind(function: Callable) -> Callable:
    """A copy of a function of `torch.autograd` that does not look for modes."""
    copy = types.FunctionType(
        function.__code__,
        {**vars(torch.autograd), "has_torch_function": lambda tensors: False},
        function.__name__,
        function.__defaults__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_backward = _blind(torch.autograd.backward)


def _tensor_backward(
    tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None
) -> None:
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


# To a mode a backward is a function like any other, which runs with the mode popped. These run in
# the mode that calls them.
BACKWARD = {
    Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _blind(torch.autograd.grad),
}
