"""Activation memory that one pass keeps for the backward: an ordinary forward, ours, PyTorch's jvp.

    python -m benchmarks.memory [--json memory.json]

Counted, not sampled: every storage that an op allocates, until it is freed. "kept" is what lives
when the pass has returned (it is what training holds until the backward), "peak" the most on the
way. The network is a stack of DiT blocks; weights and inputs are not counted.
"""

import argparse
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import scm_kernels
from benchmarks.common import report


class AllocatedBytes(TorchDispatchMode):
    """Bytes of the storages that ops allocate inside, `kept` now and `peak` so far."""

    def __init__(self):
        super().__init__()
        self.kept = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for x in _tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in self._seen | inputs:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.kept += size
        self.peak = max(self.peak, self.kept)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.kept -= size


def _tensors(tree) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


class Block(nn.Module):
    """A transformer block whose scale and shift come from t."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.modulation = nn.Linear(1, 2 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.modulation(t[:, None, None]).chunk(2, dim=-1)
        h = self.norm1(x) * scale + shift
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    """A stack of blocks, [B, M, C], [B] -> [B, M, C]."""

    def __init__(self, depth: int = 6, width: int = 128, heads: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


def measure(batch: int = 8, tokens: int = 256, width: int = 128) -> list[dict]:
    """Rows of the table: bytes kept and at the peak, and their ratio to an ordinary forward."""
    network = Network(width=width)
    x, tx = torch.randn(2, batch, tokens, width)
    t, tt = torch.rand(2, batch)
    primals, tangents = (x, t), (tx, tt)

    def eager():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(network, primals, tangents)

    passes = {
        "ordinary forward": lambda: network(x, t),
        "scm_kernels.jvp": lambda: scm_kernels.jvp(network, primals, tangents),
        "torch.func.jvp, eager attention": eager,
    }
    rows = []
    for name, run in passes.items():
        with AllocatedBytes() as memory:
            results = run()
            kept = memory.kept
            del results
        rows.append({"pass": name, "kept MB": kept / 1e6, "peak MB": memory.peak / 1e6})
    for row in rows:
        row["kept / forward"] = row["kept MB"] / rows[0]["kept MB"]
        row["peak / forward"] = row["peak MB"] / rows[0]["peak MB"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    report("activation memory of one pass, measured", measure(), options.json)


if __name__ == "__main__":
    main()
