"""The time that a call of an op keeps the host busy on the Triton backend: checks, op, launch.

    python -m benchmarks.host [--repeats 2000] [--json host.json]

Where there is no GPU, kernels are compiled for an A100 and not run: a launch ends where CUDA's
driver would take it, some microseconds short of a real one. Microseconds of this process, whose
backward on a GPU has a thread of its own; the least of many turns: what else the machine does only
adds to them.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

import scm_kernels
from benchmarks import offline
from benchmarks.common import report
from examples.digits.model import Block, ModelConfig

ROUNDS = 5  # over all calls: a slow spell of the machine lasts longer than the turns of one


class Nothing(torch.autograd.Function):
    """What PyTorch itself takes for the tensors of `attention_jvp` and of its gradient."""

    @staticmethod
    def forward(ctx, *tensors):
        out, t_out = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
        ctx.save_for_backward(*tensors, out, t_out)
        return out, t_out

    @staticmethod
    def backward(ctx, dout, dt_out):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return tuple(torch.empty_like(x) if want else None for x, want in wanted)


def calls(device: str) -> dict[str, Callable[[], object]]:
    """Each op on tensors so small that only the host counts."""
    x = [torch.randn(1, 2, 64, 64, dtype=torch.bfloat16, device=device) for _ in range(6)]
    leaves = [y.clone().requires_grad_() for y in x]
    out, t_out = scm_kernels.attention_jvp(*leaves)
    cotangents = torch.randn_like(out), torch.randn_like(out)
    nothing = Nothing.apply(*leaves)
    F, V, X, J = torch.randn(4, 32, 256, device=device)
    t = torch.rand(32, device=device)
    w = torch.rand(32, device=device)
    learned = F.clone().requires_grad_(), w.clone().requires_grad_()
    loss = scm_kernels.consistency_loss(learned[0], V, X, J, t, learned[1])
    block = Block(ModelConfig(width=64, depth=1, heads=2)).to(device)
    h, t_h, m, t_m = (torch.randn(1, n, 64, device=device) for n in (16, 16, 4, 4))

    def block_jvp(*inputs):
        return scm_kernels.jvp(block, inputs[:2], inputs[2:])

    compiled_jvp = torch.compile(block_jvp, fullgraph=True)
    return {
        "attention_jvp": lambda: scm_kernels.attention_jvp(*x),
        "attention_jvp, graph kept": lambda: scm_kernels.attention_jvp(*leaves),
        "its backward, both outputs": lambda: torch.autograd.grad(
            (out, t_out), leaves[:3], cotangents, retain_graph=True
        ),
        "of which PyTorch's, graph kept": lambda: Nothing.apply(*leaves),
        "of which PyTorch's, backward": lambda: torch.autograd.grad(
            nothing, leaves[:3], cotangents, retain_graph=True
        ),
        "normalized_tangent": lambda: scm_kernels.normalized_tangent(F, V, X, J, t),
        "consistency_loss": lambda: scm_kernels.consistency_loss(F, V, X, J, t, w),
        "consistency_loss, graph kept": lambda: scm_kernels.consistency_loss(
            learned[0], V, X, J, t, learned[1]
        ),
        "its backward": lambda: torch.autograd.grad(loss, learned, retain_graph=True),
        "a DiT block": lambda: block(h, m),
        "jvp of a DiT block": lambda: block_jvp(h, m, t_h, t_m),
        "the same, compiled": lambda: compiled_jvp(h, m, t_h, t_m),
        "torch.empty_like": lambda: torch.empty_like(F),
    }


def least(run: Callable[[], object], repeats: int) -> float:
    """Microseconds of CPU time a call, in the quickest of many turns of 50."""
    turns = []
    for _ in range(max(repeats // 50, 1)):
        start = time.process_time()
        for _ in range(50):
            run()
        turns.append(1e6 * (time.process_time() - start) / 50)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the queue of launches fills, and a call waits for it
    return min(turns)


def gpu(device: str) -> AbstractContextManager:
    """Triton on this machine's GPU, or on none."""
    return scm_kernels.backend("triton") if device == "cuda" else offline.gpu("sm_80", record=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with gpu(device):
        runs = calls(device)
        times = dict.fromkeys(runs, math.inf)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                run()
                run()
                times[name] = min(times[name], least(run, options.repeats // ROUNDS))
    rows = [{"call": name, "host us": time} for name, time in times.items()]
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    report(f"host time a call, Triton backend, {where}", rows, options.json)


if __name__ == "__main__":
    main()
