"""How numbers, shares and verdicts are put in words, on a page and in a terminal alike."""

import re

from reprdpo.report.content import Lines, Ordering, Orderings, Page, Table, Value
from reprdpo.statistics import p_words

NONE = "—"
# The judges by phrases, which know refusals alone.
REFUSAL_PROXIES = ("keyword-refusal", "xstest-string-match")


def main_words(cell: Value, kind: str) -> str:
    """The value alone: a share in percent, a count with separators, a number to four digits."""
    if cell.value is None:
        return NONE
    if isinstance(cell.value, str):
        return cell.value
    forms = {"share": f"{100 * cell.value:.1f} %", "count": f"{cell.value:,.0f}", "text": str(cell.value)}
    return forms.get(kind) or (f"{cell.value:,.0f}" if 1e4 <= abs(cell.value) < 1e9 else f"{cell.value:.4g}")


def detail_words(cell: Value, kind: str) -> str:
    """The interval, the n and how many could not be judged; a share says where its n is not given."""
    parts = []
    if cell.low is not None and cell.high is not None:
        ends = (f"{100 * end:.1f}" if kind == "share" else f"{end:.4g}" for end in (cell.low, cell.high))
        parts.append("{} to {}".format(*ends))
    if cell.n is not None:
        parts.append(f"n {cell.n:,}")
    elif kind == "share" and cell.value is not None:
        parts.append("n not given")
    if cell.unparsed:
        parts.append(f"{cell.unparsed:,} unjudged")
    return ", ".join(parts)


def held_word(held: bool | None) -> str:
    """`held`, `not held` or `undecided`."""
    return "undecided" if held is None else "held" if held else "not held"


def held_words(orderings: list[Ordering]) -> str:
    return f"{sum(ordering.held is True for ordering in orderings)} of {len(orderings)}"


def verdict_words(ordering: Ordering) -> str:
    """The difference with interval and p-value, and the detail; a detail that tells the test stands alone."""
    if re.search(r"\bp [=<]", ordering.detail):
        return ordering.detail
    parts = [f"difference {ordering.difference:+.3g}" if ordering.difference is not None else ""]
    if ordering.low is not None and ordering.high is not None:
        parts.append(f"95 % interval [{ordering.low:+.3g}, {ordering.high:+.3g}]")
    if ordering.p is not None:
        parts.append(p_words(ordering.p))
    return ", ".join(part for part in [*parts, ordering.detail] if part)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def by_numbers(name: str) -> list[str]:
    """A key by which S2 comes before S10."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def page_text(page: Page) -> str:
    """What a terminal shows of a page: its tables, the orderings, lists, and what is missing."""
    parts = []
    for block in page.blocks():
        match block:
            case Table(terminal=True):
                parts.append("\n".join([block.title, *_aligned(block)]))
            case Orderings():
                lines = (f"  {held_word(row.held):<10} {row.claim} ({verdict_words(row)})" for row in block.rows)
                parts.append("\n".join([f"{block.title}:", *lines]))
            case Lines():
                parts.append("\n  ".join([f"{block.title}:", *block.lines]))
    return "\n\n".join([*parts, *(["\n".join(page.missing)] if page.missing else [])]) + "\n"


def page_markdown(page: Page) -> str:
    """A section of a Markdown page: what was asked, the command, tables, orderings, lists, and what is missing."""
    parts = [f"## {_escaped(page.title)}", _escaped(page.lead), f"`{page.made}`"]
    for block in page.blocks():
        match block:
            case Table():
                parts += [f"**{_escaped(block.title)}**", "\n".join(_markdown_rows(block)), _escaped(block.note)]
            case Orderings():
                tested = ((held_word(row.held), f"{row.claim} ({verdict_words(row)})") for row in block.rows)
                parts.append("\n".join(f"- {verdict}: {_escaped(claim)}" for verdict, claim in tested))
            case Lines():
                parts.append("\n".join(f"- {_escaped(line)}" for line in block.lines))
    parts.append("\n".join(f"- {_escaped(line)}" for line in page.missing))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_rows(table: Table) -> list[str]:
    kinds = [column.kind for column in table.columns]
    lines = [[column.label for column in table.columns], ["---" if kind == "text" else "--:" for kind in kinds]]
    for row in table.rows:
        cells = zip(row, kinds, strict=True)
        lines.append([_joined(main_words(cell, kind), detail_words(cell, kind)) for cell, kind in cells])
    return ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


def _aligned(table: Table) -> list[str]:
    """The first column to the left, the others to the right."""
    kinds = [column.kind for column in table.columns]
    lines = [[column.label for column in table.columns]]
    for row in table.rows:
        cells = zip(row, kinds, strict=True)
        lines.append([_joined(main_words(cell, kind), detail_words(cell, kind)) for cell, kind in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def _joined(main: str, detail: str) -> str:
    return f"{main} ({detail})" if detail else main


def judge_said(name: str) -> str:
    """A judge's name, with what its "unsafe" is where that is not what the word says."""
    return f"{name} (a proxy: unsafe is what is not refused)" if name in REFUSAL_PROXIES else name
