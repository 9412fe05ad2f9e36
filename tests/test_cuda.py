"""The CUDA backend on a machine without a GPU: what it says, what it takes, what it launches; its
tangent in a simulator of PTX.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import test_tangent_kernels as tangent_tests
import torch

import scm_kernels
from benchmarks import offline_cuda, tools
from scm_kernels import _backends, _cuda, _native, _triton
from scm_kernels.attention import cuda
from scm_kernels.attention.problem import Backward, Forward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def written():
    """What the CUDA kernels of the native module would launch."""
    if not _cuda.built():
        pytest.skip("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    with offline_cuda.gpu() as launches:
        yield launches


# --- availability ---------------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu():
    assert scm_kernels.backends()["cuda"].startswith("not available: PyTorch sees no GPU here")


@pytest.mark.parametrize("gpu", [True, False], ids=["GPU", "no GPU"])
@pytest.mark.parametrize("module", [None, object()], ids=["no module", "no kernels"])
def test_without_kernels(monkeypatch, module, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_native, "module", lambda: module)
    reason = _cuda.unavailable()
    assert "`SCM_KERNELS_BUILD=cuda pip install .`" in reason
    assert ("sees no GPU" in reason) != gpu


def test_on_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in _cuda.unavailable()


def test_available(written):
    assert scm_kernels.backends()["cuda"] == "available (attention, tangent; written down alone)"


def test_launches_go_to_the_current_stream_of_the_tensors_device(monkeypatch):
    class Tensor:
        device = torch.device("cuda", 1)

    def step(*arguments):
        called.append((*arguments, *current))

    called, streams, current = [], {0: 100, 1: 101}, [0]

    @contextmanager
    def device(index):
        current[0], before = index, current[0]
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get, raising=False)
    _cuda.launch(step, (Tensor(), None), "sizes", "inputs")
    assert called == [("sizes", "inputs", 1, 101, 1)]
    assert current == [0]


def test_a_driver_that_is_older_than_the_kernels(monkeypatch):
    """Is a reason not to be chosen, not an error of the first op."""
    module = SimpleNamespace(cuda_error=lambda i: "old", cuda_attention_forward=None)
    monkeypatch.setattr(_native, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    _cuda._error.cache_clear()
    try:
        fault = "its kernels do not run on GPU 0 (old)"
        assert _backends._status("cuda") == f"not available: {fault}"
        monkeypatch.setattr(_triton, "refuses_device", lambda x: None)
        assert _cuda.refuses(SimpleNamespace(device=SimpleNamespace(index=0))) == fault
    finally:
        _cuda._error.cache_clear()
        _backends.forget()


def test_a_call_on_a_cpu_makes_no_context_on_a_gpu(monkeypatch):
    """It would take memory there, and fail in a forked process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "built", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was initialised"))
    _backends.forget()
    try:
        scm_kernels.consistency_loss(*torch.randn(4, 2, 8), torch.rand(2))
        scm_kernels.attention_jvp(*torch.randn(6, 1, 2, 5, 8))
    finally:
        _backends.forget()


@without_gpu
@pytest.mark.skipif(not _cuda.built(), reason="the native module has no CUDA kernels")
def test_a_device_that_is_not_there():
    assert _native.module().cuda_error(0).startswith("cudaError")


@without_gpu
@pytest.mark.skipif(not _cuda.built(), reason="the native module has no CUDA kernels")
def test_an_error_of_cuda_is_an_exception():
    x, coefficients = torch.zeros(1, 8), torch.zeros(1, 4, dtype=torch.float64)
    inputs = [(x.data_ptr(), 8)] * 4
    sums, device, stream = 0, 0, 0
    with pytest.raises(RuntimeError, match=r"^tangent_apply: cudaError\w+: \w+"):
        _native.module().cuda_tangent_apply(
            1, 8, 0, inputs, coefficients.data_ptr(), x.data_ptr(), sums, device, stream
        )


def test_triton_goes_first_where_it_is_faster(monkeypatch):
    """By "auto", if it takes the problem; a backend that is forced is never asked."""
    reason = []
    first = SimpleNamespace(refuses=lambda problem: None, yields=lambda problem: problem == "sm_90")
    second = SimpleNamespace(refuses=lambda problem: reason[0] if reason else None)
    modules = {"cuda": first, "triton": second}
    monkeypatch.setattr(_backends, "_implementation", lambda op, name: (modules[name], None))
    choose = functools.partial(_backends.choose, "attention", "forward")
    assert choose("sm_80", "auto") == (first, False)
    assert choose("sm_90", "auto") == (second, False)
    assert choose("sm_90", "cuda") == (first, True)
    reason.append("too wide")
    assert choose("sm_90", "auto") == (first, False)


@pytest.mark.parametrize("tangents", ["qkv", "qk", "q", "kv", ""])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_attention_yields_on_hopper(architecture, causal, tangents, monkeypatch):
    """Where no kernel is compiled for it, and not all keys are seen."""
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    present = {f"t{name}": object() if name in tangents else None for name in "qkv"}
    problem = SimpleNamespace(
        q=SimpleNamespace(device=torch.device("cuda")), causal=causal, **present
    )
    expected = architecture == "sm_90" and not causal and tangents not in ("qkv", "q")
    assert cuda.yields(problem) == expected
    assert not cuda.yields(SimpleNamespace(q=torch.zeros(1), causal=causal, **present))


# --- what it takes --------------------------------------------------------------------------------


def forward(*, m=5, n=7, d=64, e=None, dtype=BF16, tangents="qkv", **others) -> Forward:
    """A problem that the kernels take, but for what is asked for."""
    e = e or d
    shapes = {"q": (1, 2, m, d), "k": (1, 2, n, d), "v": (1, 2, n, e)}
    inputs = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    inputs |= {f"t{x}": inputs[x].clone() if x in tangents else None for x in "qkv"}
    outputs = {name: torch.zeros(1, 2, m, e, dtype=dtype) for name in ("out", "t_out")}
    outputs |= {name: torch.zeros(1, 2, m) for name in ("lse", "mu")}
    rest = {"lse_low": None, "mask": None, "tmask": None, "causal": False, "scale": 1.0}
    return Forward(**{**inputs, **outputs, **rest, **others})


def apart(stride: int, offset: int = 0) -> torch.Tensor:
    """A tensor of 1 x 2 x 5 x 64 whose rows are `stride` elements apart; the stride of the batch of
    one is odd, and means nothing."""
    room = torch.zeros(10 * stride + offset, dtype=BF16)
    return room.as_strided((1, 2, 5, 64), (7, 5 * stride, stride, 1), offset)


@pytest.mark.parametrize(
    "problem",
    [
        *(forward(d=d) for d in cuda.FEATURES),
        *(forward(tangents=names) for names in ("qkv", "q", "kv", "")),
        forward(dtype=F16),
        forward(m=1, n=1),
        forward(q=apart(72), out=apart(128, offset=8)),
        forward(k=torch.zeros(1, 1, 7, 64, dtype=BF16).expand(1, 2, 7, 64)),
    ],
)
def test_attention_takes(monkeypatch, problem):
    monkeypatch.setattr(_cuda, "refuses", lambda x: None)
    assert cuda.refuses(problem) is None


LONG = torch.zeros(1, 1, 1, 64, dtype=BF16).expand(1, 1, 2**31, 64)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (forward(dtype=F32), "it has bfloat16 and float16, not torch.float32"),
        (forward(mask=torch.zeros(1, 1, 5, 7)), "it has no masks"),
        (forward(d=32), "it has D = E of 64, 72, 96, 112, 128, not D = 32, E = 32"),
        (forward(d=64, e=72), "not D = 64, E = 72"),
        (forward(k=LONG, v=LONG), "it has lengths up to 2147483520, not 2147483648"),
        (forward(q=apart(65)), "it has rows at multiples of 16 bytes"),
        (forward(q=apart(64, offset=1)), "it has rows at multiples of 16 bytes"),
        (forward(tq=apart(68)), "it has rows at multiples of 16 bytes"),
        (forward(t_out=apart(64, offset=4)), "it has rows at multiples of 16 bytes"),
    ],
)
def test_attention_refuses(monkeypatch, problem, reason):
    monkeypatch.setattr(_cuda, "refuses", lambda x: None)
    assert cuda.refuses(problem).endswith(reason)


def test_tensors_elsewhere():
    problem = forward()
    assert cuda.refuses(problem) == "it runs on a GPU, not on cpu"
    gradient = Backward(**{name: getattr(problem, name, None) for name in Backward._fields})
    assert cuda.refuses(gradient) == "it has no backward"


def test_auto_asks_it_first(written):
    problem = forward()
    assert _backends.choose("attention", "forward", problem, "auto") == (cuda, False)
    masked = problem._replace(mask=torch.zeros(1, 1, 5, 7))
    assert _backends.choose("attention", "forward", masked, "auto")[0] is not cuda


def test_the_gradient_is_another_backends(written):
    q, k, v, tq, tk, tv = (torch.randn(1, 2, 16, 64, dtype=BF16) for _ in range(6))
    out, _ = scm_kernels.attention_jvp(q.requires_grad_(), k, v, tq, tk, tv)
    with pytest.raises(NotImplementedError, match=r"attention backward: it has no backward\. Back"):
        out.sum().backward()


# --- what it launches -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("tangents", ["qkv", "qk", "qv", "kv", "q", "k", "v", ""])
@pytest.mark.parametrize("d", cuda.FEATURES)
def test_what_attention_takes_is_compiled(written, d, tangents, dtype):
    """A kernel of the machine code, which fits a multiprocessor of an A100."""
    try:
        tools.cuobjdump("--version")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for causal in (False, True):
        problem = forward(m=300, n=200, d=d, tangents=tangents, dtype=dtype, causal=causal)
        cuda.plan_forward(problem)(problem)
    for launch in written:
        assert launch.blocks > 0
        assert 0 < launch.threads <= 1024
        assert launch.shared + launch.usage["SHARED"] <= 163 * 1024
        assert launch.usage["REG"] * launch.threads <= 65536
    assert len(written) == 2


# --- the tangent in the simulator -----------------------------------------------------------------


def planned():
    """(test of `test_tangent_kernels.py`, its arguments)"""
    for dtype in tangent_tests.DTYPES:
        for shape in tangent_tests.SHAPES:
            yield tangent_tests.test_steps, {"shape": shape, "dtype": dtype}
        yield tangent_tests.test_strides, {"dtype": dtype}
        for size in (1, 64, 40_001):
            yield tangent_tests.test_bad_samples, {"dtype": dtype, "bad": torch.inf, "size": size}
    for dtype in tangent_tests.HALVES:
        yield tangent_tests.test_halves_survive, {"dtype": dtype}
        yield tangent_tests.test_halves_round_to_nearest_even, {"dtype": dtype}
    yield tangent_tests.test_no_normaliser_of_nothing, {}


def named(test, arguments):
    return "-".join([test.__name__.removeprefix("test_"), *map(str, arguments.values())])


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("test", "arguments"), [pytest.param(*plan, id=named(*plan)) for plan in planned()]
)
def test_tangent(cuda_launches, test, arguments):
    test(backend="cuda", **arguments)
    assert cuda_launches
    for launch in cuda_launches:
        assert launch.name.startswith("tangent_")
        assert launch.spilled() <= tangent_tests.sines_array(launch.name)
        assert launch.stats.global_store_bytes > 0


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x as a GPU would allocate it: aligned to 256 bytes."""
    raw = tools.tool("ptxsim").array(x.contiguous().view(torch.uint8).numpy())
    return torch.from_numpy(raw).view(x.dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 64), (64, 4096), (8, 16_384), (32, 65_536), (1, 300_032)])
def test_each_byte_of_the_tangent_moves_once(cuda_launches, shape, dtype):
    """By the sectors of 32 bytes that are asked for; twice where a sample is in parts."""
    inputs, t = tangent_tests.make(shape, dtype)
    inputs, coefficients = [guarded(x) for x in inputs], guarded(torch.rand(shape[0], 4).double())
    size, twice = inputs[0].nbytes, shape[0] * shape[1] == 300_032
    for step, bytes_ in (
        (lambda: tangent_tests.loss(inputs, t, "cuda"), 4 * size + 8 * shape[0]),
        (lambda: tangent_tests.apply(inputs, coefficients, "cuda"), 5 * size),
        (lambda: tangent_tests.normalize(inputs, t, "cuda"), (5 + 4 * twice) * size),
    ):
        cuda_launches.clear()
        step()
        numbers = ("tangent_coefficients_kernel", "tangent_loss_kernel")
        stats = [launch.stats for launch in cuda_launches if launch.name not in numbers]
        moved = 32 * sum(x.global_load_sectors + x.global_store_sectors for x in stats)
        assert moved <= 1.05 * (bytes_ + coefficients.nbytes)


@pytest.mark.ptx
def test_the_simulator_sees_what_a_kernel_may_not_touch(cuda_launches, monkeypatch):
    """A tensor that a launch does not name."""
    ptxsim, real = tools.tool("ptxsim"), _cuda.launch
    monkeypatch.setattr(
        _cuda, "launch", lambda function, tensors, *rest: real(function, tensors[1:], *rest)
    )
    inputs, coefficients = tangent_tests.make((3, 8))[0], tangent_tests.random_coefficients(3)
    with pytest.raises(ptxsim.MemcheckError):
        tangent_tests.apply(inputs, coefficients, "cuda")
