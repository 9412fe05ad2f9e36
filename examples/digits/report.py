"""What a run leaves behind: the printed table, samples.png, loss.png and report.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from .evaluate import Row

COLUMNS = 20
SMOOTHING = 20


def table(rows: list[Row], floor: float, floor_noise: float) -> str:
    """The one table of the run."""
    head = f"{'sampler':<24}{'evaluations':>12}{'s / 1,000':>11}{'Frechet':>10}{'+/-':>8}"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.sampler:<24}{row.evaluations:>12}{row.seconds_per_1000:>11.3f}"
            f"{row.frechet:>10.4f}{row.noise:>8.4f}"
        )
    lines.append(f"{'floor: two real halves':<24}{'':>12}{'':>11}{floor:>10.4f}{floor_noise:>8.4f}")
    return "\n".join(lines)


def comparison(rows: list[Row]) -> dict[str, float]:
    """The headline: the two-step student against the teacher."""
    teacher, two = rows[0], rows[-1]
    ratios = [b / a for a, b in zip(teacher.resampled, two.resampled, strict=True)]
    return {
        "frechet_ratio": two.frechet / teacher.frechet,
        "frechet_ratio_noise": statistics.stdev(ratios),
        "time_ratio": teacher.seconds_per_1000 / two.seconds_per_1000,
        "evaluation_ratio": teacher.evaluations / two.evaluations,
    }


def save_samples(path: Path, rows: dict[str, Tensor]) -> None:
    """A labelled row of pictures (values in [0, 1], [N, 1, 8, 8]) a sampler; a column a digit."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(COLUMNS * 0.55, len(rows) * 0.85))
    for axis, (name, images) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        padded = torch.nn.functional.pad(images[:COLUMNS, 0], (1, 0, 0, 0), value=0.5)
        axis.imshow(torch.cat(list(padded), dim=1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_losses(path: Path, curves: dict[str, list[float]]) -> None:
    """The loss of every step and its running mean, a panel a phase."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.2), squeeze=False)
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        window = min(SMOOTHING, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(values, linewidth=0.5, alpha=0.4)
        axis.plot(np.arange(window - 1, len(values)), smooth, linewidth=1.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def save_report(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")
