"""`reprdpo experiment`: the paper's tables and figures, by name."""

import argparse
import sys
from typing import Any

import yaml

from reprdpo.cli.parser import Parser
from reprdpo.errors import UserError


def main(argv: list[str]) -> None:
    from reprdpo.experiments.experiment import SCALES, describe, experiment_names, merge, run_experiment
    from reprdpo.report import render

    scales = "\n".join(f"  {name:<8}{what}" for name, what in SCALES.items())
    parser = Parser(
        prog="reprdpo experiment",
        description=__doc__,
        epilog=f"scales:\n{scales}\n\nThe same command again goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="an experiment's name, or 'list'")
    parser.add_argument("--model", help="folder or hub name of a causal LM (default: the sandbox)")
    parser.add_argument("--preferences", help="labelled preferences: a source, see `reprdpo datasets`")
    parser.add_argument("--prompts", help="red-team prompts: a source, see `reprdpo datasets`")
    parser.add_argument("--judge", help="who judges (see docs/judges.md)")
    parser.add_argument("--scale", default="small", choices=tuple(SCALES), help="how large (default: %(default)s)")
    parser.add_argument("--output_dir", default="runs/experiments", help="default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as train.beta=0.2"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the experiment"
    )
    arguments = parser.parse_args(argv)
    if arguments.name == "list":
        print("\n".join(f"{name:<20}{describe(name)}" for name in experiment_names()))
        return
    given = {"model": arguments.model, "preferences": arguments.preferences}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    asked = {"prompts": arguments.prompts, "judge": arguments.judge}
    settings = merge(settings, {"evaluate": {key: value for key, value in asked.items() if value is not None}})
    for text in arguments.set:
        settings = merge(settings, _assignment("--set", text))
    options: dict[str, Any] = {}
    for text in arguments.option:
        options = merge(options, _assignment("--option", text))
    folder = run_experiment(
        arguments.name,
        scale=arguments.scale,
        output_dir=arguments.output_dir,
        settings=settings,
        options=options,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"result: {folder / 'result.json'}")
    print(f"report: {render(folder)}")


def _assignment(option: str, text: str) -> dict[str, Any]:
    """``train.beta=0.2`` as a nested mapping."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"{option} {text}: expected KEY=VALUE, such as train.beta=0.2")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text}: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)
