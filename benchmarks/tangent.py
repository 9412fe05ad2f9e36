"""The sCM tangent and its loss, as a share of the memory bandwidth that a copy reaches.

    python -m benchmarks.tangent [--repeats 20] [--json tangent.json]

Bandwidth counts each input once and each output once, whatever a kernel reads again: the four
inputs and the tangent, or the gradient, and nothing else. A copy of a tensor beyond the caches into
memory that is there already, read and written once, is taken in turns with them. The calls allocate
what they return, and fresh memory costs page faults, so their share is also given of a copy that
does (`clone`); the kernels, the last three, write where they wrote before. "reference" is the same
on the reference backend.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import scm_kernels
from benchmarks.common import interleaved, report, with_progress
from scm_kernels import _backends
from scm_kernels.tangent.problem import Apply, Norm, Normalize

# Toy data; samples of less than a vector's worth of work each; latents of 256 x 256, 512 x 512 and
# 1024 x 1024 pixels; one large sample; a video.
SHAPES = [
    (32, 4, 8, 8),
    (4096, 64),
    (32, 4, 32, 32),
    (256, 4, 64, 64),
    (64, 16, 128, 128),
    (1, 2_000_000),
    (8, 16, 21, 60, 104),
]
DTYPES = (torch.float32, torch.bfloat16)
COPY = 2**26  # elements of float32


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """Each call, and how many tensors of the shape it reads or writes at least."""
    F, V, X, J = (torch.randn(shape, dtype=dtype) for _ in range(4))
    t, w = torch.rand(shape[0]) * 1.4 + 0.1, torch.randn(shape[0])
    leaf = F.clone().requires_grad_()
    loss = scm_kernels.consistency_loss(leaf, V, X, J, t, w)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, leaf, retain_graph=True)[0]

    scalars, out = torch.rand(shape[0], 4, dtype=torch.float64), torch.empty_like(F)
    inputs = [x.reshape(shape[0], -1) for x in (F, V, X, J)]
    norm = Norm(*inputs, scalars, torch.empty_like(scalars[:, 0]))
    apply = Apply(*inputs, scalars, out.reshape(inputs[0].shape))
    normalize = Normalize(*inputs, scalars, 0.1, False, False, apply.out)

    def kernel(step: str, problem: Norm | Apply | Normalize) -> Callable[[], None]:
        return lambda: _backends.run("tangent", step, problem, _backends.requested())

    return {
        "tangent": (lambda: scm_kernels.normalized_tangent(F, V, X, J, t), 5),
        "loss": (lambda: scm_kernels.consistency_loss(F, V, X, J, t, w), 4),
        "backward": (lambda: gradient(loss), 5),
        "loss + backward": (
            lambda: gradient(scm_kernels.consistency_loss(leaf, V, X, J, t, w)),
            9,
        ),
        "kernel: norm": (kernel("norm", norm), 4),
        "kernel: apply": (kernel("apply", apply), 5),
        "kernel: normalize": (kernel("normalize", normalize), 5),
    }


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[dict]:
    """A row of the table for each call."""
    source, target = torch.randn(2, COPY)
    with scm_kernels.backend("reference"):
        reference = calls(shape, dtype)
    ours = calls(shape, dtype)
    providers = {"copy": lambda: target.copy_(source), "clone": lambda: source.clone()}
    providers |= {name: run for name, (run, _) in ours.items()}
    providers |= {f"{name}, reference": on_reference(run) for name, (run, _) in reference.items()}
    times = interleaved(providers, repeats, warm=True)
    copy, clone = (8 * COPY / times[name]["p50"] / 1e6 for name in ("copy", "clone"))
    rows = []
    for name, (_, tensors) in ours.items():
        size = tensors * math.prod(shape) * dtype.itemsize
        row = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
        row |= {"call": name, "MB": size / 1e6, "ms": times[name]["p50"]}
        row["GB/s"] = size / row["ms"] / 1e6
        row |= {"copy GB/s": copy, "of copy": row["GB/s"] / copy}
        row |= {"clone GB/s": clone, "of clone": row["GB/s"] / clone}
        row["reference / ours"] = times[f"{name}, reference"]["p50"] / row["ms"]
        rows.append(row)
    return rows


def on_reference(run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with scm_kernels.backend("reference"):
            return run()

    return forced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    cases = [(shape, dtype) for dtype in DTYPES for shape in SHAPES]
    rows = [row for case in with_progress(cases) for row in measure(*case, options.repeats)]
    report("sCM tangent and loss, measured", rows, options.json)


if __name__ == "__main__":
    main()
