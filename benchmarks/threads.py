"""Our kernels and PyTorch's in turns, on the same threads: does either slow the other down?

    python -m benchmarks.threads [--threads 2] [--repeats 50] [--json threads.json]

Three matrix products by PyTorch and then one attention with its tangent by ours, against the two
alone. With a pool of threads each, those of one that still wait for work, spinning, would hold the
cores that the other wants: "together / sum" would be well above 1.
"""

import argparse

import torch

import scm_kernels
from benchmarks.common import interleaved, report, with_progress

SIZES = [(64, 128), (256, 512), (512, 1024)]  # tokens of attention, size of the matrices


def measure(tokens: int, size: int, repeats: int) -> dict:
    """One row of the table: milliseconds of each, and the ratio to their sum."""
    a, b = torch.randn(2, size, size)
    x = torch.randn(6, 1, 8, tokens, 64)

    def matmuls() -> None:
        for _ in range(3):
            a @ b

    def attention() -> None:
        with scm_kernels.backend("cpu"):
            scm_kernels.attention_jvp(*x)

    def several(*calls) -> None:
        for _ in range(10):
            for call in calls:
                call()

    times = interleaved(
        {
            "matmuls": lambda: several(matmuls),
            "attention": lambda: several(attention),
            "together": lambda: several(matmuls, attention),
        },
        repeats,
    )
    row = {"tokens": tokens, "matrix": size}
    row |= {f"{name} ms": value["p50"] / 10 for name, value in times.items()}
    row["together / sum"] = row["together ms"] / (row["matmuls ms"] + row["attention ms"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(*sizes, options.repeats) for sizes in with_progress(SIZES)]
    report("matrix products and attention with tangent in turns, measured", rows, options.json)


if __name__ == "__main__":
    main()
