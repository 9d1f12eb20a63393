"""`reprdpo train`: align a model by SFT, DPO, cDPO or the method."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from reprdpo.cli.arguments import add_fields, add_policy, given, policy_of
from reprdpo.cli.parser import Parser
from reprdpo.data import TokenizeConfig, load_preferences
from reprdpo.errors import UserError
from reprdpo.experiments.config import build
from reprdpo.experiments.run_folder import SETTINGS_FILE, checked_settings
from reprdpo.experiments.stages import train_to_end
from reprdpo.files import check_writable, read_jsonl, unmade_on_error, write_json
from reprdpo.reward import HybridReward
from reprdpo.training import ReprDPOConfig, ReprDPOTrainer, ReprSFTConfig, ReprSFTTrainer

METHODS = ("reprdpo", "dpo", "cdpo", "sft")
# Its name in newer transformers, and in all.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
MAIN_ARGUMENTS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "warmup_steps",
    "lr_scheduler_type",
    "logging_steps",
    "save_steps",
    "seed",
)
EPILOG = """\
Any field of transformers.TrainingArguments is an option too. The same command again goes on from the last checkpoint.

example: the paper's settings, with a reward from `reprdpo fit` and pairs from `reprdpo sample`
  reprdpo train --model path/to/model --reward reward --preferences samples/pairs.jsonl \\
    --output_dir aligned --preset paper
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="reprdpo train", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_policy(parser)
    parser.add_argument("--method", choices=METHODS, default="reprdpo", help="reprdpo is the paper's (default)")
    parser.add_argument("--preferences", required=True, help="pairs to train on: a source, see `reprdpo datasets`")
    parser.add_argument("--reward", help="folder of a fitted reward (method reprdpo)")
    parser.add_argument("--output_dir", required=True, help="folder of the aligned model, its log and its reward")
    parser.add_argument("--limit", type=int, help="pairs to read")
    parser.add_argument("--skip_invalid", action="store_true", help="drop pairs that cannot be used")
    parser.add_argument("--json", action="store_true", help="print the last metrics as JSON")
    add_fields(parser, TokenizeConfig)
    own = {f.name for f in fields(ReprDPOConfig)} - {f.name for f in fields(TrainingArguments)}
    checkpointing = next(name for name in CHECKPOINTING if hasattr(ReprDPOConfig, name))
    add_fields(parser, ReprDPOConfig, only={*own, *MAIN_ARGUMENTS, checkpointing})
    arguments = parser.parse_args(argv)
    output = Path(arguments.output_dir)
    if getattr(arguments, "resume_from_checkpoint", None):
        raise UserError("--resume_from_checkpoint: leave it out; training goes on from --output_dir's last checkpoint")
    check_writable(output)
    if (output / "model").exists():
        raise UserError(f"{output}: holds a trained model already; choose another --output_dir")
    given_here = {name: value for name, value in vars(arguments).items() if name not in ("output_dir", "json")}
    settings = checked_settings(output, given_here)
    with unmade_on_error(output):  # transformers makes it before all is checked
        trainer = _trainer(arguments)
    write_json(output / SETTINGS_FILE, settings)
    train_to_end(trainer, output)
    if trainer.is_world_process_zero():
        _print_last(output, as_json=arguments.json)


def _trainer(arguments: argparse.Namespace) -> Trainer:
    policy = policy_of(arguments)
    pairs = load_preferences(arguments.preferences, limit=arguments.limit, skip_invalid=arguments.skip_invalid)
    where = arguments.preferences
    if arguments.method == "sft":
        for name in given(arguments, ReprDPOConfig).keys() - given(arguments, ReprSFTConfig).keys():
            raise UserError(f"--{name}: means nothing to --method sft; leave it out")
        config = build(ReprSFTConfig, given(arguments, ReprSFTConfig))
        rows = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "response")
        rows = policy.tokenize_responses(rows, where)
        return ReprSFTTrainer(policy.model(), config, rows, processing_class=policy.tokenizer())
    settings: dict[str, Any] = {"confidence_source": "reward" if arguments.method == "reprdpo" else "fixed"}
    if arguments.method == "cdpo":
        settings["fixed_confidence"] = 0.9
    config = build(ReprDPOConfig, settings | given(arguments, ReprDPOConfig))
    if arguments.method == "reprdpo" and not arguments.reward:
        raise UserError("--reward: missing; the method needs a reward (`reprdpo fit` makes one)")
    reward = HybridReward.from_pretrained(arguments.reward) if arguments.reward else None
    return ReprDPOTrainer(
        policy.model(),
        config,
        train_dataset=policy.tokenize(pairs, where),
        processing_class=policy.tokenizer(),
        reward=reward,
    )


def _print_last(output: Path, *, as_json: bool) -> None:
    lines = [line for _, line in read_jsonl(output / "metrics.jsonl")]
    last: dict[str, Any] = lines[-1] if lines else {}
    if as_json:
        print(json.dumps(last | {"model": str(output / "model")}, indent=2))
        return
    for name, value in last.items():
        print(f"  {name:<24}{value:.4g}")
    print(f"model: {output / 'model'}")
