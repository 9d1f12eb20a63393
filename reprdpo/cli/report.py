"""`reprdpo report`: draw a run's folder as PNG files and one self-contained page."""

import argparse
import json


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="reprdpo report", description=__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print the page's path as JSON")
    arguments = parser.parse_args(argv)

    from reprdpo.report import render, summary_table

    page = render(arguments.run)
    if arguments.json:
        print(json.dumps({"report": str(page)}))
        return
    print(summary_table(arguments.run))
    print(f"report: {page}")
