"""`reprdpo datasets`: list the data sets that are read, or say what one source holds."""

import argparse
import json
from collections import Counter
from typing import Any

from reprdpo.cli.parser import Parser
from reprdpo.data.adapters import ADAPTERS, Adapter
from reprdpo.data.sources import SOURCE_OPTIONS

EXAMPLES = """\
A source is written [ADAPTER:]PLACE[?option=value&option=value] wherever preferences, prompts or responses are read.
The place is a file (jsonl, json, csv, each perhaps .gz or .xz; parquet), a folder of them or of a saved data set, or
a name on the hub. Without an adapter the columns tell it.

examples:
  reprdpo datasets
  reprdpo datasets 'pku-safe-rlhf:data/Alpaca-7B?label=better&both_unsafe=drop'
  reprdpo datasets 'xstest_prompts.csv?label=safe' --as prompts
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo datasets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", help="a source to read through (default: list the adapters)")
    parser.add_argument(
        "--as", dest="kind", choices=("preferences", "prompts", "responses"), help="default: what it holds first"
    )
    parser.add_argument("--limit", type=int, help="rows to read")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.source is None:
        print(json.dumps(_registry(), indent=2) if arguments.json else _listing())
        return
    found = examine(arguments.source, kind=arguments.kind, limit=arguments.limit)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else _describe(found))


def examine(source: str, *, kind: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Read ``source`` through: its rows, the categories they are of, and the first one."""
    from reprdpo.data import kinds_of, load_preferences, load_prompts, load_responses

    readers = {"preferences": load_preferences, "prompts": load_prompts, "responses": load_responses}
    kind = kind or f"{kinds_of(source)[0]}s"
    rows = readers[kind](source, limit=limit)
    categories = Counter(rows["category"])
    return {
        "source": source,
        "kind": kind,
        "rows": len(rows),
        "categories": {name or "none": count for name, count in categories.most_common()},
        "first": rows[0],
    }


def _registry() -> dict[str, Any]:
    return {
        name: {
            "title": adapter.title,
            "home": adapter.home,
            "licence": adapter.licence,
            "reads": list(adapter.reads),
            "options": {key: _meaning(adapter, key) for key in adapter.options},
            "columns": list(adapter.columns),
        }
        for name, adapter in ADAPTERS.items()
    }


def _listing() -> str:
    lines = []
    for name, adapter in ADAPTERS.items():
        lines.append(f"{name:<16}{adapter.title}: {', '.join(adapter.reads)} ({adapter.licence})")
        lines += [f"{'':<16}  {key}: {_meaning(adapter, key)}" for key in adapter.options]
    lines += ["", "every source", *(f"{'':<16}  {key}: {what}" for key, what in SOURCE_OPTIONS.items())]
    return "\n".join(lines)


def _meaning(adapter: Adapter, key: str) -> str:
    option = adapter.options[key]
    choices = f"; {', '.join(option.choices)}" if option.choices else ""
    default = "" if option.default is None else f" (default: {option.default})"
    return f"{option.help}{choices}{default}"


def _describe(found: dict[str, Any]) -> str:
    counts = [f"  {count:>8}  {name}" for name, count in found["categories"].items()]
    first = [f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in found["first"].items()]
    return "\n".join([f"{found['rows']} {found['kind']}", *counts, "first:", *first])
