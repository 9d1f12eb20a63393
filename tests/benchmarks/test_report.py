"""Result files become tables, a page and the README; what cannot be compared or mixed is refused."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.__main__ import ROOT, main
from benchmarks.report.readme import BEGIN, END
from benchmarks.report.record import read, series

Write = Any


def row(name: str = "test_op[native]", seconds: float = 0.002, **columns: Any) -> dict[str, Any]:
    return {
        "name": name,
        "file": "bench_op.py",
        "group": "op",
        "mode": "eager",
        "status": "measured",
        "implementation": name.split("[")[-1].rstrip("]"),
        "peer": "native" not in name,
        "shape": {},
        "upstream": 1.0,
        "dtype": "float32",
        "headline": "kernel",
        "p20_s": seconds / 2,
        "p50_s": seconds,
        "p80_s": seconds * 2,
        "peak_bytes": 3e6,
        "flop": 4e9,
        "bytes": 5e6,
        "floor_s": seconds / 2,
        "floor_share": 0.5,
        "error": 1e-7,
        "kind": "exact",
    } | columns


def unmeasured(status: str, reason: str, **columns: Any) -> dict[str, Any]:
    return {key: value for key, value in row(**columns).items() if not key.endswith("_s")} | {
        "status": status,
        "reason": reason,
    }


def result(*rows: dict[str, Any], commit: str = "0123456789abcdef", **changes: Any) -> dict[str, Any]:
    machine = {"cpu": "EPYC", "cuda": [], "threads": 2, "capability": "AVX2", "versions": {"torch": "2.13.0"}}
    return {
        "machine_info": machine | changes.pop("machine_info", {}),
        "commit_info": {"id": commit, "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "complete": True,
        "rows": list(rows or [row()]),
    } | changes


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_a_table_with_its_stamp(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("test_op[eager]", 0.004),
        row(),
        row("test_op[rough]", 0.001, error=2e-2, kind="rounded"),
        unmeasured("skipped", "liger is missing", name="test_op[liger]"),
        unmeasured("counted", "too large", name="test_op[70B]"),
    ]
    assert main([write("a.json", result(*rows))]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "EPYC (AVX2), 2 threads; torch 2.13.0; 0123456789; 2026-01-02"
    assert shown[-5:] == [
        "| op[rough] | 0.5 / 1 / 2 | 0.50 | 2.0e-02 (rounded) | 3 | 4 | 5 |",
        "| op[native] | 1 / 2 / 4 | 0.50 | 1.0e-07 | 3 | 4 | 5 |",
        "| op[eager] | 2 / 4 / 8 | 0.50 | 1.0e-07 | 3 | 4 | 5 |",
        "| op[liger] | skipped: liger is missing |  |  |  |  |  |",
        "| op[70B] | counted: too large |  |  |  | 4 | 5 |",
    ]


def test_a_row_without_an_oracle_says_so(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ("peer", "shape", "upstream", "dtype", "headline", "kind", "error", "floor_s", "floor_share")
    bare = {key: value for key, value in row().items() if key not in left_out}
    page = tmp_path / "page.html"
    assert main([write("a.json", result(bare)), "--page", str(page), "--record", str(tmp_path / "none")]) == 0
    assert "| op[native] | 1 / 2 / 4 |  | (unchecked) | 3 | 4 | 5 |" in capsys.readouterr().out
    assert "(unchecked)" in page.read_text(encoding="utf-8")


def test_on_a_gpu_the_host_and_launches_are_shown(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    graph = row(mode="graph", seconds=1e-6)
    assert main([write("a.json", result(row(host_s=12e-6, launches=3), graph, machine_info={"cuda": ["H200"]}))]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("H200; ")
    assert "| op[native] | 1 / 2 / 4 | 0.50 | 1.0e-07 | 3 | 4 | 5 | 12 | 3 |" in shown
    assert "| op[native], graph | 0.0005 / 0.001 / 0.002 | 0.50 | 1.0e-07 | 3 | 4 | 5 |  |  |" in shown


def test_where_the_time_of_a_row_goes(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    ours = row("test_step[native]", 2.0, parts={"forward": 0.5, "reward": 0.001, "other": 1.499}, tokens_per_s=1234.0)
    peer = row("test_step[trl]", 6.0, parts={"forward": 0.5, "other": 5.5})
    assert main([str(write("a.json", result(ours, peer, row())))]) == 0
    printed = capsys.readouterr().out
    assert "|  | all | tokens/s | forward | reward | other |" in printed
    assert "| native | 2000 | 1230 | 500 | 1 | 1500 |" in printed
    assert "| trl | 6000 |  | 500 |  | 5500 |" in printed
    assert printed.count("where the time goes") == 1


def test_parts_of_one_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [write("a.json", result()), write("b.json", result(row("test_other[native]"), complete=False))]
    assert main(parts) == 0
    shown = capsys.readouterr().out
    assert "op[native]" in shown
    assert "other[native]" in shown
    assert "interrupted: only the rows finished by then" in shown


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result(machine_info={"cpu": "Xeon"}), "differ in cpu ('EPYC' and 'Xeon')"),
        (result(machine_info={"threads": 1}), "differ in threads (2 and 1)"),
        (result(machine_info={"versions": {"torch": "2.11.0"}}), "differ in versions"),
        (result(commit="fedcba9876543210"), "is of 0123456789, "),
        (result(commit_info={"id": "0123456789abcdef", "dirty": True}), "with uncommitted changes; compare them"),
        (result(), "two of the files hold the row test_op[native] of op"),
        (result() | {"rows": []}, "holds no row"),
        ("{", "is not a result of these benchmarks"),
        ("[1]", "is not a result of these benchmarks"),
        ({"benchmarks": []}, "KeyError: 'rows'"),
        (result(row(p50_s=None)), "p50_s of test_op[native] is None"),
        (result(row(status="fine")), "none of measured, counted, skipped, red"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str], other: Any, message: str
) -> None:
    assert main([write("a.json", result()), write("b.json", other)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert "none.json: is not a result of these benchmarks (FileNotFoundError" in capsys.readouterr().err


def test_two_commits(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    new = write("new.json", result(row(seconds=0.001), commit="fedcba98765"))
    assert main([new, "--against", write("old.json", result(row(seconds=0.003)))]) == 0
    shown = capsys.readouterr().out
    assert "0123456789; 2026-01-02, then EPYC" in shown
    assert "| test_op[native] (op) | 3 | 1 | 3.00 |" in shown


def test_a_row_that_only_one_commit_has_is_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    broken = unmeasured("red", "no module", name="bench_op.py", group="bench_op.py")
    aside = row("test_aside[native]", file="bench_aside.py")
    new = write("new.json", result(row(), broken, commit="fedcba98765"))
    assert main([new, "--against", write("old.json", result(row(), row("test_gone[native]"), aside))]) == 0
    shown = capsys.readouterr().out
    assert "| test_gone[native] (op) | 2 | absent | none: not measured in both |" in shown
    assert "| bench_op.py (bench_op.py) | absent | red | none: the check is red (no module) |" in shown
    assert "aside" not in shown


@pytest.mark.parametrize(
    ("row_now", "message"),
    [
        (unmeasured("red", "wrong result"), "| red | none: the check is red (wrong result) |"),
        (unmeasured("skipped", "no memory"), "| skipped | none: not measured in both |"),
        (
            row(seconds=0.001, error=0.02, kind="rounded"),
            "none: exact became rounded (error 1.0e-07, now 2.0e-02 (rounded))",
        ),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_no_speed_up_is_claimed_from_a_wrong_row(
    write: Write, capsys: pytest.CaptureFixture[str], row_now: Any, message: str, turned: bool
) -> None:
    files = [write("new.json", result(row_now, commit="fedcba98765")), write("old.json", result(row(seconds=0.003)))]
    new, old = reversed(files) if turned else files
    assert main([new, "--against", old]) == 0
    shown = capsys.readouterr().out
    if turned:
        assert "| none: " in shown.splitlines()[-1]
    else:
        assert message in shown


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (result(machine_info={"capability": "AVX512"}), "differ in capability"),
        (result(row("test_else[native]")), "share no row"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str], old: Any, message: str
) -> None:
    assert main([write("new.json", result()), "--against", write("old.json", old)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--against", "old.json"]])
def test_nothing_to_do(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


README = f"# Title\n{BEGIN}\nstale\n{END}\nThe end.\n"


def readme(tmp_path: Path, write: Write, *results: dict[str, Any], text: str = README) -> tuple[int, str]:
    for index, content in enumerate(results):
        write(f"results/epyc/{index}.json", content)
    path = Path(write("README.md", text))
    return main(["--readme", str(path), "--record", str(tmp_path / "results")]), path.read_text()


def test_the_readme_quotes_ours_beside_the_fastest_exact_peer(tmp_path: Path, write: Write) -> None:
    rows = [
        row(),
        row("test_op[eager]", 0.009),
        row("test_op[compiled]", 0.005),
        row("test_op[rough]", 0.001, error=2e-2, kind="rounded"),
        row("test_aside[native]", group="aside", headline=None),
    ]
    status, text = readme(tmp_path, write, result(*rows))
    assert status == 0
    assert text.startswith(f"# Title\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nThe end.\n")
    assert "| op | 2 (native) | 0.50 | 1.0e-07 | 3 | 5 (compiled) | 2.50 | 1 (rough), error 2.0e-02 (rounded) |" in text
    assert "stale" not in text
    assert "aside" not in text


def test_a_red_row_of_ours_claims_nothing_for_its_group(tmp_path: Path, write: Write) -> None:
    red = unmeasured("red", "wrong result", name="test_op[native, bfloat16]")
    _, text = readme(tmp_path, write, result(row(), red, row("test_op[eager]", 0.009)))
    assert "| op | red: test_op[native, bfloat16]: wrong result |" in text
    assert "9 (eager)" not in text


def claim(name: str, setting: str, **columns: Any) -> dict[str, Any]:
    status = columns.pop("status", "measured")
    made = row if status == "measured" else lambda **columns: unmeasured(status, "no room", **columns)
    return made(name=f"test_op[{name}]", group=f"cost of 1 pair, {setting}", headline="claim", **columns)


def test_the_cost_claim_has_both_ratios(tmp_path: Path, write: Write) -> None:
    rows = [
        claim("native", "T=512", seconds=1e-6, flop=1e6),
        claim("online", "T=512", seconds=2.0, flop=3e13),
        claim("model", "T=512", status="counted", flop=4e14),
        claim("native", "70B", status="counted", flop=1e6),
        claim("online", "70B", status="counted", flop=5e13),
        claim("native", "7B", flop=1e6),
        claim("online", "7B", status="skipped"),
    ]
    _, text = readme(tmp_path, write, result(*rows))
    assert "**cost of 1 pair: times ours in time / in FLOP**" in text
    assert "|  | ours | online | model |" in text
    assert "| T=512 | 0.001 ms / 0.001 GFLOP | 2e+06 / 3e+07 | not measured / 4e+08 |" in text
    assert "| 70B | 0.001 GFLOP | counted 5e+07 |  |" in text
    assert "| 7B | 2 ms / 0.001 GFLOP | no room |  |" in text


@pytest.mark.parametrize("broken", ["native", "online"])
def test_a_red_row_claims_no_cost(tmp_path: Path, write: Write, broken: str) -> None:
    rows = [claim(name, "T=512", status="red" if name == broken else "measured") for name in ("native", "online")]
    _, text = readme(tmp_path, write, result(*rows))
    assert f"| T=512 | red: test_op[{broken}]: no room |  |" in text


def test_a_file_is_quoted_from_its_newest_run(tmp_path: Path, write: Write) -> None:
    other = row("test_else[native]", file="bench_else.py", group="else")
    old = result(row(seconds=0.008), other, commit="old")
    new = result(row(seconds=0.004), commit="new", datetime="2026-02-03T00:00:00")
    _, text = readme(tmp_path, write, new, old)
    assert "8 (native)" not in text
    assert text.index("; new; 2026-02-03") < text.index("| op | 4 (native)")
    assert text.index("| op | 4 (native)") < text.index("; old; 2026-01-02") < text.index("| else | 2 (native)")


@pytest.mark.parametrize("text", ["# Title", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{END}"])
def test_a_readme_without_its_markers_is_left_alone(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert readme(tmp_path, write, result(), text=text) == (2, text)
    assert "README.md: needs the lines" in capsys.readouterr().err


def test_uncommitted_changes_are_not_quoted(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = readme(tmp_path, write, result(commit_info={"id": "0123456789abcdef", "dirty": True}))
    assert (status, text) == (2, README)
    assert "uncommitted changes; measure a commit" in capsys.readouterr().err


def test_a_record_of_two_devices_in_one_folder_is_refused(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = readme(tmp_path, write, result(), result(commit="b", machine_info={"cpu": "Xeon"}))
    assert status == 2
    assert "differ in cpu" in capsys.readouterr().err


def test_this_readme_is_what_the_committed_results_give(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copied = tmp_path / "README.md"
    copied.write_text(text, encoding="utf-8")
    assert main(["--readme", str(copied)]) == 0
    assert copied.read_text(encoding="utf-8") == text, "run `python -m benchmarks.report --readme`"
    figures = re.findall(r"\((docs/benchmarks/.*?\.svg)\)", text)
    assert figures
    for figure in figures:  # what they say; where matplotlib puts it differs by its version
        said, made = (re.findall(r"<text.*?>(.*?)</text>", (at / figure).read_text()) for at in (ROOT, tmp_path))
        assert said == made


def test_the_readmes_figure_has_every_implementation_of_the_headline_groups(tmp_path: Path, write: Write) -> None:
    rows = [
        row("test_both[native]", 0.5, file="bench_linear_preference.py", group="loss"),
        row("test_both[eager]", 0.9, file="bench_linear_preference.py", group="loss", kind="rounded", peak_bytes=7e6),
        row("test_both[native-T]", file="bench_linear_preference.py", group="memory", headline=None),
        row(),
    ]
    _, text = readme(tmp_path, write, result(*rows))
    assert "](docs/benchmarks/epyc.svg)" in text
    figure = (tmp_path / "docs" / "benchmarks" / "epyc.svg").read_text()
    said = [each.strip() for each in re.findall(r"<text.*?>(.*?)</text>", figure)]
    expected = ["loss", "native", "eager (rounded)", "500", "900", "3", "7", "median time, ms", "peak extra memory, MB"]
    assert sorted(said) == sorted(expected)


def test_the_readme_shows_what_memory_grows_with(tmp_path: Path, write: Write) -> None:
    sizes = [{"T": T, "V": V} for T, V in ((64, 8), (64, 32), (64, 128), (256, 32))]
    rows = [
        row(f"test_memory[{name}-T{each['T']}-V{each['V']}]", shape=each, implementation=name)
        for name in ("native", "eager")
        for each in sizes
    ]
    _, text = readme(tmp_path, write, result(*rows))
    for dimension in "TV":
        assert f"](docs/benchmarks/epyc-memory-{dimension}.svg)" in text
        figure = (tmp_path / "docs" / "benchmarks" / f"epyc-memory-{dimension}.svg").read_text()
        assert {"native", "eager", dimension, "peak extra memory, MB"} <= set(
            re.findall(r"<text.*?>(.*?)</text>", figure)
        )


def test_a_readme_without_rows_to_draw_has_no_figure(tmp_path: Path, write: Write) -> None:
    _, text = readme(tmp_path, write, result())
    assert "![" not in text
    assert not (tmp_path / "docs").exists()


def test_the_page_holds_its_plots_and_the_record(tmp_path: Path, write: Write) -> None:
    write("results/epyc/old.json", result(row(seconds=0.008), commit="0ld"))
    write("results/epyc/new.json", result(commit="new", datetime="2026-02-03T00:00:00"))
    rows = [
        row(f"test_op[{name}-{size}]", size / 1e6, shape={"T": size, "V": 32}, implementation=name)
        for name in ("native", "eager")
        for size in (64, 512, 4096)
    ] + [row("test_copy[native]", flop=0, group="<copy>")]
    page = tmp_path / "page.html"
    run = write("run.json", result(*rows))
    assert main([run, "--page", str(page), "--record", str(tmp_path / "results")]) == 0
    text = page.read_text(encoding="utf-8")
    headings = ["op, float32, upstream 1, eager, V=32; along T", "Roofline", "Share of the floor", "Over commits: epyc"]
    assert all(heading in text for heading in headings)
    assert "along V" not in text  # every row has the same
    assert "<td>8 ms, 0.50</td><td>2 ms, 0.50</td>" in text  # oldest first
    assert "&lt;copy&gt;" in text
    svgs = text.split("<svg")[1:]
    assert len(svgs) == 4
    for svg in svgs:
        ET.fromstring("<svg" + svg[: svg.index("</svg>") + len("</svg>")])
    assert not re.search(r"src=|<link|@import", text)  # it needs no other file


def test_the_record_has_no_time_of_a_commit_with_a_red_row_of_ours(tmp_path: Path, write: Write) -> None:
    write("epyc/green.json", result(row(), unmeasured("red", "rounded", name="test_op[eager]"), commit="green"))
    rows = row(), unmeasured("red", "wrong result", name="test_op[native, bfloat16]")
    write("epyc/red.json", result(*rows, commit="red", datetime="2026-02-03T00:00:00"))
    (line,) = series(read(tmp_path)["epyc"])
    assert (line.commits, line.seconds, line.floor_share) == (["green", "red"], [0.002, None], [0.5, None])


def test_a_page_of_an_unfinished_run_with_nothing_measured(tmp_path: Path, write: Write) -> None:
    run = write("run.json", result(unmeasured("skipped", "no memory"), complete=False))
    page = tmp_path / "page.html"
    assert main([run, "--page", str(page), "--record", str(tmp_path / "none")]) == 0
    assert "skipped: no memory" in page.read_text(encoding="utf-8")
