"""The figures of a run: one function a figure, one style for all, drawn without a display or global state."""

# ruff: noqa: RUF001  Greek letters are what the figures show

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reprdpo.files import atomic_path
from reprdpo.report.run_folder import Fit, Histogram, Run, Training

WIDTH = 5.0  # inches: two figures side by side on a page, one on a phone, one in a column of a paper
PNG_DPI = 220
SMOOTHING = 25  # a running mean spans 1/SMOOTHING of the steps to either side


@dataclass(frozen=True)
class Theme:
    """The colours of a figure: Okabe and Ito's, which colour-blind readers tell apart; lighter on dark ground."""

    ink: str
    muted: str
    grid: str
    ground: str
    chosen: str
    rejected: str
    systems: dict[str, str]
    others: str


LIGHT = Theme(
    ink="#1f2430",
    muted="#667085",
    grid="#e4e7ec",
    ground="#ffffff",
    chosen="#0072b2",
    rejected="#d55e00",
    systems={
        "base": "#667085",
        "sft": "#e69f00",
        "dpo": "#56b4e9",
        "rs": "#cc79a7",
        "dpo_ranked": "#009e73",
        "cdpo_fixed": "#8a6fc0",
        "reprdpo": "#0072b2",
        "online": "#d55e00",
    },
    others="#1f2430",
)
DARK = Theme(
    ink="#e6e9ef",
    muted="#98a2b3",
    grid="#2c323d",
    ground="#171b22",
    chosen="#4ba3e3",
    rejected="#f08a4b",
    systems={
        "base": "#98a2b3",
        "sft": "#f0b429",
        "dpo": "#9bd4f5",
        "rs": "#e0a3c4",
        "dpo_ranked": "#3cc79d",
        "cdpo_fixed": "#b7a2e6",
        "reprdpo": "#4ba3e3",
        "online": "#f08a4b",
    },
    others="#e6e9ef",
)
# A second sign beside the colour: a marker for dots, a dash pattern for lines.
MARKERS = {"sft": "s", "dpo": "D", "rs": "P", "dpo_ranked": "^", "cdpo_fixed": "X", "reprdpo": "*", "online": "v"}
DASHES: dict[str, Any] = {
    "dpo": (0, (5, 1.5)),
    "dpo_ranked": (0, (3, 1, 1, 1)),
    "cdpo_fixed": (0, (4, 1, 1, 1, 1, 1)),
    "online": (0, (1.2, 1.2)),
}
REWARDS = {"rewards": "Implicit reward of the policy", "hybrid": "Hybrid reward"}  # metric prefix -> title


@dataclass(frozen=True)
class Plot:
    """A figure to be: its file name, the page's section it stands in, its words, and how it is drawn."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def plots_of(run: Run) -> list[Plot]:
    """Every figure that the parts of this run allow, in the order of the page."""
    plots = []
    if any(row.toxic.rate is not None for row in run.summary):
        plots.append(
            Plot(
                "toxic-rate",
                "results",
                "Toxic rate",
                "Share of unsafe responses to the harmful prompts, with 95 % intervals; small dots are single seeds.",
                lambda theme: toxic_rates(run, theme),
            )
        )
    if fit := run.fit:
        plots.append(
            Plot(
                "probe-accuracy",
                "reward",
                "Figure 1 · Pair accuracy by layer",
                "How often each layer's linear probe ranks the safe answer of a held-out pair first; the line across "
                "is the gated reward that mixes all layers." + _interval_words(fit),
                lambda theme: probe_accuracy(fit, theme),
            )
        )
        if any(calibration.bins for calibration in fit.calibrations):
            plots.append(
                Plot(
                    "calibration",
                    "reward",
                    "Calibration of the confidence",
                    "Held-out pairs grouped by how sure the reward is of their ranking, against the share it ranks "
                    "right. On the diagonal γ means what it says; a dot's area is its number of pairs. ECE is the "
                    "mean distance from the diagonal.",
                    lambda theme: calibration(fit, theme),
                )
            )
        if histogram := fit.histogram:
            plots.append(
                Plot(
                    "confidence-held-out",
                    "reward",
                    "Confidence before training",
                    "Distribution of γ over held-out pairs. Left of ½ a pair's label is taken as more likely wrong.",
                    lambda theme: confidence([histogram], theme),
                )
            )
    plots += [_trends_plot(run, training) for training in run.trainings if "rewards/chosen" in training.metrics]
    preference = [training for training in run.trainings if "rewards/chosen" in training.metrics]
    if any("rewards/accuracies" in training.metrics for training in preference):
        plots.append(
            Plot(
                "reward-accuracies",
                "training",
                "Reward accuracies",
                "Share of training pairs whose chosen answer has the higher reward, by the policy's implicit reward "
                "and by the hybrid reward.",
                lambda theme: accuracies(run, preference, theme),
            )
        )
    if any("loss" in training.metrics for training in preference):
        plots.append(
            Plot(
                "loss",
                "training",
                "Preference loss",
                "It starts at log 2, where policy and reference agree. "
                "With a confidence γ its floor is the entropy of γ, not 0.",
                lambda theme: losses(run, preference, theme, start=True),
            )
        )
    plots += [_confidence_plot(run, training) for training in run.trainings if any(map(_spread, training.histograms))]
    language = [t for t in run.trainings if "loss" in t.metrics and t not in preference]
    if language:
        plots.append(
            Plot(
                "loss-sft",
                "training",
                "Supervised loss",
                "Mean negative log-likelihood of a response token.",
                lambda theme: losses(run, language, theme),
            )
        )
    return plots


def _trends_plot(run: Run, training: Training) -> Plot:
    return Plot(
        f"reward-trends-{training.system}",
        "training",
        f"Figure 5 · Reward trends, {run.label(training.system)}",
        "Mean rewards of the chosen and rejected answers and their margin. "
        "Thin lines are seeds, the thick one is their mean.",
        lambda theme: reward_trends(training, _limits(run), theme),
    )


def _confidence_plot(run: Run, training: Training) -> Plot:
    return Plot(
        f"confidence-{training.system}",
        "training",
        f"Confidence, {run.label(training.system)}",
        "Distribution of γ over the first and the last pairs of the training. "
        "Left of ½ a pair's label is taken as more likely wrong than right.",
        lambda theme: confidence(training.histograms, theme),
    )


def toxic_rates(run: Run, theme: Theme) -> Figure:
    """Dot and interval for each system, its seeds as small dots beneath."""
    rows = [row for row in run.summary if row.toxic.rate is not None]
    figure, (axes,) = _figure(theme, height=0.9 + 0.42 * len(rows))
    for y, row in enumerate(rows):
        colour = theme.systems.get(row.system, theme.others)
        seeds = [100 * e.toxic.rate for e in run.evaluations if e.system == row.system and e.toxic.rate is not None]
        if len(seeds) > 1:
            axes.plot(seeds, [y + 0.24] * len(seeds), "o", color=colour, markersize=2.6, alpha=0.75)
        if row.toxic.low is not None and row.toxic.high is not None:
            ends = [100 * row.toxic.low, 100 * row.toxic.high]
            axes.plot(ends, [y, y], color=colour, linewidth=3, alpha=0.5, solid_capstyle="round")
        mean = 100 * (row.toxic.rate or 0.0)
        marker = MARKERS.get(row.system, "o")
        axes.plot([mean], [y], marker, color=colour, markersize=11 if marker == "*" else 7)
        axes.annotate(f"{mean:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", color=theme.ink)
    axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("toxic rate, %")
    _grid(axes, "x")
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.spines["left"].set_visible(False)
    return figure


def probe_accuracy(fit: Fit, theme: Theme) -> Figure:
    """The paper's Figure 1: a probe a layer, the gated reward across."""
    figure, (axes,) = _figure(theme)
    layers = range(1, len(fit.layers) + 1)
    accuracy = [100 * (rate.rate or 0.0) for rate in fit.layers]
    if all(rate.low is not None and rate.high is not None for rate in fit.layers):
        low, high = ([100 * (getattr(rate, end) or 0.0) for rate in fit.layers] for end in ("low", "high"))
        axes.fill_between(layers, low, high, color=theme.chosen, alpha=0.16, linewidth=0)
    axes.plot(layers, accuracy, "o-", color=theme.chosen, markersize=5 if len(layers) < 20 else 3.5, label="probe")
    if fit.gated.rate is not None:
        if fit.gated.low is not None and fit.gated.high is not None:
            axes.axhspan(100 * fit.gated.low, 100 * fit.gated.high, color=theme.rejected, alpha=0.13, linewidth=0)
        gated = 100 * fit.gated.rate
        axes.axhline(gated, color=theme.rejected, linestyle=(0, (6, 2)), label=f"gated reward, {gated:.1f} %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.6, len(layers) + 0.4)
    axes.set_xlabel("layer")
    axes.set_ylabel("pair accuracy, %")
    _grid(axes, "y")
    _legend(figure, axes)
    return figure


def calibration(fit: Fit, theme: Theme) -> Figure:
    """Reliability diagram: accuracy against confidence, the diagonal where both agree."""
    figure, (axes,) = _figure(theme)
    axes.plot([0.5, 1], [0.5, 1], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1)
    # the paper's alpha first, so that the one in use lies on top
    looks = [("α", theme.chosen, "-"), ("the paper's α", theme.rejected, (0, (5, 1.5)))]
    for found, (name, colour, dashes) in reversed(list(zip(fit.calibrations, looks, strict=False))):
        most = max((row.count for row in found.bins), default=1)
        x, y = [row.confidence for row in found.bins], [row.accuracy for row in found.bins]
        axes.plot(x, y, color=colour, linestyle=dashes, label=f"{name} = {found.alpha:.3g}, ECE {found.ece:.3f}")
        sizes = [14 + 130 * row.count / most for row in found.bins]
        axes.scatter(x, y, s=sizes, color=colour, edgecolor=theme.ground, zorder=3)
    axes.set(xlim=(0.48, 1.02), xlabel="confidence, max(γ, 1 − γ)", ylabel="share ranked right")
    _grid(axes, "both")
    _legend(figure, axes)
    return figure


def reward_trends(training: Training, limits: dict[str, tuple[float, float]], theme: Theme) -> Figure:
    """The paper's Figure 5 for one system: the implicit reward above, the hybrid one below where it is logged.

    ``limits`` holds the vertical range of each, shared by the systems so that their figures compare.
    """
    kinds = [kind for kind in REWARDS if f"{kind}/chosen" in training.metrics]
    figure, panels = _figure(theme, rows=len(kinds), height=0.7 + 2.0 * len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        axes.axhline(0, color=theme.grid, linewidth=1)
        _seeds(axes, training.metrics.get(f"{kind}/chosen"), theme.chosen, "chosen")
        _seeds(axes, training.metrics.get(f"{kind}/rejected"), theme.rejected, "rejected")
        _seeds(axes, training.metrics.get(f"{kind}/margins"), theme.muted, "margin", (0, (4, 2)))
        axes.set_title(REWARDS[kind])
        axes.set_ylim(*limits[kind])
        _grid(axes, "y")
    panels[-1].set_xlabel("step")
    _legend(figure, panels[0])
    return figure


def accuracies(run: Run, trainings: list[Training], theme: Theme) -> Figure:
    """Accuracy of both rewards on the training pairs, a line a system."""
    kinds = [kind for kind in REWARDS if any(f"{kind}/accuracies" in t.metrics for t in trainings)]
    figure, panels = _figure(theme, rows=len(kinds), height=0.7 + 2.0 * len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        for training in trainings:
            _system_line(axes, run, training, f"{kind}/accuracies", theme, scale=100)
        axes.set_title(REWARDS[kind])
        axes.set_ylabel("accuracy, %")
        _grid(axes, "y")
    panels[-1].set_xlabel("step")
    _legend(figure, panels[0])
    return figure


def losses(run: Run, trainings: list[Training], theme: Theme, *, start: bool = False) -> Figure:
    """The loss by step, a line a system; with ``start`` a line at log 2, where preference losses begin."""
    figure, (axes,) = _figure(theme)
    if start:
        axes.axhline(log(2), color=theme.muted, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate("log 2", (1, log(2)), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", color=theme.muted)  # fmt: skip
    for training in trainings:
        _system_line(axes, run, training, "loss", theme)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    _grid(axes, "y")
    _legend(figure, axes)
    return figure


def confidence(histograms: list[Histogram], theme: Theme) -> Figure:
    """Histogram of confidence, the seeds' counts pooled: the last series filled, one before it outlined."""
    figure, (axes,) = _figure(theme)
    edges = histograms[0].edges
    alike = [histogram for histogram in histograms if histogram.edges == edges]
    *_, last = histograms[0].counts
    for name in reversed(histograms[0].counts):
        counts = [sum(column) for column in zip(*(h.counts[name] for h in alike), strict=True)]
        share = [100 * count / (sum(counts) or 1) for count in counts]
        if name == last:
            axes.stairs(share, edges, fill=True, color=theme.chosen, alpha=0.55, label=name)
        else:
            axes.stairs(share, edges, color=theme.ink, linewidth=1.5, label=name)
    axes.axvline(0.5, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1)
    axes.set(xlim=(edges[0], edges[-1]), xlabel="confidence γ", ylabel="pairs, %")
    _grid(axes, "y")
    _legend(figure, axes)
    return figure


def save_png(plot: Plot, folder: Path) -> Path:
    """Write a figure for print: light, `PNG_DPI` dots an inch."""
    path = folder / f"{plot.name}.png"
    with _style(LIGHT), atomic_path(path) as temporary:
        plot.draw(LIGHT).savefig(temporary, format="png", dpi=PNG_DPI, metadata={"Software": None, "Title": plot.title})
    return path


def to_svg(plot: Plot, theme: Theme) -> str:
    """A figure as an SVG document that holds its text as text, for the reader's own sans-serif font."""
    text = io.StringIO()
    with _style(theme):
        plot.draw(theme).savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return re.sub(r"'DejaVu Sans'(?:, sans-serif)?", "system-ui, sans-serif", svg[svg.index("<svg") :])


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.labelcolor": theme.muted,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "figure.facecolor": theme.ground,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "lines.linewidth": 1.9,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "reprdpo",
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(theme: Theme, *, rows: int = 1, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=theme.ground)
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _grid(axes: Axes, axis: Literal["both", "x", "y"]) -> None:
    axes.grid(visible=True, axis=axis)
    axes.tick_params(length=0)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = 4 if sum(sorted(map(len, labels))[-4:]) <= 60 else 2  # characters in the figure's width
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.2)


def _short(label: str) -> str:
    return label if len(label) <= 20 else f"{label[:19]}…"


def _system_line(axes: Axes, run: Run, training: Training, metric: str, theme: Theme, scale: float = 1.0) -> None:
    colour = theme.systems.get(training.system, theme.others)
    dashes = DASHES.get(training.system, "-")
    _seeds(axes, training.metrics.get(metric), colour, _short(run.label(training.system)), dashes, scale=scale)


def _seeds(
    axes: Axes, seeds: list[dict[int, float]] | None, colour: str, label: str, dashes: Any = "-", scale: float = 1.0
) -> None:
    """One thin line a seed and, over the steps that all have, their mean."""
    if not seeds:
        return
    if len(seeds) > 1:
        for seed in seeds:
            axes.plot(list(seed), _smooth([scale * v for v in seed.values()]), color=colour, linewidth=0.7, alpha=0.4)
    steps = [step for step in seeds[0] if all(step in seed for seed in seeds)]
    mean = [scale * sum(seed[step] for seed in seeds) / len(seeds) for step in steps]
    axes.plot(steps, _smooth(mean), color=colour, linestyle=dashes, label=label)


def _smooth(values: list[float]) -> list[float]:
    """Centred running mean; it narrows towards the start, so that the first value stays as logged."""
    half = len(values) // SMOOTHING
    windows = [values[i - min(half, i) : i + min(half, i) + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _limits(run: Run) -> dict[str, tuple[float, float]]:
    """The range of each reward's drawn lines over all systems, with a margin."""
    limits = {}
    for kind in REWARDS:
        series = [
            _smooth(list(seed.values()))
            for training in run.trainings
            for name in ("chosen", "rejected", "margins")
            for seed in training.metrics.get(f"{kind}/{name}", [])
        ]
        if series:
            low, high = min(map(min, series)), max(map(max, series))
            pad = 0.06 * (high - low) or 1.0
            limits[kind] = (low - pad, high + pad)
    return limits


def _spread(histogram: Histogram) -> bool:
    """Whether there is a distribution to see: a fixed confidence fills one bin."""
    return any(sum(count > 0 for count in column) > 1 for column in histogram.counts.values())


def _interval_words(fit: Fit) -> str:
    return " Bands are 95 % intervals." if any(rate.low is not None for rate in [*fit.layers, fit.gated]) else ""
