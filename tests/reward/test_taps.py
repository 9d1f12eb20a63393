"""Taps against transformers' own hidden_states, and what a hook can get wrong."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reward_cases import FAMILIES, LAYERS, pad
from torch import nn
from torch.utils.checkpoint import checkpoint

from reprdpo.errors import UserError
from reprdpo.reward import HiddenStateTap, PooledStateTap


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_transformers_own(family: str, make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model(family)
    ids, mask = pad(sequences)
    with torch.no_grad(), HiddenStateTap(model) as tap:
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, output_hidden_states=True)
    assert len(tap.states) == LAYERS
    for ours, theirs in zip(tap.states, out.hidden_states[1:], strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooled_rows_are_the_last_tokens(
    family: str, side: str, make_model: Callable[..., Any], sequences: list[list[int]]
) -> None:
    model = make_model(family)
    ids, mask = pad(sequences, side)
    last = torch.tensor([row.nonzero().max() for row in mask])
    for pool in ("last", "mean"):
        with torch.no_grad(), PooledStateTap(model, mask, pool=pool) as tap, HiddenStateTap(model) as whole:
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
        stacked = torch.stack(whole.states, dim=1)
        if pool == "last":
            assert torch.equal(tap.pooled, stacked[torch.arange(len(ids)), :, last])
        else:
            mean = torch.stack([stacked[i, :, mask[i].bool()].double().mean(1) for i in range(len(ids))])
            torch.testing.assert_close(tap.pooled, mean.float())


def test_gradients_flow_through_the_references(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model().train()
    ids, mask = pad(sequences)
    with HiddenStateTap(model) as tap:
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    ours = torch.autograd.grad(sum(s.square().sum() for s in tap.states), model.parameters(), allow_unused=True)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    theirs = torch.autograd.grad(
        sum(s.square().sum() for s in out.hidden_states[1:]), model.parameters(), allow_unused=True
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


class _CheckpointedCall(nn.Module):
    """A layer whose whole call, hooks included, runs again in backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer.__call__, *args, use_reentrant=False, **kwargs)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    ids, mask = pad(sequences)
    grads = []
    for checkpointing in (False, True):
        model = make_model().double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with HiddenStateTap(model) as tap:
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            before = [s.data_ptr() for s in tap.states]
            sum(s.square().sum() for s in tap.states).backward()
            assert [s.data_ptr() for s in tap.states] == before
        grads.append([p.grad for n, p in model.named_parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_recomputed_hook_is_passed_by(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    """Checkpointing outside the layer's call fires its hooks again in backward."""
    model = make_model().train()
    ids, mask = pad(sequences)
    inner = list(model.model.layers)
    with HiddenStateTap(model) as tap, PooledStateTap(model, mask) as pooled:
        for i, layer in enumerate(inner):
            model.model.layers[i] = _CheckpointedCall(layer)
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
        before = [s.data_ptr() for s in tap.states]
        rows = pooled.pooled.clone()
        tap.states[-1].sum().backward()
        assert [s.data_ptr() for s in tap.states] == before
        assert torch.equal(pooled.pooled, rows)


def test_hooks_go_with_the_block(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model()
    ids, mask = pad(sequences)
    count = hook_count(model)
    with HiddenStateTap(model) as tap, PooledStateTap(model, mask):
        model(input_ids=ids, attention_mask=mask)
        assert hook_count(model) > count
    assert hook_count(model) == count
    with pytest.raises(IndexError), HiddenStateTap(model):
        model(input_ids=torch.full_like(ids, 10_000), attention_mask=mask)
    assert hook_count(model) == count
    model(input_ids=ids, attention_mask=mask)
    assert len(tap.states) == LAYERS


def test_a_second_forward_replaces_the_first(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    model = make_model()
    ids, mask = pad(sequences)
    with torch.no_grad(), HiddenStateTap(model) as tap:
        model(input_ids=ids.flip(0), attention_mask=mask.flip(0))
        first = tap.states
        model(input_ids=ids, attention_mask=mask)
    assert len(tap.states) == LAYERS
    torch.testing.assert_close(tap.states[0], first[0].flip(0))
    with pytest.raises(RuntimeError, match="in use"), tap, tap:
        pass


def test_pooled_mode_holds_one_layer_at_a_time(make_model: Callable[..., Any], sequences: list[list[int]]) -> None:
    """When a layer's output is pooled, those of the layers before its input are gone."""
    model = make_model()
    ids, mask = pad(sequences)
    alive: list[weakref.ref] = []
    counts = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    for layer in model.model.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad(), PooledStateTap(model, mask) as tap:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    assert max(counts) <= 1
    assert tap.pooled.shape == (len(ids), LAYERS, 16)
    assert not any(ref() is not None for ref in alive)


def test_a_row_of_padding_alone_is_nan_and_alone_in_it(
    make_model: Callable[..., Any], sequences: list[list[int]]
) -> None:
    model = make_model()
    ids, mask = pad(sequences)
    mask[2] = 0
    for pool in ("last", "mean"):
        with torch.no_grad(), PooledStateTap(model, mask, pool=pool) as tap:
            model(input_ids=ids, attention_mask=mask)
        assert tap.pooled[2].isnan().all()
        assert tap.pooled[[0, 1, 3]].isfinite().all()


def test_no_forward_no_states(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with HiddenStateTap(model) as tap, pytest.raises(RuntimeError, match="0 of 3 layers seen"):
        _ = tap.states
    with PooledStateTap(model, torch.ones(1, 2, dtype=torch.int64)) as pooled, pytest.raises(RuntimeError):
        _ = pooled.pooled
    with pytest.raises(UserError, match="pool must be"):
        PooledStateTap(model, torch.ones(1, 2, dtype=torch.int64), pool="first")
