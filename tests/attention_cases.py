"""The problems that every backend of attention runs through: `CASES`, and `draw` for their inputs.

A new backend joins by its name alone: `test_attention.py` runs all of them on whatever
`scm_kernels.backends()` calls available. The truth is in `attention_truth.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("query", "key", "value", "t_query", "t_key", "t_value", "attn_mask", "t_attn_mask")


@dataclass(frozen=True)
class Case:
    """One problem; each default is harmless, so that a case says only what it is about."""

    name: str
    dtype: torch.dtype = torch.float32
    b: int = 2
    h: int = 2
    hk: int | None = None  # key heads; None: h
    m: int = 17
    n: int = 23
    d: int = 8
    e: int | None = None  # None: d
    tangents: str = "qkv"
    causal: bool = False
    scale: float | None = None
    mask: str = ""  # a name of `_MASKS`
    mask_shape: str = "bhmn"  # 1 stands for a dimension that broadcasts
    mask_dtype: torch.dtype | None = None  # None: dtype
    t_mask: bool = False
    layout: str = "bhsd"  # a name of `LAYOUTS`
    t_layout: str | None = None  # None: layout
    logits: float = 1.0  # multiplies query
    shared: float = 0.0  # size of a component that all of t_key has in common

    def __str__(self) -> str:
        return self.name

    def options(self) -> dict:
        """The arguments that are not tensors."""
        gqa = self.hk not in (None, self.h)
        return {"is_causal": self.causal, "scale": self.scale, "enable_gqa": gqa}


# --- layouts: the same values [B, H, S, X] at other strides, among NaN that nobody may read -------


def _bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """A slice of a packed qkv [B, S, 3, H, X]."""
    b, h, s, d = x.shape
    qkv = x.new_full((b, s, 3, h, d), math.nan)
    qkv[:, :, 1] = x.transpose(1, 2)
    return qkv[:, :, 1].transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """A slice of a tensor with more features: rows start at odd addresses."""
    wide = x.new_full((*x.shape[:3], x.shape[3] + 5), math.nan)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def _long(x: Tensor) -> Tensor:
    """A slice of a tensor with more tokens, such as a key cache."""
    long = x.new_full((*x.shape[:2], x.shape[2] + 9, x.shape[3]), math.nan)
    long[:, :, 4:-5] = x
    return long[:, :, 4:-5]


def _column(x: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    return x.mT.contiguous().mT


def _every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhsd": torch.clone,
    "bshd": _bshd,
    "packed": _packed,
    "wide": _wide,
    "long": _long,
    "column": _column,
    "every_second": _every_second,
    "expanded_b": lambda x: x[:1].clone().expand(x.shape),
    "expanded_h": lambda x: x[:, :1].clone().expand(x.shape),
    "expanded_s": lambda x: x[:, :, :1].clone().expand(x.shape),
}


def at_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x at other strides; of the memory between its rows nothing is touched."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, (*strides, 1), strict=True))
    y = torch.empty(0, dtype=x.dtype).set_(torch.UntypedStorage(2 * size))
    return y.as_strided(x.shape, (*strides, 1)).copy_(x)


# --- masks ----------------------------------------------------------------------------------------


def _bool_mask(shape, gen) -> Tensor:
    return torch.rand(shape, generator=gen) > 0.3


def _dead_rows(shape, gen) -> Tensor:
    """No key in the first and the last row; with one row for all, no key in the last sample."""
    mask = torch.rand(shape, generator=gen) > 0.3
    if shape[-2] > 1:
        mask[..., 0, :] = mask[..., -1, :] = False
    else:
        mask[-1] = False
    return mask


def _late_keys(shape, gen) -> Tensor:
    """Even rows see the second half of the keys alone: their first tile is masked entirely."""
    mask = torch.rand(shape, generator=gen) > 0.3
    mask[..., ::2, : shape[-1] // 2] = False
    return mask


def _few_keys(shape, gen) -> Tensor:
    """One key in eight: a mean over all keys is far from one over the live ones."""
    mask = torch.rand(shape, generator=gen) < 0.1
    mask[..., ::8] = True
    return mask


def _with_minus_inf(shape, gen) -> Tensor:
    dead = ~_dead_rows(shape, gen)
    return torch.randn(shape, generator=gen, dtype=torch.float64).masked_fill(dead, -math.inf)


def _padding(shape, gen) -> Tensor:
    """0 / -10000, as PixArt and SANA pass it. A row of -10000 alone costs everybody four digits
    (scores and lse are rounded at the size of 10000): a comparison would only tell who was lucky.
    """
    live = torch.rand(shape, generator=gen) > 0.4
    live[..., 0] = True
    return torch.where(live, 0.0, -10000.0).double()


def _least(shape, gen) -> Tensor:
    """The least finite number at the second half of the keys, and, in the first row, at all: what
    many models write for -inf. Scores are lost in it, so there all keys count alike.
    """
    mask = torch.zeros(shape, dtype=torch.float64)
    mask[..., shape[-1] // 2 :] = mask[..., 0, :] = torch.finfo(torch.bfloat16).min
    return mask


_MASKS = {
    "least": _least,
    "bool": _bool_mask,
    "dead": _dead_rows,
    "late": _late_keys,
    "few": _few_keys,
    "bias": lambda shape, gen: torch.randn(shape, generator=gen, dtype=torch.float64),
    "padding": _padding,
    "inf": _with_minus_inf,
}


# --- inputs ---------------------------------------------------------------------------------------


def draw(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """The tensors of a case by the names of `attention_jvp`'s arguments, rounded to its dtype."""
    gen = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    hk, e = case.hk or case.h, case.e or case.d
    shapes = [(case.b, case.h, case.m, case.d), (case.b, hk, case.n, case.d)]
    shapes.append((case.b, hk, case.n, e))
    values = [torch.randn(s, generator=gen, dtype=torch.float64) for s in (*shapes, *shapes)]
    values[0] *= case.logits
    values[4] += case.shared * torch.randn(1, hk, 1, case.d, generator=gen, dtype=torch.float64)
    layouts = [case.layout] * 3 + [case.t_layout or case.layout] * 3
    inputs = {
        name: LAYOUTS[layout](x.to(device, case.dtype))
        for name, x, layout in zip(NAMES, values, layouts, strict=False)
    }
    for letter, name in zip("qkv", NAMES[3:6], strict=True):
        if letter not in case.tangents:
            inputs[name] = None
    return inputs | _draw_masks(case, gen, device)


def _draw_masks(case: Case, gen, device) -> dict[str, Tensor | None]:
    if not case.mask:
        return {"attn_mask": None, "t_attn_mask": None}
    sizes = {"b": case.b, "h": case.h, "m": case.m, "n": case.n, "1": 1}
    shape = tuple(sizes[letter] for letter in case.mask_shape)
    mask, t_mask = _MASKS[case.mask](shape, gen), None
    if mask.dtype != torch.bool:
        mask = mask.to(case.mask_dtype or case.dtype)
    if case.t_mask:
        t_mask = torch.randn(shape, generator=gen, dtype=torch.float64).to(device, mask.dtype)
    return {"attn_mask": mask.to(device), "t_attn_mask": t_mask}


# --- the list -------------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def _features() -> list[Case]:
    """Head dimensions that users run, with enough elements for the mean of the error budget."""
    big = {"b": 1, "h": 2, "m": 96, "n": 80}
    cases = [Case(f"d{d}", d=d, **big) for d in (64, 72, 112, 128, 256)]
    cases += [Case(f"d{d}_e{e}", d=d, e=e, **big) for d, e in ((64, 72), (8, 64), (128, 40))]
    for name, dtype in (("f16", F16), ("bf16", BF16)):
        cases += [Case(f"d{d}_{name}", dtype, d=d, **big) for d in (64, 72, 128)]
        cases.append(Case(f"causal_{name}", dtype, d=64, causal=True, **big))
        cases.append(Case(f"bias_{name}", dtype, d=64, mask="bias", t_mask=True, **big))
        cases.append(Case(f"dead_{name}", dtype, d=64, mask="dead", **big))
        cases.append(Case(f"sharp_{name}", dtype, d=64, logits=30.0, **big))
        cases.append(Case(f"shared_{name}", dtype, d=64, shared=16.0, **big))
    # 1 / sqrt(64) is exact in float32, the other is not.
    cases += [Case(f"sharp_d{d}", d=d, logits=30.0, **big) for d in (64, 72)]
    cases.append(Case("sharp_late", d=72, logits=30.0, mask="late", **big))
    cases.append(Case("shared", d=64, shared=16.0, **big))
    cases.append(Case("shared_causal", d=64, shared=16.0, causal=True, **big))
    cases.append(Case("shared_late", d=64, shared=16.0, mask="late", **big))
    cases.append(Case("shared_sharp", d=72, shared=16.0, logits=30.0, **big))
    return cases


def _shapes() -> list[Case]:
    sizes = [(1, 1), (1, 2), (2, 1), (1, 129), (129, 1), (3, 5), (31, 33), (65, 64), (127, 3)]
    cases = [Case(f"m{m}_n{n}", m=m, n=n) for m, n in sizes]
    cases += [Case(f"m{m}_n{n}_causal", m=m, n=n, causal=True) for m, n in sizes]
    cases += [Case("d1", d=1), Case("d1_e1_n1", d=1, e=1, n=1), Case("d3_e5", d=3, e=5)]
    cases += [Case("b1_h1", b=1, h=1), Case("h5", h=5, b=3)]
    cases += [
        Case("gqa", h=6, hk=2),
        Case("mqa", h=4, hk=1),
        Case("gqa_causal", h=4, hk=2, causal=True),
    ]
    cases += [Case("gqa_bias", h=6, hk=3, mask="bias", t_mask=True), Case("gqa_m1", h=4, hk=2, m=1)]
    cases += [Case("no_batch", b=0), Case("no_heads", h=0), Case("no_batch_mask", b=0, mask="bias")]
    cases += [
        Case("scale", scale=0.7),
        Case("scale_0", scale=0.0),
        Case("scale_negative", scale=-2.0),
    ]
    cases += [Case(f"float64_{n}", F64, n=n, causal=n == 40) for n in (1, 23, 40)]
    return cases


def _masks() -> list[Case]:
    shapes = (
        "bhmn",
        "b11n",
        "bh1n",
        "mn",
        "b1mn",
        "1hmn",
        "11mn",
        "1h1n",
        "bhm1",
        "1n",
        "n",
        "1111",
    )
    cases = [Case(f"bool_{s}", mask="bool", mask_shape=s) for s in shapes]
    cases += [Case(f"bias_{s}", mask="bias", mask_shape=s, t_mask=True) for s in shapes]
    cases += [
        Case(f"{kind}_{s}", mask=kind, mask_shape=s)
        for kind in ("dead", "inf", "padding")
        for s in ("bhmn", "b11n", "b1mn")
    ]
    cases += [Case(f"{kind}_tangent", mask=kind, t_mask=True) for kind in ("inf", "padding")]
    cases += [Case("dead_gqa", mask="dead", h=4, hk=2), Case("late", mask="late", m=40, n=90)]
    cases.append(Case("mask_tangent_alone", mask="bias", t_mask=True, tangents=""))
    for name, dtype in (("f16", F16), ("bf16", BF16)):
        cases.append(Case(f"float32_bias_{name}", dtype, mask="bias", mask_dtype=F32, t_mask=True))
        cases.append(Case(f"padding_{name}", dtype, mask="padding", mask_shape="b11n"))
        cases.append(Case(f"inf_{name}", dtype, mask="inf", mask_shape="b1mn"))
    cases.append(Case("float32_bias_f64", F64, mask="bias", mask_dtype=F32, t_mask=True))
    cases.append(Case("dead_f64", F64, mask="dead"))
    return cases


def _strides() -> list[Case]:
    cases = [Case(f"layout_{name}", layout=name) for name in LAYOUTS]
    cases += [Case(f"tangent_{name}", t_layout=name) for name in LAYOUTS if name != "bhsd"]
    cases += [Case("layout_bshd_tangent_wide", layout="bshd", t_layout="wide")]
    cases += [
        Case("packed_bf16", BF16, layout="packed"),
        Case("packed_gqa", h=4, hk=2, layout="packed"),
    ]
    cases += [Case("bshd_m1", layout="bshd", m=1), Case("bshd_h1", layout="bshd", h=1)]
    return cases


def _tangents() -> list[Case]:
    parts = ("", "q", "k", "v", "qk", "qv", "kv")
    cases = [Case(f"tangents_{t or 'none'}", tangents=t) for t in parts]
    return cases + [Case(f"tangents_{t}_causal", tangents=t, causal=True) for t in ("q", "v")]


CASES = [*_features(), *_shapes(), *_masks(), *_strides(), *_tangents()]
