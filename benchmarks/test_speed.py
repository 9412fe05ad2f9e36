"""The cases of `python -m benchmarks --quick` under pytest-benchmark: `pytest benchmarks`."""

from functools import lru_cache

import pytest
import torch

from benchmarks import cases, providers
from benchmarks.suite import PROBLEMS, effort_of, refusal, seconds_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EFFORT = effort_of("quick", DEVICE)
LEFT_OUT = tuple(name for name, _ in EFFORT.left_out)
OURS = [name for name, _, _ in providers.in_order(DEVICE) if not name.endswith(LEFT_OUT)]


@lru_cache(maxsize=1)
def drawn(case: cases.Case) -> providers.Problem:
    return PROBLEMS[case.kind](case, DEVICE)


@pytest.mark.parametrize("name", [providers.EAGER, providers.SDPA, *OURS])
@pytest.mark.parametrize("case", cases.select("quick", DEVICE), ids=lambda case: case.label)
def test_speed(benchmark, case, name):
    problem = drawn(case)
    mine = [provider for provider in problem.providers if provider.name.startswith(name)]
    if not mine:
        pytest.skip("it has no such pass")
    provider = mine[0]
    reason = provider.reason or refusal(provider, DEVICE, seconds_of(problem, DEVICE), EFFORT)
    if reason is not None:
        pytest.skip(reason)
    wrong = problem.check((provider.values or provider.run)())
    assert wrong is None, f"{provider.name}: {wrong}"

    def run():
        provider.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.label
    benchmark.extra_info["work"] = problem.work
    benchmark.pedantic(run, rounds=EFFORT.repeats[0], warmup_rounds=1)
