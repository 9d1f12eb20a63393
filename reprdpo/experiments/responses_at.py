"""N responses of a policy to each prompt: drawn once, scored by any reward and judged once, every step kept on disk.

Shapes below: P prompts, N responses to each.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.data import Text
from reprdpo.errors import UserError
from reprdpo.evaluation import Judge, Judgement, judge_responses, mean_over_seeds
from reprdpo.experiments.finished_run import FinishedRun
from reprdpo.experiments.results import Interval
from reprdpo.experiments.stages import Policy, by_reward
from reprdpo.files import content_hash
from reprdpo.models import model_fingerprint
from reprdpo.reward import HybridReward
from reprdpo.sampling import Score, TransformersEngine, rank_responses, read_samples, sample_responses
from reprdpo.training import BradleyTerryRewardModel

Value = TypeVar("Value")


@dataclass(frozen=True)
class Responses:
    """What a policy answered: ``prompts`` [P], ``texts`` [P][N]; ``path`` is the file of samples."""

    path: Path
    prompts: list[Text]
    texts: list[list[str]]

    def only(self, places: Sequence[Sequence[int]]) -> "Responses":
        """The responses at ``places`` of each prompt."""
        rows = zip(self.texts, places, strict=True)
        return replace(self, texts=[[texts[place] for place in chosen] for texts, chosen in rows])

    def flat(self) -> tuple[list[Text], list[str]]:
        """One prompt and one text a response, P x N."""
        prompts = [prompt for prompt, texts in zip(self.prompts, self.texts, strict=True) for _ in texts]
        return prompts, [text for texts in self.texts for text in texts]

    def by_prompt(self, values: Sequence[Value]) -> list[list[Value]]:
        """What stands one a response as [P][N]."""
        many = len(self.texts[0])
        return [list(values[start : start + many]) for start in range(0, len(values), many)]

    def scores(self, name: str, key: str, score: Score) -> list[list[float | None]]:
        """``score`` of every response [P][N], kept beside the samples; None for an empty response.

        Raises:
            UserError: scores of this ``name`` are there, of other responses or with another ``key``.
        """
        path = rank_responses(self.path, self.path.with_suffix(f".{name}.jsonl"), score, key=key)
        return [[response["reward"] for response in record["responses"]] for record in read_samples(path)]

    def judgements(self, judge: Judge, cache_dir: Path) -> list[list[Judgement]]:
        """The judge's word on every response [P][N]; what it has said before is in ``cache_dir``."""
        return self.by_prompt(judge_responses(judge, *self.flat(), cache_dir=cache_dir))


class Answerer:
    """The policy that answers as the row ``name`` of a finished run, loaded once for all that is asked of it."""

    def __init__(self, run: FinishedRun, name: str, seed: int) -> None:
        config = run.config
        self.policy = Policy.of(run.config, run.model(name, seed))
        self.name, self.seed, self.settings = name, seed, config.evaluate

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.policy.model()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.tokenizer()

    def draw(self, prompts: Sequence[Mapping[str, Any]], many: int, folder: Path) -> Responses:
        """``many`` responses to each of ``prompts``, drawn as in evaluation; a file that is there is gone on with.

        Raises:
            UserError: several responses drawn greedily, or a file of responses to other prompts or of another model.
        """
        if many > 1 and self.settings.temperature == 0:
            raise UserError(f"evaluate.temperature: is 0, and {many} responses would be one; give a positive number")
        path = folder / f"{self.name}-seed-{self.seed}.samples.jsonl"
        sample_responses(
            TransformersEngine(self.model, self.tokenizer), prompts, path, self.settings.sampling(many, self.seed)
        )
        records = read_samples(path)
        texts = [[response["text"] for response in record["responses"]] for record in records]
        return Responses(path, [record["prompt"] for record in records], texts)

    def score(
        self, responses: Responses, name: str, reward: HybridReward | BradleyTerryRewardModel
    ) -> list[list[float | None]]:
        """Scores [P][N] of a reward read from the policy's states, or of a reward model with its tokenizer."""
        key = content_hash(model_fingerprint(reward), model_fingerprint(self.model))
        return responses.scores(name, key, by_reward(self.model, self.tokenizer, reward, self.policy.data))


def best(scores: Sequence[Sequence[float | None]], many: int) -> list[list[int]]:
    """The places of the ``many`` highest scores of each prompt, best first; those without a score are last."""

    def ranked(row: Sequence[float | None]) -> list[int]:
        return sorted(range(len(row)), key=lambda place: (row[place] is None, -(row[place] or 0.0), place))

    return [ranked(row)[:many] for row in scores]


@dataclass(frozen=True)
class Tally:
    """Of each prompt's chosen responses: the share that is an event [P] (None: none was judged), and how many.

    ``judged`` [P] and ``chosen`` [P] count responses.
    """

    shares: list[float | None]
    judged: list[int]
    chosen: list[int]


def tally(outcomes: Sequence[Sequence[bool | None]], chosen: Sequence[Collection[int]]) -> Tally:
    """The share of events among the ``chosen`` places of each prompt's ``outcomes`` [P][N]; None is no word."""
    known = [
        [value for place in places if (value := row[place]) is not None]
        for row, places in zip(outcomes, chosen, strict=True)
    ]
    shares = [sum(values) / len(values) if values else None for values in known]
    return Tally(shares, [len(values) for values in known], [len(places) for places in chosen])


def rate(tallies: Sequence[Tally]) -> Interval:
    """The mean share over prompts and seeds, its interval with prompts as clusters; ``n`` counts responses.

    A prompt of which some seed has no judged response is left out, and its responses are among the ``unparsed``.
    """
    found = mean_over_seeds([one.shares for one in tallies])
    kept = [place for place in range(len(tallies[0].shares)) if all(one.shares[place] is not None for one in tallies)]
    judged = sum(one.judged[place] for one in tallies for place in kept)
    return Interval(found.mean, found.low, found.high, judged, sum(sum(one.chosen) for one in tallies) - judged)
