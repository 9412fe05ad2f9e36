"""What only a GPU can show. The shared test lists run there too, under the same marker."""

import copy

import pytest
import test_attention as shared
import test_attention_cuda as cuda_list
import torch
from attention_cases import Case, draw

import scm_kernels
from scm_kernels import _backends, _cuda
from scm_kernels.attention import torch_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

CASES = [
    Case("gpu_d64", torch.bfloat16, m=200, n=200, d=64),
    Case("gpu_causal", torch.float16, m=200, n=200, d=128, causal=True),
    Case("gpu_cross", torch.bfloat16, m=70, n=300, d=72),
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """A backend of attention's forward on GPUs."""
    if request.param == "cuda" and not _cuda.built():
        pytest.skip("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    return request.param


def test_a_gpu_runs_it(backend):
    assert scm_kernels.backends()[backend].startswith("available")


# More tiles of rows than there are multiprocessors, for each of which a block stays on Hopper.
ROUNDS = [
    Case(
        f"gpu_rounds_d{d}{'_causal' * causal}",
        torch.bfloat16,
        b=4,
        h=33,
        m=m,
        n=n,
        d=d,
        causal=causal,
    )
    for d in (64, 72, 128)
    for m, n, causal in ((300, 200, False), (300, 300, True), (130, 0, False))
]
CUDA_CASES = [
    *cuda_list.cases(((65, 200), (1, 63), (63, 1), (200, 64), (300, 300))),
    *cuda_list.LENGTHS,
    *cuda_list.SPECIAL,
    *cuda_list.EVERYWHERE,
    *ROUNDS,
]


@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_cuda_kernels(case):
    """The list of the simulator, and what is too long for it; on Hopper by other kernels."""
    if not _cuda.built():
        pytest.skip("the native module has no CUDA kernels (SCM_KERNELS_BUILD=cuda)")
    shared.check(shared.run("cuda", case, draw(case, "cuda")), case)


@pytest.fixture
def served(monkeypatch):
    """The problems that PyTorch's backward takes, where it stands back for nobody."""
    problems, real = [], torch_backward.plan_backward
    monkeypatch.setattr(torch_backward, "_slower", lambda problem: False)
    monkeypatch.setattr(
        torch_backward, "plan_backward", lambda problem: problems.append(problem) or real(problem)
    )
    _backends.forget()
    yield problems
    _backends.forget()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorchs_flash_backward_gives_the_gradient(case, served):
    """Under "auto" it serves the gradient through out, inside the error budget."""
    shared.check(shared.run("auto", case, draw(case, "cuda"), "out"), case, "out")
    assert [torch_backward._flash_refuses(problem) for problem in served] == [None]


def test_launches_go_to_the_current_stream(backend):
    """A stream that waits for an event sees what was written before it."""
    case = Case("gpu_stream", torch.bfloat16, m=200, n=200, d=64)
    inputs, stream = draw(case, "cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        moved = {name: None if x is None else x + 0 for name, x in inputs.items()}
        results = shared.run(backend, case, moved)
    stream.synchronize()
    shared.check(results, case)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu(backend):
    """While the first stays PyTorch's current device."""
    case, through = Case("gpu_second", torch.bfloat16, m=200, n=200, d=64), ""
    if backend == "triton":
        through = "both"
    shared.check(shared.run(backend, case, draw(case, "cuda:1"), through), case, through)
    assert torch.cuda.current_device() == 0


def test_a_cuda_graph(backend):
    """A launch is captured, and sees the inputs of the day when it is replayed."""
    q, k, v, tq, tk, tv = torch.randn(6, 1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    with scm_kernels.backend(backend):
        scm_kernels.attention_jvp(q, k, v, tq, tk, tv)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = scm_kernels.attention_jvp(q, k, v, tq, tk, tv)
        q.normal_()
        graph.replay()
        expected = scm_kernels.attention_jvp(q, k, v, tq, tk, tv)
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(96,), (4, 24)], ids=str)
def test_the_tangent_of_an_rms_norm(shape, affine, dtype):
    """By PyTorch's kernel of the gradient; the primal is PyTorch's own, with its graph."""
    norm = torch.nn.RMSNorm(shape, eps=1e-6, elementwise_affine=affine, device="cuda", dtype=dtype)
    if affine:
        torch.nn.init.normal_(norm.weight)
    x = 3 * torch.randn(2, 7, *shape, device="cuda", dtype=dtype) + 1
    for t_x in (torch.randn_like(x), torch.randn_like(x[:1]).expand_as(x)):
        x.requires_grad_(affine)
        out, t_out = scm_kernels.jvp(norm, (x,), (t_x,))
        assert torch.equal(out, norm(x))
        assert out.requires_grad == affine
        assert not t_out.requires_grad
        wide = copy.deepcopy(norm).double()
        _, truth = torch.func.jvp(wide, (x.detach().double(),), (t_x.double(),))
        error = (t_out.double() - truth).abs().max() / truth.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps
        if affine:
            grads = [torch.autograd.grad(y.sum(), (x, norm.weight)) for y in (out, norm(x))]
            assert all(map(torch.equal, *grads))
