"""`reprdpo score`: read prompt/response lines, write rewards."""

import argparse
import sys
from pathlib import Path

from reprdpo.cli.arguments import add_fields, add_policy, policy_of
from reprdpo.cli.parser import Parser
from reprdpo.data import TokenizeConfig, load_responses
from reprdpo.files import check_writable, json_line, write_jsonl
from reprdpo.reward import HybridReward
from reprdpo.sampling import score_responses

EXAMPLE = """\
A reward that is not finite is written as null.

example:
  reprdpo score --model aligned/model --reward aligned/model/reward answers.jsonl > scored.jsonl
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo score", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_policy(parser)
    parser.add_argument("input", help="prompts with responses: a source, see `reprdpo datasets`")
    parser.add_argument("--reward", required=True, help="folder of a fitted reward")
    parser.add_argument("--output", help="file of the same lines with a reward (default: standard output)")
    add_fields(parser, TokenizeConfig)
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_writable(Path(arguments.output).parent)
    rows = load_responses(arguments.input)
    policy, reward = policy_of(arguments), HybridReward.from_pretrained(arguments.reward)
    model = policy.model()
    reward.check_base(model, allow_descendant=True)
    scores = score_responses(
        model,
        policy.tokenizer(),
        reward.to(model.device),
        list(rows["prompt"]),
        list(rows["response"]),
        tokenize=policy.data,
        progress=True,
    )
    scored = [row | {"reward": score} for row, score in zip(rows, scores, strict=True)]
    if arguments.output:
        write_jsonl(arguments.output, scored)
    else:
        sys.stdout.writelines(map(json_line, scored))
