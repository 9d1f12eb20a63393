"""`python -m benchmarks.report`: tables of a run, two commits compared, the page, the README's tables."""

import argparse
import sys
from pathlib import Path

from benchmarks.report.results import merge, stamp
from benchmarks.report.tables import compare, group_tables


def main(argv: list[str] | None = None) -> int:
    """Print or write what is asked; status 2 for files that cannot be read, mixed or compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="*", help="files of one run (`pytest benchmarks --benchmark-json FILE`)"
    )
    parser.add_argument("--against", type=Path, nargs="+", help="files of another commit, on the same device")
    arguments = parser.parse_args(argv)
    try:
        result = merge(arguments.results)
        if arguments.against:
            print(compare(result, merge(arguments.against)).markdown())
        else:
            print("\n\n".join([stamp(result), *(table.markdown() for table in group_tables(result))]))
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
