"""The ops behind `op.py`: schema, kernel, fake, autograd and vmap.

    tangent_loss       the loss of each sample, and what its gradient takes
    tangent_gradient   that gradient, in F and in w, a constant
    tangent_normalize  s g, a constant
    tangent_distance   q = ||F - F^- - G||^2 with a known value; its gradient is `tangent_apply`
    tangent_apply      G, linear in the coefficients; F, V, X and J are constants

The last two are for derivatives beyond the first, and for those of w in forward mode. F, V, X, J
are [B, D], the coefficients of G [B, 4]; symbols and derivation in `reference.py`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from scm_kernels import _backends, _checks, _library, _plans
from scm_kernels.tangent.problem import Apply, Gradient, Loss, Normalize, check

_INPUTS = "Tensor f, Tensor v, Tensor x, Tensor j"
_TIMES = "Tensor t, Tensor? warmup"
_OPTIONS = "float r, float sigma_data, float c, str preset, bool zero, str backend"
_INSTEAD = (
    "normalized_tangent is a constant, and consistency_loss has derivatives in output in reverse "
    "mode alone, and in log_weight in both."
)


def _rows(x: Tensor) -> Tensor:
    """x [B, D] with a contiguous last dimension, which every backend may rely on."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _vmap(op):
    """The batching rule that all ops share: a vmapped dimension is folded into B."""

    def rule(info, in_dims, *args):
        def batch_first(x, dim):
            if not isinstance(x, Tensor):
                return x
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        batched = list(map(batch_first, args, in_dims))
        out = op(*(x.flatten(0, 1) if isinstance(x, Tensor) else x for x in batched))
        sizes = batched[0].shape[:2]
        if isinstance(out, Tensor):
            return out.unflatten(0, sizes), 0
        return tuple(x.unflatten(0, sizes) for x in out), (0,) * len(out)

    return rule


def _define(schema, kernel, fake, autograd=None):
    """An op; without an autograd of its own its result is a constant."""
    name = schema.partition("(")[0]

    def constant(*args):
        _library.refuse_duals(name, _INSTEAD, (x for x in args if isinstance(x, Tensor)))
        return op.below(*args)

    op = _library.define(
        schema,
        check=check,
        kernel=kernel,
        fake=fake,
        autograd=autograd or constant,
        vmap=_vmap(lambda *args: op.dispatched(*args)),
    )
    return op


# --- tangent_loss ---------------------------------------------------------------------------------


def _fake_loss(f, v, x, j, t, warmup, log_weight, *options):
    batch, wide = f.shape[0], _checks.wide_dtype(f)
    losses = f.new_empty(batch, dtype=torch.promote_types(f.dtype, torch.float32))
    return losses, *(f.new_empty(shape, dtype=wide) for shape in ((batch, 4), (batch,), (batch,)))


def _loss(f, v, x, j, *numbers_and_options):
    *numbers_and_options, backend = numbers_and_options
    outputs = _fake_loss(f, v, x, j, *numbers_and_options)
    t, warmup, log_weight, r, *options = numbers_and_options
    if f.numel() > 0:
        numbers = t, warmup, log_weight, _plans.Number(r)
        problem = Loss(*map(_rows, (f, v, x, j)), *numbers, *options, *outputs)
        _backends.run("tangent", "loss", problem, backend)
    return outputs


class Call:
    """Calls of a public function of one kind, which are `plain`, outside of autocast and dual
    levels, and have been checked: what depends on the kind alone is decided at the first one.
    """

    def __init__(self, shape: torch.Size, *options):
        self.shape = None if len(shape) == 2 else (shape[0], shape[1:].numel())
        *self.options, self.backend = options  # sigma_data, c, preset, zero
        self.plan: Callable[[Loss | Normalize], None] | None = None
        self.patterns: list[Tensor] = []  # of a loss's outputs

    def normalize(self, f, v, x, j, t, warmup, r: float) -> Tensor:
        """s g, in the shape of f; contiguous, as all inputs are."""
        with _library.below_autograd():
            out = torch.empty_like(f)
            numbers = t, warmup, _plans.Number(r)
            problem = Normalize(*self.rows(f, v, x, j), *numbers, *self.options, *self.rows(out))
            self.run("normalize", problem)
        return out

    def loss(self, f, v, x, j, t, warmup, log_weight, r: float) -> Tensor:
        """The loss of each sample."""
        args = *self.rows(f, v, x, j), t, warmup, log_weight, r
        if _library.differentiable((f, log_weight)):
            return _Loss.apply(*args, *self.options, self.backend, self)[0]  # no transform is about
        with _library.below_autograd():
            return self.losses(*args)[0]

    def losses(self, f, v, x, j, t, warmup, log_weight, r: float) -> list[Tensor]:
        """What `tangent_loss` returns."""
        if self.plan is None:
            outputs = _fake_loss(f, v, x, j, t, warmup, log_weight)
            self.patterns = [_plans.pattern(x) for x in outputs]
        outputs = [torch.empty_like(x) for x in self.patterns]
        numbers = t, warmup, log_weight, _plans.Number(r)
        self.run("loss", Loss(f, v, x, j, *numbers, *self.options, *outputs))
        return outputs

    def rows(self, *tensors: Tensor) -> Iterable[Tensor]:
        """[B, ...] as [B, D]."""
        return tensors if self.shape is None else [x.view(self.shape) for x in tensors]

    def run(self, step: str, problem: Loss | Normalize) -> None:
        if self.plan is None:
            self.plan = _backends.plan("tangent", step, problem, self.backend)
        self.plan(problem)


class _Loss(_library.Function):
    """The losses, with gradients in f and in log_weight; the other outputs are constants."""

    @staticmethod
    def forward(ctx, f, v, x, j, t, warmup, log_weight, *options):
        *options, call = options
        if call is None:
            losses, *rest = tangent_loss.inside(f, v, x, j, t, warmup, log_weight, *options)
        else:
            losses, *rest = call.losses(f, v, x, j, t, warmup, log_weight, options[0])
        # log_weight's own gradient reads no elements; f's may be asked for at an outer level.
        nested = torch._C._functorch.peek_interpreter_stack() is not None
        rows = (f, v, x, j) if ctx.needs_input_grad[0] or nested else (None,) * 4
        ctx.save_for_backward(*rows, *rest, log_weight)
        ctx.mark_non_differentiable(*rest)
        ctx.backend = options[-1]
        return losses, *rest

    @staticmethod
    def backward(ctx, dlosses, *_):
        *given, log_weight = ctx.saved_tensors
        if given[0] is None or torch.is_grad_enabled():  # a second derivative may follow
            df, dw = _differentiable_gradient(*given, log_weight, dlosses, ctx.backend)
        else:
            df, dw = tangent_gradient(*given, log_weight, dlosses, ctx.backend)
        dw = None if log_weight is None else dw
        return df, *(None,) * 5, dw, *(None,) * 7


def _differentiable_gradient(
    f, v, x, j, coefficients, distances, weights, log_weight, dlosses, backend
):
    """`tangent_gradient` with derivatives of its own, in f, in log_weight and in dlosses; without
    f, that in log_weight alone.
    """
    # What a sample that is left out has for dlosses and log_weight is in no derivative.
    left_out, rates, w = weights == 0, weights, log_weight
    dlosses = dlosses.masked_fill(left_out, 0.0)
    if w is not None:
        rates = rates * w.to(rates.dtype).masked_fill(left_out, 0.0).exp()
    df = None if f is None else _pull(f, v, x, j, coefficients, dlosses * rates, backend)
    if w is None:
        return df, None
    q = distances if f is None else tangent_distance(f, v, x, j, coefficients, distances, backend)
    dw = (dlosses * (rates * q - 1)).masked_fill(left_out, 0.0)
    return df, dw.to(w.dtype)


def _autograd_loss(*args):
    _library.refuse_duals("tangent_loss", _INSTEAD, args[:7])
    if _library.differentiable((args[0], args[6])):
        return _library.apply(_Loss, *args, None)
    return tangent_loss.below(*args)


# --- tangent_gradient -----------------------------------------------------------------------------


def _fake_gradient(f, v, x, j, coefficients, distances, weights, log_weight, dlosses, backend):
    dtype = dlosses.dtype if log_weight is None else log_weight.dtype
    return f.new_empty(f.shape), f.new_empty(f.shape[0], dtype=dtype)


def _gradient(f, v, x, j, coefficients, distances, weights, log_weight, dlosses, backend):
    numbers = coefficients.contiguous(), distances.contiguous(), weights.contiguous()
    numbers = *numbers, log_weight, dlosses
    outputs = _fake_gradient(f, v, x, j, *numbers, backend)
    if f.numel() > 0:
        problem = Gradient(*map(_rows, (f, v, x, j)), *numbers, *outputs)
        _backends.run("tangent", "gradient", problem, backend)
    return outputs


# --- tangent_normalize ----------------------------------------------------------------------------


def _fake_normalize(f, *rest):
    return f.new_empty(f.shape)


def _normalize(f, v, x, j, t, warmup, r, *options_and_backend):
    *options, backend = options_and_backend
    out = f.new_empty(f.shape)
    if f.numel() > 0:
        numbers = t, warmup, _plans.Number(r)
        problem = Normalize(*map(_rows, (f, v, x, j)), *numbers, *options, out)
        _backends.run("tangent", "normalize", problem, backend)
    return out


# --- tangent_distance -----------------------------------------------------------------------------


def _fake_distance(f, v, x, j, coefficients, distances, backend):
    return torch.empty_like(distances)


def _distance(f, v, x, j, coefficients, distances, backend):
    return distances.clone()


class _Distance(_library.Function):
    """q = ||F - F^- - G||^2, whose value, `distances`, is known. Gradients reach f alone."""

    @staticmethod
    def forward(ctx, f, v, x, j, coefficients, distances, backend):
        ctx.save_for_backward(f, v, x, j, coefficients)
        ctx.backend = backend
        return tangent_distance.inside(f, v, x, j, coefficients, distances, backend)

    @staticmethod
    def backward(ctx, dq):
        return _pull(*ctx.saved_tensors, dq, ctx.backend), *(None,) * 6


def _pull(f, v, x, j, coefficients, dq, backend):
    """dq [B] pulled back to f: 2 dq (F - F^- - G)."""
    # A sample that is left out: it and its dq may be NaN, and no derivative is to see that.
    left_out = coefficients.eq(0).all(1, keepdim=True)
    dq = (2 * dq.unsqueeze(1)).masked_fill(left_out, 0.0)
    df = tangent_apply(f, v, x, j, -dq * coefficients, backend)
    if torch.is_grad_enabled():
        # A second derivative may follow: F - F^- is zero in value only.
        zero = (f - f.detach()).masked_fill(left_out, 0.0)
        # In float32 at least: an infinite dq would make NaN of a float16 zero.
        wide = torch.promote_types(f.dtype, torch.float32)
        df = df + (dq.to(wide) * zero).to(df.dtype)
    return df


def _autograd_distance(*args):
    *tensors, _backend = args
    _library.refuse_duals("tangent_distance", _INSTEAD, tensors)
    if _library.differentiable(tensors[:1]):
        return _library.apply(_Distance, *args)
    return tangent_distance.below(*args)


# --- tangent_apply --------------------------------------------------------------------------------


def _fake_apply(f, v, x, j, coefficients, backend):
    return f.new_empty(f.shape)


def _apply(f, v, x, j, coefficients, backend):
    out = f.new_empty(f.shape)
    if f.numel() > 0:
        problem = Apply(*map(_rows, (f, v, x, j)), coefficients.contiguous(), out)
        _backends.run("tangent", "apply", problem, backend)
    return out


class _Apply(_library.Function):
    """Linear in the coefficients; only a double backward comes here."""

    @staticmethod
    def forward(ctx, f, v, x, j, coefficients, backend):
        ctx.save_for_backward(f, v, x, j)
        ctx.scalar_dtype = coefficients.dtype
        return tangent_apply.inside(f, v, x, j, coefficients, backend)

    @staticmethod
    def backward(ctx, dout):
        dout = dout.to(ctx.scalar_dtype)
        rates = torch.stack([(dout * x.detach()).sum(1) for x in ctx.saved_tensors], dim=1)
        return None, None, None, None, rates, None


def _autograd_apply(*args):
    *tensors, _backend = args
    _library.refuse_duals("tangent_apply", _INSTEAD, tensors)
    if _library.differentiable(tensors[4:]):
        return _library.apply(_Apply, *args)
    return tangent_apply.below(*args)


tangent_loss = _define(
    f"tangent_loss({_INPUTS}, {_TIMES}, Tensor? log_weight, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _fake_loss,
    _autograd_loss,
)
tangent_gradient = _define(
    f"tangent_gradient({_INPUTS}, Tensor coefficients, Tensor distances, Tensor weights, "
    "Tensor? log_weight, Tensor dlosses, str backend) -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
tangent_normalize = _define(
    f"tangent_normalize({_INPUTS}, {_TIMES}, {_OPTIONS}) -> Tensor", _normalize, _fake_normalize
)
tangent_distance = _define(
    f"tangent_distance({_INPUTS}, Tensor coefficients, Tensor distances, str backend) -> Tensor",
    _distance,
    _fake_distance,
    _autograd_distance,
)
tangent_apply = _define(
    f"tangent_apply({_INPUTS}, Tensor coefficients, str backend) -> Tensor",
    _apply,
    _fake_apply,
    _autograd_apply,
)
