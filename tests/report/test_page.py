"""The page: well-formed, alone, escaped, and right about what it leaves out."""

import base64
import hashlib
import math
import re
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from reprdpo.files import read_json
from reprdpo.report import render
from reprdpo.report.markup import tag
from reprdpo.report.plots import DARK, LIGHT, PNG_DPI, WIDTH, plots_of, to_svg
from reprdpo.report.run_folder import load_run
from tests.report.invented_run import HOSTILE, put, put_lines, write_run

FIGURES = {
    "toxic-rate",
    "probe-accuracy",
    "calibration",
    "confidence-held-out",
    *(f"reward-trends-{system}" for system in ("dpo", "dpo_ranked", "reprdpo", "online")),
    "reward-accuracies",
    "loss",
    "confidence-reprdpo",
    "loss-sft",
}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, text by element, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "link", "img", "source"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        return "\n".join(data for name, data in self.texts if name not in ("script", "style"))

    def count(self, name: str) -> int:
        return sum(element == name for element, _ in self.elements)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(write_run(tmp_path_factory.mktemp("rendered") / "run"))


@pytest.fixture(scope="module")
def html(rendered: Path) -> str:
    return rendered.read_text(encoding="utf-8")


def test_model_text_is_escaped_everywhere(html: str) -> None:
    page = Page(html)
    assert page.count("script") == 1
    assert all("onerror" not in attributes for _, attributes in page.elements)
    said = [data for name, data in page.texts if name == "p"]
    assert HOSTILE in said
    assert f"{HOSTILE} said base" in said
    assert "&lt;script&gt;alert(" in html
    assert "<script>alert" not in html


def test_hostile_names_from_every_file_are_escaped(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "systems")
    state, summary = read_json(run_dir / "run.json"), read_json(run_dir / "evaluation" / "summary.json")
    state |= {"name": HOSTILE, "command": HOSTILE, "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    state["stages"] = {HOSTILE: {"status": HOSTILE, "seconds": 1.0}}
    summary["systems"][0]["label"] = HOSTILE
    summary["orderings"] = [{"claim": HOSTILE, "held": True, "detail": HOSTILE}]
    evaluation = read_json(run_dir / "evaluation" / "base-seed-0.json")
    evaluation |= {"judge": HOSTILE, "by_category": {HOSTILE: evaluation["toxic"]}}
    put(run_dir / "run.json", state)
    put(run_dir / "evaluation" / "summary.json", summary)
    put(run_dir / "evaluation" / "base-seed-0.json", evaluation)
    page = Page(render(run_dir).read_text(encoding="utf-8"))
    assert page.count("script") == 1
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert page.text().count(HOSTILE) > 10


def test_nothing_is_asked_from_elsewhere(html: str) -> None:
    page = Page(html)
    for name, attributes in page.elements:
        for key in ("src", "srcset", "href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (name, key, value)
    assert not re.search(r"url\(|@import", html)
    (policy,) = (a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_policy_admits_the_script_it_came_with(html: str) -> None:
    page = Page(html)
    (script,) = (data for name, data in page.texts if name == "script")
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" in html.replace(
        "&#x27;", "'"
    )


def test_figures_come_light_and_dark_as_svg_with_words_for_the_blind(html: str) -> None:
    page = Page(html)
    images = [attributes for name, attributes in page.elements if name == "img"]
    assert len(images) == len(FIGURES)
    assert all(len(attributes["alt"] or "") > 40 for attributes in images)
    sources = [a["srcset"] for n, a in page.elements if n == "source" and a["media"] == "(prefers-color-scheme: dark)"]
    assert len(sources) == len(images)
    for uri in [*sources, *(attributes["src"] for attributes in images)]:
        assert uri is not None
        root = ElementTree.fromstring(base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert sources[0] != images[0]["src"]


def test_pngs_are_there_sized_for_print_and_drawn_on(rendered: Path) -> None:
    paths = list(rendered.parent.glob("*.png"))
    assert {path.stem for path in paths} == FIGURES
    for path in paths:
        with Image.open(path) as image:
            assert image.width == round(WIDTH * PNG_DPI)
            assert image.height > 500
            colours = image.convert("RGB").getcolors(image.width * image.height)
            assert colours is not None
            assert len(colours) > 20


def test_tables_sort_and_orderings_stand_in_words(html: str) -> None:
    page = Page(html)
    sortable = [a for n, a in page.elements if n == "td" and a.get("data-value") == "0.09"]
    assert sortable
    assert [data for name, data in page.texts if name == "span" and "held" in data][-1] == "not held"
    assert "11.0 % against 9.0 %, intervals overlap" in page.text()
    assert "3 of 5" in page.text()
    assert "reprdpo run invented.yaml" in page.text()


def test_the_same_folder_gives_the_same_figure(rendered: Path) -> None:
    first, second = (plots_of(load_run(rendered.parent.parent))[0] for _ in range(2))
    assert to_svg(first, DARK) == to_svg(second, DARK)
    assert to_svg(first, DARK) != to_svg(first, LIGHT)


def test_labels_are_cut_to_fit_a_figure_and_never_read_as_formulas(run_dir: Path) -> None:
    summary = read_json(run_dir / "evaluation" / "summary.json")
    summary["systems"][0]["label"] = r"$\frac$ " + 200 * "long "
    put(run_dir / "evaluation" / "summary.json", summary)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = to_svg(plots_of(load_run(run_dir))[0], LIGHT)
    assert r"$\frac$ long long" in svg
    assert "…" in svg


def test_a_fixed_confidence_draws_no_histogram(run_dir: Path) -> None:
    alone = [0] * 19 + [256]
    value = {"edges": [i / 20 for i in range(21)], "initial": alone, "final": alone}
    put(run_dir / "systems" / "dpo" / "seed-0" / "confidence_histogram.json", value)
    names = {plot.name for plot in plots_of(load_run(run_dir))}
    assert "confidence-dpo" not in names
    assert "confidence-reprdpo" in names


def test_curves_start_as_logged_and_seeds_meet_in_their_mean(run_dir: Path) -> None:
    run = load_run(run_dir)
    logged = next(t for t in run.trainings if t.system == "dpo").metrics["loss"]
    for seed in logged:
        seed[1] = math.log(2)
    logged[2] = {step: value for step, value in logged[2].items() if step <= 80}
    figure = next(plot for plot in plots_of(run) if plot.name == "loss").draw(LIGHT)
    lines = figure.axes[0].get_lines()
    (mean,) = (line for line in lines if line.get_label() == "DPO")
    assert list(mean.get_xdata())[-1] == 80
    assert mean.get_ydata()[0] == pytest.approx(math.log(2))
    assert sum(line.get_linewidth() < 1 and line.get_color() == mean.get_color() for line in lines) == 3


def test_limits_are_shared_so_that_systems_compare(run_dir: Path) -> None:
    figures = [plot.draw(LIGHT) for plot in plots_of(load_run(run_dir)) if plot.name.startswith("reward-trends")]
    assert len({figure.axes[0].get_ylim() for figure in figures}) == 1


def test_a_run_that_has_only_begun_still_makes_a_page(run_dir: Path) -> None:
    for part in ("fit", "systems", "evaluation"):
        shutil.rmtree(run_dir / part)
    page = Page(render(run_dir).read_text(encoding="utf-8"))
    assert page.count("img") == 0
    for what in ("Probe accuracy", "Training curves", "Table of toxic rates", "Samples before and after"):
        assert f"{what}" in page.text()
    assert not any(attributes.get("id") == "samples" for _, attributes in page.elements)
    assert list((run_dir / "report").glob("*.png")) == []


def test_plain_dpo_without_hybrid_reward_and_without_fit(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "fit")
    shutil.rmtree(run_dir / "systems")
    log = [{"step": s, "loss": 0.7, "rewards/chosen": 0.1 * s, "rewards/rejected": 0.0} for s in range(1, 4)]
    put_lines(run_dir / "systems" / "dpo" / "seed-0" / "metrics.jsonl", log)
    render(run_dir)
    assert {path.stem for path in (run_dir / "report").glob("*.png")} == {"toxic-rate", "reward-trends-dpo", "loss"}


def test_tag_escapes_text_and_attributes() -> None:
    assert tag("a", "<b>", tag("i", "&"), None, title='"', class_="x") == (
        '<a title="&quot;" class="x">&lt;b&gt;<i>&amp;</i></a>'
    )


def test_matplotlib_is_loaded_by_rendering_alone() -> None:
    code = (
        "import sys, reprdpo.report; raise SystemExit(any(n.startswith(('matplotlib', 'torch')) for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
