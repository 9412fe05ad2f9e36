"""What is known of PyTorch's functions by their names: tables of the mode and of checkpoints."""

import functools
import inspect
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def functions(names: Iterable[str]) -> frozenset:
    """PyTorch's functions of these names, methods among them."""
    places = (torch, Tensor, F, torch.linalg, torch.special, torch.fft)
    return frozenset(getattr(place, n) for n in names for place in places if hasattr(place, n))


# Functions that are linear in all that may be dual, and some that are so where they select or round
# as they do: their tangents are functions of tangents alone, of which autograd has no graph where
# it is to keep none.
LINEAR = functions(
    (
        *("view", "view_as", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
        *("expand_as", "transpose", "permute", "movedim", "chunk", "split", "unbind", "select"),
        *("narrow", "__getitem__", "contiguous", "clone", "to", "float", "type_as", "cat", "stack"),
        *("pad", "repeat", "roll", "flip", "add", "sub", "neg", "__neg__", "sum", "mean", "where"),
        *("bfloat16", "cumsum", "diff", "double", "gather", "half", "index_select", "interpolate"),
        *("masked_fill", "repeat_interleave", "swapaxes", "tril", "triu", "t"),
        *("conj", "imag", "real", "view_as_complex", "view_as_real"),
        *("atleast_2d", "atleast_3d", "block_diag", "broadcast_tensors", "broadcast_to", "deg2rad"),
        *("diag", "diag_embed", "diagflat", "diagonal", "diagonal_scatter", "dsplit", "fliplr"),
        *("flipud", "hsplit", "index_copy", "masked_scatter", "masked_select", "meshgrid"),
        *("nansum", "rad2deg", "ravel", "reshape_as", "rot90", "rsub", "scatter_add"),
        *("select_scatter", "slice_scatter", "split_with_sizes", "sum_to_size", "take"),
        *("take_along_dim", "tensor_split", "tile", "trace", "unfold", "vsplit"),
        *("cummax", "cummin", "kthvalue", "median", "mode", "msort", "nanmedian", "sort", "topk"),
        *("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
        *(
            f"{name}{n}d{indices}"
            for name in ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool")
            for n in (1, 2, 3)
            for indices in ("", "_with_indices")
        ),
        *("ceil", "floor", "frac", "round", "sign", "trunc"),
        *("aminmax", "as_strided", "atleast_1d", "cartesian_prod", "column_stack", "combinations"),
        *("complex", "concat", "concatenate", "constant_pad_nd", "dstack", "embedding", "fold"),
        *("gradient", "hstack", "index_add", "index_fill", "index_put", "max_unpool1d"),
        *("max_unpool2d", "max_unpool3d", "row_stack", "vstack"),
        *(name for name in torch.fft.__all__ if "freq" not in name),
    )
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "imag", "real")}
_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
    *("logsigmoid", "log_softmax", "mish", "prelu", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softmin", "softplus", "softsign", "tanh", "tanhshrink"),
    *("expit", "hardshrink", "softshrink", "threshold"),
)
_POINTWISE = (
    *("abs", "acos", "addcdiv", "addcmul", "asin", "atan", "atan2", "clamp", "clamp_max"),
    *("clamp_min", "clip", "cos", "cosh", "div", "divide", "erf", "erfc", "erfinv", "exp", "exp2"),
    *("expm1", "float_power", "hypot", "lerp", "lgamma", "log", "log10", "log1p", "log2"),
    *("logaddexp", "logit", "maximum", "minimum", "mul", "multiply", "pow", "reciprocal"),
    *("rsqrt", "sin", "sinc", "sinh", "sqrt"),
    *("square", "tan", "true_divide", "xlogy", "__mul__", "__pow__", "__rmul__", "__rpow__"),
    *("__rtruediv__", "__truediv__"),
    *("absolute", "angle", "asinh", "acosh", "atanh", "digamma", "fmax", "fmin", "fmod", "gammaln"),
    *("i0", "isclose", "isfinite", "isinf", "isnan", "ldexp", "mvlgamma", "nan_to_num", "ndtr"),
    *("polar", "remainder", "xlog1py", "__mod__", "__rmod__"),
    *("arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "copysign"),
    *("entr", "erfcx", "i0e", "i1", "i1e", "log_ndtr", "logaddexp2", "multigammaln", "ndtri"),
    *("polygamma", "psi"),
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
    *("nanmean", "poisson_nll_loss", "scatter_reduce", "triplet_margin_loss", "vdot"),
    *("addr", "cumulative_trapezoid", "ger", "hinge_embedding_loss", "linear_cross_entropy"),
    *("margin_ranking_loss", "multilabel_soft_margin_loss", "soft_margin_loss", "trapezoid"),
    *("trapz", "triplet_margin_with_distance_loss", "vecdot"),
    *("convolution", "einsum", "istft", "native_group_norm", "nll_loss", "scatter", "stft"),
)
_OF_MATRICES = (
    *("chain_matmul", "cholesky", "det", "eigh", "eigvalsh", "inv", "inverse", "logdet"),
    *("lu_factor", "matrix_exp", "matrix_norm", "matrix_power", "multi_dot", "pinv", "qr"),
    *("slogdet", "solve", "solve_triangular", "svd", "svdvals", "eig", "eigvals"),
    *("cholesky_ex", "cholesky_inverse", "cholesky_solve", "cond", "householder_product"),
    *("inv_ex", "lstsq", "lu", "lu_factor_ex", "lu_solve", "matrix_sqrth", "pinverse"),
    *("solve_ex", "tensorinv", "tensorsolve", "triangular_solve", "vander"),
)
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
_WRITING = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "idiv", "itruediv", "ifloordiv", "imod", "ipow")
)


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


def is_written_to(func) -> bool:
    """Whether a function of PyTorch's writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))
