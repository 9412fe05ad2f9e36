"""DDP, FSDP2, autocast and hooks of saved tensors around and inside of a jvp."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from networks import close, dit_case, gradients, stock_jvp, true_jvp
from torch import nn
from torch.utils.checkpoint import checkpoint

import scm_kernels

WORLD = 2
THROUGH = pytest.mark.parametrize("through", [False, True], ids=["detached", "recorded"])


# --- two processes --------------------------------------------------------------------------------


class Step(nn.Module):
    """A loss with the jvp inside: what DDP and FSDP2 wrap."""

    def __init__(self, network, through):
        super().__init__()
        self.network, self.through = network, through

    def forward(self, primals, tangents):
        out, t_out = scm_kernels.jvp(self.network, primals, tangents, tangent_grad=self.through)
        t_out = t_out if self.through else t_out.detach()
        return (out * t_out).mean() + out.square().mean()


def batches(steps=3):
    """Global batches of the same samples in every process."""
    return [dit_case(batch=2 * WORLD, seed=seed)[1:] for seed in range(steps)]


def train(module, parameters, part=slice(None), reduce=None):
    """The parameters after a few steps on a part of every batch."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for primals, tangents in batches():
        optimizer.zero_grad()
        module(tuple(x[part] for x in primals), tuple(x[part] for x in tangents)).backward()
        optimizer.step()
    return module


def network():
    return dit_case()[0]


def own_part(rank):
    return slice(2 * rank, 2 * rank + 2)


class Kept(nn.Module):
    """A block in a checkpoint."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return checkpoint(self.block, *args, use_reentrant=False)


def checkpointed():
    module = network()
    module.blocks = nn.ModuleList(map(Kept, module.blocks))
    return module


def ddp(rank, through, network=network):
    module = nn.parallel.DistributedDataParallel(Step(network(), through))
    train(module, module.parameters(), own_part(rank))
    return [p.detach() for p in module.module.network.parameters()]


def fsdp(rank, through, inside=True, network=network):
    from torch.distributed.fsdp import fully_shard

    module = Step(network(), through)
    for block in module.network.blocks:
        fully_shard(block)
    # The root is what is called from outside: the step, or the network that the jvp is of.
    fully_shard(module if inside else module.network)
    train(module, module.parameters(), own_part(rank))
    return [p.detach().full_tensor() for p in module.network.parameters()]


def jvp_of_fsdp(rank, through):
    return fsdp(rank, through, inside=False)


def ddp_of_checkpoints(rank, through):
    return ddp(rank, through, network=checkpointed)


def fsdp_of_checkpoints(rank, through):
    return fsdp(rank, through, network=checkpointed)


WAYS = [
    *((way, through) for way in (ddp, fsdp, jvp_of_fsdp) for through in (False, True)),
    *((way, False) for way in (ddp_of_checkpoints, fsdp_of_checkpoints)),
]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        results = {f"{way.__name__} {through}": way(rank, through) for way, through in WAYS}
        if rank == 0:
            torch.save(results, folder / "results.pt")
        dist.barrier()  # neither process ends while the other still talks to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The parameters that two processes have trained, by name of the way."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, folder), nprocs=WORLD)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize(("way", "through"), WAYS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_two_processes_train_as_one(trained, way, through):
    module = Step(network(), through)
    before = [p.detach().clone() for p in module.parameters()]
    train(module, module.parameters())
    after = [p.detach() for p in module.network.parameters()]
    assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    close(list(trained[f"{way.__name__} {through}"]), after, 1e-10)


# --- hooks of saved tensors, autocast -------------------------------------------------------------


def results(network, primals, tangents, run, through):
    parameters = list(network.parameters())
    out, t_out = run(network, primals, tangents)
    return out, t_out, gradients(out, t_out, parameters, through_tangent=through)


@THROUGH
@pytest.mark.parametrize("where", ["around", "inside"])
def test_hooks_of_saved_tensors(where, through):
    network, primals, tangents = dit_case()

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x)

    def hooked(network, primals, tangents):
        def inside(*args):
            with hooks():
                return network(*args)

        if where == "inside":
            return scm_kernels.jvp(inside, primals, tangents, tangent_grad=through)
        with hooks():
            return scm_kernels.jvp(network, primals, tangents, tangent_grad=through)

    got = results(network, primals, tangents, hooked, through)
    close(got, results(network, primals, tangents, true_jvp, through))


@THROUGH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where, dtype, through):
    """As near to the truth as autocast with PyTorch's own jvp, in values and in gradients."""
    network, primals, tangents = dit_case(torch.float32, width=32, tokens=16)

    def cast(jvp, **options):
        def run(network, primals, tangents):
            def inside(*args):
                with torch.autocast("cpu", dtype):
                    return network(*args)

            if where == "inside":
                return jvp(inside, primals, tangents, **options)
            with torch.autocast("cpu", dtype):
                return jvp(network, primals, tangents, **options)

        return run

    ours = cast(scm_kernels.jvp, tangent_grad=through)
    got = results(network, primals, tangents, ours, through)
    eager = results(network, primals, tangents, cast(stock_jvp), through)
    wide = copy.deepcopy(network).double()
    case = [tuple(x.double() for x in tensors) for tensors in (primals, tangents)]
    truth = results(wide, *case, true_jvp, through)
    scale = max(g.abs().max() for g in truth[2])
    for x, lo, true in zip(got[:2], eager[:2], truth[:2], strict=True):
        assert x.dtype == lo.dtype
        error, lo_error = ((y.double() - true).abs().mean() for y in (x, lo))
        assert error <= 2 * lo_error + 1e-4 * true.abs().mean()
    errors = [
        max((y - true).abs().max() / scale for y, true in zip(grads, truth[2], strict=True))
        for grads in (got[2], eager[2])
    ]
    assert errors[0] <= 2 * errors[1] + 1e-3
