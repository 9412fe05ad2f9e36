"""Attention's Triton kernels on a machine without a GPU: run by a simulator of PTX with its checks
of memory, races, initialisation and asynchronous copies, and interpreted.

The tests that run are those of `test_attention.py`, which a GPU takes as they are; the lengths here
are past several tiles, and do not divide them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_attention as shared
import torch
from attention_cases import Case, draw

import scm_kernels
from scm_kernels import _backends, _triton, attention_jvp
from scm_kernels.attention import triton as attention_triton
from scm_kernels.attention import triton_backward_config, triton_backward_float, triton_config
from scm_kernels.attention.problem import Backward, Forward

offline = pytest.importorskip("benchmarks.offline")  # it needs Triton
pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")

slow, ptx = pytest.mark.slow, pytest.mark.ptx
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LONG = {"b": 1, "h": 2, "m": 70, "n": 131}  # two tiles of rows; whole tiles of keys, and a rest


# --- the simulator --------------------------------------------------------------------------------

QUICK = [
    Case("ptx_d64_bf16", BF16, d=64, **LONG),
    Case("ptx_causal_d64_bf16", BF16, d=64, causal=True, **(LONG | {"m": 131, "n": 100})),
    Case("ptx_dead_d64_bf16", BF16, d=64, mask="dead", **LONG),
]
DTYPES = {"bf16": BF16, "f16": F16, "f32": F32}
SLOW = [
    *(Case(f"ptx_d{d}_{n}", t, d=d, **LONG) for d in (72, 128) for n, t in DTYPES.items()),
    Case("ptx_d112_bf16", BF16, d=112, **LONG),
    Case("ptx_d64_f32", F32, d=64, **LONG),
    Case("ptx_causal_d72_f16", F16, d=72, causal=True, **(LONG | {"m": 200, "n": 200})),
    Case("ptx_causal_d128_bf16", BF16, d=128, causal=True, **(LONG | {"m": 200})),
    Case("ptx_gqa", BF16, d=64, **(LONG | {"h": 4, "hk": 2})),
    Case("ptx_bias", BF16, d=64, mask="bias", t_mask=True, **LONG),
    Case("ptx_padding", F16, d=72, mask="padding", mask_shape="b11n", **LONG),
    Case("ptx_late", BF16, d=64, mask="late", **LONG),
    Case("ptx_least", BF16, d=64, mask="least", **LONG),
    Case("ptx_sharp", BF16, d=64, logits=30.0, **LONG),
    Case("ptx_sharp_f32", F32, d=64, logits=30.0, **LONG),
    Case("ptx_bias_f32", F32, d=72, mask="bias", t_mask=True, **LONG),
    Case("ptx_least_f32", F32, d=64, mask="least", **LONG),
    Case("ptx_shared", BF16, d=64, shared=16.0, **LONG),
    Case("ptx_packed", BF16, d=64, layout="packed", **LONG),
    Case("ptx_wide", BF16, d=64, layout="wide", **LONG),  # rows at odd addresses
    Case("ptx_d40_e72", BF16, d=40, e=72, **LONG),
    Case("ptx_one", BF16, d=64, **(LONG | {"m": 1, "n": 1})),
    *(Case(f"ptx_tangents_{t or 'none'}", BF16, d=64, tangents=t, **LONG) for t in ("", "q", "kv")),
    Case("ptx_negative", BF16, d=64, scale=-0.3, **LONG),
]
GRADIENTS = [
    Case("ptx_d64_bf16", BF16, d=64, **LONG),
    Case("ptx_d72_f16", F16, d=72, **LONG),
    Case("ptx_d128_bf16", BF16, d=128, **LONG),
    Case("ptx_d64_f32", F32, d=64, **LONG),
    Case("ptx_sharp_d24_f32", F32, d=24, logits=30.0, **(LONG | {"h": 1, "m": 40, "n": 70})),
    Case("ptx_bias_f32", F32, d=16, mask="bias", **LONG),
    Case("ptx_causal_gqa", BF16, d=64, causal=True, **(LONG | {"h": 4, "hk": 2, "m": 131})),
    Case("ptx_causal_wide", BF16, d=24, causal=True, layout="wide", **LONG),  # at odd addresses
    Case("ptx_bias_gradient", BF16, d=64, mask="bias", mask_shape="1hmn", t_mask=True, **LONG),
    Case("ptx_d128_bias_gradient", BF16, d=128, mask="bias", t_mask=True, **LONG),
    Case("ptx_dead_gradient", BF16, d=64, mask="dead", mask_shape="b1mn", **LONG),
    Case("ptx_least_gradient", BF16, d=64, mask="least", **(LONG | {"h": 4, "hk": 2})),
    Case("ptx_bias_d5", BF16, d=5, mask="bias", **(LONG | {"n": 70})),  # at odd addresses
    Case("ptx_few_keys", BF16, d=64, mask="bias", t_mask=True, **(LONG | {"n": 20})),
    Case("ptx_two_keys_f32", F32, d=24, mask="late", logits=30.0, **(LONG | {"h": 1, "n": 2})),
]


@ptx
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(c, marks=slow) for c in SLOW)], ids=str)
def test_values(launches, case):
    shared.check(shared.run("triton", case, draw(case)), case)
    assert [launch.name for launch in launches] == ["attention_forward_kernel"]
    if not case.mask and case.layout != "wide":
        stats = launches[0].stats
        # Operands of 32 bits are not laid out for it; of products on ordinary cores it were 0.7.
        most = 0.45 * stats.shared_wavefronts if case.dtype == F32 else 0
        assert stats.shared_conflicts <= most, "bank conflicts"


@ptx
@pytest.mark.parametrize(
    "through", [pytest.param("out", marks=slow), pytest.param("both", marks=slow)]
)
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(launches, case, through):
    shared.check(shared.run("triton", case, draw(case), through), case, through)


@ptx
def test_one_gradient(launches):
    case = Case("ptx_d64_bf16", BF16, d=64, **LONG)
    shared.check(shared.run("triton", case, draw(case), "out"), case, "out")
    assert [launch.name.split("_")[2] for launch in launches[1:]] == ["rows", "keys", "queries"]


@ptx
def test_one_key_that_takes_all(launches):
    """T is rounded before its mean is taken off, which the interpreter never fuses."""
    torch.manual_seed(0)
    q, tq = 5 * torch.randn(2, 1, 1, 16, 16)
    k, tk, v, tv = 5 * torch.randn(4, 1, 1, 20, 16)
    q[..., 0], k[..., 0] = 1e3, torch.where(torch.arange(20) == 19, 1e3, 0.0)
    out, t_out = attention_jvp(q, k, v, tq, 100 * tk, tv, scale=0.3)
    assert torch.equal(out, v[:, :, -1:].expand_as(out))
    assert torch.equal(t_out, tv[:, :, -1:].expand_as(out))


@ptx
@slow
def test_the_backward_has_the_scores_of_the_forward(launches, monkeypatch):
    """And their tangent, where its other products in float32 are for ordinary cores: lse and mu are
    of those. Where one key takes it all, what others differ by is an error that eager has not."""
    monkeypatch.setattr(triton_backward_float, "TENSOR", {})
    triton_backward_config.backward_row.cache_clear()
    sizes = {"b": 1, "h": 1, "m": 30, "n": 40, "d": 72}
    mask = {"mask": "padding", "mask_shape": "11mn", "t_mask": True}
    large = {"logits": 30.0, "shared": 8.0, "scale": 0.3}
    case = Case("ptx_ordinary", F32, tangents="kv", **sizes, **mask, **large)
    try:
        shared.check(shared.run("triton", case, draw(case), "both"), case, "both")
    finally:
        triton_backward_config.backward_row.cache_clear()
    metas = [launch.constants["META"] for launch in launches[2:]]
    assert {(meta.PRECISION, meta.SCORES) for meta in metas} == {("ieee", "bf16x6")}


@ptx
@slow
def test_addresses_beyond_31_bits(launches):
    shared.check_far_addresses("triton")


def test_one_variant_serves_all_lengths_and_strides():
    """Neither M, N nor a stride makes Triton compile again: not 1, not a multiple of 16."""
    with offline.gpu("sm_80") as launches:
        for b, h, m, n in ((1, 1, 1, 1), (2, 3, 16, 160), (1, 1, 33, 7), (16, 16, 1, 16)):
            q, k = torch.zeros(b, h, m, 64, dtype=BF16), torch.zeros(b, h, n, 64, dtype=BF16)
            for _ in range(2):
                attention_jvp(q, k, k, q, k, k)
    assert len(launches) == 8
    assert len({launch.metadata.hash for launch in launches}) == 1


@ptx
@pytest.mark.parametrize("masked", [False, True])
def test_a_second_launch_is_like_the_first(launches, masked):
    """It goes to the compiled kernel at once: with the numbers of its own call."""

    def call(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        x = [torch.randn(1, 2, 40, 64, dtype=BF16, requires_grad=True) for _ in range(6)]
        mask = {"attn_mask": torch.randn(1, 1, 40, 40, dtype=BF16)} if masked else {}
        outputs = attention_jvp(*x, **mask)
        cotangents = [torch.randn_like(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, x, cotangents)]

    first = call(0)
    again = call(1)
    _backends.forget()
    for actual, expected in zip(again, call(1), strict=True):
        assert torch.equal(actual, expected)
    assert not any(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("features", [1, 16, 40, 64, 72, 96, 112, 128, 160, 256])
def test_parts_cover_a_head_dimension(features):
    for widest in (16, 64, 256):
        end = 0
        for start, width in triton_config.parts(features, widest):
            assert start == end
            assert 16 <= width <= widest
            assert width & (width - 1) == 0
            end = start + width
        assert features <= end < features + 16


# --- interpreted ----------------------------------------------------------------------------------


def interpreted(*arguments: str, **environment: str) -> subprocess.Popen:
    """pytest in Triton's interpreter: there a wild pointer ends the process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def expect_success(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert " passed" in output, output


def test_interpreter():
    chosen = "triton and (test_values and m127_n3 or both and (gqa_bias or d1_e1_n1))"
    expect_success(interpreted("tests/test_attention.py", "-k", chosen))


@slow
def test_interpreter_over_the_whole_list():
    expect_success(
        interpreted("tests/test_attention.py", "-k", "triton and gradients and both"),
        interpreted("tests/test_attention.py", "-k", "triton and not (gradients and both)"),
    )


# --- the backend ----------------------------------------------------------------------------------


def test_a_forced_backend_names_what_it_does_not_take():
    x = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    wide = torch.zeros(1, 1, 4, 300)
    with offline.gpu("sm_80"):
        assert scm_kernels.backends()["triton"].startswith("available (attention, tangent; sm_80")
        with pytest.raises(NotImplementedError, match=r"'triton' was forced.*float64.*'reference'"):
            attention_jvp(x, x, x, x, x, x)
        with pytest.raises(NotImplementedError, match=r"'triton' was forced.*up to 256, not 300"):
            attention_jvp(wide, wide, wide, wide, wide, wide)


@pytest.mark.parametrize(
    ("target", "both", "most"),
    [("sm_80", True, 256), ("sm_89", False, 256), ("sm_89", True, 128), ("gfx942", False, 128)],
)
def test_float32_that_does_not_fit_goes_elsewhere(target, both, most):
    """Not to an error of the launch: `auto` then asks the next backend."""
    for d in (most, most + 8):
        x = torch.zeros(1, 1, 4, d)
        stats = x[..., 0], x[..., 0], x[..., 0]
        problem = Forward(x, x, x, x, x, x, None, None, False, 1.0, x, x, *stats)
        if both:
            absent = [None] * 5
            problem = Backward(*problem, x, x, x, x, x, *absent)
        with offline.gpu(target):
            reason = attention_triton.refuses(problem)
        if d == most:
            assert reason is None
        elif most == 256:
            assert reason == f"it has head dimensions up to 256, not {d}"
        else:
            assert reason == f"it has head dimensions up to 128 in float32 on this GPU, not {d}"


@pytest.mark.parametrize(
    ("target", "exact"), [("sm_80", "bf16x6"), ("sm_90", "bf16x6"), ("gfx942", "ieee")]
)
def test_products_in_float32_are_exact_unless_pytorch_is_told(target, exact):
    x, told = torch.zeros(1, 1, 4, 16), torch.backends.cuda.matmul
    before = told.fp32_precision
    try:
        with offline.gpu(target) as launches:
            for setting in ("none", "ieee", "tf32", "none"):
                told.fp32_precision = setting
                attention_jvp(x, x, x, x, x, x)
    finally:
        told.fp32_precision = before
    used = [launch.constants["META"].PRECISION for launch in launches]
    assert used == [exact, "ieee", "tf32", exact]


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    """The second of two devices, whatever the current one is."""
    entered = []

    class Guard:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    class Tensor:
        @staticmethod
        def get_device():
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    kernel = {(3,): lambda *args, **options: entered.append((args, options))}
    _triton.Launch(kernel, 3, num_warps=4)(Tensor(), "x")
    assert entered == [1, "in", (("x",), {"num_warps": 4}), "out"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_family_has_a_row(dtype):
    for architecture in ("", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a"):
        for features in (1, 64, 72, 128, 256):
            for causal in (False, True):
                for masked in (False, True):
                    row = triton_config.forward_row(architecture, dtype, features, causal, masked)
                    assert row.most >= features


def test_a_dimension_of_one_does_not_narrow_accesses():
    x = torch.zeros(1, 4, 8, 64, dtype=BF16).as_strided((1, 4, 8, 64), (3, 512, 64, 1))
    assert _triton.vector(x) == 8
    assert _triton.vector(x, x[..., 1:]) == 1
