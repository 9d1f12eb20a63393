"""Adapters: one file a published data set; the registry that names them and knows them by their columns."""

from collections.abc import Mapping
from typing import Any

from reprdpo.data.adapters import (
    alpaca_eval,
    do_not_answer,
    hh_rlhf,
    pku_safe_rlhf,
    reward_bench,
    salad_bench,
    trl,
    ultrafeedback,
    xstest,
)
from reprdpo.data.adapters.adapter import Adapter, Dropped, Option
from reprdpo.errors import UserError, did_you_mean

# In the order in which a row is tried; the last one takes whatever the others do not know.
ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        pku_safe_rlhf.ADAPTER,
        hh_rlhf.PAIRS,
        hh_rlhf.ATTEMPTS,
        do_not_answer.ADAPTER,
        salad_bench.ADAPTER,
        xstest.ADAPTER,
        alpaca_eval.ADAPTER,
        reward_bench.ADAPTER,
        ultrafeedback.ADAPTER,
        trl.ADAPTER,
    )
}
FALLBACK = trl.ADAPTER


def get_adapter(name: str, where: str) -> Adapter:
    """
    Raises:
        UserError: no adapter of that name.
    """
    if name not in ADAPTERS:
        meant = did_you_mean(name, ADAPTERS) or ";"
        raise UserError(f"{where}: there is no adapter '{name}'{meant} there are {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def recognise(row: Mapping[str, Any]) -> Adapter:
    """The adapter that knows a row's columns."""
    return next(adapter for adapter in ADAPTERS.values() if adapter.known_by(row))


__all__ = ["ADAPTERS", "FALLBACK", "Adapter", "Dropped", "Option", "get_adapter", "recognise"]
