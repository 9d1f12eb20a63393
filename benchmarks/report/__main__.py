"""`python -m benchmarks.report`: tables of a run, two commits compared, the page, the README's tables."""

import argparse
import sys
from pathlib import Path

from benchmarks.report.results import merge, stamp
from benchmarks.report.tables import compare, group_tables, parts_tables

ROOT = Path(__file__).resolve().parent.parent.parent


def main(argv: list[str] | None = None) -> int:
    """Print or write what is asked; status 2 for files that cannot be read, mixed or compared."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not (arguments.results or arguments.page or arguments.readme):
        parser.error("nothing to do: give result files, --page or --readme")
    if arguments.against and not arguments.results:
        parser.error("--against needs result files to compare with")
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    result = merge(arguments.results) if arguments.results else None
    if result and arguments.against:
        print(compare(result, merge(arguments.against)).markdown())
    elif result:
        tables = [*group_tables(result), *parts_tables(result)]
        print("\n\n".join([stamp(result), *(table.markdown() for table in tables)]))
    if not (arguments.page or arguments.readme):
        return
    try:
        from benchmarks.report.page import page
        from benchmarks.report.readme import updated
    except ImportError as error:
        raise ValueError(f"page and README are drawn with matplotlib (pip install 'reprdpo[train]'): {error}") from None
    if arguments.page:
        arguments.page.write_text(page(result, arguments.record), encoding="utf-8")
    if arguments.readme:
        try:
            text, figures = updated(arguments.readme.read_text(encoding="utf-8"), arguments.record)
        except ValueError as error:
            raise ValueError(f"{arguments.readme}: {error}") from None
        for path, figure in figures.items():
            (file := arguments.readme.parent / path).parent.mkdir(parents=True, exist_ok=True)
            file.write_text(figure, encoding="utf-8")
        arguments.readme.write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    files = "files of one run (`pytest benchmarks --benchmark-json FILE`); parts of one commit are put together"
    parser.add_argument("results", type=Path, nargs="*", help=files)
    parser.add_argument("--against", type=Path, nargs="+", help="files of another commit on the same device: compare")
    parser.add_argument("--page", type=Path, metavar="HTML", help="write tables, plots and the record as one page")
    parser.add_argument(
        "--record", type=Path, default=ROOT / "benchmarks" / "results", help="the committed results, a folder a device"
    )
    parser.add_argument(
        "--readme", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE", help="rewrite the README's tables"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
