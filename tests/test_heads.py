"""Ops run at the head of a model give the log-probs and gradients of the model's own logits, whatever its head."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL_LMS, VOCABULARY, tiny_causal_lm
from torch import Tensor, nn
from transformers import PreTrainedModel

from reprdpo import ops
from reprdpo.errors import UserError
from reprdpo.heads import HeadSpec, check_head, run_at_head, token_logps
from reprdpo.models import output_head

LENGTHS = (7, 4)


@pytest.fixture(params=CAUSAL_LMS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_causal_lm(request.param)


def make_batch() -> dict[str, Tensor]:
    """Two rows padded on the right; the first two tokens of each are prompt."""
    ids_BT = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, 1:-1] = torch.where(mask_BT[:, 2:], ids_BT[:, 2:], -100)
    scored_N = (labels_BT.flatten() != -100).nonzero().squeeze(1)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT, "scored_index": scored_N}


def eager_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    picked_BT = logits_BTV.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(batch["labels"] == -100, 0, picked_BT)


def gradients(model: nn.Module, logps_BT: Tensor) -> dict[str, Tensor]:
    """Those of a sum that weighs every token differently."""
    weights_BT = torch.linspace(-1, 2, logps_BT.numel()).view_as(logps_BT)
    model.zero_grad()
    (logps_BT * weights_BT).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: nn.Module, **tolerance: float) -> None:
    batch = make_batch()
    wanted_BT = eager_logps(model, batch)
    wanted = gradients(model, wanted_BT)
    found_BT = token_logps(model, batch)
    found = gradients(model, found_BT)
    torch.testing.assert_close(found_BT, wanted_BT, **tolerance)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_log_probs_and_gradients_are_those_of_the_models_own_logits(model: PreTrainedModel) -> None:
    check_head(model)
    assert_same_training(model, rtol=1e-4, atol=1e-6)


def test_the_formula_gives_the_models_logits(model: PreTrainedModel) -> None:
    ids_BT = torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        found_BTV = run_at_head(model, lambda hidden, head: head.logits(hidden), input_ids=ids_BT)
        torch.testing.assert_close(found_BTV, model(input_ids=ids_BT).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_head_that_does_more_than_the_formula_is_found_out(name: str) -> None:
    model = tiny_causal_lm(name)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.01)
    with pytest.raises(UserError, match="this architecture's head is not supported"):
        check_head(model)


def test_the_check_leaves_the_mode_and_takes_half_precision() -> None:
    model = tiny_causal_lm("gemma2")
    check_head(model.train())
    assert model.training
    check_head(model.to(torch.bfloat16).eval())
    assert not model.training


def test_a_head_called_twice_or_not_at_all_is_refused() -> None:
    model, ids_BT = tiny_causal_lm("llama"), torch.tensor([[3, 4]])
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs) and forward(**inputs)
    with pytest.raises(UserError, match="calls its lm_head 2 times, not once"):
        run_at_head(model, lambda hidden, _: hidden, input_ids=ids_BT)
    model.forward = lambda input_ids: (model.model(input_ids=input_ids).last_hidden_state @ model.lm_head.weight.T,)
    with pytest.raises(UserError, match="calls its lm_head 0 times, not once"):
        run_at_head(model, lambda hidden, _: hidden, input_ids=ids_BT)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model, ids_BT = tiny_causal_lm("llama"), torch.tensor([[3, 4]])
    before = model(input_ids=ids_BT).logits

    def fail(hidden: Tensor, head: HeadSpec) -> Tensor:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        run_at_head(model, fail, input_ids=ids_BT)
    torch.testing.assert_close(model(input_ids=ids_BT).logits, before)


def test_every_tensor_of_a_tuple_carries_gradients_and_the_rest_stays() -> None:
    model, batch = tiny_causal_lm("gemma2"), make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def use(hidden: Tensor, head: HeadSpec) -> Any:
        return ops.linear_logprob(
            hidden, labels=batch["labels"], return_entropy=True, return_stats=True, **head._asdict()
        )

    result = run_at_head(model, use, **inputs)
    assert isinstance(result, ops.LinearLogprob)
    assert not result.top1.requires_grad
    for value in (result.logprob, result.entropy):
        (grad_VD,) = torch.autograd.grad(value.sum(), model.lm_head.weight, retain_graph=True)
        assert grad_VD.abs().sum() > 0
    with torch.no_grad():
        assert not run_at_head(model, use, **inputs).logprob.requires_grad


def test_a_result_that_is_not_finite_spoils_no_other() -> None:
    """What holds results up to the model's output carries no value of theirs."""
    model = tiny_causal_lm("gemma2")
    good, bad = run_at_head(
        model, lambda hidden, _: (hidden[0].sum(), hidden.sum() * torch.inf), input_ids=torch.tensor([[3, 4]])
    )
    assert not bad.isfinite()
    good.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_frozen_head_asks_for_no_weight_gradient() -> None:
    model, batch = tiny_causal_lm("llama"), make_batch()
    model.lm_head.requires_grad_(False)
    assert_same_training(model, rtol=1e-4, atol=1e-6)
    token_logps(model, batch).sum().backward()
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gemma2", "cohere"])
def test_autocast(name: str) -> None:
    """The head's error under bf16 autocast is no larger than eager's, against float32 on the same bf16 states."""
    model, batch = tiny_causal_lm(name), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BT, eager_BT = token_logps(model, batch), eager_logps(model, batch)

        def exact(hidden: Tensor, head: HeadSpec) -> Tensor:
            weight_VD = head.weight.to(torch.bfloat16).double()
            with torch.autocast("cpu", enabled=False):
                logits_BTV = head._replace(weight=weight_VD).logits(hidden.to(torch.bfloat16).double())
            return logits_BTV.log_softmax(-1)

        exact_BTV = run_at_head(model, exact, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    labels_BT = batch["labels"]
    exact_BT = exact_BTV.gather(-1, labels_BT.clamp(min=0)[..., None]).squeeze(-1).masked_fill(labels_BT == -100, 0)
    assert found_BT.dtype == torch.float32
    assert (found_BT - exact_BT).norm() <= max((eager_BT - exact_BT).norm(), 1e-5)
    found_BT.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_under_torch_compile_every_call_sees_its_own_arguments() -> None:
    model = tiny_causal_lm("llama")
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        batch = make_batch()
        torch.testing.assert_close(
            gradients(compiled, token_logps(compiled, batch)), gradients(compiled, eager_logps(model, batch))
        )
    torch._dynamo.reset()


# peft


def with_adapter(name: str, **settings: Any) -> nn.Module:
    """The model under LoRA whose B is not zero, as it is after some steps."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(tiny_causal_lm(name), config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model


LORA: dict[str, Callable[[], nn.Module]] = {
    "on_the_head": lambda: with_adapter("llama", target_modules=["q_proj", "lm_head"]),
    "on_a_biased_head_with_a_bias_of_its_own": lambda: with_adapter(
        "phi_with_bias", target_modules=["lm_head"], lora_bias=True
    ),
    "rank_stabilised_under_softcap": lambda: with_adapter("gemma2", target_modules=["lm_head"], use_rslora=True),
    "under_a_logit_scale": lambda: with_adapter("cohere", target_modules=["lm_head"]),
    "elsewhere": lambda: with_adapter("llama", target_modules=["q_proj"]),
    "head_trained_whole": lambda: with_adapter("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("case", LORA)
def test_adapters_get_the_gradients_of_eager(case: str) -> None:
    model = LORA[case]()
    check_head(model)
    assert_same_training(model, rtol=1e-4, atol=1e-6)


def test_rows_that_pad_the_vocabulary_are_left_out() -> None:
    model = tiny_causal_lm("phi_with_bias")
    model.config.unpadded_vocab_size = 50
    weight, bias = run_at_head(
        model, lambda _, head: (head.weight, head.bias), input_ids=torch.tensor([[1, 5, 9]]), use_cache=False
    )
    assert torch.equal(weight, model.lm_head.weight[:50])
    assert torch.equal(bias, model.lm_head.bias[:50])


@pytest.mark.parametrize("case", ["on_the_head", "head_trained_whole"])
def test_disabled_adapters_are_left_out(case: str) -> None:
    model, batch = LORA[case](), make_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        before = token_logps(model, batch)
        with model.disable_adapter():
            check_head(model)
            found = token_logps(model, batch)
            torch.testing.assert_close(found, eager_logps(model, batch), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(before, found)


def test_merged_and_several_adapters() -> None:
    peft = pytest.importorskip("peft")
    model, batch = LORA["on_the_head"](), make_batch()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    nn.init.normal_(output_head(model).lora_B["second"].weight, std=0.3)
    model.base_model.set_adapter(["default", "second"])
    assert_same_training(model, rtol=1e-4, atol=1e-6)
    separate = token_logps(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(token_logps(model, batch), separate, rtol=1e-4, atol=1e-5)


def test_an_adapter_below_the_resolution_of_a_bf16_weight_is_not_rounded_away() -> None:
    model, batch = LORA["on_the_head"]().to(torch.bfloat16), make_batch()
    head: Any = output_head(model)
    nn.init.ones_(head.base_layer.weight)
    nn.init.normal_(head.lora_B["default"].weight, std=2e-3)
    exact = copy.deepcopy(model).double()
    ids_BT = batch["input_ids"]
    with torch.no_grad():
        hidden_BTD = run_at_head(model, lambda hidden, _: hidden[..., :16].double(), input_ids=ids_BT)
        wanted_BTV = exact.get_base_model().lm_head(hidden_BTD)
        found_BTV = run_at_head(model, lambda hidden, head: hidden.double() @ head.weight.double().T, input_ids=ids_BT)
    spread_BTV = wanted_BTV - wanted_BTV.mean(-1, keepdim=True)
    error_BTV = (found_BTV - wanted_BTV) - (found_BTV - wanted_BTV).mean(-1, keepdim=True)
    assert error_BTV.norm() < 0.02 * spread_BTV.norm()


def test_heads_that_are_not_one_linear_map_are_refused() -> None:
    batch = make_batch()
    with pytest.raises(UserError, match="turn off DoRA"):
        token_logps(with_adapter("llama", target_modules=["lm_head"], use_dora=True), batch)
    model = tiny_causal_lm("llama")

    class Quantised(nn.Module):
        weight = torch.zeros(VOCABULARY, 16, dtype=torch.int8)

    model.lm_head = Quantised()
    with pytest.raises(UserError, match=r"lm_head is a Quantised.*leave the head out of quantisation"):
        token_logps(model, batch)
