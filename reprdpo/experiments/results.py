"""What an experiment found, as plain data: tables, figures, orderings, and what was not run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reprdpo.evaluation import Comparison, Estimate

FORMAT = "reprdpo-experiment-1"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval and how many judged items it rests on; ``unparsed`` ones are not among them."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unparsed: int = 0

    @classmethod
    def of(cls, found: Estimate | Comparison) -> "Interval":
        """A mean over seeds, or the difference of two systems."""
        value = found.mean if isinstance(found, Estimate) else found.difference
        return cls(value, found.low, found.high, found.n, found.unparsed)


@dataclass(frozen=True)
class Column:
    """A column of a table; a "share" is a fraction of 1, shown in percent."""

    key: str
    label: str
    kind: Literal["text", "count", "number", "share"] = "number"


Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line, group of bars or cloud of points of a figure; ``x`` is None where the figure has categories."""

    label: str
    y: Sequence[float | None]
    x: Sequence[float] | None = None
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    group: str | None = None


@dataclass(frozen=True)
class Line:
    """A horizontal reference of a figure."""

    label: str
    y: float


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    kind: Literal["line", "bars", "scatter", "density", "reliability", "histogram"]
    x_label: str
    y_label: str
    series: Sequence[Series]
    categories: Sequence[str] | None = None
    lines: Sequence[Line] = ()
    note: str = ""


@dataclass(frozen=True)
class Ordering:
    """A claim "A below B" with its test; ``held`` is None where the interval holds 0."""

    claim: str
    held: bool | None
    difference: float
    low: float
    high: float
    p: float
    detail: str

    @classmethod
    def of(cls, claim: str, found: Comparison) -> "Ordering":
        """The ordering that a comparison of the lower with the higher system shows."""
        held = {"held": True, "reversed": False}.get(found.verdict)
        detail = found.describe().removeprefix(f"{found.verdict}: ")
        return cls(claim, held, found.difference, found.low, found.high, found.p, detail)


@dataclass(frozen=True)
class Result:
    """What a recipe returns; ``not_run`` names what of the paper's version was left out, and why."""

    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    orderings: Sequence[Ordering] = ()
    notes: Sequence[str] = ()
    not_run: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
