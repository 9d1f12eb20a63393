"""Folds of a cross-validation that keep groups whole, and the rows they hold."""

from collections.abc import Iterable

import torch
from torch import Tensor

from reprdpo.errors import UserError


def grouped_folds(groups: Iterable[object], folds: int, seed: int) -> list[Tensor]:
    """Split rows into at most ``folds`` folds of about equal size, the rows of a group together.

    Args:
        groups: one label a row (a prompt, a pair's number).
        folds: how many; fewer where there are fewer groups.
        seed: which groups share a fold.

    Returns:
        Sorted row numbers of each fold, int64; none empty.

    Raises:
        UserError: fewer than two folds or fewer than two groups.
    """
    rows_of: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group.item() if isinstance(group, Tensor) else group, []).append(row)
    folds = min(folds, len(rows_of))
    if folds < 2:
        raise UserError(f"cross-validation needs 2 folds and 2 groups, not {folds} and {len(rows_of)}; give more pairs")
    members = list(rows_of.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    split: list[list[int]] = [[] for _ in range(folds)]
    for i in sorted(order, key=lambda i: -len(members[i])):
        min(split, key=len).extend(members[i])
    return [torch.tensor(sorted(rows)) for rows in split]


def rows_but(held: Tensor, count: int) -> Tensor:
    """The rows of 0 .. count - 1 that are not held out."""
    rows = torch.arange(count)
    return rows[~torch.isin(rows, held)]


def both_sides(pairs: Tensor, P: int) -> Tensor:
    """The sequences of some of P pairs, all of which lie chosen first, then rejected."""
    return torch.cat([pairs, pairs + P])
