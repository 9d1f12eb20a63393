"""The page of a run: one HTML file that needs nothing beside it, and the figures as PNG for print."""

import base64
import hashlib
import json
from pathlib import Path

from reprdpo.files import write_text
from reprdpo.report.assets import CSS, SORT
from reprdpo.report.markup import Markup, join, tag
from reprdpo.report.plots import DARK, LIGHT, Plot, Theme, plots_of, save_png, to_svg
from reprdpo.report.run_folder import AFTER, BEFORE, Reply, Run, Sample, load_run
from reprdpo.report.tables import (
    Table,
    category_table,
    cost_table,
    held_in_words,
    percent,
    results_table,
    seeds_table,
)


def write_page(run_dir: str | Path) -> Path:
    """Write ``report/*.png`` and ``report/index.html``; returns the page's path."""
    run = load_run(run_dir)
    folder = run.path / "report"
    plots = plots_of(run)
    for plot in plots:
        save_png(plot, folder)
    write_text(folder / "index.html", page(run, plots))
    return folder / "index.html"


# section -> its title, and the words under it
SECTIONS = {
    "results": (
        "Results",
        "Unsafe responses to harmful prompts, refusals of harmless ones, and perplexity on benign text.",
    ),
    "reward": ("The reward", "Linear probes on the hidden states and the gate that mixes them, on held-out pairs."),
    "training": (
        "Training",
        "Curves are running means over a few per cent of the steps; the first value is as logged.",
    ),
    "samples": ("Before and after", ""),
    "cost": ("Cost by stage", "Wall time, counted matmuls and the most memory in use, of this run."),
    "run": ("The run", "What it takes to make it again."),
}


def page(run: Run, plots: list[Plot]) -> str:
    """The whole document as text."""
    drawn = {section: [_figure(plot) for plot in plots if plot.section == section] for section in SECTIONS}
    bodies = {
        "results": _results(run, drawn["results"]),
        "reward": _grid(*drawn["reward"], _pairs_card("The fit", run.fit.facts) if run.fit else None),
        "training": _grid(*drawn["training"]),
        "samples": _samples(run),
        "cost": _costs(run),
        "run": _provenance(run),
    }
    bodies = {section: body for section, body in bodies.items() if body}
    menu = tag("nav", *(tag("a", SECTIONS[section][0], href=f"#{section}") for section in bodies))
    header = tag("header", tag("p", "reprdpo", class_="over"), tag("h1", run.name), _tiles(run), menu)
    main = tag("main", _absent(run), *(_section(section, body) for section, body in bodies.items()))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{run.name} · reprdpo"),
        tag("style", Markup(CSS)),
    )
    html = tag("html", head, tag("body", header, main, tag("script", Markup(SORT))), lang="en")
    return f"<!doctype html>\n{html}\n"


def _section(name: str, body: Markup) -> Markup:
    title, words = SECTIONS[name]
    return tag("section", tag("h2", title), tag("p", words, class_="lead") if words else None, body, id=name)


def _tiles(run: Run) -> Markup:
    rates = {row.system: row.toxic.rate for row in run.summary if row.toxic.rate is not None}
    ends = [next((name for name in names if name in rates), None) for names in (BEFORE, AFTER)]
    tiles = [(f"{percent(rates[name]).text} %", f"toxic rate, {run.label(name)}") for name in ends if name]
    if run.fit and run.fit.gated.rate is not None:
        tiles.append((f"{percent(run.fit.gated.rate).text} %", "pair accuracy of the gated reward"))
    if run.orderings:
        held = sum(ordering.held is True for ordering in run.orderings)
        tiles.append((f"{held} of {len(run.orderings)}", "of the paper's orderings held"))
    seconds = sum(stage.seconds or 0.0 for stage in run.stages.values())
    if seconds:
        tiles.append((_duration(seconds), "wall time, all stages"))
    return tag(
        "div", *(tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in tiles), class_="tiles"
    )


def _costs(run: Run) -> Markup:
    if not run.stages:
        return Markup("")
    lines = tag("ul", *(tag("li", line) for line in run.overhead), class_="plain") if run.overhead else None
    return join(_table_card(None, cost_table(run), "bar"), lines)


def _absent(run: Run) -> Markup | None:
    sentences = run.absent()
    if not sentences:
        return None
    listed = tag("ul", *(tag("li", sentence) for sentence in sentences), class_="plain absent-list")
    return tag("aside", tag("h3", "Not in this report"), listed, class_="card absent", style="margin-top:1.6rem")


def _results(run: Run, figures: list[Markup]) -> Markup:
    table = _table_card(None, results_table(run)) if run.summary else None
    pair = _grid(*figures, _orderings(run)) if figures or run.orderings else None
    categories = category_table(run)
    heat = _table_card("Toxic rate by category, %", categories, "heat") if categories.rows else None
    seeds = None
    if run.evaluations:
        judges = ", ".join(dict.fromkeys(row.judge for row in run.evaluations if row.judge))
        note = tag("p", f"Judged by: {judges}.", class_="note") if judges else None
        inner = tag("div", note, _html_table(seeds_table(run)))
        seeds = tag("details", tag("summary", "Every seed"), inner, class_="card")
    return join(table, pair, heat, seeds)


def _orderings(run: Run) -> Markup | None:
    if not run.orderings:
        return None
    items = []
    for ordering in run.orderings:
        look = {True: "good", False: "bad", None: "open"}[ordering.held]
        words = tag("div", ordering.claim, tag("div", ordering.detail, class_="note") if ordering.detail else None)
        items.append(tag("li", tag("span", held_in_words(ordering.held), class_=f"chip {look}"), words))
    return tag("div", tag("h3", "The paper's orderings"), tag("ul", *items, class_="plain"), class_="card")


def _samples(run: Run) -> Markup:
    if not run.samples or not run.compared:
        return Markup("")
    before, after = map(run.label, run.compared)
    words = (
        f"{before} and {after}, first seed: the first prompt of each category, then the second, none picked by hand."
    )
    return join(tag("p", words, class_="lead"), *(_sample(sample, before, after) for sample in run.samples))


def _sample(sample: Sample, before: str, after: str) -> Markup:
    category = tag("span", sample.category, class_="note") if sample.category else None
    replies = tag("div", _reply(before, sample.before), _reply(after, sample.after), class_="grid")
    return tag("article", category, tag("p", sample.prompt, class_="prompt said"), replies, class_="card sample")


def _reply(who: str, reply: Reply) -> Markup:
    look = "bad" if reply.verdict.startswith("unsafe") else "good"
    chip = tag("span", reply.verdict, class_=f"chip {look}") if reply.verdict else None
    return tag("div", tag("div", who, chip, class_="who"), tag("p", reply.text, class_="said"), class_="reply")


def _provenance(run: Run) -> Markup:
    config = tag("pre", json.dumps(run.config, indent=2, ensure_ascii=False))
    title = f"Config {run.config_hash}".strip()
    return join(
        tag("div", tag("h3", "Command"), tag("pre", run.command, class_="wrap"), class_="card"),
        _pairs_card("Versions", run.versions) if run.versions else None,
        tag("details", tag("summary", title), tag("div", config), class_="card") if run.config else None,
    )


def _pairs_card(title: str, pairs: dict[str, str]) -> Markup:
    rows = (tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in pairs.items())
    return tag("div", tag("h3", title), tag("table", tag("tbody", *rows), class_="pairs"), class_="card")


def _table_card(title: str | None, table: Table, look: str | None = None) -> Markup:
    return tag("div", tag("h3", title) if title else None, _html_table(table, look), class_="card")


def _html_table(table: Table, look: str | None = None) -> Markup:
    """A table whose columns sort; it scrolls sideways within itself where the window is narrow."""
    head = tag("tr", *(tag("th", tag("button", column, type="button"), scope="col") for column in table.columns))
    rows = []
    for first, *cells in table.rows:
        name = tag("th", first.text, scope="row", data_value=first.value)
        rows.append(tag("tr", name, *(tag("td", c.text, data_value=c.value, style=_heat(c.heat)) for c in cells)))
    inner = tag("table", tag("thead", head), tag("tbody", *rows), class_=look)
    return tag("div", inner, class_="scroll", tabindex=0)


def _heat(heat: float | None) -> str | None:
    return None if heat is None else f"--h:{heat:.3f}"


def _figure(plot: Plot) -> Markup:
    light, dark = _data_uri(plot, LIGHT), _data_uri(plot, DARK)
    picture = tag(
        "picture",
        tag("source", srcset=dark, media="(prefers-color-scheme: dark)"),
        tag("img", src=light, alt=f"{plot.title}. {plot.caption}"),
    )
    return tag("figure", tag("h3", plot.title), picture, tag("figcaption", plot.caption), class_="card")


def _data_uri(plot: Plot, theme: Theme) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(plot, theme).encode()).decode()


def _grid(*children: Markup | None) -> Markup:
    return tag("div", *children, class_="grid") if any(children) else Markup("")


def _policy() -> str:
    """The page may show its own images and run its one script, known by its hash; nothing else, from nowhere."""
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
