"""The ops behind `op.py`: schema, kernel, fake, autograd, vmap of attention and its gradient."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from scm_kernels import _backends, _library, _plans
from scm_kernels._duals import unpack
from scm_kernels.attention import flops, reference, torch_backward
from scm_kernels.attention.problem import Backward, Forward, check

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? mask, Tensor? tmask"
)
_INSTEAD = (
    "Call scm_kernels.scaled_dot_product_attention, which takes dual tensors of one level of "
    "forward-mode AD; "
    "a jvp of a jvp is not supported."
)
_PRIMALS = (0, 1, 2, 6)  # q, k, v and mask among the inputs
_ROWS = (  # of a gradient's problem
    *("q", "k", "v", "tq", "tk", "tv"),
    *("out", "t_out", "dout", "dt_out"),
)
_gradient_plans = _plans.Plans()  # of kinds whose tensors are as every backend may rely on them
_VECTORISED = (
    "scm_kernels: a gradient of attention inside of a vectorised jacobian in forward mode "
    '(torch.autograd.functional.hessian with outer_jacobian_strategy="forward-mode") is not '
    "supported; take torch.func.jacrev of a torch.func.jacfwd"
)

# A dual tensor of the plain `forward_ad.dual_level` whose tangents `op.py` passes, else None: it
# has lost its tangent once that level has ended. functorch's transforms end before a backward.
dual_level: ContextVar[Tensor | None] = ContextVar("scm_kernels_dual_level", default=None)


# --- attention_jvp: the forward


def _allocate(q, v, mask) -> tuple[Tensor | None, ...]:
    """The outputs; out lies in memory as q does ([B, M, H, D] or [B, H, M, D])."""
    (b, h, m, _), e = q.shape, v.shape[3]
    rows = (e, h * e) if q.stride(1) < q.stride(2) else (m * e, e)
    out = q.new_empty_strided((b, h, m, e), (h * m * e, *rows, 1))  # no view: it may be written to
    lse = q.new_empty(b, h, m, dtype=_stats_dtype(q))
    low = torch.empty_like(lse) if _needs_low(q, mask) else None
    return out, torch.empty_like(out), lse, torch.empty_like(lse), low


def _needs_low(q: Tensor, mask: Tensor | None) -> bool:
    """Whether P = exp(S - lse) asks for more digits of lse than float32 has: those of P in float32,
    or those of the scores that a large mask has drowned. In half types the score itself is known to
    fewer."""
    return q.dtype.itemsize >= 4 or (mask is not None and mask.dtype != torch.bool)


def _empty_forward(q, k, v, tq, tk, tv, mask, tmask, causal, scale, tangent_grad, backend):
    return _returned(_allocate(q, v, mask))


def _returned(outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """As an op returns them: an lse_low that nobody needs has no rows."""
    *others, low = outputs
    return (*others, others[2].new_empty(*others[2].shape[:2], 0) if low is None else low)


def _needed(low: Tensor | None) -> Tensor | None:
    """An lse_low that an op has returned, None if nobody needs it."""
    return None if low is None or low.shape[2] == 0 else low


def _stats_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q, k, v, tq, tk, tv, mask, tmask, causal, scale, tangent_grad, backend):
    outputs = _allocate(q, v, mask)
    if 0 not in q.shape[:3]:  # without batch, heads or rows: no backend meets an empty problem
        inputs = (_rowwise(x) for x in (q, k, v, tq, tk, tv))
        problem = Forward(*inputs, mask, tmask, causal, scale, *outputs)
        _backends.run("attention", "forward", problem, backend)
    return _returned(outputs)


def _rowwise(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension, which every backend may rely on."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Call:
    """Calls of `attention_jvp` of one kind, which are `plain` and have been checked: what depends
    on the kind alone is decided at the first one.
    """

    def __init__(self, absent: int, *options):
        self.absent = absent  # leading dimensions of a mask
        self.options = options  # what follows the tensors
        self.plan: Callable[[Forward], None] | None = None
        self.patterns: list[Tensor | None] = []  # of the outputs

    @staticmethod
    def takes(tensors) -> bool:
        """Whether there is nothing to be done before or in place of a kernel."""
        rowwise = all(_rowwise(x) is x for x in tensors[:6])
        return rowwise and 0 not in tensors[0].shape[:3]

    def __call__(self, tensors) -> Iterable[Tensor | None]:
        _library.refuse_duals("attention_jvp", _INSTEAD, tensors)
        if self.absent > 0:
            first = (None,) * self.absent
            tensors = *tensors[:6], *(x if x is None else x[first] for x in tensors[6:])
        if _library.differentiable(tensors):
            return _Attention.apply(*tensors, *self.options, self)  # no transform is about
        return self.run(tensors)

    @_library.without_autocast
    def run(self, tensors) -> list[Tensor | None]:
        """The kernel, where autograd has nothing to record."""
        causal, scale, _, backend = self.options
        if self.plan is None:
            outputs = _allocate(tensors[0], tensors[2], tensors[6])
            self.patterns = [_plans.pattern(x) for x in outputs]
        outputs = [x if x is None else torch.empty_like(x) for x in self.patterns]
        problem = Forward(*tensors, causal, scale, *outputs)
        if self.plan is None:
            self.plan = _backends.plan("attention", "forward", problem, backend)
        self.plan(problem)
        return outputs


class _Attention(_library.Function):
    """Autograd of `attention_jvp`: through out and t_out, or (tangent_grad False) out alone."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, causal, scale, tangent_grad, backend, call = args
        if call is None:
            out, t_out, lse, mu, low = attention_jvp.inside(*args[:-1])
        else:
            out, t_out, lse, mu, low = call.run(tensors)
        ctx.set_materialize_grads(False)
        constant = [lse, mu] if low is None else [lse, mu, low]
        if not any(ctx.needs_input_grad[i] for i in _PRIMALS):
            constant.append(out)  # which the tangents have no part in
        # As many as a call of a known kind: a checkpoint counts them, and computes by such a call.
        used = _needed(low)
        if tangent_grad:
            ctx.save_for_backward(*tensors, out, t_out, lse, mu, used)
        else:
            constant.append(t_out)
            q, k, v, _, _, _, mask, _ = tensors
            ctx.save_for_backward(q, k, v, None, None, None, mask, None, out, None, lse, None, used)
        ctx.mark_non_differentiable(*constant)
        ctx.options = causal, scale, backend
        ctx.level, ctx.in_older_vmap = dual_level.get(), _library.in_older_vmap.get()
        return out, t_out, lse, mu, low

    @staticmethod
    def backward(ctx, dout, dt_out, *_):
        wanted, saved = ctx.needs_input_grad[:8], ctx.saved_tensors
        if ctx.level is None or forward_ad.unpack_dual(ctx.level).tangent is None:
            return (*_gradients(saved, ctx.options, dout, dt_out, wanted), *(None,) * 5)
        if ctx.in_older_vmap:
            raise NotImplementedError(_VECTORISED)
        # A backward inside of the dual level. The gradient of (dout, O) in the inputs has a
        # tangent: the gradient of (dout, tO), as tO is the tangent of O, and of (tdout, O).
        (dout, tdout), (dt_out, tdt_out) = map(unpack, (dout, dt_out))
        if tdt_out is not None:
            raise NotImplementedError(_INSTEAD)
        gradients = _gradients(saved, ctx.options, dout, dt_out, wanted)
        primals = [want and i in _PRIMALS for i, want in enumerate(wanted)]
        tangents = _gradients(saved, ctx.options, tdout, dout, primals)
        duals = (
            x if t is None else forward_ad.make_dual(x, t)
            for x, t in zip(gradients, tangents, strict=True)
        )
        return (*duals, *(None,) * 5)


def _gradients(saved, options, dout, dt_out, wanted) -> list[Tensor | None]:
    """The gradient of each input, None where it is not wanted."""
    causal, scale, backend = options
    *tensors, out, t_out, lse, mu, low = saved
    if dout is None and dt_out is None:
        return [None] * 8
    if dt_out is None:  # the gradient through out does not see the tangents
        q, k, v, _, _, _, mask, _ = tensors
        tensors, t_out, mu = [q, k, v, None, None, None, mask, None], None, None
        wanted = [want and i in _PRIMALS for i, want in enumerate(wanted)]
    gradients = iter(
        attention_jvp_backward(
            dout, dt_out, *tensors, out, t_out, lse, mu, low, causal, scale, list(wanted), backend
        )
    )
    return [next(gradients) if want else None for want in wanted]


def _autograd_forward(*args):
    tensors = args[:8]
    _library.refuse_duals("attention_jvp", _INSTEAD, tensors)
    if _library.differentiable(tensors):
        return _library.apply(_Attention, *args, None)
    return attention_jvp.below(*args)


def _vmap_forward(info, in_dims, *args):
    """A vmapped dimension is one more batch dimension, folded into B."""
    size, (*tensors, causal, scale, tangent_grad, backend) = info.batch_size, args
    batch = _batch(tensors[0], in_dims[0])
    folded = _fold_all(tensors, in_dims, size, batch)
    outputs = torch.ops.scm_kernels.attention_jvp(*folded, causal, scale, tangent_grad, backend)
    outputs = [x.unflatten(0, (size, batch)) for x in outputs]
    if any(in_dims[i] is not None for i in _PRIMALS):
        return tuple(outputs), (0,) * 5
    # A batch of tangents alone, as of a Jacobian in forward mode: a dual tensor's primal has none.
    out, t_out, lse, mu, low = outputs
    return (out[0], t_out, lse[0], mu, low[0]), (None, 0, None, 0, None)


def _batch(q: Tensor, dim: int | None) -> int:
    """B of a q [B, H, M, D] with a vmapped dimension somewhere."""
    return q.shape[0] if dim is None else q.movedim(dim, 0).shape[1]


def _fold_all(tensors, in_dims, size: int, batch: int) -> list[Tensor | None]:
    """[B or 1, ...] with a vmapped dimension somewhere, or none, as [size * B, ...]."""
    folded = []
    for x, dim in zip(tensors, in_dims, strict=False):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.expand(size, batch, *x.shape[2:])
            if x.ndim == 5 and x.stride(2) < x.stride(3):  # a copy lies in memory as x does
                x = x.transpose(2, 3).flatten(0, 1).transpose(1, 2)
            else:
                x = x.flatten(0, 1)
        folded.append(x)
    return folded


# --- attention_jvp_backward: its gradient


def _empty_backward(dout, dt_out, *args):
    """One gradient for each wanted input, in order, and None for the others."""
    tensors, wanted = args[:8], args[15]
    return [torch.empty_like(x) if want else None for x, want in zip(tensors, wanted, strict=True)]


def _fake_backward(*args):
    return [x for x in _empty_backward(*args) if x is not None]


def _backward(dout, dt_out, *args):
    *tensors, out, t_out, lse, mu, low, causal, scale, wanted, backend = args
    gradients = _empty_backward(dout, dt_out, *args)
    if 0 in (*lse.shape, tensors[1].shape[2]):  # rows or keys
        return [x.zero_() for x in gradients if x is not None]
    given = *tensors, causal, scale, out, t_out, lse, mu, _needed(low), dout, dt_out
    kind = *wanted, _backends.setting(backend), *_plans.kind(given)
    plan, problem = _gradient_plans[kind], Backward(*given, *gradients)
    if plan is None:
        problem = _prepared(problem)
        plan = _backends.plan("attention", "backward", problem, backend, torch_backward)
        if all(x is y for x, y in zip(given, problem, strict=False)):
            _gradient_plans[kind] = plan
    plan(problem)
    if problem.k.shape[2] == 1:  # a softmax of one key does not vary: this is what rounding left
        for x in (problem.dq, problem.dk, problem.dtq, problem.dtk, problem.dmask, problem.dtmask):
            if x is not None:
                x.mul_(0.0)
    return [x for x in gradients if x is not None]


def _prepared(p: Backward) -> Backward:
    """The problem with rows as every backend may rely on them."""
    rows = {name: _rowwise(getattr(p, name)) for name in _ROWS}
    stats = ((name, getattr(p, name)) for name in ("lse", "mu", "lse_low"))  # which vmap expands
    return p._replace(**rows, **{name: None if x is None else x.contiguous() for name, x in stats})


class _AttentionBackward(_library.Function):
    """Double backward: the closed formula, differentiated by PyTorch, in O(M N) memory."""

    @staticmethod
    def forward(ctx, *args):
        dout, dt_out, *tensors = args[:10]
        causal, scale, wanted, _ = args[15:]
        gradients = attention_jvp_backward.inside(*args)
        ctx.save_for_backward(dout, dt_out, *tensors)
        ctx.options = causal, scale, wanted
        return tuple(gradients)

    @staticmethod
    @_library.without_autocast
    def backward(ctx, *cotangents):
        causal, scale, wanted = ctx.options
        saved = list(ctx.saved_tensors)
        moving = [i for i, x in enumerate(saved) if x is not None and x.is_floating_point()]
        wide = _stats_dtype(cotangents[0])

        def gradient(*values):
            for i, value in zip(moving, values, strict=True):
                saved[i] = value
            return _dense_gradient(saved[:2], saved[2:], causal, scale, wanted)

        # Not a vjp: in what the gradient does not depend on, that fails inside of other transforms.
        # And not in half types, where a fake product has other strides than a real one.
        def paired(*values):
            pairs = zip(gradient(*values), cotangents, strict=True)
            return sum((x.to(wide) * c.to(wide)).sum() for x, c in pairs)

        gradients = [None] * len(saved)
        every = torch.func.grad(paired, argnums=tuple(range(len(moving))))
        for i, value in zip(moving, every(*(saved[i] for i in moving)), strict=True):
            gradients[i] = value
        return (*gradients, *(None,) * 9)


def _dense_gradient(cotangents, tensors, causal, scale, wanted) -> tuple[Tensor, ...]:
    """The wanted gradients of (out, t_out), themselves differentiable."""
    wide = _stats_dtype(tensors[0])
    cotangents = [None if x is None else x.to(wide) for x in cotangents]
    used = [i for i, want in enumerate(wanted) if want]

    def outputs(*values):
        inputs = list(tensors)
        for i, value in zip(used, values, strict=True):
            inputs[i] = value
        inputs = [x.to(wide) if x is not None and x.is_floating_point() else x for x in inputs]
        both = reference.dense(*inputs, causal=causal, scale=scale)[:2]
        return tuple(x for x, d in zip(both, cotangents, strict=True) if d is not None)

    _, pullback = torch.func.vjp(outputs, *(tensors[i] for i in used))
    return pullback(tuple(d for d in cotangents if d is not None))


def _autograd_backward(*args):
    tensors = args[:15]
    _library.refuse_duals("attention_jvp_backward", _INSTEAD, tensors)
    if _library.differentiable(tensors):
        return list(_library.apply(_AttentionBackward, *args))
    return attention_jvp_backward.below(*args)


def _vmap_backward(info, in_dims, *args):
    size, (*tensors, causal, scale, wanted, backend) = info.batch_size, args
    batch = _batch(tensors[2], in_dims[2])
    folded = _fold_all(tensors, in_dims, size, batch)
    gradients = torch.ops.scm_kernels.attention_jvp_backward(
        *folded, causal, scale, wanted, backend
    )
    inputs = [i for i, want in enumerate(wanted) if want]
    unfolded = []
    for i, x in zip(inputs, gradients, strict=True):
        x = x.unflatten(0, (size, batch))
        shared = _batch(tensors[2 + i], in_dims[2 + i]) == 1 != batch  # a mask for the whole batch
        unfolded.append(x.sum(1, keepdim=True) if shared else x)
    return unfolded, [0] * len(unfolded)


attention_jvp = _library.define(
    f"attention_jvp({_INPUTS}, bool causal, float scale, bool tangent_grad, str backend)"
    " -> (Tensor out, Tensor t_out, Tensor lse, Tensor mu, Tensor lse_low)",
    check=check,
    kernel=_forward,
    fake=_empty_forward,
    autograd=_autograd_forward,
    vmap=_vmap_forward,
    flops=flops.forward,
)
attention_jvp_backward = _library.define(
    f"attention_jvp_backward(Tensor? dout, Tensor? dt_out, {_INPUTS}, Tensor out, Tensor? t_out,"
    " Tensor lse, Tensor? mu, Tensor? lse_low, bool causal, float scale, bool[] wanted,"
    " str backend) -> Tensor[]",
    check=check,
    kernel=_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
    vmap=_vmap_backward,
    flops=flops.backward,
)
