"""sequence_sum against a loop over sequences."""

import pytest
import torch

from reprdpo.ops import sequence_sum


def looped(values, ids, num_sequences, average):
    sums = []
    for sequence in range(num_sequences):
        own = values[ids == sequence]
        sums.append(own.sum() / max(1, len(own)) if average else own.sum())
    return torch.stack(sums)


@pytest.mark.parametrize("average", [False, True])
def test_unsorted_ids(average):
    values = torch.randn(200, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-2, 12, (200,))
    ids[ids == 4] = 5  # sequence 4 is empty; -2, -1, 10 and 11 are in no sequence
    ours, wanted = (
        sequence_sum(values, sequence_ids=ids, num_sequences=10, average=average),
        looped(values, ids, 10, average),
    )
    torch.testing.assert_close(ours, wanted)
    assert ours[4] == 0
    upstream = torch.randn(10).double()
    torch.testing.assert_close(
        torch.autograd.grad(ours, values, upstream), torch.autograd.grad(wanted, values, upstream)
    )


@pytest.mark.parametrize("average", [False, True])
def test_cu_seqlens(average):
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 4, 4, 8], dtype=torch.int32)  # empty first and third; the last token is in none
    ids = torch.tensor([1, 1, 1, 1, 3, 3, 3, 3, -1])
    ours, wanted = sequence_sum(values, cu_seqlens=cu_seqlens, average=average), looped(values, ids, 4, average)
    torch.testing.assert_close(ours, wanted)
    assert torch.autograd.gradcheck(lambda v: sequence_sum(v, cu_seqlens=cu_seqlens, average=average), values)


def test_float32_adds_without_drift():
    values = -torch.rand(100_000)
    total = sequence_sum(values, sequence_ids=torch.zeros(100_000, dtype=torch.long), num_sequences=1)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total[0].double(), values.double().sum(), rtol=1e-7, atol=0)


def test_nan_and_infinity_stay_in_their_sequence():
    values = torch.tensor([1.0, torch.nan, 2.0, -torch.inf, torch.nan], requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, -1])
    total = sequence_sum(values, sequence_ids=ids, num_sequences=4, average=True)
    torch.testing.assert_close(total, torch.tensor([1.5, torch.nan, -torch.inf, 0.0]), equal_nan=True)
    assert torch.autograd.grad(total, values, torch.tensor([1.0, 1.0, 1.0, torch.nan]))[0].tolist() == [
        0.5,
        1,
        0.5,
        1,
        0,
    ]


@pytest.mark.parametrize("num_sequences", [0, 3])
def test_no_tokens(num_sequences):
    ids = torch.zeros(0, dtype=torch.long)
    total = sequence_sum(torch.zeros(0), sequence_ids=ids, num_sequences=num_sequences, average=True)
    assert total.tolist() == [0.0] * num_sequences


def test_wild_boundaries_read_nothing_wild():
    total = sequence_sum(torch.ones(5), cu_seqlens=torch.tensor([-7, 3, 1, 99]))
    assert total.tolist() == [3.0, 0.0, 2.0]


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_and_compile(packed):
    values = torch.randn(6, requires_grad=True)
    ids = None if packed else torch.tensor([2, 0, 0, 1, 2, 5])
    cu_seqlens = torch.tensor([0, 1, 1, 6]) if packed else None
    torch.library.opcheck(torch.ops.reprdpo.sequence_sum.default, (values, ids, cu_seqlens, 3, True))

    def step(values):
        return sequence_sum(values, sequence_ids=ids, cu_seqlens=cu_seqlens, num_sequences=3).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(values), values), torch.autograd.grad(step(values), values))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "exactly one", {}),
        (ValueError, "exactly one", {"sequence_ids": torch.zeros(4).long(), "cu_seqlens": torch.zeros(2).long()}),
        (TypeError, "num_sequences must be an integer", {"sequence_ids": torch.zeros(4).long()}),
        (ValueError, "sequence_ids must be of shape", {"sequence_ids": torch.zeros(3).long(), "num_sequences": 2}),
        (ValueError, "num_sequences \\+ 1 = 3 entries", {"cu_seqlens": torch.zeros(2).long(), "num_sequences": 2}),
        (TypeError, "cu_seqlens must be an integer", {"cu_seqlens": torch.zeros(2)}),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match=message):
        sequence_sum(torch.zeros(4), **arguments)
