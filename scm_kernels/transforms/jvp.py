"""`torch.func.jvp` of a whole network through this package's paths."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scm_kernels import _checks
from scm_kernels._checkpoint import inside_of_a_jvp
from scm_kernels._duals import current_level, level_is_open
from scm_kernels.transforms.fused import Fused


def jvp(
    func: Callable,
    primals: tuple,
    tangents: tuple,
    *,
    has_aux: bool = False,
    tangent_grad: bool = False,
) -> tuple:
    """The output of a network and its directional derivative, in one pass.

    The contract of `torch.func.jvp`. Inside, attention, linear layers, convolutions, matrix
    products, norms and arithmetic on dual tensors take this package's paths, of an unmodified
    model. `out` keeps its autograd graph, so that the network's parameters get gradients through
    it. With `tangent_grad` False no graph and no saved activation is kept for `t_out`: one pass
    serves both the target of a consistency model and the gradient, in the memory of an ordinary
    forward. Activation checkpoints inside (`torch.utils.checkpoint`, non-reentrant) work then, and
    compute the primals again. Their backward raises PyTorch's `CheckpointError` with
    `tangent_grad` True, where a checkpoint belongs around the jvp, and around an
    `autograd.Function` or a custom op of one's own, a `torch.func.vmap`, a recurrent network, or
    random numbers other than those of dropout. A hook of a tensor is one of its primal's gradient;
    no tensor inside says that it `requires_grad`. A checkpoint around the jvp, all of it under
    `torch.compile(fullgraph=True)`, wants
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`. PyTorch's forward
    mode is for one thread of a process.

    Args:
        func: takes `len(primals)` arguments and returns a tensor or a pytree of tensors (with
            `has_aux` a pair of two of those).
        primals: tuple of tensors, or pytrees of tensors, of a floating dtype, at which to evaluate.
        tangents: the direction, of the structure of `primals`, each tensor of its primal's shape,
            dtype and device.
        has_aux: `func` returns (out, aux), and aux comes back as the third value.
        tangent_grad: keep the graph of `t_out` too, for losses that differentiate through it.

    Returns:
        (out, t_out), or (out, t_out, aux) with `has_aux`; t_out has the structure of out.

    Raises:
        TypeError, ValueError: primals or tangents do not fit, or func returns something other than
            tensors; the message names the one.
        NotImplementedError: an op inside would lose its tangent (a custom op without a rule, a jvp
            of a jvp), attention has no such derivative (a jvp of a vmap or of a grad), a module has
            backward hooks, which PyTorch would leave out, or a selective checkpoint would see what
            it cannot compute again.

    Source: Lu & Song, arXiv 2410.11081, section 4 (the tangent of a consistency model is one JVP).
    """
    if not callable(func):
        raise TypeError(f"func: got {_checks.describe(func)}, expected a callable")
    _checks.flag("has_aux", has_aux)
    _checks.flag("tangent_grad", tangent_grad)
    _check(primals, tangents)
    if not tangent_grad and level_is_open():
        raise NotImplementedError(
            "tangent_grad: got False in a jvp inside a jvp (one in another thread of this process "
            "counts, as PyTorch's forward mode is for one), expected True: the derivative of t_out "
            "would be lost. (Attention has no second derivative in forward mode; linear layers and "
            "norms do.)"
        )
    mode = Fused(forget_level=None)
    if not torch.compiler.is_compiling():
        mode.inference = torch.is_inference_mode_enabled()

    def seen_through(*args):
        if not tangent_grad:
            mode.forget_level = current_level()
        with mode:
            result = func(*args)
        _check_result(result, has_aux)
        return result

    primals, tangents = pytree.tree_map(_owned, (primals, tangents))
    if not tangent_grad:
        tangents = _detached(tangents)
    with nullcontext() if torch.compiler.is_compiling() else inside_of_a_jvp():
        out, t_out, *aux = torch.func.jvp(seen_through, primals, tangents, has_aux=has_aux)
    return (out, t_out if tangent_grad else _detached(t_out), *aux)


def _owned(x: Tensor) -> Tensor:
    """x, copied where a view of other memory would not do.

    `make_dual` rarely takes an expanded one (one time for a whole batch), and a compiled jvp fails
    in PyTorch at a view of a view.
    """
    expanded = any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))
    return x.clone() if expanded or torch.compiler.is_compiling() else x


def _detached(tree):
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _check(primals, tangents) -> None:
    for name, tree in (("primals", primals), ("tangents", tangents)):
        if not isinstance(tree, tuple) or not tree:
            raise TypeError(
                f"{name}: got {_checks.describe(tree)}, expected a tuple, one entry for each "
                "argument of func"
            )
    flat, spec = pytree.tree_flatten(primals)
    flat_tangents, tangent_spec = pytree.tree_flatten(tangents)
    if spec != tangent_spec:
        raise ValueError(
            f"tangents: got the structure {tangent_spec}, expected that of primals, {spec}"
        )
    for i, (primal, tangent) in enumerate(zip(flat, flat_tangents, strict=True)):
        _checks.dense(f"primals[{i}]", primal)
        _checks.dense(f"tangents[{i}]", tangent)
        _checks.tensor(f"primals[{i}]", primal)
        _checks.like(f"tangents[{i}]", tangent, f"primals[{i}]", primal)


def _check_result(result, has_aux: bool) -> None:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"func: returned {_checks.describe(result)}, expected a pair (out, aux), as has_aux is "
            "True"
        )
    parts = {"out": result[0], "aux": result[1]} if has_aux else {"out": result}
    for name, part in parts.items():
        leaves = pytree.tree_leaves(part)
        for x in leaves:
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"func: returned {type(x).__qualname__} in {name}, expected a tensor or a "
                    "pytree of tensors alone"
                )
        if not leaves and name == "out":
            raise TypeError("func: returned no tensor, expected one or a pytree of some")
