"""`reprdpo run`: the whole pipeline from a YAML file."""

import argparse
import dataclasses
import json
import sys
import textwrap
from typing import Any, get_type_hints

from reprdpo.cli.arguments import describe, documented_fields
from reprdpo.cli.parser import Parser
from reprdpo.experiments.config import RunConfig, load_config

EXAMPLE = """\
example:
  model: path/to/model            # a folder, or a hub name
  preferences: pairs.jsonl        # or a publisher's own files: `reprdpo datasets` lists what is read
  output_dir: runs/mine
  systems: [base, dpo, rs, reprdpo]
  seeds: [0, 1, 2]
  data: {max_length: 512, truncation_mode: keep_end}
  sample: {num_responses: 8, max_new_tokens: 128}
  train: {beta: 0.1, learning_rate: 1.0e-6, num_train_epochs: 1}
  evaluate: {judge: keyword-refusal, prompts: harmful.jsonl}

The same command again goes on where it stopped.

keys:
"""
TRAINING = "; `reprdpo train --help` explains them"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo run",
        description=__doc__,
        epilog=EXAMPLE + _keys(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--output_dir", help="the run's folder, instead of the file's")
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON, progress on standard error only"
    )
    arguments = parser.parse_args(argv)

    execute(load_config(arguments.config, output_dir=arguments.output_dir), as_json=arguments.json)


def _keys(cls: type[Any], indent: str = "  ") -> str:
    """Every key of a run's YAML with what it is, those of a section under its name."""
    hints, documented, lines = get_type_hints(cls), documented_fields(cls), []
    for field in dataclasses.fields(cls):
        section = hints[field.name]
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            lines += [f"{indent}{field.name}:", _keys(section, indent + "  ")]
            continue
        text = describe(field, documented)
        text += TRAINING if "training arguments" in text else ""
        lines.append(textwrap.fill(f"{field.name:<20}  {text}", 78, initial_indent=indent, subsequent_indent=" " * 24))
    return "\n".join(lines)


def execute(config: Any, *, as_json: bool) -> None:
    """Run ``config``, draw its report, print the summary."""
    from reprdpo.experiments import run
    from reprdpo.files import read_json
    from reprdpo.report import render, summary_table

    folder = run(config, say=lambda line: print(line, file=sys.stderr, flush=True)).path
    page = render(folder)
    if as_json:
        print(json.dumps(read_json(folder / "evaluation" / "summary.json") | {"report": str(page)}, indent=2))
        return
    print(summary_table(folder))
    print(f"report: {page}")
