"""Training loops: one phase for the teacher, one for the student.

Every random number of a step is a function of (seed, phase, step) and is drawn on the CPU for the
whole global batch, so that a resumed run, a sharded run and a run on another device see the same
numbers.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import scm_kernels

from .config import RunConfig
from .data import SIGMA_DATA, Digits
from .distributed import World
from .losses import ConsistencyLoss, DiffusionLoss, new_network
from .model import DiT

PHASES = ("teacher", "student")
BETAS = (0.9, 0.99)
RATE_WARMUP = 0.05  # share of a phase over which the learning rate rises
WEIGHT_RATE = 10.0  # w(t) is one scalar a time: it can and should follow faster than the network


@dataclass(frozen=True)
class Batch:
    """x0, z [B, 1, 8, 8]; label, t [B]."""

    x0: Tensor
    label: Tensor
    z: Tensor
    t: Tensor


def generator(seed: int, stream: int, step: int) -> torch.Generator:
    """A CPU generator for one step of one stream of random numbers."""
    state = np.random.SeedSequence([seed, stream, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def draw_batch(digits: Digits, config: RunConfig, phase: str, step: int, world: World) -> Batch:
    """This process's slice of the global batch of a step."""
    gen = generator(config.seed, PHASES.index(phase), step)
    size, count = config.batch_size, len(digits.train_images)
    rounds = math.ceil(size / count)
    index = torch.cat([torch.randperm(count, generator=gen) for _ in range(rounds)])[:size]
    z = SIGMA_DATA * torch.randn(size, *digits.train_images.shape[1:], generator=gen)
    p_mean, p_std = config.teacher_p if phase == "teacher" else config.student_p
    t = scm_kernels.trigflow.sample_time(
        size, p_mean=p_mean, p_std=p_std, sigma_data=SIGMA_DATA, generator=gen
    )
    mine = world.shard(size)
    index = index[mine]
    tensors = (digits.train_images[index], digits.train_labels[index], z[mine], t[mine])
    return Batch(*(tensor.to(world.device, non_blocking=True) for tensor in tensors))


def learning_rate(peak: float, step: int, steps: int) -> float:
    """A short linear rise, then a cosine to zero: a function of the step, so nothing to save."""
    rise = max(1, round(RATE_WARMUP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Phase:
    """A network in training: objective, optimiser, EMA, step count and loss curve."""

    def __init__(self, name: str, objective: nn.Module, config: RunConfig, world: World) -> None:
        self.name, self.config, self.world = name, config, world
        self.objective = objective.to(world.device)
        self.ema = deepcopy(self.objective.network).requires_grad_(False)
        teacher = name == "teacher"
        self.steps = config.teacher_steps if teacher else config.student_steps
        self.rate = config.teacher_rate if teacher else config.student_rate
        groups = [
            {"params": list(self.objective.network.parameters()), "scale": 1.0},
            {"params": list(self.objective.log_weight.parameters()), "scale": WEIGHT_RATE},
        ]
        self.optimiser = torch.optim.Adam(groups, lr=self.rate, betas=BETAS, fused=True)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.wrapped: nn.Module = self.objective
        if world.size > 1:
            self.wrapped = DistributedDataParallel(self.objective)

    def train_step(self, digits: Digits) -> Tensor:
        """One step; returns the loss of this process's slice, detached."""
        batch = draw_batch(digits, self.config, self.name, self.step, self.world)
        arguments: list[Any] = [batch.x0, batch.label, batch.z, batch.t]
        if self.name == "student":
            arguments.append(self.tangent_warmup())
        loss = self.wrapped(*arguments)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = group["scale"] * learning_rate(self.rate, self.step, self.steps)
        self.optimiser.step()
        self._update_ema()
        self.step += 1
        return loss.detach()

    def tangent_warmup(self) -> float:
        """r = min(1, step / H) of arXiv 2410.11081, Algorithm 1, counting steps from 1.

        At r = 0 a student that still is its teacher has a gradient of nothing but rounding errors,
        and Adam would blow these up to a full step.
        """
        return min(1.0, (self.step + 1) / max(1.0, self.config.tangent_warmup * self.steps))

    def _update_ema(self) -> None:
        """An exponential average over about ``ema_share`` of the steps taken so far."""
        decay = 1.0 - 1.0 / max(1.0, self.config.ema_share * (self.step + 1))
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.objective.network.parameters(), strict=True)
            for average, parameter in pairs:
                average.lerp_(parameter, 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = list(state["losses"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.ema.load_state_dict(state["ema"])


def teacher_phase(config: RunConfig, world: World) -> Phase:
    network = new_network(config.model, config.seed)
    return Phase("teacher", DiffusionLoss(network), config, world)


def student_phase(config: RunConfig, world: World, teacher: DiT | None) -> Phase:
    """sCD starts from the teacher's weights; sCT, from data alone, starts from random ones."""
    network = new_network(config.model, config.seed)
    if teacher is not None:
        network.load_state_dict(teacher.state_dict())
    objective = ConsistencyLoss(network, teacher, eager=config.eager)
    return Phase("student", objective, config, world)


def run_phase(phase: Phase, digits: Digits, save: Callable[[bool], None]) -> None:
    """Train to the phase's last step; ``save(False)`` may write a checkpoint."""
    start = time.perf_counter() - phase.seconds
    show_bar = phase.world.rank == 0 and sys.stderr.isatty()
    every = max(1, phase.steps // 8)
    with tqdm(total=phase.steps, initial=phase.step, desc=phase.name, disable=not show_bar) as bar:
        while phase.step < phase.steps:
            loss = phase.world.mean(phase.train_step(digits)).item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"{phase.name}: the loss of step {phase.step} is {loss}")
            phase.losses.append(loss)
            phase.seconds = time.perf_counter() - start
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if not show_bar and (phase.step % every == 0 or phase.step == phase.steps):
                recent = sum(phase.losses[-every:]) / len(phase.losses[-every:])
                phase.world.print(
                    f"{phase.name} step {phase.step}/{phase.steps}  loss {recent:.3f}  "
                    f"{phase.seconds:.0f} s"
                )
            save(phase.step == phase.steps)
