"""The two training objectives as modules, so that DDP can wrap them with the jvp on the inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scm_kernels

from .data import SIGMA_DATA
from .model import DiT, LogWeight, ModelConfig

# The paper's c = 0.1 stands beside norms over CIFAR-10's 3,072 elements; norms grow with the root.
TANGENT_C = 0.1 * math.sqrt(64 / 3072)

Network = Callable[[Tensor, Tensor], Tensor]


class DiffusionLoss(nn.Module):
    """E || sd F(x_t / sd, t) - v_t ||^2, with a learned w(t) (arXiv 2410.11081, section 3)."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network
        self.log_weight = LogWeight(network.config)

    def forward(self, x0: Tensor, label: Tensor, z: Tensor, t: Tensor) -> Tensor:
        x_t = scm_kernels.trigflow.interpolate(x0, z, t)
        target = scm_kernels.trigflow.velocity(x0, z, t)
        output = self.network(x_t / SIGMA_DATA, t, label)
        error = (SIGMA_DATA * output - target).square().flatten(1).mean(1)
        log_weight = self.log_weight(t)
        return (log_weight.exp() * error - log_weight).mean()


class ConsistencyLoss(nn.Module):
    """sCD with a teacher, sCT without (arXiv 2410.11081, Algorithm 1).

    The fused path is one pass, ``scm_kernels.jvp``: F with its graph and J without one. The eager
    path is what one writes without the package: ``torch.func.jvp`` over math attention for the
    tangent, then a second forward for the gradient.
    """

    def __init__(self, network: DiT, teacher: DiT | None, eager: bool = False) -> None:
        super().__init__()
        self.network = network
        self.log_weight = LogWeight(network.config)
        self.eager = eager
        self._teacher = (teacher,)  # in a tuple: neither trained, nor saved, nor synchronised

    def forward(self, x0: Tensor, label: Tensor, z: Tensor, t: Tensor, warmup: float) -> Tensor:
        x_t = scm_kernels.trigflow.interpolate(x0, z, t)
        dxdt = self._velocity(x0, label, z, t, x_t)
        primals, tangents = scm_kernels.trigflow.tangent_inputs(x_t, dxdt, t, sigma_data=SIGMA_DATA)

        def network(x: Tensor, time: Tensor) -> Tensor:
            return self.network(x, time, label)

        if self.eager:
            output, jvp = eager_jvp(network, primals, tangents)
        else:
            output, jvp = scm_kernels.jvp(network, primals, tangents, tangent_grad=False)
        return scm_kernels.consistency_loss(
            output,
            dxdt,
            x_t,
            jvp,
            t,
            self.log_weight(t),
            warmup=warmup,
            sigma_data=SIGMA_DATA,
            c=TANGENT_C,
        )

    def _velocity(self, x0: Tensor, label: Tensor, z: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        (teacher,) = self._teacher
        if teacher is None:
            return scm_kernels.trigflow.velocity(x0, z, t)
        with torch.no_grad():
            return SIGMA_DATA * teacher(x_t / SIGMA_DATA, t, label)


def eager_jvp(
    network: Network, primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(F with a graph, J without) in two passes of stock PyTorch."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, jvp = torch.func.jvp(network, primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):
        output = network(*primals)
    return output, jvp


def new_network(config: ModelConfig, seed: int) -> DiT:
    """A network whose first weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(config)
