"""Two processes, the model replicated or sharded: the loss and the gradients of one process that has all the pairs."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from tiny_models import VOCABULARY, tiny_causal_lm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from reprdpo import ops
from reprdpo.heads import HeadSpec, run_at_head

PROCESSES, PAIRS, LENGTH = 2, 4, 6
Gradients = dict[str, Tensor]


def replicated(model: Any) -> nn.Module:
    return DistributedDataParallel(model)


def sharded_by_layer(model: Any) -> nn.Module:
    """The head in the root's group, its weight sharded again as soon as the forward is over."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)), reshard_after_forward=True)


def sharded_with_the_norm(model: Any) -> nn.Module:
    """The head and the final norm in a group of their own, as accelerate does it."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=True)
    return sharded_by_layer(model)


def sharded_in_half_precision(model: Any) -> nn.Module:
    """Parameters gathered in bf16 and every module's output cast to it, as accelerate's mixed precision does."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def with_lora(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def sharded_under_lora(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    head = model.get_base_model().lm_head
    for module in (head.base_layer, head.lora_B["default"], head):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


Case = tuple[str, Callable[[Any], Any], Callable[[Any], nn.Module]]


def unchanged(model: Any) -> Any:
    return model


CASES: dict[str, Case] = {
    "replicated": ("gemma2", unchanged, replicated),
    "sharded": ("llama", unchanged, sharded_by_layer),
    "sharded, tied": ("qwen2_tied", unchanged, sharded_by_layer),
    "sharded, softcap": ("gemma2", unchanged, sharded_by_layer),
    "sharded, head apart": ("llama", unchanged, sharded_with_the_norm),
    "sharded, bf16": ("llama", unchanged, sharded_in_half_precision),
    "LoRA, replicated": ("llama", with_lora, replicated),
    "LoRA, every part sharded apart": ("llama", with_lora, sharded_under_lora),
}


def loss_and_gradients(model: nn.Module, ids_ST: Tensor) -> tuple[Tensor, Gradients]:
    labels_ST = torch.full_like(ids_ST, -100)
    labels_ST[:, 1:-1] = ids_ST[:, 2:]

    def use(hidden: Tensor, head: HeadSpec) -> ops.LinearPreferenceLoss:
        zero_P = torch.zeros(len(ids_ST) // 2)
        return ops.linear_preference_loss(
            hidden,
            labels=labels_ST,
            ref_chosen_logp=zero_P,
            ref_rejected_logp=zero_P,
            beta=2.0,
            confidence=0.8,
            **head._asdict(),
        )

    loss = run_at_head(model, use, input_ids=ids_ST).loss
    (loss * 0.7).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in grads.items()
    }


def all_ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2 * PAIRS, LENGTH), generator=torch.Generator().manual_seed(5))


def work(cases: list[str]) -> dict[str, tuple[Tensor, Gradients]]:
    mine = torch.arange(PAIRS).chunk(PROCESSES)[dist.get_rank()]
    ids_ST = all_ids()[torch.cat([mine, mine + PAIRS])]
    found = {}
    for case in cases:
        name, adapt, wrap = CASES[case]
        found[case] = loss_and_gradients(wrap(adapt(tiny_causal_lm(name))), ids_ST)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[Tensor, Gradients]]]:
    """Loss and gradients of every case, by process; the processes start once for all of them."""
    cases = [case for case in CASES if "LoRA" not in case or find_spec("peft")]
    return distributed.run(work, cases, world_size=PROCESSES)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_process(
    case: str, results: list[dict[str, tuple[Tensor, Gradients]]]
) -> None:
    if "LoRA" in case:
        pytest.importorskip("peft")
    name, adapt, _ = CASES[case]
    loss, wanted = loss_and_gradients(adapt(tiny_causal_lm(name)), all_ids())
    found = [each[case] for each in results]
    tolerance = {"rtol": 0.05, "atol": 0.02} if "bf16" in case else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.stack([each for each, _ in found]).mean(), loss, **tolerance)
    for each, grads in found:
        assert each.dtype == torch.float32
        assert each != each.bfloat16(), "the loss was rounded on its way out of the model"
        assert grads.keys() == wanted.keys()
        for parameter, grad in grads.items():
            torch.testing.assert_close(
                grad, wanted[parameter], **tolerance, msg=lambda text, p=parameter: f"{p}: {text}"
            )
