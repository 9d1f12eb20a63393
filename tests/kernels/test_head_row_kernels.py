"""Row scales of the lm_head's gradients, gathered and scattered, under the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from reprdpo_kernels.linear_logprob import row_scales, scale_hidden, scatter_hidden_grad

pytestmark = pytest.mark.interpreter

SHAPES = [(0, 3, 8), (1, 1, 1), (5, 9, 7), (70, 70, 33), (3, 40, 4100)]


def scored(rows, tokens):
    return torch.randperm(tokens)[:rows].sort().values


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (1, 1), (5, 9), (300, 700)])
def test_row_scales(rows, tokens, with_index):
    tokens = tokens if with_index else rows
    index = scored(rows, tokens) if with_index else torch.arange(tokens)
    labels, upstream = torch.randint(0, 50, (tokens,)), torch.randn(tokens)
    labels[::4] = -100
    upstream[labels == -100] = torch.nan
    row_stats = torch.rand(3, rows + 3)[:, 1 : rows + 1]
    scale = row_scales(upstream, index if with_index else None, labels, row_stats, 0.7)
    wanted = upstream[index].double() * row_stats[1].double() / row_stats[2].double() * 0.7
    torch.testing.assert_close(scale.double(), wanted.masked_fill(labels[index] == -100, 0), rtol=1e-6, atol=0)


def test_tokens_of_no_sequence_have_scale_0_and_read_nothing_wild():
    upstream = torch.tensor([torch.nan, 2.0, 3.0, torch.nan])[1:3]
    ids = torch.tensor([1, -1, 0, 2, 1, -(2**40)])
    labels = torch.tensor([0, 0, 0, 0, -100, 0])
    scale = row_scales(upstream, None, labels, torch.ones(3, 6), 0.5, sequence_ids_N=ids)
    assert scale.tolist() == [1.5, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_nan_of_the_statistics_and_an_index_out_of_range_stay_in_their_rows():
    row_stats = torch.ones(3, 4)
    row_stats[2, 1] = torch.nan
    index = torch.tensor([0, 1, 7, -1])
    scale = row_scales(torch.ones(3), index, torch.zeros(3, dtype=torch.int64), row_stats, 1.0)
    assert scale.isnan().tolist() == [False, True, True, True]
    out = torch.full((3, 5), 7.0)
    scatter_hidden_grad(torch.ones(4, 5), index, torch.ones(4), out)
    assert out.tolist() == [[1.0] * 5, [1.0] * 5, [7.0] * 5]
    assert scale_hidden(torch.ones(3, 5), index, torch.ones(4), torch.float32).isnan().any(1).tolist() == [
        False, False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens", "width"), SHAPES)
def test_gather_and_scatter(rows, tokens, width, dtype):
    index, scale = scored(rows, tokens), torch.randn(rows)
    scale[:1] = 0
    hidden = torch.randn(tokens, width + 3).to(dtype)[:, :width]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    wanted = hidden[index].double() * scale.double()[:, None]
    hidden[index[:1]] = torch.nan  # its scale is 0
    scaled = scale_hidden(hidden, index, scale, dtype)
    assert scaled.dtype == dtype
    torch.testing.assert_close(scaled.double(), wanted, rtol=rounding, atol=1e-7)
    up = scale_hidden(hidden, index, scale, torch.float32, power=torch.tensor(2.0**20))
    torch.testing.assert_close(up.double(), wanted * 2**20, rtol=1e-6, atol=0)

    product, out = torch.randn(rows, width), torch.full((tokens, width), 3.0, dtype=dtype)
    wanted = torch.full((tokens, width), 3.0, dtype=torch.float64)
    wanted[index] = product.double() * scale.double()[:, None]
    product[:1] = torch.nan
    assert scatter_hidden_grad(product, index, scale, out) is out
    torch.testing.assert_close(out.double(), wanted, rtol=rounding, atol=1e-7)


def test_without_an_index_rows_stay_where_they_are():
    hidden, scale = torch.randn(6, 9), torch.randn(6)
    torch.testing.assert_close(scale_hidden(hidden, None, scale, torch.float32), hidden * scale[:, None])
    out = torch.empty(6, 9)
    torch.testing.assert_close(scatter_hidden_grad(hidden, None, scale, out), hidden * scale[:, None])
