"""Figure 7: what the reward costs beside online sampling, measured in a run and counted against sequence length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reprdpo import costs, models
from reprdpo.errors import UserError
from reprdpo.experiments.experiment import Job
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.overhead import overhead
from reprdpo.experiments.results import Column, Figure, Result, Series, Table
from reprdpo.files import read_json

TITLE = "Figure 7: extra cost against online sampling"
QUESTION = "How much cheaper is re-ranking by hidden states than sampling from the moving policy?"
PAIR = 2  # responses


@dataclass(frozen=True)
class Options:
    """Attributes:
    lengths: tokens of prompt and response, a point of the curves each.
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)


class Shape(NamedTuple):
    """The sizes that the counted costs depend on."""

    name: str
    layers: int
    hidden_size: int
    parameters: int

    def reward(self) -> float:
        """FLOP of scoring a pair and of the reward's gradients on it; of no length."""
        return costs.reward_flop(self.layers, self.hidden_size, sequences=PAIR, gradients=True)

    def adam(self, batch: int) -> float:
        """FLOP of the reward's optimizer step, a pair of a batch."""
        return costs.reward_step_flop(self.layers, self.hidden_size) / batch

    def online(self, tokens: int) -> float:
        """FLOP of drawing, scoring and learning from two responses."""
        return costs.online_flop(self.parameters, tokens)


LLAMA_7B = Shape("7B", 32, 4096, 6_740_000_000)


def run(job: Job) -> Result:
    needed = {"reprdpo", "online"}
    if missing := needed - set(job.config.systems):
        raise UserError(f"systems: figure7 compares reprdpo with online; add {', '.join(sorted(missing))}")
    finished = job.pipeline()
    shapes = [_shape_of(finished), LLAMA_7B]
    arguments = finished.config.training_arguments("reprdpo")
    batch = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    found = overhead(_own_stages(finished))
    assert found is not None  # reprdpo moves a reward
    lengths = job.options.lengths
    return Result(
        tables=[_measured(found), _counted(shapes, lengths, batch)],
        figures=[
            Figure("cost", "Extra FLOP a pair", "line", "tokens", "FLOP", _cost_series(shapes, lengths), note=_LOG),
            Figure("ratio", "Online sampling / ours", "line", "tokens", "ratio", _ratios(shapes, lengths), note=_LOG),
        ],
        notes=[
            *found["lines"],
            "Counted: multiply-adds of matmuls, two FLOP each. Ours a pair is 2 responses x 2 (forward and parameter "
            "gradients) x 4 L d; online is 2 responses x (2 + 2 + 6) N T: draw, score, train the reward model of N "
            "parameters. The policy's own update is in neither.",
            'The paper\'s "5 to 6 orders of magnitude" and its "300x" are two ratios: the marginal one a pair, and the '
            "whole run's, to which the one-off drawing of N responses a prompt belongs.",
        ],
        not_run=["Timing at 7B: the 7B curves are counted from its shapes; only this run's points are measured."],
    )


_LOG = "Both axes are logarithmic by nature: ours is flat, online sampling grows with length."


def _own_stages(finished: FinishedRun) -> dict[str, Any]:
    """The stages of this run's fit, sampling and two systems, of all that its folder holds."""
    kept = ["fit", "sample", *(f"train {name} seed {s}" for name in ("reprdpo", "online") for s in finished.seeds)]
    return {name: stage for name, stage in read_json(finished / "run.json")["stages"].items() if name in kept}


def _shape_of(finished: FinishedRun) -> Shape:
    config = AutoConfig.from_pretrained(finished.base_model, trust_remote_code=finished.config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=finished.config.trust_remote_code)
    parameters = models.matmul_parameters(models.decoder(model)) + models.output_head(model).weight.numel()
    text = config.get_text_config()
    return Shape("this model", text.num_hidden_layers, text.hidden_size, parameters)


def _measured(found: Mapping[str, Any]) -> Table:
    rows = [
        {"what": "Share of training's time that the reward took", "value": found["reward_share"]},
        {"what": "Seconds of the reward, all trainings", "value": found["reward_seconds"]},
        {"what": "Seconds of training, all of it", "value": found["training_seconds"]},
        {"what": "Seconds once: fitting, sampling and ranking", "value": found["one_off_seconds"]},
        {"what": "Online / ours a pair, counted FLOP (marginal)", "value": found["marginal_counted"]},
        {
            "what": "Online / ours, counted FLOP, one-off part with ours (whole run)",
            "value": found["whole_run_counted"],
        },
    ]
    if "marginal_measured" in found:
        rows.append({"what": "Online / ours, measured seconds (marginal)", "value": found["marginal_measured"]})
    columns = [Column("what", "Quantity", "text"), Column("value", "Value")]
    return Table("measured", "What this run cost", columns, rows, "From the run's own accounting (run.json).")


def _counted(shapes: list[Shape], lengths: tuple[int, ...], batch: int) -> Table:
    columns = [Column("tokens", "Tokens", "count")]
    for place, shape in enumerate(shapes):
        columns += [
            Column(f"ours_{place}", f"Ours, {shape.name} (FLOP)"),
            Column(f"online_{place}", f"Online, {shape.name} (FLOP)"),
            Column(f"ratio_{place}", f"Ratio, {shape.name}"),
            Column(f"ratio_adam_{place}", f"Ratio with Adam at batch {batch}, {shape.name}"),
        ]
    rows = []
    for tokens in lengths:
        row: dict[str, Any] = {"tokens": tokens}
        for place, shape in enumerate(shapes):
            ours, online = shape.reward(), shape.online(tokens)
            row |= {f"ours_{place}": ours, f"online_{place}": online, f"ratio_{place}": online / ours}
            row[f"ratio_adam_{place}"] = online / (ours + shape.adam(batch))
        rows.append(row)
    return Table("counted", "Extra cost a pair, counted", columns, rows, "Policy update excluded.")


def _cost_series(shapes: list[Shape], lengths: tuple[int, ...]) -> list[Series]:
    x = [float(tokens) for tokens in lengths]
    ours = [Series(f"ours, {shape.name}", [shape.reward() for _ in lengths], x, group=shape.name) for shape in shapes]
    online = [
        Series(f"online, {shape.name}", [shape.online(tokens) for tokens in lengths], x, group=shape.name)
        for shape in shapes
    ]
    return [*ours, *online]


def _ratios(shapes: list[Shape], lengths: tuple[int, ...]) -> list[Series]:
    x = [float(tokens) for tokens in lengths]
    return [Series(shape.name, [shape.online(t) / shape.reward() for t in lengths], x) for shape in shapes]
