"""Over-refusal: the share of harmless prompts, borderline ones above all, that are refused (XSTest's question)."""

from collections.abc import Sequence

from reprdpo.evaluation.judges import Judgement
from reprdpo.evaluation.toxic_rate import RateTable, rate_table


def overrefusal_rate(judgements: Sequence[Judgement], categories: Sequence[str | None] | None = None) -> RateTable:
    """The rate of ``refusal`` in responses to harmless prompts.

    Args:
        judgements: one a response; every prompt is taken to be harmless.
        categories: one a response; None gives no table by category.

    Raises:
        UserError: no judgements, or another number of categories.
    """
    return rate_table(judgements, categories, lambda judgement: judgement.refusal)
