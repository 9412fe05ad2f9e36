"""Attention's CUDA kernels, as the native module holds them: values in a simulator of PTX, with its
checks of memory, races, initialisation and asynchronous copies; registers and spills of the machine
code; and bugs planted into the PTX, which those checks have to see.
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import test_attention as shared
import torch
from attention_cases import CASES, Case, draw

import scm_kernels
from benchmarks import offline_cuda, tools
from scm_kernels import _cuda, attention_jvp
from scm_kernels.attention.cuda import FEATURES

slow, ptx = pytest.mark.slow, pytest.mark.ptx
BF16, F16 = torch.bfloat16, torch.float16
DTYPES = {"bf16": BF16, "f16": F16}
LONG = {"b": 1, "h": 2, "m": 70, "n": 131}  # two blocks of rows; whole tiles of keys, and a rest
# The tangents there are, in kernels' names.
SETS = {x: x or "none" for x in ("qkv", "qk", "qv", "kv", "q", "k", "v", "")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cases(lengths):
    """Every kernel, causal or not in turns."""
    for d in FEATURES:
        for name, dtype in DTYPES.items():
            for i, (tangents, which) in enumerate(SETS.items()):
                for j, (m, n) in enumerate(lengths):
                    causal = (i + j) % 2 == 1
                    label = f"cuda_d{d}_{name}_{which}_{m}x{n}{'_causal' * causal}"
                    shape = {"b": 1, "h": 1, "m": m, "n": n, "d": d}
                    if n == 200:  # shared heads, at other strides
                        shape |= {"h": 2, "hk": 1, "layout": "packed", "t_layout": "bshd"}
                    yield Case(label, dtype, tangents=tangents, causal=causal, **shape)


LENGTHS = [
    Case(f"cuda_{m}x{n}{'_causal' * causal}", BF16, b=1, h=1, m=m, n=n, d=64, causal=causal)
    for m, n in ((1, 1), (63, 65), (64, 64), (65, 63), (200, 1), (1, 200), (200, 200), (64, 32))
    for causal in (False, True)
]
SPECIAL = [
    Case("cuda_gqa", BF16, d=64, **(LONG | {"h": 4, "hk": 2})),
    Case("cuda_gqa_causal", F16, d=128, causal=True, **(LONG | {"h": 6, "hk": 1})),
    Case("cuda_batches", BF16, d=72, **(LONG | {"b": 3, "h": 3})),
    Case("cuda_bshd", BF16, d=64, layout="bshd", **LONG),
    Case("cuda_packed", BF16, d=64, layout="packed", t_layout="bshd", **LONG),
    *(Case(f"cuda_expanded_{x}", F16, d=72, layout=f"expanded_{x}", **LONG) for x in "bhs"),
    Case("cuda_t_packed", F16, d=112, t_layout="packed", **LONG),
    Case("cuda_sharp", BF16, d=64, logits=30.0, **(LONG | {"n": 300})),
    Case("cuda_sharp_f16", F16, d=128, logits=30.0, **(LONG | {"n": 300})),
    Case("cuda_sharp_causal_f16", F16, d=72, logits=30.0, causal=True, **(LONG | {"m": 200})),
    Case("cuda_flat_f16", F16, d=64, logits=1e-3, **LONG),
    Case("cuda_shared", BF16, d=64, shared=16.0, **LONG),
    Case("cuda_shared_f16", F16, d=112, shared=16.0, causal=True, **LONG),
    Case("cuda_shared_keys", BF16, d=64, tangents="kv", shared=16.0, **LONG),
    Case("cuda_negative", BF16, d=64, scale=-0.3, **LONG),
    Case("cuda_negative_causal", F16, d=128, scale=-0.3, causal=True, **LONG),
    Case("cuda_scale_zero", BF16, d=72, scale=0.0, **LONG),
    Case("cuda_scale_one", F16, d=64, scale=1.0, logits=0.1, **LONG),
    Case("cuda_scale_large", BF16, d=64, scale=3.7, logits=0.1, **LONG),
]


# The list of all backends, with features, types and strides that these kernels take.
ALIGNED = ("bhsd", "bshd", "packed", "long", "expanded_b", "expanded_h", "expanded_s")
EVERYWHERE = [
    dataclasses.replace(
        case, name=f"cuda_{case.name}", dtype=F16 if case.dtype == F16 else BF16, d=72, e=None
    )
    for case in CASES
    if not case.mask
    and case.tangents in SETS
    and case.b * case.h * case.m > 0
    and case.m * case.n <= 2**16
    and {case.layout, case.t_layout or case.layout} <= set(ALIGNED)
]


@ptx
@pytest.mark.parametrize(
    "case",
    [
        *cases([(65, 200)]),
        *(pytest.param(c, marks=slow) for c in cases([(1, 63), (63, 1), (64, 65), (200, 64)])),
        *LENGTHS,
        *SPECIAL,
        *(pytest.param(c, marks=slow) for c in EVERYWHERE),
    ],
    ids=str,
)
def test_values(cuda_launches, case):
    shared.check(shared.run("cuda", case, draw(case)), case)
    (launch,) = cuda_launches
    kind = {name for name, dtype in DTYPES.items() if dtype == case.dtype}.pop()
    assert launch.name == f"attention_forward_d{case.d}_{kind}_{SETS[case.tangents]}_kernel"
    assert launch.stats.shared_conflicts == 0, "bank conflicts"


def check_against_reference(*tensors, **options):
    """All four results, by the maximum of the error budget; `lo` is the eager maths."""
    results = attention_jvp(*tensors, **options, return_stats=True)
    wide = [None if x is None else x.double() for x in tensors]
    with scm_kernels.backend("reference"):
        truth = attention_jvp(*wide, **options, return_stats=True)
        low = attention_jvp(*tensors, **options, return_stats=True)
    eps = torch.finfo(tensors[0].dtype).eps
    for name, x, t, lo in zip(("out", "t_out", "lse", "mu"), results, truth, low, strict=True):
        allowed = 5 * (lo - t).abs().max() + 2 * eps * t.abs().max()
        assert (x - t).abs().max() <= allowed, name
        assert (x - t).abs().mean() <= 2 * (lo - t).abs().mean() + 2 * eps * t.abs().mean(), name


@ptx
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_row_whose_scores_rise_by_more_than_a_power_of_two_may(cuda_launches, dtype):
    """From tile to tile, so that the top is raised again and again; one row at a time."""
    q, k, v, tq, tk, tv = (torch.randn(1, 1, 70, 64).to(dtype) for _ in range(6))
    q[..., 0], k[0, 0, :, 0] = 8.0, torch.linspace(-60.0, 60.0, 70)
    q[0, 0, ::3, 0] = -8.0
    check_against_reference(q, k, v, tq, tk, tv)


@ptx
@pytest.mark.parametrize("rise", [0.0, 3.0, 7.5])
@pytest.mark.parametrize("size", [1.0, 5000.0, 20000.0])
def test_large_tangents_of_float16_do_not_overflow(cuda_launches, rise, size):
    """h = p (T - c) reaches as far as T does, also where scores rise by powers of two."""
    q, k, v, tq, tk, tv = (torch.zeros(1, 1, 64, 64, dtype=F16) for _ in range(6))
    q[..., 0], k[0, 0, 32:, 0] = 8.0, rise * math.log(2)
    tq[..., 1], k[..., 1] = 8.0, (torch.rand(64) * 2 - 1) * size
    check_against_reference(q, k, v.normal_(), tq, tk, tv.normal_())


@ptx
def test_small_numbers_of_float16_keep_their_digits(cuda_launches):
    """Neither the top nor the scale takes them into subnormal numbers."""
    q, k, v, tq, tk, tv = (torch.randn(1, 2, 64, 64) for _ in range(6))
    few = [x[:, :, :4].to(F16) for x in (k, v)]
    check_against_reference(q.to(F16), *few, (1e-4 * tq).to(F16), None, None)
    small = [x.to(F16) for x in (1e-3 * q, (15000 * k).clamp(-6e4, 6e4), v, 1e-3 * tq, tk, tv)]
    check_against_reference(*small, scale=1 / 256)
    n = 4097  # half of the weight on one key, before many equal ones
    q, k, v = (torch.zeros(1, 1, rows, 64) for rows in (16, n, n))
    q[..., 0], k[0, 0, 0, 0] = 8.0, (math.log2(n) + 0.7) * math.log(2)
    v = v.normal_() + 1 - 2 * (torch.arange(n) == 0)[:, None]
    tangents = (torch.randn(1, 1, rows, 64) for rows in (16, n, n))
    check_against_reference(*(x.to(F16) for x in (q, k, v, *tangents)))


@ptx
def test_large_numbers_of_bfloat16(cuda_launches):
    """Values near the end of its range, below scores that rise."""
    q, k, v, tq, tk, tv = (torch.randn(1, 1, 96, 64) for _ in range(6))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[0, 0, 32:, 0] = 8.0, 15.9 * math.log(2)
    check_against_reference(*(x.to(BF16) for x in (q, k, 1e34 * v, tq, tk, 1e34 * tv)))


@ptx
def test_scores_of_minus_infinity(cuda_launches):
    """By overflow: in the first tile of some rows, in all tiles of another."""
    q, k, v, tq, tk, tv = (torch.randn(1, 1, 96, 64).to(BF16) for _ in range(6))
    q[..., :2], k[..., :2] = 0, 0
    q[0, 0, :8, 0], k[0, 0, :32, 0] = 1e30, -1e30
    q[0, 0, 9, 1], k[..., 1] = 1e30, -1e30
    outputs = attention_jvp(q, k, v, tq, tk, tv, return_stats=True)
    with scm_kernels.backend("reference"):
        truth = attention_jvp(q, k, v, tq, tk, tv, return_stats=True)
    for x, t in zip(outputs[::2], truth[::2], strict=True):  # tangents overflow, in both
        torch.testing.assert_close(x, t, atol=0.02, rtol=0.02)


NAMES = ("q", "k", "v", "tq", "tk", "tv")


@ptx
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [64, 72])
def test_what_is_not_finite_goes_no_further_than_it_must(cuda_launches, name, bad, causal, d):
    """Not from a tangent to a primal, and not to rows that do not see it."""
    tensors = [torch.randn(1, 1, rows, d, dtype=BF16) for rows in (70, 131, 131) * 2]
    tensors[NAMES.index(name)][0, 0, 50, 3] = bad
    results = attention_jvp(*tensors, is_causal=causal, return_stats=True)
    with scm_kernels.backend("reference"):
        truth = attention_jvp(*tensors, is_causal=causal, return_stats=True)
    for what, x, t in zip(("out", "t_out", "lse", "mu"), results, truth, strict=True):
        rows, expected = ((~y.isfinite()).reshape(70, -1).any(1) for y in (x, t))
        assert not (rows & ~expected).any(), what
        assert name in ("tq", "tk", "tv") or what != "out" or (rows == expected).all()


@ptx
def test_no_keys(cuda_launches):
    q, k = torch.randn(1, 2, 5, 64, dtype=BF16), torch.randn(1, 2, 0, 64, dtype=BF16)
    out, t_out, lse, mu = attention_jvp(q, k, k, q, k, k, return_stats=True)
    assert len(cuda_launches) == 1
    assert not out.any()
    assert not t_out.any()
    assert not mu.any()
    assert (lse == -torch.inf).all()


@ptx
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (70, 1)])
def test_the_stride_of_one_row_means_nothing(cuda_launches, m, n):
    """It may be none that a copy could start at."""
    tensors = [torch.randn(1, 1, rows, 64, dtype=BF16) for rows in (m, n, n) * 2]
    odd = [x.as_strided(x.shape, (65, 65, 65, 1)) if x.shape[2] == 1 else x for x in tensors]
    check_against_reference(*odd)
    assert len(cuda_launches) == 1


@ptx
def test_addresses_beyond_31_bits(cuda_launches):
    shared.check_far_addresses("cuda")


# --- the machine code -----------------------------------------------------------------------------


def kernels():
    """The launch of every kernel of attention on an A100."""
    if not _cuda.built():
        pytest.skip("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    with offline_cuda.gpu() as launches:
        for d in FEATURES:
            for dtype in DTYPES.values():
                for tangents in SETS:
                    x = torch.zeros(1, 1, 64, d, dtype=dtype)
                    attention_jvp(x, x, x, *(x if c in tangents else None for c in "qkv"))
    return launches


def test_nothing_spills_and_two_blocks_fit_a_multiprocessor():
    """Of an A100: 65,536 registers, 164 KiB of shared memory, of which each block takes 1 more."""
    launches = kernels()
    assert len({launch.name for launch in launches}) == 80
    for launch in launches:
        usage = launch.usage
        assert launch.spilled() == 0, launch.name
        assert launch.threads == 128
        assert usage["REG"] * launch.threads * 2 <= 65536, launch.name
        assert 2 * (launch.shared + usage["SHARED"] + 1024) <= 164 * 1024, launch.name


@pytest.mark.parametrize("d", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangents", ["qkv", "q"])
def test_kernels_for_hopper(tangents, dtype, d):
    """The simulator lacks their products: what can be seen of them without a GPU is their code.
    Products run one behind the other, and are begun at four places; where ptxas cannot prove that
    their registers are left alone, it begins each anew, and waits for it."""
    kernels()  # or skip
    name = f"attention_forward_hopper_d{d}_{dtype}_{tangents}_kernel"
    launch = offline_cuda.Launch(name, 132, 384, 0, b"")
    assert launch.spilled() == 0
    # A block has these, and no more, for those that its warpgroups ask for: one 40 a thread, two
    # 232. One that asked in vain would wait for ever.
    assert 40 * 128 + 232 * 256 <= launch.usage["REG"] * launch.threads <= 65536
    code = launch.machine_code
    assert code.count("HGMMA.64x") >= 40
    assert code.count("WARPGROUP.ARRIVE") == 4


@pytest.mark.parametrize("d", FEATURES)
def test_modelled_speed_on_an_a100(d):
    """Of bfloat16 with all tangents; the model is some 10% off, and 3% is noise."""
    try:
        tools.tool("sassmodel")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    a100 = pytest.importorskip("benchmarks.a100")  # it needs Triton
    kernels()  # or skip
    (row,) = a100.table(a100.Problem("forward", BF16, d, backend="cuda"))
    assert row["TFLOP/s"] >= 215


# --- planted bugs ---------------------------------------------------------------------------------

KERNEL = re.compile(r"\.entry attention_forward_d64_bf16_qkv_kernel\(.*?\n}\n", re.DOTALL)
BARRIER, WAIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;"


def without(instruction: str, which: int) -> object:
    """The simulator's module of a kernel that lacks one of its instructions of a kind."""
    code = next(x for x in offline_cuda.ptx() if KERNEL.search(x))
    kernel = KERNEL.search(code)
    places = list(re.finditer(instruction, kernel[0]))
    assert len(places) == {BARRIER: 6, WAIT: 5}[instruction]
    start, end = (kernel.start() + at for at in places[which].span())
    return tools.tool("ptxsim").Module(code[:start] + code[end:])


# The last ones are of the loops over the tiles with bounds, under a causal mask and without; the
# latter has one tile, so nothing is left to wait for behind it.
@ptx
@pytest.mark.parametrize(
    ("instruction", "which", "causal"),
    [*((BARRIER, i, i < 5) for i in range(6)), *((WAIT, i, True) for i in range(4))],
)
def test_a_missing_barrier_or_wait_is_seen(cuda_launches, monkeypatch, instruction, which, causal):
    ptxsim, module = tools.tool("ptxsim"), without(instruction, which)
    monkeypatch.setattr(offline_cuda, "_module", lambda name: module)
    x = torch.randn(1, 1, 200, 64, dtype=BF16)
    with pytest.raises((ptxsim.RaceError, ptxsim.AsyncError)):
        attention_jvp(x, x, x, x, x, x, is_causal=causal)
