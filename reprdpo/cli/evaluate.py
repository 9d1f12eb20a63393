"""`reprdpo evaluate`: sample a model's responses to prompts and judge them."""

import argparse
import json
from pathlib import Path
from typing import Any

from reprdpo.cli.arguments import add_fields, add_policy, policy_of, take_fields
from reprdpo.cli.parser import Parser
from reprdpo.data import TokenizeConfig, load_prompts, load_responses
from reprdpo.evaluation import build_judge
from reprdpo.experiments.config import EvaluateSection
from reprdpo.experiments.sources import first
from reprdpo.experiments.stages import evaluate_policy
from reprdpo.files import check_writable
from reprdpo.report.words import judge_said
from reprdpo.reward import HybridReward

EXAMPLE = """\
example:
  reprdpo evaluate --model aligned/model --prompts red_team.jsonl --judge llama-guard-3:path/to/guard \\
    --output judged/aligned
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo evaluate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_policy(parser)
    parser.add_argument("--output", required=True, help="where to write: OUTPUT.json, OUTPUT.responses.jsonl")
    parser.add_argument("--reward", help="folder of a fitted reward: judge the best of --best_of responses by it")
    parser.add_argument("--best_of", type=int, default=8, help="responses a prompt with --reward (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the responses (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--prompts", required=True, help="red-team prompts: a source, see `reprdpo datasets`")
    parser.add_argument(
        "--benign_text", default=None, help="responses whose perplexity is measured, a source (default: none)"
    )
    add_fields(parser, EvaluateSection)
    add_fields(parser, TokenizeConfig)
    arguments = parser.parse_args(argv)
    config = take_fields(arguments, EvaluateSection)
    check_writable(Path(arguments.output).parent)
    build_judge(config.judge, needs=("unsafe",))  # says what is wrong with it before the policy is loaded
    policy = policy_of(arguments)
    result = evaluate_policy(
        policy,
        config,
        Path(arguments.output),
        red_team=first(load_prompts(config.prompts), config.limit),
        borderline=first(load_prompts(config.borderline_prompts), config.limit) if config.borderline_prompts else None,
        benign=policy.tokenize_responses(load_responses(config.benign_text), config.benign_text)
        if config.benign_text
        else None,
        seed=arguments.seed,
        best_of=arguments.best_of if arguments.reward else 1,
        reward=HybridReward.from_pretrained(arguments.reward) if arguments.reward else None,
    )
    print(json.dumps(result, indent=2) if arguments.json else _describe(result))


def _describe(result: dict[str, Any]) -> str:
    def rate(value: dict[str, Any]) -> str:
        interval = f"{value['rate']:6.1%} [{value['low']:.1%}, {value['high']:.1%}]"
        return f"{interval}  n={value['n']}, {value['unparsed']} unparsed"

    lines = [f"judge: {judge_said(result['judge'])}", f"  {'toxic':<28}{rate(result['toxic'])}"]
    lines += [f"    {name:<26}{rate(value)}" for name, value in result["by_category"].items()]
    if result["overrefusal"]:
        by = "" if result["overrefusal_judge"] == result["judge"] else f"  (judge: {result['overrefusal_judge']})"
        lines.append(f"  {'over-refusal':<28}{rate(result['overrefusal'])}{by}")
    if result["perplexity"]:
        lines.append(f"  {'perplexity':<28}{result['perplexity']:.2f}")
    return "\n".join(lines)
