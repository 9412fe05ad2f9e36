"""Sampling from teacher and student, timed and scored, and the time of a training step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import scm_kernels

from . import metrics
from .config import RunConfig
from .data import SIGMA_DATA, Digits
from .distributed import World
from .losses import ConsistencyLoss
from .model import DiT
from .train import Batch, Phase, draw_batch, generator

CHUNK = 250  # images a batch: what keeps the activations in cache
T_MAX = math.atan(80.0 / SIGMA_DATA)
NOISE_STREAM, STEP_NOISE_STREAM = 10, 11
Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Row:
    """A line of the table; ``noise`` is the deviation of the ``resampled`` distances."""

    sampler: str
    evaluations: int
    seconds_per_1000: float
    frechet: float
    noise: float
    nearest: float
    resampled: list[float] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "resampled"}


@dataclass
class Samples:
    """What a sampler made: images [N, 1, 8, 8], and the network evaluations and seconds of one."""

    images: Tensor
    evaluations: int
    seconds_per_image: float


def samplers(config: RunConfig) -> dict[str, Sampler]:
    """Name -> sampler; the teacher's is absent in mode sct."""

    def heun(network: Any, noise: Tensor, gen: torch.Generator) -> Tensor:
        return scm_kernels.trigflow.solve_ode(
            network, noise, steps=config.heun_steps, sigma_data=SIGMA_DATA, method="heun"
        )

    def few_steps(times: tuple[float, ...]) -> Sampler:
        def sampler(network: Any, noise: Tensor, gen: torch.Generator) -> Tensor:
            return scm_kernels.trigflow.sample(
                network, noise, times, sigma_data=SIGMA_DATA, generator=gen
            )

        return sampler

    table: dict[str, Sampler] = {}
    if config.mode == "scd":
        table[f"teacher, Heun {config.heun_steps} steps"] = heun
    table["student, 1 step"] = few_steps(config.student_times[:1])
    table["student, 2 steps"] = few_steps(config.student_times)
    return table


@torch.no_grad()
def generate(
    network: DiT, sampler: Sampler, labels: Tensor, config: RunConfig, world: World
) -> Samples:
    """One image a label. All samplers see the same noise and labels, so that they compare well."""
    shape = (len(labels), 1, config.model.image_size, config.model.image_size)
    noise = SIGMA_DATA * torch.randn(shape, generator=generator(config.seed, NOISE_STREAM, 0))
    seed = generator(config.seed, STEP_NOISE_STREAM, 0).initial_seed()
    step_noise = torch.Generator(device=world.device).manual_seed(seed)
    parts, calls, seconds = [], 0, []
    for start in range(0, len(labels), CHUNK):
        label = labels[start : start + CHUNK].to(world.device)
        first = noise[start : start + CHUNK].to(world.device)

        def counted(x: Tensor, t: Tensor, label: Tensor = label) -> Tensor:
            nonlocal calls
            calls += 1
            return network(x, t, label)

        begin = clock(world)
        parts.append(sampler(counted, first, step_noise).cpu())
        seconds.append((clock(world) - begin) / len(label))
    # The median over chunks: the first one warms up, and others may share the machine.
    return Samples(torch.cat(parts), calls // len(parts), statistics.median(seconds))


def clock(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def evaluation_labels(digits: Digits, count: int) -> Tensor:
    """Labels in the proportions of the held-out images."""
    held = digits.held_labels
    return held.repeat(math.ceil(count / len(held)))[:count]


def nearest_ratio(images: Tensor, digits: Digits) -> float:
    """Median distance to the nearest training image over that to the nearest held-out image.

    About 1 for new images and towards 0 for copies of the training set (both sets are equally big).
    """
    flat = images.flatten(1)
    count = min(len(digits.train_images), len(digits.held_images))
    train = torch.cdist(flat, digits.train_images[:count].flatten(1)).amin(1)
    held = torch.cdist(flat, digits.held_images[:count].flatten(1)).amin(1)
    return (train.median() / held.median()).item()


def score(name: str, samples: Samples, digits: Digits, classifier: metrics.Classifier) -> Row:
    generated = classifier.features(samples.images)
    real = classifier.features(digits.held_images)
    labels = evaluation_labels(digits, len(generated))
    resampled = metrics.bootstrap(generated, labels, real)
    return Row(
        sampler=name,
        evaluations=samples.evaluations,
        seconds_per_1000=1000 * samples.seconds_per_image,
        frechet=metrics.frechet_distance(generated, real),
        noise=statistics.stdev(resampled),
        nearest=nearest_ratio(samples.images, digits),
        resampled=resampled,
    )


def time_training_step(
    student: Phase, teacher: DiT | None, digits: Digits, world: World
) -> dict[str, float]:
    """Median milliseconds of a student step, fused and eager, interleaved, on copies."""
    config = student.config
    single = World(device=world.device)
    network = student.objective.network
    objectives = {
        name: ConsistencyLoss(deepcopy(network), teacher, eager=name == "eager").to(world.device)
        for name in ("fused", "eager")
    }
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for step in range(config.timed_steps + 1):
        batch = draw_batch(digits, config, "student", step, single)
        for name, objective in objectives.items():
            begin = clock(world)
            forward_backward(objective, batch)
            if step:  # the first is the warm-up
                times[name].append(1e3 * (clock(world) - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def forward_backward(objective: ConsistencyLoss, batch: Batch) -> None:
    objective.zero_grad(set_to_none=True)
    objective(batch.x0, batch.label, batch.z, batch.t, 1.0).backward()
