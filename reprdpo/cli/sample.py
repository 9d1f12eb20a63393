"""`reprdpo sample`: draw responses, rank them by the reward, make pairs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from reprdpo.cli.arguments import add_fields, add_policy, policy_of, take_fields
from reprdpo.cli.parser import Parser
from reprdpo.data import TokenizeConfig, load_prompts
from reprdpo.experiments.stages import sample_pairs
from reprdpo.files import check_writable
from reprdpo.reward import HybridReward
from reprdpo.sampling import EngineConfig, SamplingConfig

EXAMPLES = """\
in this process:
  reprdpo sample --model policy --reward reward --prompts prompts.jsonl --output samples

from a server of the same policy, which should run on other devices than the scoring here:
  vllm serve policy --port 8000
  reprdpo sample --model policy --reward reward --prompts prompts.jsonl --output samples \\
    --engine openai --base_url http://127.0.0.1:8000/v1 --concurrency 64

The same command again goes on where it stopped. A server's key, if it wants one, is read from the environment
variable REPRDPO_API_KEY. The server applies its own tokenizer and chat template: serve the policy's folder.
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo sample",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_policy(parser)
    parser.add_argument("--reward", required=True, help="folder of a fitted reward")
    parser.add_argument("--prompts", required=True, help="prompts to answer: a source, see `reprdpo datasets`")
    parser.add_argument("--output", required=True, help="folder of responses.jsonl and pairs.jsonl")
    parser.add_argument("--limit", type=int, help="prompts to read")
    parser.add_argument("--top", type=int, default=1, help="responses from the top of a ranking (default: 1)")
    parser.add_argument("--bottom", type=int, default=1, help="responses from the bottom of a ranking (default: 1)")
    parser.add_argument("--min_gap", type=float, default=0.0, help="smallest reward gap of a pair (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_fields(parser, EngineConfig)
    add_fields(parser, SamplingConfig)
    add_fields(parser, TokenizeConfig)
    arguments = parser.parse_args(argv)
    output, engine = Path(arguments.output), take_fields(arguments, EngineConfig)
    check_writable(output)
    report = asdict(
        sample_pairs(
            policy_of(arguments),
            HybridReward.from_pretrained(arguments.reward),
            load_prompts(arguments.prompts, limit=arguments.limit),
            take_fields(arguments, SamplingConfig),
            output,
            engine=engine,
            top_k=arguments.top,
            bottom_k=arguments.bottom,
            min_gap=arguments.min_gap,
        )
    )
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{output / 'pairs.jsonl'}: {report['n_pairs']} pairs of {report['n_prompts']} prompts")
        print(f"left out: {report['skipped'] or 'nothing'}; mean reward gap {report['mean_gap']:.3f}")
