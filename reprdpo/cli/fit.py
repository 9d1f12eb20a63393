"""`reprdpo fit`: fit the reward on the hidden states of a preference set."""

import argparse
import json
from pathlib import Path
from typing import Any

from reprdpo.cli.arguments import add_fields, add_policy, policy_of, take_fields
from reprdpo.cli.parser import Parser
from reprdpo.data import TokenizeConfig, load_preferences
from reprdpo.errors import UserError
from reprdpo.experiments.stages import fit_reward
from reprdpo.files import check_writable, write_json
from reprdpo.reward import FitReport, RewardFitConfig, fit_from_states

EXAMPLE = """\
example:
  reprdpo fit --model path/to/model --preferences pairs.jsonl --output reward
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo fit", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_policy(parser, required=False)
    parser.add_argument("--preferences", help="pairs to fit on: a source, see `reprdpo datasets`")
    parser.add_argument("--states", help="instead: a safetensors file of hidden states, chosen and rejected [n, L, D]")
    parser.add_argument("--keep_embedding", action="store_true", help="take row 0 of --states as a layer too")
    parser.add_argument("--output", help="folder the reward is written to")
    parser.add_argument("--limit", type=int, help="pairs to read")
    parser.add_argument("--skip_invalid", action="store_true", help="drop pairs that cannot be used")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_fields(parser, RewardFitConfig)
    add_fields(parser, TokenizeConfig)
    arguments = parser.parse_args(argv)
    report = _fit(arguments, take_fields(arguments, RewardFitConfig))
    print(json.dumps(report.to_json(), indent=2) if arguments.json else _describe(report))


def _fit(arguments: argparse.Namespace, config: RewardFitConfig) -> FitReport:
    if arguments.states:
        return fit_from_states(arguments.states, config, drop_embedding=not arguments.keep_embedding)
    if not (arguments.model and arguments.preferences and arguments.output):
        raise UserError("give --model, --preferences and --output, or --states")
    check_writable(arguments.output)
    pairs = load_preferences(arguments.preferences, limit=arguments.limit, skip_invalid=arguments.skip_invalid)
    policy, output = policy_of(arguments), Path(arguments.output)
    if (output / "reward.json").exists():
        raise UserError(f"{output}: holds a reward already; choose another --output, or delete it")
    report = fit_reward(policy, policy.tokenize(pairs, arguments.preferences), config, output)
    write_json(output / "fit_report.json", report.to_json())
    return report


def _describe(report: Any) -> str:
    layers = [f"  layer {number:>3}  {value:.3f}" for number, value in enumerate(report.layer_accuracy, start=1)]
    return "\n".join(
        [
            f"pair accuracy, {report.folds}-fold cross-validated, {report.num_pairs} pairs",
            *layers,
            f"  gated      {report.gated_accuracy:.3f}",
            f"alpha {report.alpha:.3g}, calibration error {report.calibration.ece:.3f} "
            f"(at alpha 7.5: {report.paper_calibration.ece:.3f}), {report.seconds:.1f} s",
        ]
    )
