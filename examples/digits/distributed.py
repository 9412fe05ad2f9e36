"""One process or several (torchrun): rank, device, sharding and who prints."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def shard(self, batch: int) -> slice:
        """The samples of a global batch that this process takes."""
        if batch % self.size:
            raise ValueError(f"batch_size: {batch} does not divide over {self.size} processes")
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a scalar."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def pick_device(name: str) -> torch.device:
    """``auto`` takes a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but PyTorch sees no GPU")
    return device


def start(device_name: str) -> World:
    """Join the processes that torchrun started, if it did."""
    device = pick_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank=dist.get_rank(), size=size, device=device)


def stop(world: World) -> None:
    if world.size > 1:
        dist.barrier()  # no process ends while another still talks to it
        dist.destroy_process_group()
