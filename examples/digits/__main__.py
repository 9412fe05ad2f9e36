"""``python -m examples.digits``: teacher, student, samples, table. See ``--help``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import checkpoint, distributed
from .config import MODES, RunConfig, preset
from .run import run

TRAINING_FLAGS = ("mode", "seed", "eager", "batch_size", "teacher_steps", "student_steps")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a diffusion teacher and a two-step sCM student on 8x8 digits.",
    )
    add = parse.add_argument
    add("--mode", choices=MODES, help="distil from the teacher (scd) or from data alone (sct)")
    add("--seed", type=int, help="of weights, batches and noise; not of the data split")
    add("--teacher-steps", type=positive, metavar="N", help="training steps of the teacher")
    add("--student-steps", type=positive, metavar="N", help="training steps of the student")
    add("--batch-size", type=positive, metavar="N", help="global batch, over all processes")
    add("--eager", action="store_true", default=None, help="train without the fused path")
    add("--quick", action="store_true", help="a smoke run of some 20 seconds")
    add("--out", type=Path, default=Path("runs/digits"), help="output folder")
    add("--resume", action="store_true", help="continue the checkpoint in the output folder")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=positive, metavar="N", help="CPU threads; PyTorch's choice if absent")
    add("--checkpoint-seconds", type=float, default=20.0, metavar="S", help="default 20")
    return parse


def configure(flags: argparse.Namespace) -> RunConfig:
    """The run that the flags ask for; with --resume the checkpoint's, which they cannot change."""
    given = {name: getattr(flags, name) for name in TRAINING_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if not flags.resume:
        return replace(preset(flags.mode or "scd", flags.quick), **given)
    if flags.quick:
        raise ValueError("--quick: not with --resume, which continues the checkpoint's own run")
    saved = RunConfig.from_dict(checkpoint.read(flags.out / checkpoint.NAME)["config"])
    for name, value in given.items():
        if getattr(saved, name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, but the checkpoint that --resume "
                f"continues has {getattr(saved, name)}"
            )
    return saved


def main(arguments: list[str] | None = None) -> None:
    parse = parser()
    flags = parse.parse_args(arguments)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    try:
        distributed.pick_device(flags.device)
        config = configure(flags)
        if not flags.checkpoint_seconds >= 0.0:  # nor NaN
            got = flags.checkpoint_seconds
            raise ValueError(f"--checkpoint-seconds: got {got}, expected at least 0")
        flags.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        parse.error(f"--out: {flags.out} is no folder")
    except (ValueError, OSError) as error:
        parse.error(str(error))
    run(config, flags.out, flags.device, flags.resume, flags.checkpoint_seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
