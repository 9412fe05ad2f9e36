"""Plots of a run: time, memory and the ratio to eager against length, and the training step."""

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.tables import RUNS, heading

# Blue, orange, green, red, purple, brown, grey: the same provider has the same colour everywhere.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#8c564b", "#7f7f7f")


def draw(place: Path, about: dict, rows: list[dict]) -> list[Path]:
    """Write the plots that the rows have figures for."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    sweep = [row for row in rows if row["kind"] == "attention" and row["model"] == "sweep"]
    steps = [row for row in rows if row["kind"] == "step" and row["p50 ms"] is not None]
    curves = {
        "time": ("p50 ms", 1.0, "ms, median and p20 to p80"),
        "memory": ("peak bytes", 1e-6, "peak memory, MB"),
        "ratio": ("eager / this", 1.0, "times as fast as eager"),
    }
    paths = []
    for name, (key, unit, label) in curves.items():
        mine = [row for row in sweep if row[key] is not None]
        if mine:
            figure = _against_length(mine, key, unit, label, colours)
            paths.append(_save(place / f"{name}.png", figure, about))
    if steps:
        paths.append(_save(place / "step.png", _step(steps, colours), about))
    return paths


def _save(path: Path, figure: plt.Figure, about: dict) -> Path:
    figure.text(0.01, 0.005, f"measured: {heading(about)}", fontsize=6.5, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _against_length(rows: list[dict], key: str, unit: float, label: str, colours) -> plt.Figure:
    """A panel for each run and dtype that has more than one length."""
    panels = defaultdict(list)
    for row in rows:
        b, h, _, _, d = row["shape"]
        panels[row["run"], row["dtype"], (b, h, d)].append(row)
    several = {k: v for k, v in panels.items() if len({row["shape"][2] for row in v}) > 1}
    panels = several or panels
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    for axis, ((run, dtype, (b, h, d)), mine) in zip(axes.flat, panels.items(), strict=False):
        _curves(axis, mine, key, unit, colours)
        title = f"Attention {RUNS[run]}"
        axis.set_title(f"{title}\n{dtype}, B = {b}, H = {h}, D = {d}", fontsize=8)
        axis.set_xlabel("tokens, M = N")
        axis.set_ylabel(label)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    return figure


def _curves(axis: Axes, rows: list[dict], key: str, unit: float, colours: dict) -> None:
    """A line for each provider; of times with the band from p20 to p80."""
    lines = defaultdict(list)
    for row in rows:
        lines[row["provider"]].append(row)
    for name, mine in lines.items():
        lengths = [row["shape"][2] for row in mine]
        values = [unit * row[key] for row in mine]
        axis.plot(lengths, values, marker="o", markersize=3, color=colours[name], label=name)
        if key == "p50 ms":
            low, high = ([row[name] for row in mine] for name in ("p20 ms", "p80 ms"))
            axis.fill_between(lengths, low, high, color=colours[name], alpha=0.2, linewidth=0)
    lengths = sorted({row["shape"][2] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_yscale("linear" if key == "eager / this" else "log")
    axis.grid(alpha=0.3)


def _step(rows: list[dict], colours: dict) -> plt.Figure:
    """Time and memory of a training step, a group of bars a network."""
    networks = list(dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.6 + 0.4 * len(rows)))
    panels = (("p50 ms", 1.0, "ms a step, median"), ("peak bytes", 1e-6, "peak memory, MB"))
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        for row in (row for row in rows if row[key] is not None):
            group = networks.index((tuple(row["shape"]), row["dtype"]))
            y = group * (len(names) + 1) + names.index(row["provider"])
            axis.barh(y, unit * row[key], color=colours[row["provider"]])
            axis.text(unit * row[key], y, f" {unit * row[key]:.3g}", va="center", fontsize=8)
        places = [g * (len(names) + 1) + i for g in range(len(networks)) for i in range(len(names))]
        labels = names * len(networks) if key == "p50 ms" else [""] * len(places)
        axis.set_yticks(places, labels, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(label)
    sizes = "; ".join(f"{' x '.join(map(str, shape))} {dtype}" for shape, dtype in networks)
    figure.suptitle(f"Training step (batch x tokens x width x depth x heads): {sizes}", fontsize=9)
    return figure
