"""How far alignment moved a prompt's responses, their ranking and their set, prompt by prompt; see `hypothesis`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from reprdpo.data import (
    ResponseCollator,
    TokenizeConfig,
    in_kind,
    is_empty,
    length_grouped_batches,
    to_device,
    tokenize_response,
)
from reprdpo.evaluation.stability import effective_sample_size, kendall, ngram_overlap, shared_probability, spearman
from reprdpo.experiments.stages import Policy
from reprdpo.reward import HybridReward
from reprdpo.sampling import score_responses
from reprdpo.statistics import FloatArray
from reprdpo.training.reference import batch_logps

BLIND = 0.02
_BATCH_SIZE = 64
RANKINGS = {
    "reward": "R, of each policy's own states and probes",
    "fixed_reward": "R, probes as before",
    "likelihood": "log π(y | x)",
}


class Draw(NamedTuple):
    """A prompt with the responses drawn for it before alignment that can be scored, each text once for its ranking."""

    prompt_id: int
    prompt: Any
    texts: list[str]
    truncated: list[bool]

    @property
    def distinct(self) -> list[int]:
        """The first place of each text."""
        return sorted({text: place for place, text in reversed(list(enumerate(self.texts)))}.values())


class Scores(NamedTuple):
    """Of each response of each prompt, in the draws' order: log-probability, its tokens, rewards by name."""

    logp: list[FloatArray]
    tokens: list[FloatArray]
    rewards: dict[str, list[FloatArray]]


class Moved(NamedTuple):
    """One value a prompt and seed, for one system; ``groups`` are the prompts."""

    rho: dict[str, FloatArray]
    tau: dict[str, FloatArray]
    nats: FloatArray
    effective: FloatArray
    shared: FloatArray
    overlap: FloatArray
    floor: FloatArray
    groups: list[int]

    @property
    def blind(self) -> bool:
        """Whether n-grams cannot tell: two draws of one policy share less than BLIND of them."""
        return bool(self.floor.mean() < BLIND)

    @property
    def text_ratio(self) -> FloatArray:
        """Values whose mean is mean(overlap) / mean(floor) and whose spread is that ratio's, to first order.

        NaN where two draws of the reference share next to nothing, so that there is nothing to lose.
        """
        if self.blind:
            return np.full_like(self.floor, math.nan)
        ratio = self.overlap.mean() / self.floor.mean()
        return np.asarray(ratio + (self.overlap - ratio * self.floor) / self.floor.mean())

    def movement(self) -> dict[str, FloatArray]:
        """0 for what did not move, 1 for what has nothing to do with what it was."""
        ranks = {f"Ranking by {RANKINGS[name]}": 1 - tau for name, tau in self.tau.items()}
        return ranks | {"Set, by n-grams": 1 - self.text_ratio, "Set, by probability mass": 1 - self.shared}


def compare(
    draws: Sequence[Draw],
    old: Scores,
    new: Scores,
    again: Sequence[Sequence[str]],
    fresh: Sequence[Sequence[str]],
    *,
    n: int,
) -> Moved:
    """Every measure of every prompt; ``again`` and ``fresh`` are new draws of the old and of the new policy.

    A ranking that is all ties on one side is NaN.
    """
    sides = {name: (old.rewards["fixed_reward"], scores) for name, scores in new.rewards.items()}
    sides["likelihood"] = (old.logp, new.logp)
    ratios = [after - before for before, after in zip(old.logp, new.logp, strict=True)]
    places = [draw.distinct for draw in draws]

    def over(measure: Any, name: str) -> FloatArray:
        return np.array([measure(f[at], g[at]) for f, g, at in zip(*sides[name], places, strict=True)])

    return Moved(
        rho={name: over(spearman, name) for name in RANKINGS},
        tau={name: over(kendall, name) for name in RANKINGS},
        nats=np.array([(ratio / tokens).mean() for ratio, tokens in zip(ratios, old.tokens, strict=True)]),
        effective=np.array([effective_sample_size(ratio) for ratio in ratios]),
        shared=np.array([shared_probability(ratio) for ratio in ratios]),
        overlap=np.array([ngram_overlap(draw.texts, texts, n=n) for draw, texts in zip(draws, fresh, strict=True)]),
        floor=np.array([ngram_overlap(draw.texts, texts, n=n) for draw, texts in zip(draws, again, strict=True)]),
        groups=[draw.prompt_id for draw in draws],
    )


def drawn(record: dict[str, Any]) -> Draw:
    said = [response for response in record["responses"] if not is_empty(response["text"])]
    texts, truncated = [r["text"] for r in said], [bool(r["truncated"]) for r in said]
    return Draw(record["prompt_id"], record["prompt"], texts, truncated)


def score(policy: Policy, rewards: dict[str, HybridReward], draws: Sequence[Draw]) -> Scores:
    """What a policy and the rewards read from its states make of every response."""
    model, tokenizer = policy.model(), policy.tokenizer()
    flat = [(draw.prompt, in_kind(draw.prompt, text)) for draw in draws for text in draw.texts]
    cut = [cut for draw in draws for cut in draw.truncated]
    configs = {end: dataclasses.replace(policy.data, append_eos=end) for end in (True, False)}
    rows = [
        tokenize_response(tokenizer, prompt, text, configs[not stopped])._asdict()
        for (prompt, text), stopped in zip(flat, cut, strict=True)
    ]
    data: TokenizeConfig = policy.data
    prompts, texts = [prompt for prompt, _ in flat], [text for _, text in flat]
    found = {
        name: score_responses(model, tokenizer, reward.to(model.device), prompts, texts, data)
        for name, reward in rewards.items()
    }
    counts = [len(draw.texts) for draw in draws]
    return Scores(
        _split(sequence_logps(model, rows), counts),
        _split([len(row["input_ids"]) - row["response_start"] for row in rows], counts),
        {name: _split(values, counts) for name, values in found.items()},
    )


@torch.inference_mode()
def sequence_logps(model: PreTrainedModel, rows: list[dict[str, Any]]) -> list[float]:
    """log pi(y | x) of each row, summed over the response."""
    collate, found = ResponseCollator(0), [math.nan] * len(rows)  # any token serves as padding: it is masked
    for batch in length_grouped_batches([len(row["input_ids"]) for row in rows], _BATCH_SIZE):
        inputs = to_device(collate([rows[row] for row in batch]), model.device)
        for row, value in zip(batch, batch_logps(model, inputs).tolist(), strict=True):
            found[row] = value
    return found


def _split(values: Sequence[float], counts: Sequence[int]) -> list[FloatArray]:
    return np.split(np.asarray(values, dtype=np.float64), np.cumsum(counts)[:-1])


def joined(parts: Sequence[Moved]) -> Moved:
    """All seeds' values one after the other."""

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], dict):
            return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
        return np.concatenate(values)

    groups = [group for part in parts for group in part.groups]
    return Moved(**{name: join(name) for name in Moved._fields if name != "groups"}, groups=groups)
