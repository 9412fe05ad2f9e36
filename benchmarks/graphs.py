"""Attention's forward with its tangent on a GPU without the host: calls replayed from a CUDA graph.

    python -m benchmarks.graphs [--json graphs.json]

`python -m benchmarks` measures calls as a program makes them, launches included. Here are the
kernels alone, with warm caches, of each backend for GPUs, in bfloat16: not causal, causal, and with
a tangent of the queries alone, as cross-attention to a fixed text has it.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

import scm_kernels
from benchmarks.common import report, with_progress
from benchmarks.device import between_events

# batch, heads, tokens, features
SHAPES = (
    *((1, 16, 4096, d) for d in (64, 72, 96, 112, 128)),
    *((1, 8, n, 64) for n in (512, 1024, 2048, 8192)),
    *((8, 16, 256, 72), (32, 16, 256, 72), (32, 16, 1024, 72)),  # DiT-XL/2
    *((2, 24, 1024, 128), (4, 16, 128, 64), (64, 4, 64, 64)),
)
KINDS = {"": (12, False), "causal": (6, True), "q": (8, False)}  # B H M N D operations; is_causal
CALLS, REPLAYS = 10, 9


def milliseconds(run: Callable[[], object]) -> float:
    """Of one of CALLS calls in a graph, the median of REPLAYS."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    graph.replay()
    return statistics.median(between_events(graph.replay) for _ in range(REPLAYS)) / CALLS


def measure(shape: tuple[int, int, int, int], kind: str) -> dict:
    """A row of the table."""
    b, h, n, d = shape
    operations, causal = KINDS[kind]
    q, k, v, *tangents = torch.randn(6, *shape, device="cuda", dtype=torch.bfloat16)
    if kind == "q":
        tangents[1:] = None, None
    row = {"shape": "x".join(map(str, shape)), "kind": kind}
    for backend in ("triton", "cuda"):
        with scm_kernels.backend(backend):
            time = milliseconds(
                lambda: scm_kernels.attention_jvp(q, k, v, *tangents, is_causal=causal)
            )
        row |= {
            f"{backend} ms": time,
            f"{backend} TFLOP/s": operations * b * h * n * n * d / time / 1e9,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    cases = [(shape, kind) for shape in SHAPES for kind in KINDS]
    rows = [measure(*case) for case in with_progress(cases)]
    report(f"forward without the host, {torch.cuda.get_device_name()}", rows, options.json)


if __name__ == "__main__":
    main()
