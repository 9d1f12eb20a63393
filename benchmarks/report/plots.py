"""Plots of result rows as SVG text: along one dimension of the shape, the roofline, the share of the floor."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

from benchmarks.report.record import Series
from benchmarks.report.results import Row
from benchmarks.report.tables import number

# Okabe and Ito's colours, told apart with any colour vision, each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=("o", "s", "^", "D", "v", "P", "X")),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "reprdpo",
}
# Where readers of the README look first.
BESIDE_PEERS = ("bench_linear_preference.py", "bench_training_step.py")
DIMENSIONS = ("T", "V", "L", "P", "B", "D", "n")


def along_dimensions(rows: list[Row]) -> dict[str, str]:
    """For each question whose rows differ in one dimension of the shape alone: time and memory along it."""
    plots = {}
    for title, (dimension, lines) in sorted(_families(rows).items()):
        plots[title] = _svg(partial(_draw_lines, dimension, lines), 9, 3.6)
    return plots


def memory_along(rows: list[Row]) -> dict[str, str]:
    """Dimension to the plot along it of the rows that are there to show what memory grows with."""
    plots = along_dimensions([row for row in rows if row["name"].startswith("test_memory[")])
    return {title.rsplit(" ", 1)[1]: svg for title, svg in plots.items()}


def _families(rows: list[Row]) -> dict[str, tuple[str, dict[str, list[Row]]]]:
    """Title to dimension and the rows of each implementation; at least one of them has two points or more."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in _measured(rows):
        question = (
            row["file"].removesuffix(".py"),
            row["name"].split("[")[0].removeprefix("test_"),
            row["dtype"] or "",
        )
        for dimension in DIMENSIONS:
            if dimension in row["shape"]:
                rest = " ".join(f"{key}={value}" for key, value in row["shape"].items() if key != dimension)
                upstream = "" if row["upstream"] is None else f"upstream {row['upstream']:g}"
                key = (dimension, *question, upstream, row["mode"], rest)
                found.setdefault(key, {}).setdefault(row["implementation"], []).append(row)
    families = {}
    for (dimension, *words), lines in found.items():
        points = {name: sorted(each, key=lambda row: row["shape"][dimension]) for name, each in lines.items()}
        if any(len({row["shape"][dimension] for row in each}) > 1 for each in points.values()):
            families[f"{', '.join(word for word in words if word)}; along {dimension}"] = (dimension, points)
    return families


def _draw_lines(dimension: str, lines: dict[str, list[Row]], figure: Any) -> None:
    time, memory = figure.subplots(1, 2)
    for name, rows in sorted(lines.items(), key=lambda line: (line[1][0]["peer"], line[0])):
        label = f"{name} (rounded)" if any(row["kind"] == "rounded" for row in rows) else name
        sizes = [row["shape"][dimension] for row in rows]
        time.plot(sizes, [1e3 * row["p50_s"] for row in rows], label=label)
        memory.plot(sizes, [max(row["peak_bytes"], 1e3) / 1e6 for row in rows], label=label)
    ticks = sorted({row["shape"][dimension] for rows in lines.values() for row in rows})
    for axes, quantity in ((time, "median time, ms"), (memory, "peak extra memory, MB")):
        axes.set(xlabel=dimension, ylabel=quantity, xscale="log", yscale="log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    time.legend(frameon=False, fontsize="small")


def roofline(rows: list[Row]) -> str | None:
    """Rate against intensity under the ceilings measured in the run; None where no row has matmuls."""
    counted = [row for row in _measured(rows) if row["flop"] and row["bytes"] and row["floor_s"]]
    if not counted:
        return None
    return _svg(partial(_draw_roofline, counted, _measured(rows)), 7, 4.2)


def _draw_roofline(counted: list[Row], measured: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    for implementation in sorted({row["implementation"] for row in counted}):
        points = [row for row in counted if row["implementation"] == implementation]
        intensity = [row["flop"] / row["bytes"] for row in points]
        axes.plot(intensity, [row["flop"] / row["p50_s"] for row in points], linestyle="", label=implementation)
    dtypes = sorted({row["dtype"] for row in counted})
    rates = {name: max(row["flop"] / row["floor_s"] for row in counted if row["dtype"] == name) for name in dtypes}
    bandwidth = max(
        (row["bytes"] / row["floor_s"] for row in measured if row["floor_s"] and not row["flop"]), default=None
    )
    intensities = [row["flop"] / row["bytes"] for row in counted]
    ridges = [rate / bandwidth for rate in rates.values()] if bandwidth else []
    spread = np.geomspace(min(intensities + ridges) / 3, max(intensities + ridges) * 3, 200)
    for dtype, rate in rates.items():
        ceiling = np.minimum(rate, bandwidth * spread) if bandwidth else np.full_like(spread, rate)
        axes.plot(spread, ceiling, color="0.4", marker="", linewidth=1)
        axes.annotate(f"fastest GEMM, {dtype}", (spread[-1], rate), fontsize="small", va="bottom", ha="right")
    axes.set(xlabel="FLOP per byte, counted", ylabel="FLOP/s", xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize="small")


def floor_shares(rows: list[Row]) -> str | None:
    """A bar for each measured row: its share of the floor."""
    measured = [row for row in _measured(rows) if row["floor_share"] is not None]
    shown = sorted(measured, key=lambda row: (row["group"], row["p50_s"]), reverse=True)
    if not shown:
        return None
    return _svg(partial(_draw_shares, shown), 9, 1.2 + 0.24 * len(shown))


def _draw_shares(shown: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    labels = [f"{row['group']}: {row['implementation']}" + _mode(row) for row in shown]
    colours = [COLOURS[4] if row["peer"] else COLOURS[0] for row in shown]
    axes.barh(range(len(shown)), [row["floor_share"] for row in shown], color=colours)
    axes.set_yticks(range(len(shown)), labels, fontsize="x-small")
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set(xlabel="share of the floor (1 is the floor; blue ours, orange peers)")


def beside_peers(rows: list[Row]) -> str | None:
    """Time and memory of every implementation of the headline groups in ``BESIDE_PEERS``; None where none was run."""
    groups: dict[str, list[Row]] = {}
    for row in _measured(rows):
        if row["file"] in BESIDE_PEERS and row["headline"] and row["mode"] == "eager":
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    heights = [len(each) + 2 for each in groups.values()]
    return _svg(partial(_draw_beside, groups, heights), 9, 0.22 * sum(heights))


def _draw_beside(groups: dict[str, list[Row]], heights: list[int], figure: Any) -> None:
    grid = figure.subplots(len(groups), 2, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights})
    quantities = (("median time, ms", "p50_s", 1e3), ("peak extra memory, MB", "peak_bytes", 1e-6))
    for line, (group, rows) in zip(grid, groups.items(), strict=True):
        shown = sorted(rows, key=lambda row: row["p50_s"], reverse=True)
        labels = [row["implementation"] + (" (rounded)" if row["kind"] == "rounded" else "") for row in shown]
        colours = [COLOURS[4] if row["peer"] else COLOURS[0] for row in shown]
        for axes, (_, key, unit) in zip(line, quantities, strict=True):
            bars = axes.barh(labels, [unit * row[key] for row in shown], color=colours)
            axes.bar_label(bars, [f" {number(unit * row[key])}" for row in shown], fontsize="x-small")
            axes.set(xmargin=0.12, xticks=[])
            axes.tick_params(length=0, labelsize="x-small")
            axes.grid(visible=False)
        line[0].set_title(group, fontsize="small", loc="left")
    for axes, (quantity, _, _) in zip(grid[-1], quantities, strict=True):
        axes.set_xlabel(quantity, fontsize="small")


def over_commits(series: Series) -> str:
    """Our time over commits."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([each[:7] for each in series.commits], [None if s is None else 1e3 * s for s in series.seconds])
        axes.set(ylabel="ms", title=series.group)
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize("small")

    return _svg(draw, 6, 2.2)


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "measured"]


def _mode(row: Row) -> str:
    return "" if row["mode"] == "eager" else f", {row['mode']}"


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(width, height), layout="constrained")
        try:
            draw(figure)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
