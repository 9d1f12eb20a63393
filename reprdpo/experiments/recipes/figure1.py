"""Figure 1: what each layer knows of safety, before and after alignment."""

from dataclasses import dataclass, field

import numpy as np

from reprdpo.experiments.experiment import Job
from reprdpo.experiments.recipes._states import (
    below,
    check_aligned,
    interval,
    labelled_pairs,
    labelled_states,
    layer_series,
    policy_of,
    read_pairs,
)
from reprdpo.experiments.results import Column, Figure, Line, Result, Table
from reprdpo.experiments.stages import Policy
from reprdpo.experiments.systems import SYSTEMS
from reprdpo.reward import RewardEvaluation, evaluate_rewards
from reprdpo.statistics import clustered_mean

TITLE = "Figure 1: pair accuracy of the probes by layer, before and after alignment"
QUESTION = "Which layers tell safe from unsafe answers, does alignment change it, and does the gate keep up?"


@dataclass(frozen=True)
class Options:
    """``pairs`` is a file of labelled pairs to probe with; by default the run's own, cross-validated by prompt."""

    system: str = field(default="reprdpo", metadata={"help": "the aligned system"})
    pairs: str | None = field(default=None, metadata={"help": "labelled pairs to probe with (default: the run's)"})


def run(job: Job) -> Result:
    config, system = job.config, job.options.system
    check_aligned("system", system, config)
    finished = job.pipeline()
    data = read_pairs(job.options.pairs, config) if job.options.pairs else labelled_pairs(config)

    def probed(policy: Policy, name: str) -> RewardEvaluation:
        job.say(f"probing {name}")
        states = labelled_states(policy, data, config)
        return evaluate_rewards(
            states.chosen,
            states.rejected,
            config.fit,
            groups=states.groups,
            methods=["best_layer"],
            chosen_is_safe=states.chosen_is_safe,
            rejected_is_safe=states.rejected_is_safe,
        )

    before = probed(policy_of(finished, "reference"), "the reference")
    after = {seed: probed(policy_of(finished, system, seed), f"{system} seed {seed}") for seed in config.seeds}
    label = SYSTEMS[system].label
    named = {"Before alignment": before}
    named |= {f"After: {label}" + (f", seed {seed}" if len(after) > 1 else ""): found for seed, found in after.items()}
    first = after[config.seeds[0]]
    orderings = [
        below(f"{name}: best layer below the gated reward", found.compare("best_layer", "gated"))
        for name, found in named.items()
    ]
    moved = np.asarray(before.layer_right).mean(1) - np.asarray(first.layer_right).mean(1)
    orderings.append(below("probes before below after, mean of the layers", clustered_mean(moved, before.groups)))
    moved = np.asarray(before.methods["gated"].right) - np.asarray(first.methods["gated"].right)
    orderings.append(below("gated reward before below after", clustered_mean(moved, before.groups)))
    return Result(
        tables=[_table(named)],
        figures=[_figure(named)],
        orderings=orderings,
        notes=[
            f"{before.num_pairs} pairs of {before.num_groups} prompts, {before.folds}-fold by prompt: a probe ranks "
            "pairs of prompts it has not seen. Before and after share the folds, so their differences are paired.",
            "After alignment probes and gate are fitted anew on the aligned policy's states.",
        ],
        not_run=[] if job.scale == "paper" else ["The paper's Llama-2-7B weights and PKU-SafeRLHF pairs."],
    )


def _table(named: dict[str, RewardEvaluation]) -> Table:
    names = {f"at_{number}": (name, found) for number, (name, found) in enumerate(named.items())}
    columns = [Column("layer", "Layer", "text"), *(Column(key, name, "share") for key, (name, _) in names.items())]
    layers = next(iter(named.values())).num_layers
    rows = [
        {"layer": str(layer + 1), **{key: interval(found.layer_accuracy[layer]) for key, (_, found) in names.items()}}
        for layer in range(layers)
    ]
    rows.append(
        {"layer": "gated", **{key: interval(found.methods["gated"].accuracy) for key, (_, found) in names.items()}}
    )
    return Table("layers", "Pair accuracy by layer", columns, rows)


def _figure(named: dict[str, RewardEvaluation]) -> Figure:
    series, lines = [], []
    for name, found in named.items():
        series.append(layer_series(name, found))
        lines.append(Line(f"Gated reward, {name[0].lower()}{name[1:]}", found.methods["gated"].accuracy.value))
    return Figure("figure1", TITLE, "line", "Layer", "Pair accuracy", series, lines=lines, note="95 % intervals.")
