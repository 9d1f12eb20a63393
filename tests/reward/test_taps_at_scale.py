"""Taps on compiled models and on models wrapped by DDP and FSDP2."""

from collections.abc import Callable
from typing import Any

import distributed
import pytest
import torch
from reward_cases import CONFIGS, pad
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from reprdpo.reward import HiddenStateTap, PooledStateTap

BATCHES = [[[3, 4, 5], [3, 4, 5, 6, 7]], [[9, 4, 5], [3, 4, 8, 6, 7]], [[9, 4, 5, 3, 3, 3], [3, 4, 8, 6, 7, 7]]]


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]())


def call(model: nn.Module, ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    return model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False, **kwargs)


def loss(states: list[Tensor]) -> Tensor:
    return torch.stack([state.square().mean() for state in states]).sum()


def eager_states(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    return list(call(model, ids, mask, output_hidden_states=True).hidden_states[1:])


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_whole(model: Any) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def compiled_layers(model: Any) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_layers])
def test_a_compiled_model_gives_each_tap_its_own_batch(compiled: Callable[[Any], nn.Module]) -> None:
    plain = llama().train()
    model = llama().train()
    run = compiled(model)
    # A tap of its own each step, as a trainer does it: hooks traced for the first must not serve the later ones.
    for batch in BATCHES:
        ids, mask = pad(batch)
        expected = eager_states(plain, ids, mask)
        with HiddenStateTap(run) as tap, PooledStateTap(run, mask) as pooled:
            call(run, ids, mask)
        for ours, theirs in zip(tap.states, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        last = torch.tensor([row.nonzero().max() for row in mask])
        torch.testing.assert_close(pooled.pooled, torch.stack(expected, 1)[torch.arange(len(ids)), :, last])
        ours = torch.autograd.grad(loss(tap.states), list(model.model.layers.parameters()))
        theirs = torch.autograd.grad(loss(expected), list(plain.model.layers.parameters()))
        torch.testing.assert_close(ours, theirs)


def test_code_compiled_before_the_tap_is_named_with_the_cure() -> None:
    ids, mask = pad(BATCHES[0])
    run = compiled_whole(llama().train())
    call(run, ids, mask)
    with HiddenStateTap(run) as tap:
        call(run, ids, mask)
    with pytest.raises(RuntimeError, match=r"0 of 3 layers seen.*torch\._dynamo\.reset\(\)"):
        _ = tap.states
    torch._dynamo.reset()
    with HiddenStateTap(run) as tap:
        call(run, ids, mask)
    assert len(tap.states) == 3


def train_one_step(wrapper: str) -> tuple[Tensor, Tensor]:
    """Pooled states of this rank's sequence, and the first layer's gradient averaged over ranks."""
    rank = torch.distributed.get_rank()
    model = llama().train()
    layers = model.model.layers
    wrapped: nn.Module = model
    if wrapper == "fsdp2":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    ids, mask = pad(BATCHES[0][rank : rank + 1])
    with HiddenStateTap(wrapped) as tap, PooledStateTap(wrapped, mask) as pooled:
        out = call(wrapped, ids, mask)
    (out.logits[:, :, 0].mean() + loss(tap.states)).backward()
    grad = layers[0].mlp.up_proj.weight.grad
    return pooled.pooled, grad.full_tensor() if wrapper == "fsdp2" else grad


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_see_the_states_of_one(wrapper: str) -> None:
    results = distributed.run(train_one_step, wrapper)
    model = llama().train()
    losses = []
    for sequence, (pooled, _) in zip(BATCHES[0], results, strict=True):
        out = call(model, *pad([sequence]), output_hidden_states=True)
        states = list(out.hidden_states[1:])
        torch.testing.assert_close(pooled[0], torch.stack(states)[:, 0, -1].detach())
        losses.append(out.logits[:, :, 0].mean() + loss(states))
    expected = torch.autograd.grad(torch.stack(losses).mean(), model.model.layers[0].mlp.up_proj.weight)[0]
    for _, grad in results:
        torch.testing.assert_close(grad, expected)
