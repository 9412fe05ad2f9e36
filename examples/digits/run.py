"""The whole job in order: data, teacher, student, step times, samples, table and files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, distributed, evaluate, metrics, report
from .config import RunConfig
from .distributed import World
from .model import DiT
from .train import Phase, run_phase, student_phase, teacher_phase


class Job:
    """A run with all that its checkpoint holds."""

    def __init__(
        self, config: RunConfig, out: Path, world: World, resume: bool, save_seconds: float
    ) -> None:
        self.config, self.out, self.world = config, out, world
        self.digits = data.load()
        self.phases: dict[str, Phase] = {}
        self.samples: dict[str, dict[str, Any]] = {}
        self.elapsed_before = 0.0
        self.start = time.perf_counter()
        path = out / checkpoint.NAME
        self.saved = checkpoint.read(path) if resume else None
        if self.saved:
            self.samples = dict(self.saved["samples"])
            self.elapsed_before = self.saved["elapsed"]
        elif world.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        self.save = checkpoint.Saver(path, self.state_dict, save_seconds, world.rank == 0)

    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "phases": {name: phase.state_dict() for name, phase in self.phases.items()},
            "samples": self.samples,
            "elapsed": self.elapsed(),
        }

    def train(self, phase: Phase) -> Phase:
        """Run a phase from its start, or from where the checkpoint left it."""
        self.phases[phase.name] = phase
        if self.saved and phase.name in self.saved["phases"]:
            phase.load_state_dict(self.saved["phases"][phase.name])
            self.world.print(f"{phase.name}: resumed at step {phase.step} of {phase.steps}")
        run_phase(phase, self.digits, self.save)
        return phase

    def train_all(self) -> tuple[DiT | None, Phase]:
        teacher = None
        if self.config.mode == "scd":
            teacher = self.train(teacher_phase(self.config, self.world)).ema
        student = self.train(student_phase(self.config, self.world, teacher))
        return teacher, student

    def sample_all(self, teacher: DiT | None, student: DiT) -> dict[str, evaluate.Samples]:
        """Every sampler's images; a finished sampler is in the checkpoint and is not run again."""
        labels = evaluate.evaluation_labels(self.digits, self.config.generated)
        for name, sampler in evaluate.samplers(self.config).items():
            if name not in self.samples:
                network = teacher if name.startswith("teacher") else student
                made = evaluate.generate(network, sampler, labels, self.config, self.world)
                self.samples[name] = vars(made)
                self.save(True)
        return {name: evaluate.Samples(**values) for name, values in self.samples.items()}


def run(
    config: RunConfig, out: Path, device: str, resume: bool, save_seconds: float = 20.0
) -> None:
    """Train and, on the first process, evaluate and write the files."""
    world = distributed.start(device)
    world.shard(config.batch_size)
    job = Job(config, out, world, resume, save_seconds)
    world.print(
        f"digits: {config.mode}, seed {config.seed}, {world.device}, {world.size} process(es), "
        f"{torch.get_num_threads()} thread(s)"
    )
    teacher, student = job.train_all()
    distributed.stop(world)
    if world.rank == 0:
        finish(job, teacher, student)


def finish(job: Job, teacher: DiT | None, student: Phase) -> None:
    """Samples, scores, step times; the table on the screen and the files in the folder."""
    config, digits = job.config, job.digits
    classifier = metrics.train_classifier(digits.train_images, digits.train_labels)
    accuracy = classifier.accuracy(digits.held_images, digits.held_labels)
    samples = job.sample_all(teacher, student.ema)
    rows = [evaluate.score(name, made, digits, classifier) for name, made in samples.items()]
    images = torch.cat([digits.train_images, digits.held_images])
    labels = torch.cat([digits.train_labels, digits.held_labels])
    floor = metrics.floor_distance(classifier.features(images), labels)
    steps = evaluate.time_training_step(student, teacher, digits, job.world)

    print(f"\n{report.table(rows, floor.value, floor.noise)}\n")
    result: dict[str, Any] = {}
    if teacher is not None:
        result = report.comparison(rows)
        print(
            f"two steps / teacher: distance x{result['frechet_ratio']:.3f} "
            f"(+/- {result['frechet_ratio_noise']:.3f}), "
            f"time x1/{result['time_ratio']:.0f}"
        )
    print(
        f"student step: fused {steps['fused']:.0f} ms, eager two-pass {steps['eager']:.0f} ms "
        f"(x{steps['eager'] / steps['fused']:.2f})"
    )
    pictures = {name: digits.to_pixels(made.images) for name, made in samples.items()}
    pictures["real, held out"] = digits.to_pixels(digits.held_images)
    report.save_samples(job.out / "samples.png", pictures)
    report.save_losses(
        job.out / "loss.png", {name: phase.losses for name, phase in job.phases.items()}
    )
    total = job.elapsed()
    seconds = {name: phase.seconds for name, phase in job.phases.items()}
    report.save_report(
        job.out / "report.json",
        {
            "config": config.to_dict(),
            "environment": report.environment(job.world.device),
            "rows": [row.to_dict() for row in rows],
            "floor": {"frechet": floor.value, "noise": floor.noise},
            "classifier_accuracy": accuracy,
            "two_steps_against_teacher": result,
            "milliseconds_per_student_step": steps,
            "seconds": {**seconds, "total": total},
            "losses": {name: phase.losses for name, phase in job.phases.items()},
        },
    )
    print(f"{total:.0f} s in all; files in {job.out}")
