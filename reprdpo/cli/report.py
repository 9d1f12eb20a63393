"""`reprdpo report`: draw a run, an experiment or a folder of experiments as self-contained pages."""

import json

from reprdpo.cli.parser import Parser


def main(argv: list[str]) -> None:
    parser = Parser(prog="reprdpo report", description=__doc__)
    parser.add_argument("folder", help="a run's folder, an experiment's, or a folder of experiments")
    parser.add_argument("--markdown", action="store_true", help="print experiments' tables as Markdown, draw nothing")
    parser.add_argument("--json", action="store_true", help="print the page's path as JSON")
    arguments = parser.parse_args(argv)

    from reprdpo.report import markdown, render, summary_table

    if arguments.markdown:
        print(markdown(arguments.folder), end="")
        return
    page = render(arguments.folder)
    if arguments.json:
        print(json.dumps({"report": str(page)}))
        return
    print(summary_table(arguments.folder))
    print(f"report: {page}")
