"""Groups stay whole, folds are even, the seed decides."""

import pytest
import torch

from reprdpo.errors import UserError
from reprdpo.reward.folds import grouped_folds


def test_groups_stay_whole_and_every_row_is_held_out_once() -> None:
    groups = ["a"] * 7 + ["b", "c"] * 3 + list(range(20))
    folds = grouped_folds(groups, 5, seed=1)
    assert torch.cat(folds).sort().values.tolist() == list(range(33))
    where = {row: i for i, fold in enumerate(folds) for row in fold.tolist()}
    assert len({where[row] for row in range(7)}) == 1
    assert len({where[row] for row in (7, 9, 11)}) == 1
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


def test_seed_decides() -> None:
    same, again, other = (grouped_folds(range(30), 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_tensor_groups_are_compared_by_value() -> None:
    assert len(grouped_folds(torch.tensor([4, 4, 9, 9]), 5, 0)) == 2


def test_too_few_groups() -> None:
    with pytest.raises(UserError, match="2 groups, not 1 and 1"):
        grouped_folds(["a", "a"], 5, 0)
