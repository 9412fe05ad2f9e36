"""examples/digits: its parts, exact resume, eager against fused, and whole runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import scm_kernels
from examples.digits import __main__ as cli
from examples.digits import checkpoint, data, evaluate, metrics
from examples.digits.config import RunConfig, preset
from examples.digits.distributed import World
from examples.digits.losses import eager_jvp, new_network
from examples.digits.model import DiT, ModelConfig, patchify, pixel_norm, unpatchify
from examples.digits.run import Job
from examples.digits.train import draw_batch, student_phase, teacher_phase

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(width=32, depth=2, heads=2)
SMALL_RUN = RunConfig(batch_size=16, teacher_steps=5, student_steps=6, model=TINY)


def random_network(config: ModelConfig = TINY) -> DiT:
    """A network whose zero-initialised weights are random too: nothing is trivially zero."""
    network = new_network(config, seed=0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
    return network


# --- data and model ----------------------------------------------------------------------------


def test_data_has_sigma_data_half_and_a_fixed_split():
    digits = data.load()
    assert len(digits.train_images) + len(digits.held_images) == 1797
    assert digits.train_images.mean().abs() < 1e-5
    assert abs(digits.train_images.std().item() - data.SIGMA_DATA) < 1e-5
    pixels = digits.to_pixels(digits.train_images)
    assert pixels.min() >= 0.0
    assert pixels.max() <= 1.0
    torch.testing.assert_close(digits.held_images, data.load().held_images, rtol=0, atol=0)
    shares = digits.train_labels.bincount() / len(digits.train_labels)
    torch.testing.assert_close(
        shares, digits.held_labels.bincount() / len(digits.held_labels), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_model_shapes(batch):
    x, t, label = torch.randn(batch, 1, 8, 8), torch.rand(batch), torch.arange(batch)
    assert random_network()(x, t, label).shape == x.shape
    torch.testing.assert_close(unpatchify(patchify(x, 2), 2, 8), x, rtol=0, atol=0)
    norms = pixel_norm(torch.randn(3, 7, 32)).square().mean(-1)
    torch.testing.assert_close(norms, torch.ones(3, 7), rtol=0, atol=1e-5)


def test_model_sees_time_and_label():
    network, x = random_network(), torch.randn(1, 1, 8, 8)
    base = network(x, torch.tensor([0.5]), torch.tensor([3]))
    assert (network(x, torch.tensor([0.9]), torch.tensor([3])) - base).abs().max() > 1e-3
    assert (network(x, torch.tensor([0.5]), torch.tensor([4])) - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [("patch", {"patch": 3}), ("width", {"heads": 5}), ("width", {"width": 33, "heads": 1})],
)
def test_model_refuses_sizes_that_do_not_divide(name, changes):
    with pytest.raises(ValueError, match=name):
        replace(TINY, **changes)


def test_jvp_is_finite_and_that_of_eager_over_the_whole_time_range():
    network = random_network()
    t = torch.tensor([0.0, 1e-4, 0.3, 1.1, evaluate.T_MAX, math.pi / 2])
    gen = torch.Generator().manual_seed(2)
    x_t, dxdt = (0.5 * torch.randn(len(t), 1, 8, 8, generator=gen) for _ in range(2))
    primals, tangents = scm_kernels.trigflow.tangent_inputs(x_t, dxdt, t)
    label = torch.arange(len(t))

    def call(x, time):
        return network(x, time, label)

    out, jvp = scm_kernels.jvp(call, primals, tangents)
    eager_out, eager = eager_jvp(call, primals, tangents)
    assert jvp.isfinite().all()
    assert jvp.abs().max() < 100
    torch.testing.assert_close(out, eager_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(jvp, eager, rtol=1e-4, atol=1e-4)
    assert out.requires_grad
    assert not jvp.requires_grad


# --- metric --------------------------------------------------------------------------------------


def gaussian_like(mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Features whose sample moments are exactly these."""
    noise = torch.randn(200, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    noise = noise - noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_a_closed_form():
    zero, shift = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    one = torch.diag(torch.tensor([1.0, 4.0, 0.25]).double())
    two = torch.diag(torch.tensor([9.0, 1.0, 0.25]).double())
    rotation, _ = torch.linalg.qr(torch.arange(9.0).reshape(3, 3).double() + torch.eye(3))
    expected = 5.25 + (3 - 1) ** 2 + (1 - 2) ** 2
    a = gaussian_like(zero, one, 0) @ rotation
    b = gaussian_like(shift, two, 1) @ rotation
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, abs=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_refuses_other_shapes():
    with pytest.raises(ValueError, match="features"):
        metrics.frechet_distance(torch.randn(9, 3), torch.randn(9, 4))


def test_classifier_learns_and_is_the_same_every_time():
    digits = data.load()
    one, two = (
        metrics.train_classifier(digits.train_images, digits.train_labels, steps=60)
        for _ in range(2)
    )
    assert one.accuracy(digits.held_images, digits.held_labels) > 0.85
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# --- training ------------------------------------------------------------------------------------


def losses_of(phase, digits, steps: int) -> torch.Tensor:
    return torch.stack([phase.train_step(digits) for _ in range(steps)])


@pytest.mark.parametrize("mode", ["scd", "sct"])
def test_fused_and_eager_give_the_same_loss_curve(mode):
    digits, steps = data.load(), 12
    config = replace(preset(mode, quick=True), batch_size=32, student_steps=steps, model=TINY)
    teacher = random_network() if mode == "scd" else None
    fused, eager = (
        losses_of(student_phase(replace(config, eager=flag), World(), teacher), digits, steps)
        for flag in (False, True)
    )
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
    assert fused[-1] < fused[0]


def test_shards_of_a_batch_are_its_slices():
    digits, config = data.load(), replace(SMALL_RUN, batch_size=12)
    whole = draw_batch(digits, config, "student", 3, World())
    parts = [draw_batch(digits, config, "student", 3, World(rank, 3)) for rank in range(3)]
    for name in ("x0", "label", "z", "t"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name))
    with pytest.raises(ValueError, match="batch_size"):
        World(0, 5).shard(12)


class KilledError(Exception):
    pass


def train(out: Path, resume: bool, stop: int | None = None) -> Job:
    """Train with a checkpoint every step; ``stop``: break off just after that many saved steps."""
    job = Job(SMALL_RUN, out, World(), resume, save_seconds=0.0)
    save, left = job.save, [stop]

    def save_and_perhaps_stop(now: bool = False) -> None:
        save(True)
        if left[0] is not None:
            left[0] -= 1
            if left[0] <= 0:
                raise KilledError

    job.save = save_and_perhaps_stop
    job.train_all()
    return job


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_resume_continues_bitwise(tmp_path, stop):
    whole = train(tmp_path / "whole", resume=False)
    with pytest.raises(KilledError):
        train(tmp_path / "cut", resume=False, stop=stop)
    torch.randn(3)  # the global generator must not matter
    train(tmp_path / "cut", resume=True)
    one, two = (checkpoint.read(tmp_path / name / checkpoint.NAME) for name in ("whole", "cut"))
    assert one["phases"].keys() == two["phases"].keys() == whole.phases.keys()
    for name, phase in one["phases"].items():
        other = two["phases"][name]
        assert phase["losses"] == other["losses"]
        assert len(phase["losses"]) == phase["step"]
        for part in ("objective", "ema"):
            assert all(torch.equal(v, other[part][k]) for k, v in phase[part].items())
        for index, slots in phase["optimiser"]["state"].items():
            there = other["optimiser"]["state"][index]
            assert all(torch.equal(value, there[key]) for key, value in slots.items())


def test_checkpoint_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, {"value": 1})
    checkpoint.write(path, {"value": 2})
    assert checkpoint.read(path)["value"] == 2
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]


def test_samplers_count_their_evaluations():
    digits, config = data.load(), replace(SMALL_RUN, heun_steps=4)
    labels = evaluate.evaluation_labels(digits, 7)
    network = random_network()
    made = {
        name: evaluate.generate(network, sampler, labels, config, World())
        for name, sampler in evaluate.samplers(config).items()
    }
    assert [samples.evaluations for samples in made.values()][1:] == [1, 2]
    assert next(iter(made.values())).evaluations in (7, 8)
    assert all(samples.images.shape == (7, 1, 8, 8) for samples in made.values())


# --- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "sct", "--teacher-steps", "5"], "data alone"),
        (["--student-steps", "0"], "at least 1"),
        (["--mode", "other"], "invalid choice"),
        (["--device", "abacus"], "device"),
        (["--resume"], "no checkpoint"),
        (["--resume", "--quick"], "--quick"),
        (["--seed", "-1"], "seed: got -1, expected 0"),
        (["--seed", str(2**63)], "seed: got 9223372036854775808"),
        (["--out", __file__], "is no folder"),
    ],
)
def test_bad_flags_are_refused_with_the_reason(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--out", str(tmp_path / "none"), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_resume_refuses_what_is_no_checkpoint(tmp_path, capsys, content):
    (tmp_path / checkpoint.NAME).write_bytes(content)
    with pytest.raises(SystemExit):
        cli.main(["--out", str(tmp_path), "--resume"])
    assert "is no checkpoint" in capsys.readouterr().err


def test_resume_refuses_a_flag_that_contradicts_the_checkpoint(tmp_path, capsys):
    checkpoint.write(tmp_path / checkpoint.NAME, {"config": SMALL_RUN.to_dict()})
    flags = cli.parser().parse_args(["--out", str(tmp_path), "--resume"])
    assert cli.configure(flags) == SMALL_RUN
    with pytest.raises(SystemExit):
        cli.main(["--out", str(tmp_path), "--resume", "--seed", "3"])
    assert "--seed" in capsys.readouterr().err


# --- whole runs ----------------------------------------------------------------------------------


def command(out: Path, *flags: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    start = [] if "--resume" in flags else ["--quick"]
    return [*launcher, "-m", "examples.digits", "--out", str(out), *start, *flags]


def run(out: Path, *flags: str, processes: int = 1) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        command(out, *flags, processes=processes),
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=300,
    )
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["scd", "sct"])
def test_quick_run_writes_every_file(tmp_path, mode):
    report = run(tmp_path, "--mode", mode)
    for name in ("samples.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    evaluations = [row["evaluations"] for row in report["rows"]]
    assert evaluations[-2:] == [1, 2]
    assert len(evaluations) == (3 if mode == "scd" else 2)
    assert all(math.isfinite(row["frechet"]) for row in report["rows"])
    assert report["milliseconds_per_student_step"].keys() == {"fused", "eager"}
    assert len(report["losses"]["student"]) == report["config"]["student_steps"]
    assert checkpoint.read(tmp_path / checkpoint.NAME)["phases"].keys() == report["losses"].keys()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = run(tmp_path / "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = command(tmp_path / "cut", "--checkpoint-seconds", "0")
    process = subprocess.Popen(start, cwd=ROOT, env=environment)
    path = tmp_path / "cut" / checkpoint.NAME
    deadline = time.monotonic() + 120
    while not path.exists() or "student" not in checkpoint.read(path)["phases"]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = run(tmp_path / "cut", "--resume")
    assert cut["losses"] == whole["losses"]
    assert [r["frechet"] for r in cut["rows"]] == [r["frechet"] for r in whole["rows"]]


@pytest.mark.slow
def test_two_processes_match_one(tmp_path):
    flags = ("--teacher-steps", "6", "--student-steps", "6")
    one = run(tmp_path / "one", *flags)
    two = run(tmp_path / "two", *flags, processes=2)
    for name, losses in one["losses"].items():
        assert two["losses"][name] == pytest.approx(losses, rel=1e-4, abs=1e-4)
    states = [checkpoint.read(tmp_path / n / checkpoint.NAME)["phases"] for n in ("one", "two")]
    for name, phase in states[0].items():
        for key, value in phase["objective"].items():
            other = states[1][name]["objective"][key]
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_teacher_phase_starts_from_the_seed():
    one, two, other = (
        teacher_phase(replace(SMALL_RUN, seed=seed), World()).objective.state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
