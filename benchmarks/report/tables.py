"""Result rows as tables: a group's rows, two commits side by side, the claims; in Markdown or HTML."""

import html
from dataclasses import dataclass

from benchmarks.report.results import Result, Row, check_same_device, groups, key_of, stamp


@dataclass(frozen=True)
class Table:
    """Cells of text under a heading."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"**{self.title}**\n\n{table}"

    def html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(cells, "td") for cells in self.rows)
        return f"<h3>{html.escape(self.title)}</h3>\n<table>\n{line(self.header, 'th')}\n{body}\n</table>"


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1610, 3.2e+07."""
    return f"{float(f'{value:.3g}'):g}"


def group_tables(result: Result) -> list[Table]:
    """Every row, one table a group, fastest first; what was not measured says why."""
    return [_group_table(name, rows) for name, rows in groups(result).items()]


def _group_table(name: str, rows: list[Row]) -> Table:
    on_gpu = any(row.get("launches") is not None for row in rows)
    header = ["", "p20 / p50 / p80, ms", "of the floor", "error", "peak extra, MB", "GFLOP", "moved, MB"]
    header += ["host, µs", "launches"] if on_gpu else []
    return Table(name, header, [_cells(row, len(header)) for row in rows])


def parts_tables(result: Result) -> list[Table]:
    """Where the time of a row goes, for each group whose rows tell their parts; tokens a second where known."""
    return [table for name, rows in groups(result).items() if (table := _parts_table(name, rows)).rows]


def _parts_table(name: str, rows: list[Row]) -> Table:
    told = [row for row in rows if row["status"] == "measured" and row.get("parts")]
    parts = list(dict.fromkeys(part for row in told for part in row["parts"]))
    lines = []
    for row in told:
        cells = [number(1e3 * row["parts"][part]) if part in row["parts"] else "" for part in parts]
        speed = number(row["tokens_per_s"]) if row.get("tokens_per_s") else ""
        lines.append([row["implementation"], number(1e3 * row["p50_s"]), speed, *cells])
    return Table(f"{name}: where the time goes, ms", ["", "all", "tokens/s", *parts], lines)


def _cells(row: Row, width: int) -> list[str]:
    name = row["name"].removeprefix("test_") + ("" if row["mode"] == "eager" else f", {row['mode']}")
    if row["status"] != "measured":
        counted = [number(row["flop"] / 1e9), number(row["bytes"] / 1e6)] if row["status"] == "counted" else []
        cells = [name, f"{row['status']}: {row['reason']}"]
        return [*cells, *[""] * (5 - len(cells)), *counted, *[""] * (width - 5 - len(counted))]
    cells = [
        name,
        " / ".join(number(1e3 * row[key]) for key in ("p20_s", "p50_s", "p80_s")),
        _share(row),
        _error(row),
        number(row["peak_bytes"] / 1e6),
        number(row["flop"] / 1e9),
        number(row["bytes"] / 1e6),
    ]
    host = [number(1e6 * row["host_s"]), str(row["launches"])] if row.get("launches") is not None else []
    return [*cells, *host, *[""] * (width - len(cells) - len(host))]


def compare(new: Result, old: Result) -> Table:
    """The speed-up of each row that both results measured; none where a check is red or rounding has changed.

    Of the benchmark files that both ran, a row that only one has is told too.

    Raises:
        ValueError: the results are of different devices or settings, or share no row.
    """
    check_same_device(new, old, "the results")
    before, after = ({key_of(row): row for row in result["rows"]} for result in (old, new))
    if not before.keys() & after.keys():
        raise ValueError("the results share no row")
    files = {row["file"] for row in old["rows"]} & {row["file"] for row in new["rows"]}
    rows = []
    for key, known in (after | before).items():
        if known["file"] not in files:
            continue
        absent = known | {"status": "absent", "reason": ""}
        was, row = before.get(key, absent), after.get(key, absent)
        times = [number(1e3 * each["p50_s"]) if each["status"] == "measured" else each["status"] for each in (was, row)]
        rows.append([f"{row['name']} ({row['group']})", *times, _speed_up(was, row)])
    return Table(f"{stamp(old)}, then {stamp(new)}", ["", "before, ms", "after, ms", "times as fast"], rows)


def _speed_up(was: Row, row: Row) -> str:
    if red := [each["reason"] for each in (was, row) if each["status"] == "red"]:
        return f"none: the check is red ({red[-1]})"
    if not was["status"] == row["status"] == "measured":
        return "none: not measured in both"
    if was["kind"] != row["kind"]:
        return f"none: {was['kind']} became {row['kind']} (error {_error(was)}, now {_error(row)})"
    return f"{was['p50_s'] / row['p50_s']:.2f}"


def kernel_claims(result: Result) -> Table:
    """Ours beside the fastest peer in each headline group; a group with a red row of ours claims nothing."""
    rows = [line for name, members in _headline(result, "kernel") for line in _kernel_claim(name, members)]
    header = ["", "ours, ms", "of the floor", "error", "peak extra, MB", "fastest peer as exact, ms", "times as fast"]
    return Table(stamp(result), [*header, "a faster rounded peer, ms"], rows)


def _kernel_claim(name: str, members: list[Row]) -> list[list[str]]:
    if red := [row for row in members if row["status"] == "red" and not row["peer"]]:
        return [[name, f"red: {red[0]['name']}: {red[0]['reason']}", *[""] * 6]]
    lines = []
    for mode in ("eager", "graph"):
        rows = [row for row in members if row["mode"] == mode and row["status"] == "measured"]
        ours = next((row for row in rows if not row["peer"]), None)
        if ours is None:
            continue
        exact = next((row for row in rows if row["peer"] and row["kind"] == "exact"), None)
        fastest = next((row for row in rows if row["peer"]), None)
        lines.append(
            [
                name + ("" if mode == "eager" else ", in a CUDA graph"),
                _named(ours),
                _share(ours),
                _error(ours),
                number(ours["peak_bytes"] / 1e6),
                _named(exact) if exact else "none",
                f"{exact['p50_s'] / ours['p50_s']:.2f}" if exact else "",
                f"{_named(fastest)}, error {_error(fastest)}" if fastest and fastest is not exact else "",
            ]
        )
    return lines


def cost_claims(result: Result) -> list[Table]:
    """A table a headline "claim", a line a setting: what ours costs, and how often that every other way costs.

    Groups are named "claim, setting". Time is compared where both were measured, FLOP are counted.
    """
    claims: dict[str, list[tuple[str, list[Row]]]] = {}
    for name, members in _headline(result, "claim"):
        claim, _, setting = name.partition(", ")
        claims.setdefault(claim, []).append((setting, members))
    return [_cost_claim(claim, settings) for claim, settings in claims.items()]


def _cost_claim(claim: str, settings: list[tuple[str, list[Row]]]) -> Table:
    ways = list(dict.fromkeys(row["implementation"] for _, members in settings for row in members if row["peer"]))
    rows = []
    for setting, members in settings:
        by_way = {row["implementation"]: row for row in members}
        ours = next((row for row in members if not row["peer"]), None)
        if red := next((row for row in members if row["status"] == "red"), None):
            rows.append([setting, f"red: {red['name']}: {red['reason']}", *[""] * len(ways)])
        elif ours is None or ours["status"] not in ("measured", "counted"):
            rows.append([setting, ours["reason"] if ours else "not run", *[""] * len(ways)])
        else:
            rows.append([setting, _cost(ours), *(_times(by_way.get(way), ours) for way in ways)])
    return Table(f"{claim}: times ours in time / in FLOP", ["", "ours", *ways], rows)


def _cost(row: Row) -> str:
    flop = f"{number(row['flop'] / 1e9)} GFLOP"
    return f"{number(1e3 * row['p50_s'])} ms / {flop}" if row["status"] == "measured" else flop


def _times(row: Row | None, ours: Row) -> str:
    if row is None or row["status"] not in ("measured", "counted"):
        return row["reason"] if row else ""
    counted = f"{number(row['flop'] / ours['flop'])}"
    if row["status"] == ours["status"] == "measured":
        return f"{number(row['p50_s'] / ours['p50_s'])} / {counted}"
    return f"not measured / {counted}" if ours["status"] == "measured" else f"counted {counted}"


def _headline(result: Result, kind: str) -> list[tuple[str, list[Row]]]:
    return [(name, rows) for name, rows in groups(result).items() if any(row["headline"] == kind for row in rows)]


def _named(row: Row) -> str:
    return f"{number(1e3 * row['p50_s'])} ({row['implementation']})"


def _error(row: Row) -> str:
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    return error if row["kind"] == "exact" else f"{error} ({row['kind']})".strip()


def _share(row: Row) -> str:
    return "" if row["floor_share"] is None else f"{row['floor_share']:.2f}"
