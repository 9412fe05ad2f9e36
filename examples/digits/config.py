"""The settings of a run: all that decides its numbers, saved in its checkpoint and report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .model import ModelConfig

MODES = ("scd", "sct")


@dataclass(frozen=True)
class RunConfig:
    """Defaults are those of the CPU run of under four minutes on two cores.

    P_mean and P_std are those of the time proposal t = arctan(exp(tau) / sd) of arXiv 2410.11081,
    section 3; ``tangent_warmup`` is H of r = min(1, step / H) (Algorithm 1), as a share of the run.
    """

    mode: str = "scd"
    seed: int = 0
    eager: bool = False
    batch_size: int = 128
    teacher_steps: int = 1000
    student_steps: int = 1400
    teacher_rate: float = 3e-3
    student_rate: float = 3e-4
    teacher_p: tuple[float, float] = (-0.8, 1.4)
    student_p: tuple[float, float] = (-1.4, 1.6)
    tangent_warmup: float = 0.1
    ema_share: float = 0.05
    student_times: tuple[float, float] = (1.5, 1.2)
    heun_steps: int = 63
    generated: int = 3000
    timed_steps: int = 40
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, expected one of {MODES}")
        for name in ("batch_size", "student_steps", "heun_steps", "generated"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2^63 - 1")
        if self.mode == "sct" and self.teacher_steps:
            raise ValueError(
                f"teacher_steps: got {self.teacher_steps}, but mode sct trains from data alone"
            )
        if self.mode == "scd" and self.teacher_steps < 1:
            raise ValueError(f"teacher_steps: got {self.teacher_steps}, but scd needs a teacher")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> RunConfig:
        values = dict(values, model=ModelConfig(**values["model"]))
        for name in ("teacher_p", "student_p", "student_times"):
            values[name] = tuple(values[name])
        return RunConfig(**values)


def preset(mode: str, quick: bool) -> RunConfig:
    """The defaults of a mode; ``quick`` is a smoke run, too short to learn much."""
    config = RunConfig() if mode == "scd" else RunConfig(mode=mode, teacher_steps=0)
    if mode == "sct":
        config = replace(config, student_steps=1800, student_rate=1e-3, tangent_warmup=0.5)
    if quick:
        config = replace(
            config,
            batch_size=64,
            teacher_steps=40 if mode == "scd" else 0,
            student_steps=40,
            heun_steps=7,
            generated=200,
            timed_steps=5,
        )
    return config
