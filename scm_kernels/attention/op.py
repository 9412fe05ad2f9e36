"""Scaled dot product attention with its tangent: the public functions and their checks."""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from scm_kernels import _backends, _checkpoint, _checks, _plans
from scm_kernels._duals import (
    Dual,
    DualMode,
    current_level,
    is_batched_here,
    is_dual_outside,
    level_is_open,
    make_dual,
    refuse_batched,
    unpack_here,
)
from scm_kernels._dynamo import never_compiled_alone
from scm_kernels.attention import library
from scm_kernels.attention.stock import autocast, stock_attention

_TENSORS = ("query", "key", "value", "t_query", "t_key", "t_value", "attn_mask", "t_attn_mask")
_OUTER_LEVEL = (
    "scaled_dot_product_attention: got a tensor that is dual at an outer level alone (a jvp of a "
    "grad, a hessian, a jvp around a jvp), where PyTorch's fused kernels have no derivative. Call "
    "it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or take the jvp inside: a grad of "
    "a jvp, jacrev(jacfwd(f))"
)
_calls = _plans.Plans()  # kinds of calls that passed the checks, and whose tensors need no view


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a derivative in every mode.

    Dual tensors in (`torch.func.jvp`, `torch.autograd.forward_ad`), dual tensor out, in one fused
    pass; reverse mode goes through the output and through its tangent. Without a dual input this is
    PyTorch's own function, untouched.

    Args:
        query: [B, H, M, D], float16, bfloat16, float32 or float64; further leading dimensions, or
            none, as in PyTorch, which broadcasts those of the three.
        key: [B, H, N, D] ([B, Hk, N, D] with `enable_gqa`).
        value: [B, H, N, E] ([B, Hk, N, E] with `enable_gqa`).
        attn_mask: broadcastable to [B, H, M, N]; bool (True takes part), or, of query's dtype or
            float32, added to the scores. A dual one adds its tangent to that of the scores. A row
            all of whose keys one number masks that drowns the scores (finfo.min) is the mean of
            their values, and its derivatives are those of a softmax with equal weights; -inf and
            False leave a row without keys.
        dropout_p: with a dual input, only 0: primal and tangent would have to share one mask.
        is_causal: row i sees the keys 0 to i (aligned top-left).
        scale: of the scores, 1 / sqrt(D) if None.
        enable_gqa: H / Hk query heads share a key head.

    Returns:
        [B, H, M, E]. A row that sees no key is 0, and so is its tangent.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: dropout with a dual input; a jvp of a jvp, of a vmap or of a grad (so
            a hessian too, unless PyTorch's MATH kernel is chosen); a forced backend that does not
            take these inputs.

    Source: Lu & Song, arXiv 2410.11081, on JVP of flash attention; the formula is in
        `attention/reference.py`.
    """
    args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    modes = reversed(torch.overrides._get_current_function_mode_stack())
    recorded = [mode.records(current_level()) for mode in modes if isinstance(mode, DualMode)]
    return dual_attention(*args, tangent_grad=recorded[0] if recorded else True)


@never_compiled_alone
def dual_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    *,
    tangent_grad: bool,
) -> Tensor:
    """The same; with `tangent_grad` False nothing is saved for a gradient through the tangent."""
    inputs = (query, key, value, attn_mask)
    # Every input is looked at: the first dual one must not hide a batched one.
    pairs = [unpack_here(x) for x in inputs] if level_is_open() else []
    if all(tangent is None for _, tangent in pairs):
        try:
            return stock_attention(inputs, dropout_p, is_causal, scale, enable_gqa)
        except NotImplementedError as error:
            if not any(map(is_dual_outside, inputs)):
                raise
            raise NotImplementedError(_OUTER_LEVEL) from error
    if any(map(is_batched_here, inputs)):
        refuse_batched()
    _checks.number("dropout_p", dropout_p)
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p: got {dropout_p!r}, expected 0.0 where an input is a dual tensor: primal "
            "and tangent would have to share one dropout mask, which is not supported"
        )
    apart = any(type(x) is Dual for x in inputs)
    with torch._C.DisableTorchFunction():  # the mode has no part in what happens in here
        (q, tq), (k, tk), (v, tv), (mask, tmask) = pairs
        tensors = autocast((q, k, v, tq, tk, tv, mask, tmask))
        beside = not tangent_grad and _checkpoint.looks_on()
        recording = _checkpoint.unrecorded() if beside else nullcontext()
        with recording, nullcontext() if apart else _inside_level():
            out, t_out, *_ = _attention(tensors, is_causal, scale, enable_gqa, tangent_grad)
        if beside:
            out = stock_attention(
                [primal for primal, _ in pairs], 0.0, is_causal, scale, enable_gqa
            )
        return Dual(out, t_out) if apart else make_dual(out, t_out)


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    *,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_stats: bool = False,
) -> tuple[Tensor, ...]:
    """Attention and its directional derivative, with the tangents as arguments.

    For code in which dual tensors cannot travel (hooks of FSDP, context parallelism, checkpointed
    blocks). Differentiable in all inputs, through both outputs.

    Args:
        query: [B, H, M, D], float16, bfloat16, float32 or float64; further leading dimensions, or
            none, as in PyTorch, which broadcasts those of the three.
        key: [B, H, N, D] ([B, Hk, N, D] with `enable_gqa`); N may be 0.
        value: [B, H, N, E] ([B, Hk, N, E] with `enable_gqa`).
        t_query: like query, or None where the derivative does not go along it; that costs nothing.
        t_key: like key, or None.
        t_value: like value, or None.
        attn_mask: broadcastable to [B, H, M, N]; bool (True takes part), or, of query's dtype or
            float32, added to the scores.
        t_attn_mask: the tangent of an added mask, of its shape.
        is_causal: row i sees the keys 0 to i (aligned top-left).
        scale: of the scores, 1 / sqrt(D) if None.
        enable_gqa: H / Hk query heads share a key head.
        return_stats: also return lse and mu, with which partial results over keys are merged.

    Returns:
        (out, t_out), each [B, H, M, E] of query's dtype, or of that of autocast, where it is on;
        with `return_stats` (out, t_out, lse, mu), the last two [B, H, M] float32 (float64 for
        float64) and not differentiable: the log-sum-exp of the scores (-inf in a row that sees no
        key), and the mean of the scores' tangent under the softmax. Results i over parts of the
        keys are those over all of them by

            lse = logsumexp_i lse_i     mu = sum_i w_i mu_i
            w_i = exp(lse_i - lse), or 0 where lse_i is -inf
            out = sum_i w_i out_i       t_out = sum_i w_i (t_out_i + (mu_i - mu) out_i)

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: a dual tensor (its tangent would be lost), or a forced backend that
            does not take these inputs.

    Source: Lu & Song, arXiv 2410.11081, on JVP of flash attention; the formula is in
        `attention/reference.py`.
    """
    _checks.flag("return_stats", return_stats)
    tensors = (query, key, value, t_query, t_key, t_value, attn_mask, t_attn_mask)
    out, t_out, lse, mu, _ = _attention(
        autocast(tensors), is_causal, scale, enable_gqa, tangent_grad=True
    )
    return (out, t_out, lse, mu) if return_stats else (out, t_out)


# --- dual tensors ---------------------------------------------------------------------------------


def _inside_level():
    """Tell autograd that the tangents are those of an open `forward_ad.dual_level`, if they are."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None:
        return nullcontext()
    return _dual_level()


@contextmanager
def _dual_level():
    token = library.dual_level.set(forward_ad.make_dual(torch.zeros(()), torch.ones(())))
    try:
        yield
    finally:
        library.dual_level.reset(token)


# --- arguments ------------------------------------------------------------------------------------


def _attention(tensors, is_causal, scale, enable_gqa, tangent_grad) -> tuple[Tensor, ...]:
    """Check, bring to four dimensions, call the op, and undo; or go where such a call went."""
    kind = _backends.kind_of_call(tensors, (is_causal, scale, enable_gqa, tangent_grad))
    call = None if kind is None else _calls[kind]
    if call is not None:
        return call(tensors)
    _check(tensors, is_causal, scale, enable_gqa)
    lead, rank = _lead(tensors), max(x.ndim for x in tensors[:3])
    q, k, v, tq, tk, tv = _four_dimensions(tensors[:6], lead, enable_gqa)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    full = (*lead, *shape[1:]) if rank > 2 else shape[2:]
    mask, tmask = (
        _four_dimensional_mask(name, x, q.dtype, lead, full)
        for name, x in zip(_TENSORS[6:], tensors[6:], strict=True)
    )
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    options = (bool(is_causal), scale, tangent_grad, _backends.requested())
    inputs = (q, k, v, tq, tk, tv, mask, tmask)
    outputs = library.attention_jvp(*inputs, *options)
    unchanged = all(x is y for x, y in zip(inputs[:6], tensors[:6], strict=True))
    viewed = mask is None or (len(lead) == 1 and mask.dtype == tensors[6].dtype)
    if kind is not None and unchanged and viewed and library.Call.takes(tensors):
        absent = 0 if mask is None else 4 - tensors[6].ndim
        _calls[kind] = library.Call(absent, *options)
    if rank == 2:
        return tuple(x.squeeze((0, 1)) for x in outputs)
    if len(lead) != 1:
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in outputs)
    return outputs


def _check(tensors, is_causal, scale, enable_gqa) -> None:
    query, key, value, _, _, _, attn_mask, t_attn_mask = tensors
    _check_options(is_causal, scale, enable_gqa)
    for name, x in zip(_TENSORS, tensors, strict=True):
        _checks.dense(name, x)
    _checks.tensor("query", query)
    _checks.like("key", key, "query", query, shape=False)
    _checks.like("value", value, "query", query, shape=False)
    for name, x in zip(_TENSORS[:3], tensors[:3], strict=True):
        if x.ndim < 2:
            raise ValueError(
                f"{name}: got {_checks.describe(x)}, expected [B, H, tokens, features], or other "
                "leading dimensions, or none"
            )
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got {_checks.describe(x)}, expected at least one feature")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: got {_checks.describe(key)}, expected query's last dimension, {query.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: got {_checks.describe(value)}, expected as many tokens as key, {key.shape[-2]}"
        )
    for i in range(3):
        if tensors[3 + i] is not None:
            _checks.like(_TENSORS[3 + i], tensors[3 + i], _TENSORS[i], tensors[i])
    _check_mask(query, attn_mask, t_attn_mask, is_causal)
    for name, x in zip(_TENSORS[:3], tensors[:3], strict=True):
        if enable_gqa and x.ndim < 3:
            raise ValueError(
                f"enable_gqa: got True for {name}, {_checks.describe(x)}, expected heads"
            )


def _check_options(is_causal, scale, enable_gqa) -> None:
    _checks.flag("is_causal", is_causal)
    _checks.flag("enable_gqa", enable_gqa)
    if isinstance(scale, Tensor):  # float(scale) would drop its gradient and its tangent
        raise TypeError(f"scale: got {_checks.describe(scale)}, expected a number; multiply query")
    if scale is not None and not isinstance(scale, (torch.SymFloat, torch.SymInt)):
        _checks.number("scale", scale)


def _check_mask(query, attn_mask, t_attn_mask, is_causal) -> None:
    if attn_mask is None:
        if t_attn_mask is not None:
            raise ValueError("t_attn_mask: got a tangent without attn_mask, expected both or None")
        return
    if is_causal:
        raise ValueError("is_causal: got True with an attn_mask, expected one of the two")
    _checks.tensor("attn_mask", attn_mask, dtypes=(torch.bool, torch.float32, query.dtype))
    if attn_mask.device != query.device:
        raise ValueError(
            f"attn_mask: got {_checks.describe(attn_mask)}, expected query's device, {query.device}"
        )
    if t_attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            raise ValueError(
                f"t_attn_mask: got {_checks.describe(t_attn_mask)}, expected None: attn_mask is "
                "bool, and has no tangent"
            )
        _checks.like("t_attn_mask", t_attn_mask, "attn_mask", attn_mask)


def _lead(tensors) -> tuple[int, ...]:
    """The leading dimensions that query, key and value have in common after broadcasting."""
    q, k, v = (x.shape[:-3] for x in tensors[:3])
    if q == k == v:
        return tuple(q)
    try:
        return tuple(torch.broadcast_shapes(q, k, v))
    except RuntimeError:
        raise ValueError(
            f"key, value: got leading dimensions {list(k)} and {list(v)}, expected ones "
            f"that broadcast with query's, {list(q)}"
        ) from None


def _four_dimensions(tensors, lead, enable_gqa) -> list[Tensor | None]:
    """q, k, v and their tangents as [B, H or Hk, tokens, features], as views where possible."""
    heads = [1 if x.ndim == 2 else x.shape[-3] for x in tensors[:3]]
    wanted = _heads(heads, enable_gqa)
    result = []
    for i, x in enumerate(tensors):
        if x is not None:
            x = x if x.ndim > 2 else x[None]
            if x.shape[:-3] != lead or x.shape[-3] != wanted[i % 3]:
                x = x.expand(*lead, wanted[i % 3], *x.shape[-2:])
            if x.ndim != 4:
                x = x[None] if x.ndim == 3 else _batch_folded(x)
        result.append(x)
    return result


def _batch_folded(x: Tensor) -> Tensor:
    """[..., H, M, X] as [B, H, M, X]; PyTorch's older vmap has no rule for `flatten`."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _heads(heads: list[int], enable_gqa: bool) -> tuple[int, int, int]:
    """The heads that query, key and value are to have: (H, Hk, Hk), H a multiple of Hk."""
    hq, hk, hv = heads
    if enable_gqa:
        if hk != hv or hq % max(hk, 1) != 0 or (hk == 0) != (hq == 0):
            raise ValueError(
                f"key, value: got {hk} and {hv} heads with enable_gqa, expected as many in both, "
                f"and a divisor of query's {hq}"
            )
        return hq, hk, hv
    h = max(heads) if min(heads) > 0 else 0
    for name, have in zip(_TENSORS[:3], heads, strict=True):
        if have not in (1, h):
            raise ValueError(
                f"{name}: got {have} heads, expected {h} or 1 (query, key and value have {hq}, "
                f"{hk} and {hv}; shared key heads need enable_gqa=True)"
            )
    return h, h, h


def _four_dimensional_mask(name, mask, dtype, lead, full) -> Tensor | None:
    """A mask with four dimensions, each of [B, H, M, N] or 1; bool, query's dtype or float32.

    It is to broadcast to `full`, what query, key and value have of [..., H, M, N].
    """
    if mask is None:
        return None
    offset = len(full) - mask.ndim
    if offset < 0 or any(m not in (1, f) for m, f in zip(mask.shape, full[offset:], strict=True)):
        raise ValueError(
            f"{name}: got {_checks.describe(mask)}, expected a shape that broadcasts "
            f"to {list(full)}"
        )
    offset += max(4 - len(full), 0)
    if offset > 0:  # an index of nothing makes an alias, which PyTorch's older vmap has no rule for
        mask = mask[(None,) * offset]
    if len(lead) > 1:
        shared = all(m == 1 for m in mask.shape[:-3])
        mask = mask.expand(*((1,) * len(lead) if shared else lead), *mask.shape[-3:])
        mask = _batch_folded(mask)
    # A float32 mask beside half inputs keeps its digits, as in PyTorch's own function.
    return mask.to(dtype) if mask.dtype == torch.float32 and dtype == torch.float64 else mask
