"""One case measured: who can, who is right, and how long each of those takes, in turns."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
import torch.autograd.forward_ad as forward_ad

from benchmarks import attention_providers, network_providers, tangent_providers
from benchmarks.cases import Case
from benchmarks.common import interleaved
from benchmarks.device import Neighbours, free_bytes, peak_bytes, timer
from benchmarks.limits import Limit
from benchmarks.providers import COMPILED, EAGER, SDPA, Problem, Provider, ours

PROBLEMS = {
    "attention": attention_providers.problem,
    "tangent": tangent_providers.problem,
    "block": network_providers.problem,
    "step": network_providers.problem,
}
LIMIT = "limit"
QUIET = 0.1  # cores
# How far below the limit a provider is expected, before it has run: a kernel, or many of PyTorch's.
KERNEL, COMPOSED = 1.5, 6


@dataclass(frozen=True)
class Effort:
    """How much time a case may take.

    seconds: of all turns. repeats: the least and the most of them. patience: seconds that a call
    may take. total: seconds after which no further case is begun. left_out: providers, by the end
    of their names, that are not measured, and why.
    """

    seconds: float
    repeats: tuple[int, int]
    patience: float
    total: float = math.inf
    left_out: tuple[tuple[str, str], ...] = ()


REFERENCE = "(reference)"
QUICK_LEAVES_OUT = tuple((name, "left out by --quick") for name in (COMPILED, REFERENCE))
EFFORTS = {
    "tiny": Effort(0.0, (3, 3), 1.0, left_out=((COMPILED, "left out by --tiny"),)),
    "quick": Effort(0.6, (3, 30), 2.0, 65.0, QUICK_LEAVES_OUT),
    "default": Effort(2.0, (9, 100), 10.0),
    "full": Effort(10.0, (9, 200), 600.0),
}


def effort_of(scale: str, device: str) -> Effort:
    """What a scale takes; the reference is left out only where we have something faster."""
    effort = EFFORTS[scale]
    if scale == "quick" and device == "cuda":
        effort = replace(effort, total=105.0)  # kernels are compiled in it
    if [name for name, reason in ours(device).items() if reason is None] == ["reference"]:
        rest = tuple(pair for pair in effort.left_out if pair[0] != REFERENCE)
        effort = replace(effort, left_out=rest)
    return effort


def measure(case: Case, device: str, effort: Effort) -> list[dict]:
    """A row for each provider: time, rate, share of the limit and memory, or why it has none."""
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # each shape is compiled anew, and none reaches the limit of compilations
    try:
        problem = PROBLEMS[case.kind](case, device)
        seconds = seconds_of(problem, device)
    except RuntimeError as error:  # too large, or a GPU that an earlier provider has broken
        return not_begun(case, _summary(error))
    rows, runs = {}, {}
    for provider in problem.providers:
        provider.reason = provider.reason or refusal(provider, device, seconds, effort)
        rows[provider.name] = row = _row(case, provider)
        if provider.reason is None:
            row |= _tried(provider, problem.check, device, effort.patience)
        if row["reason"] is None:
            runs[provider.name] = provider.run
    try:
        times = timed(runs, problem.limit, device, effort) if runs else {}
    except RuntimeError as error:  # of memory, say: each alone had enough
        times, reason = {}, _summary(error)
        rows |= {name: rows[name] | {"reason": reason} for name in runs}
    for name in runs.keys() & times.keys():
        rows[name] |= _figures(times[name], times[LIMIT], problem)
    _compare(rows, problem.arithmetic)
    return list(rows.values())


def not_begun(case: Case, reason: str) -> list[dict]:
    """What stands for a case that is not measured at all."""
    return [_row(case, Provider("all", lambda: (), reason=reason))]


def refusal(provider: Provider, device: str, seconds: float, effort: Effort) -> str | None:
    """Why a provider is not tried: left out, too large for the memory, or too slow.

    `seconds`: what it would take at the limit.
    """
    for name, why in effort.left_out:
        if provider.name.removesuffix(", one pass").endswith(name):
            return why
    free = free_bytes(device)
    if free is not None and provider.memory > 0.8 * free:
        return f"needs some {provider.memory / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
    composed = provider.name.startswith(EAGER) or REFERENCE in provider.name
    seconds *= COMPOSED if composed else KERNEL
    if seconds > effort.patience:
        return f"some {seconds:.3g} s a call, {_limit_of(effort.patience)}"
    return None


def _limit_of(patience: float) -> str:
    return f"more than the {patience:g} s of --patience"


def seconds_of(problem: Problem, device: str) -> float:
    """What a call would take at the limit."""
    return problem.work / _rate(problem.limit, device)


@cache
def _rate(limit: Limit, device: str) -> float:
    """Operations or bytes a second, by a quick look."""
    return 1e3 * limit.work / interleaved({LIMIT: limit.run}, 4, timer(device))[LIMIT]["p50"]


def _tried(provider: Provider, check: Callable, device: str, patience: float) -> dict:
    """Whether it runs and is right (the warm-up, and the compilation), and the memory it holds."""
    try:
        reason = check((provider.values or provider.run)())
        if reason is not None:
            return {"reason": reason}
        start = time.perf_counter()
        peak = _peak(provider, device)
        if (seconds := time.perf_counter() - start) > patience:
            return {"reason": f"{seconds:.3g} s a call, {_limit_of(patience)}"}
        return {"peak bytes": peak}
    except Exception as error:  # whatever a provider cannot do is its reason, not the end of a run
        _close_dual_level()
        return {"reason": _summary(error)}


def _peak(provider: Provider, device: str) -> int | None:
    """The memory of a run; None where a CPU's cannot be counted."""
    if provider.counted or device == "cuda":
        return peak_bytes(provider.run, device)
    provider.run()
    return None


def _close_dual_level() -> None:
    """A jvp that fails to compile leaves its level of forward mode open (PyTorch 2.14)."""
    try:
        with forward_ad.dual_level():
            pass
    except RuntimeError:
        torch._C._exit_dual_level(level=0)


def _summary(error: Exception) -> str:
    """Its type and its first two lines, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:200]


def timed(runs: dict[str, Callable], limit: Limit, device: str, effort: Effort) -> dict[str, dict]:
    """Quantiles of the runs and of their limit, with as many turns as fit into the effort."""
    everyone, take = {**runs, LIMIT: limit.run}, timer(device)
    start = time.perf_counter()
    for run in everyone.values():
        take(run)
    turn = time.perf_counter() - start
    least, most = effort.repeats
    repeats = min(most, max(least, math.ceil(effort.seconds / turn)))
    neighbours = Neighbours()
    times = interleaved(everyone, repeats, take, warm_up=False)
    about = {"repeats": repeats, "cores taken": neighbours.cores() if device == "cpu" else None}
    return {name: value | about for name, value in times.items()}


def quietest(case: Case, device: str, effort: Effort, end: float) -> list[dict]:
    """`measure` again until nobody took our cores meanwhile, or the clock is past `end`.

    Of all attempts the least disturbed.
    """
    best = measure(case, device, effort)
    while disturbance(best) > QUIET and time.perf_counter() < end:
        time.sleep(2)
        best = min(best, measure(case, device, effort), key=disturbance)
    return best


def disturbance(rows: list[dict]) -> float:
    """Cores that other processes took in the most disturbed of the rows; 0 on a GPU."""
    return max((row["cores taken"] or 0.0 for row in rows), default=0.0)


def _row(case: Case, provider: Provider) -> dict:
    about = asdict(case) | {"shape": list(case.shape)}
    figures = ("p20 ms", "p50 ms", "p80 ms", "repeats", "cores taken", "rate", "unit")
    ratios = (
        "limit",
        "limit p50 ms",
        "of limit",
        "eager / this",
        "this / SDPA",
        "arithmetic",
        "peak bytes",
    )
    empty = dict.fromkeys((*figures, *ratios))
    return about | {"provider": provider.name, "reason": provider.reason} | empty


def _figures(time: dict, limit_time: dict, problem: Problem) -> dict:
    limit = problem.limit
    rate = problem.work / time["p50"] / 1e6
    return {
        **{f"{name} ms": time[name] for name in ("p20", "p50", "p80")},
        "repeats": time["repeats"],
        "cores taken": time["cores taken"],
        "rate": rate,
        "unit": limit.unit,
        "limit": limit.name,
        "limit p50 ms": limit_time["p50"],
        "of limit": rate / (limit.work / limit_time["p50"] / 1e6),
    }


def _compare(rows: dict[str, dict], arithmetic: float | None) -> None:
    """Ratios to eager, and to attention without a tangent."""
    eager = next((row["p50 ms"] for name, row in rows.items() if name.startswith(EAGER)), None)
    fused = rows.get(SDPA, {}).get("p50 ms")
    if fused is not None:  # it does less: neither its rate nor its ratio to eager means anything
        rows[SDPA] |= {"rate": None, "unit": None, "of limit": None}
    for row in (row for name, row in rows.items() if row["p50 ms"] and name != SDPA):
        row["eager / this"] = eager / row["p50 ms"] if eager else None
        row["this / SDPA"] = row["p50 ms"] / fused if fused else None
        row["arithmetic"] = arithmetic if fused else None
