"""What attention and its derivatives should be: float64 `torch.func.jvp` of eager attention.

Eager attention is written out, because PyTorch's own has NaN gradients in a row that sees no key;
`test_attention_ladder.py` holds it against PyTorch's everywhere else.
"""

from __future__ import annotations

import functools
import math

import torch
from attention_cases import NAMES, Case, draw
from torch import Tensor

PRIMALS, TANGENTS = (0, 1, 2, 6), (3, 4, 5, 7)
THROUGH = {"out": (True, False), "t_out": (False, True), "both": (True, True)}


def eager(q, k, v, mask=None, *, causal=False, scale=None) -> Tensor:
    """Attention as the formula says it, in the inputs' dtype; a row without a key gives 0."""
    return probabilities(q, k, mask, causal, scale).to(q.dtype) @ for_each_head(q, v)


def for_each_head(q: Tensor, x: Tensor) -> Tensor:
    """x [B, Hk, N, X] as [B, H, N, X]."""
    return x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), dim=1)


def probabilities(q, k, mask, causal, scale) -> Tensor:
    """P [B, H, M, N]."""
    k = for_each_head(q, k)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~below, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


def eager_jvp(case: Case, inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """(out, t_out) by `torch.func.jvp` of `eager`, in the inputs' dtype."""
    values = [inputs[name] for name in NAMES]
    moving = [i for i in PRIMALS if values[i] is not None and values[i].dtype != torch.bool]
    primals = [values[i].contiguous() for i in moving]  # a dual tensor may not be expanded
    tangents = [values[TANGENTS[PRIMALS.index(i)]] for i in moving]
    tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]  # noqa: B905

    def function(*primals):
        arguments = dict(zip(moving, primals, strict=True))
        q, k, v, mask = (arguments.get(i, values[i]) for i in PRIMALS)
        return eager(q, k, v, mask, causal=case.causal, scale=case.scale)

    return torch.func.jvp(function, tuple(primals), tuple(tangents))


def evaluate(function, inputs, through: str = "", *, widen: bool = False) -> dict[str, Tensor]:
    """out, t_out and, through one of `THROUGH`, the gradient of each floating input by its name."""
    leaves = {}
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            x = (x.detach().double() if widen else x.detach()).requires_grad_()
        leaves[name] = x
    outputs = function(leaves)[:2]
    results = dict(zip(("out", "t_out"), outputs, strict=True))
    if through:
        used = [results[o] for o, use in zip(results, THROUGH[through], strict=True) if use]
        floats = {k: x for k, x in leaves.items() if x is not None and x.requires_grad}
        seeds = [cotangent(x, i) for i, x in enumerate(used)]
        gradients = torch.autograd.grad(used, [*floats.values()], seeds, materialize_grads=True)
        results |= {f"d_{name}": g for name, g in zip(floats, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def cotangent(x: Tensor, seed: int) -> Tensor:
    """A cotangent for an output, the same values in every dtype (they are bfloat16's)."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=gen).bfloat16().to(x.device, x.dtype)


@functools.lru_cache(maxsize=1024)
def expected(case: Case, through: str = "") -> dict[str, tuple[Tensor, Tensor, float]]:
    """(truth, eager in the dtype, magnitude of the summed terms) of each result of `evaluate`."""
    inputs = draw(case)
    run = functools.partial(eager_jvp, case)
    truth = evaluate(run, inputs, through, widen=True)
    lo = evaluate(run, inputs, through)
    sizes = _magnitudes(case, inputs, truth, through)
    return {
        name: (x, lo[name], max(sizes[name], float(x.abs().max()) if x.numel() else 0.0))
        for name, x in truth.items()
    }


def _magnitudes(case: Case, inputs, truth, through: str) -> dict[str, float]:
    """The size of the terms that are summed into each result: the formulas of their absolutes."""
    values = [None if x is None else x.detach().double() for x in map(inputs.get, NAMES)]
    mask = inputs["attn_mask"]
    q, k, v = values[:3]
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in zip(values, values[3:6]))  # noqa: B905
    scale = 1 / math.sqrt(case.d) if case.scale is None else case.scale
    keys = functools.partial(for_each_head, q)
    p = probabilities(q, k, mask, case.causal, scale)
    t = scale * (tq @ keys(k).mT + q @ keys(tk).mT)
    t = (t if values[7] is None else t + values[7]).abs()
    t = t + (p * t).sum(-1, keepdim=True)  # |T| + |mu|
    do, dto = (
        cotangent(truth["out"], sum(THROUGH[through][:i]) if through else 0) * use
        for i, use in enumerate(THROUGH.get(through, (0, 0)))
    )
    out, t_out = truth["out"].abs(), truth["t_out"].abs()
    q, k, v, tq, tk, tv, do, dto = (x.abs() for x in (q, k, v, tq, tk, tv, do, dto))
    b = dto @ keys(v).mT
    a = do @ keys(v).mT + dto @ keys(tv).mT
    beta = (dto * out).sum(-1, keepdim=True)
    delta = (do * out + dto * t_out).sum(-1, keepdim=True)
    g_t = p * (b + beta)
    g_s = p * (a + b * t + beta * t + delta)
    sums = {
        "out": p @ keys(v),
        "t_out": (p * t) @ keys(v) + p @ keys(tv),
        "d_query": scale * (g_s @ keys(k) + g_t @ keys(tk)),
        "d_key": scale * (g_s.mT @ q + g_t.mT @ tq),
        "d_value": p.mT @ do + (p * t).mT @ dto,
        "d_t_query": scale * g_t @ keys(k),
        "d_t_key": scale * g_t.mT @ q,
        "d_t_value": p.mT @ dto,
        "d_attn_mask": g_s,
        "d_t_attn_mask": g_t,
    }
    return {name: _largest(sums[name], x) for name, x in truth.items()}


def _largest(terms: Tensor, like: Tensor) -> float:
    """The largest sum of terms in an element of a result, which may share heads or broadcast."""
    if like.numel() == 0:
        return 0.0
    if like.ndim == 4 and terms.shape[1] % like.shape[1] == 0 and like.shape[1] != 1:
        terms = terms.unflatten(1, (like.shape[1], -1)).sum(2)
    return float(terms.abs().sum_to_size(like.shape).max())
