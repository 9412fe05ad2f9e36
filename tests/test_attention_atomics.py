"""dq by atomics (SCM_KERNELS_ATOMICS=1), an option of attention's Triton backward."""

import pytest
import test_attention as shared
import torch
from attention_cases import Case, draw
from test_attention_triton import BF16, F16, F32, LONG, expect_success, interpreted

from scm_kernels import _triton, attention_jvp

offline = pytest.importorskip("benchmarks.offline")  # it needs Triton
a100 = pytest.importorskip("benchmarks.a100")
pytestmark = pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")

ATOMIC = [
    Case("atomic_d64", BF16, d=64, **LONG),
    Case("atomic_d128_causal_gqa", BF16, d=128, causal=True, **(LONG | {"h": 4, "hk": 2})),
    Case("atomic_d40_e64_f16", F16, d=40, e=64, **LONG),
    # Keys out of bounds, of a row whose own have large negative scores: exp(0 - lse) is infinite.
    Case("atomic_negative", BF16, d=64, shared=16.0, scale=-0.3, **LONG),
    Case("atomic_column", BF16, d=64, layout="column", **LONG),
    Case("atomic_no_tangent_of_keys", BF16, d=64, tangents="q", **LONG),
]


@pytest.fixture
def atomics(monkeypatch):
    monkeypatch.setenv("SCM_KERNELS_ATOMICS", "1")


def kernels(launches) -> list[str]:
    return [launch.name.split("_")[2] for launch in launches if "backward" in launch.name]


@pytest.mark.ptx
@pytest.mark.parametrize(
    "case", [ATOMIC[0], *(pytest.param(c, marks=pytest.mark.slow) for c in ATOMIC[1:])], ids=str
)
def test_gradients(atomics, launches, case):
    shared.check(shared.run("triton", case, draw(case), "both"), case, "both")
    assert kernels(launches)[:2] == ["rows", "keys"]
    assert "sum_q" not in launches[2].constants, "it is None"


def gradient_of(dtype=BF16, d=64, wanted="qkv", **options) -> list[torch.Tensor]:
    x = [torch.randn(1, 1, 40, d, dtype=dtype, requires_grad=c in wanted) for c in "qkvabc"]
    outputs = attention_jvp(*x, **options)
    leaves = [y for y in x if y.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["rows", "keys"]),
        ({"wanted": "qkvabc"}, ["rows", "keys", "keys", "queries"]),
        ({"wanted": "q"}, ["rows", "queries"]),
        ({"d": 72}, ["rows", "keys", "queries"]),
        ({"dtype": F32}, ["rows", "keys", "queries"]),
        ({"attn_mask": torch.ones(40, dtype=torch.bool)}, ["rows", "keys", "queries"]),
    ],
    ids=["plain", "of tangents too", "of queries alone", "parts", "float32", "mask"],
)
def test_where_they_are_used(atomics, options, expected):
    with offline.gpu("sm_80") as launches:
        gradient_of(**options)
    assert kernels(launches) == expected


def test_the_switch_is_looked_at_in_each_call(monkeypatch):
    with offline.gpu("sm_80") as launches:
        for switch, names in (("", 3), ("1", 2), ("0", 3)):
            launches.clear()
            monkeypatch.setenv("SCM_KERNELS_ATOMICS", switch)
            gradient_of()
            assert len(kernels(launches)) == names
        monkeypatch.setenv("SCM_KERNELS_ATOMICS", "yes")
        with pytest.raises(ValueError, match="SCM_KERNELS_ATOMICS: got 'yes', expected 0 or 1"):
            gradient_of()


def test_not_where_pytorch_is_told_to_be_deterministic(atomics):
    torch.use_deterministic_algorithms(True)
    try:
        with offline.gpu("sm_80") as launches:
            gradient_of()
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels(launches) == ["rows", "keys", "queries"]


def test_interpreted():
    chosen = "triton and gradients and both and (m127_n3 or gqa_causal or d1_e1_n1)"
    environment = {"SCM_KERNELS_ATOMICS": "1"}
    expect_success(interpreted("tests/test_attention.py", "-k", chosen, **environment))


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_nothing_spills_under_a_causal_mask(d):
    """Without one: test_attention_triton.py."""
    launches = a100.Problem("backward, both, atomics", BF16, d, causal=True).launches()
    assert kernels(launches) == ["rows", "keys"]
    assert [launch.spilled() for launch in launches] == [0, 0]
