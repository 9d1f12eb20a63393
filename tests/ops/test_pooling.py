"""last_token_index and pool_last_token against loops, under every padding and form of hidden states."""

import pytest
import torch
from torch.library import opcheck

from reprdpo import ops

MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "hole": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "all padding": [[0, 0, 0, 0], [1, 0, 0, 0]],
    "one token": [[1], [0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_last_token_index(mask, dtype):
    wanted = [max((t for t, kept in enumerate(row) if kept), default=-1) for row in mask]
    index = ops.last_token_index(torch.tensor(mask).to(dtype))
    assert index.dtype == torch.int64
    assert index.tolist() == wanted


def test_last_token_index_of_nothing():
    assert ops.last_token_index(torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)
    assert ops.last_token_index(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [-1, -1]


def test_last_token_index_opcheck():
    opcheck(torch.ops.reprdpo.last_token_index.default, (torch.tensor(MASKS["right"]),))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(2, 3), TypeError, "attention_mask must be an integer or bool tensor, not float32"),
        (torch.ones(2, 1, 3, 3, dtype=torch.int64), ValueError, r"attention_mask must be \[B, T\], not of shape"),
        ([[1, 1]], TypeError, "attention_mask must be a tensor, not list"),
    ],
)
def test_last_token_index_refuses(mask, error, words):
    with pytest.raises(error, match=words):
        ops.last_token_index(mask)


def hidden_list(L=3, B=4, T=5, D=6, dtype=torch.float64):
    return [torch.randn(B, T, D, dtype=dtype, requires_grad=True) for _ in range(L)]


INDEX = torch.tensor([4, 0, 2, 2])


def forms(hidden):
    """The same states as a sequence, a sequence of packed tensors (with the flat index) and one stacked tensor."""
    B, T, D = hidden[0].shape
    flat = INDEX + T * torch.arange(B)
    return {
        "list": (hidden, INDEX),
        "tuple": (tuple(hidden), INDEX.int()),
        "packed": ([h.reshape(B * T, D) for h in hidden], flat),
        "stacked": (torch.stack(hidden), INDEX),
    }


@pytest.mark.parametrize("form", ["list", "tuple", "packed", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pool_copies_the_rows(form, dtype):
    hidden = hidden_list(dtype=dtype)
    states, index = forms(hidden)[form]
    pooled = ops.pool_last_token(states, index)
    wanted = torch.stack([torch.stack([layer[b, t] for layer in hidden]) for b, t in enumerate(INDEX.tolist())])
    assert pooled.dtype == dtype
    assert torch.equal(pooled, wanted)


@pytest.mark.parametrize("form", ["list", "packed", "stacked"])
def test_pool_gradient_lies_at_the_rows_alone(form):
    hidden = hidden_list()
    states, index = forms(hidden)[form]
    upstream = torch.randn(4, 3, 6, dtype=torch.float64)
    grads = torch.autograd.grad(ops.pool_last_token(states, index), hidden, upstream)
    for layer, grad in enumerate(grads):
        wanted = torch.zeros_like(grad)
        for b, t in enumerate(INDEX.tolist()):
            wanted[b, t] = upstream[b, layer]
        assert torch.equal(grad, wanted)


def test_pool_adds_gradients_where_packed_indices_repeat():
    hidden = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 3, 1])
    assert torch.autograd.gradcheck(lambda h: ops.pool_last_token([h], index), (hidden,))


def test_pool_rows_out_of_range_are_nan_and_give_no_gradient():
    hidden = hidden_list()
    index = torch.tensor([-1, 1, 5, 4])
    pooled = ops.pool_last_token(hidden, index)
    assert pooled[[0, 2]].isnan().all()
    assert pooled[[1, 3]].isfinite().all()
    grads = torch.autograd.grad(pooled, hidden, torch.full_like(pooled, float("nan")))
    assert all(grad[[0, 2]].eq(0).all() for grad in grads)


@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0), (0, 0)])
def test_pool_of_nothing(B, T):
    hidden = torch.zeros(B, T, 3, requires_grad=True)
    pooled = ops.pool_last_token([hidden, hidden], torch.full((B,), -1))
    assert pooled.shape == (B, 2, 3)
    assert pooled.isnan().all()
    pooled.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(B, T, 3))


@pytest.mark.parametrize("form", ["list", "packed", "stacked"])
def test_pool_opcheck_and_compile(form):
    states, index = forms(hidden_list(dtype=torch.float32))[form]
    states = states.detach().requires_grad_() if form == "stacked" else [h.detach().requires_grad_() for h in states]
    layers = [states] if form == "stacked" else states
    opcheck(torch.ops.reprdpo.pool_last_token.default, (layers, index))
    opcheck(
        torch.ops.reprdpo.pool_last_token_backward.default,
        (torch.randn(4, 3, 6), index, layers[0].shape, len(layers)),
    )
    compiled = torch.compile(lambda h, i: ops.pool_last_token(h, i) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(states, index), ops.pool_last_token(states, index) * 2)


@pytest.mark.parametrize(
    ("hidden", "index", "error", "words"),
    [
        ([], INDEX, ValueError, "hidden_states must hold at least one layer"),
        ({"a": 1}, INDEX, TypeError, "hidden_states must be a tensor or a sequence of them, not dict"),
        (torch.zeros(4, 5, 6), INDEX, ValueError, r"hidden_states must be \[L, B, T, D\]"),
        ([torch.zeros(4)], INDEX, ValueError, r"hidden_states\[0\] must be \[B, T, D\] or packed"),
        ([torch.zeros(4, 5, 6), torch.zeros(4, 5, 7)], INDEX, ValueError, r"hidden_states\[1\] must be of shape"),
        (
            [torch.zeros(4, 5, 6), torch.zeros(4, 5, 6).half()],
            INDEX,
            TypeError,
            r"hidden_states\[1\] must have the dtype",
        ),
        ([torch.zeros(4, 5, 6), torch.zeros(4, 5, 6, device="meta")], INDEX, ValueError, "must have the device"),
        ([torch.zeros(4, 5, 6), None], INDEX, TypeError, r"hidden_states\[1\] must be a tensor, not NoneType"),
        ([torch.zeros(4, 5, 6).long()], INDEX, TypeError, r"hidden_states\[0\] must be float32"),
        ([torch.zeros(4, 5, 6)], INDEX[:3], ValueError, r"index must be of shape \[B\] = \[4\], not \[3\]"),
        ([torch.zeros(4, 5, 6)], INDEX.double(), TypeError, "index must be an integer tensor, not float64"),
        ([torch.zeros(4, 5, 6)], 3, TypeError, "index must be a tensor, not int"),
        ([torch.zeros(20, 6)], INDEX[:, None], ValueError, r"index must be \[B\], flat"),
    ],
)
def test_pool_refuses(hidden, index, error, words):
    with pytest.raises(error, match=words):
        ops.pool_last_token(hidden, index)
