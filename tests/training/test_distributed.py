"""Two processes train as one that has the whole batch: losses, metrics, policy and reward; and go on as one."""

import copy
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny_runs
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_trainer import logged, untied
from torch import Tensor
from torch.distributed.tensor import DTensor

from reprdpo.errors import UserError
from reprdpo.training import ReprDPOTrainer, ReprSFTConfig, ReprSFTTrainer, reference_logps

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}
PACKED = {"packing": "prefix", "max_row_tokens": 40}
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "adam_epsilon": 1e-3}
End = dict[str, Tensor]


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().clone()


def shard_on_cpus() -> None:
    """accelerate turns FSDP on for accelerators alone; FSDP2 itself shards over any processes."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def train(folder: str, *, resume: bool = False, **settings: Any) -> dict[str, End]:
    """The method's run; policy and reward as they are at its end."""
    reward = tiny_runs.make_reward()
    # transformers takes entries out of what it is given.
    config = tiny_runs.make_config(folder, **copy.deepcopy({"packing": "padded", **STEPS, **settings}))
    if config.fsdp:
        shard_on_cpus()
    trainer = ReprDPOTrainer(tiny_runs.make_model(), config, train_dataset=tiny_runs.make_pairs(), reward=reward)
    assert trainer.is_fsdp_enabled == bool(config.fsdp)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
    trainer.save_model(f"{folder}/model")
    sharded = [isinstance(p, DTensor) for p in trainer.model.parameters()]
    assert all(sharded) if config.fsdp else not any(sharded)
    policy = {name.removeprefix("module."): whole(p) for name, p in trainer.model.named_parameters()}
    return {"policy": policy, "reward": {name: whole(p) for name, p in reward.named_parameters()}}


def train_all(folder: str) -> dict[str, dict[str, End]]:
    """Runs under every engine in one start of the processes; eight pairs a step in all."""
    return {
        "ddp": train(f"{folder}/ddp", per_device_train_batch_size=4),
        "split": train(
            f"{folder}/split",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_tokens_per_device=24,
        ),
        "fsdp2": train(f"{folder}/fsdp2", per_device_train_batch_size=4, **FSDP),
    }


def train_packed(folder: str) -> dict[str, dict[str, End]]:
    """In a start of its own: in one process, accelerate turns FSDP on once."""
    return {
        "packed ddp": train(f"{folder}/packed ddp", per_device_train_batch_size=4, **PACKED),
        "packed fsdp2": train(f"{folder}/packed fsdp2", per_device_train_batch_size=4, **PACKED, **FSDP),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, End]:
    return train(str(folder / "one"), per_device_train_batch_size=8)


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> list[dict[str, dict[str, End]]]:
    runs = (distributed.run(function, str(folder)) for function in (train_all, train_packed))
    return [{**padded, **packed} for padded, packed in zip(*runs, strict=True)]


def close(found: End, wanted: End, atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("engine", ["ddp", "split", "fsdp2", "packed ddp", "packed fsdp2"])
def test_two_processes_train_as_one(engine: str, folder: Path, one_process: Any, two_processes: Any) -> None:
    ranks = [each[engine] for each in two_processes]
    for name, value in ranks[0]["reward"].items():
        assert torch.equal(value, ranks[1]["reward"][name]), f"the reward's {name} differs between processes"
    for part in ("policy", "reward"):
        close(ranks[0][part], one_process[part])
    wanted = untied(logged(folder / "one"))
    found = untied(logged(folder / engine))
    assert len(found) == len(wanted) == 4
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx({**other, "epoch": line["epoch"]}, abs=1e-4)


def test_a_sharded_checkpoint_goes_on_in_one_process(folder: Path, one_process: Any, two_processes: Any) -> None:
    assert (folder / "fsdp2" / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()
    end = train(str(folder / "fsdp2"), per_device_train_batch_size=8, resume=True)
    for part in ("policy", "reward"):
        close(end[part], one_process[part])
    for line, other in zip(untied(logged(folder / "fsdp2")), untied(logged(folder / "one")), strict=True):
        assert line == pytest.approx(other, abs=1e-4)


def test_what_sharded_training_saves_is_a_whole_model(folder: Path, one_process: Any, two_processes: Any) -> None:
    saved = type(tiny_runs.make_model()).from_pretrained(folder / "fsdp2" / "model")
    close(dict(saved.named_parameters()), one_process["policy"])


def test_a_checkpoint_of_another_engine_or_configuration_is_refused(folder: Path, two_processes: Any) -> None:
    with pytest.raises(UserError, match=r"checkpoint-3: was trained with beta 0\.1, not 0\.3"):
        train(str(folder / "ddp"), per_device_train_batch_size=8, beta=0.3, resume=True)
    with pytest.raises(UserError, match="was trained with global_batch_size 8, not 4"):
        train(str(folder / "fsdp2"), per_device_train_batch_size=4, resume=True)


def evaluate(folder: str) -> dict[str, dict[str, float]]:
    """Odd numbers of pairs, fewer than processes too; a frozen reward and a policy some way from its reference."""
    found = {}
    for name, engine in {"ddp": {}, "fsdp2": FSDP}.items():
        if engine and not dist.is_initialized():
            continue
        settings = copy.deepcopy({"max_steps": 2, "per_device_train_batch_size": 2, **engine})
        config = tiny_runs.make_config(f"{folder}/{name}", **settings)
        if engine:
            shard_on_cpus()
        config.per_device_train_batch_size //= config.world_size
        config.per_device_eval_batch_size = 1
        pairs = tiny_runs.make_pairs()
        trainer = ReprDPOTrainer(tiny_runs.make_model(), config, pairs, pairs, reward=tiny_runs.make_reward())
        trainer.train()
        for rows in (1, 5, 14):
            found[f"{name} {rows}"] = trainer.evaluate(trainer.eval_dataset.select(range(rows)))
    return found


def sft(folder: str, batch: int) -> dict[str, End]:
    rows = [
        {"input_ids": row["chosen_input_ids"], "response_start": row["chosen_response_start"]}
        for row in tiny_runs.make_pairs()
    ]
    settings = {"optim": "sgd", "per_device_train_batch_size": batch, "max_tokens_per_device": 16, "max_steps": 4}
    config = tiny_runs.make_config(folder, ReprSFTConfig, **settings)
    data = tiny_runs.Dataset.from_list(rows)
    trainer = ReprSFTTrainer(tiny_runs.make_model(), config, data)
    trainer.train()
    return {name.removeprefix("module."): whole(p) for name, p in trainer.model.named_parameters()}


def the_rest(folder: str) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {"sft": sft(f"{folder}/sft", 2)}
    calls: list[int] = []
    from reprdpo.training import reference

    original, reference._CHUNK_TOKENS = reference.batch_logps, 20
    reference.batch_logps = lambda *args: calls.append(1) or original(*args)
    settings = {"pad_token_id": 0, "batch_size": 2, "cache_dir": f"{folder}/reference", "progress": False}
    found["logps"] = reference_logps(tiny_runs.make_model(), tiny_runs.make_pairs(), **settings)["ref_chosen_logps"][:]
    found["forwards"] = len(calls)
    torch.distributed.barrier()
    reference_logps(tiny_runs.make_model(), tiny_runs.make_pairs(), **settings)
    found["forwards again"] = len(calls) - found["forwards"]

    reward = tiny_runs.make_reward()
    with torch.no_grad():
        reward.probe_bias[0] += rank
    config = tiny_runs.make_config(f"{folder}/other", confidence_source="fixed")
    with pytest.raises(UserError) as told:
        ReprDPOTrainer(tiny_runs.make_model(), config, train_dataset=None, reward=reward)
    found["told"] = str(told.value)
    few = tiny_runs.make_pairs().select([0])
    with pytest.raises(UserError) as told:
        ReprDPOTrainer(tiny_runs.make_model(), config, train_dataset=few)
    found["few"] = str(told.value)
    found["forwards of what is refused"] = len(calls) - found["forwards"] - found["forwards again"]
    found["evaluation"] = evaluate(f"{folder}/evaluation")
    return found


def test_what_else_processes_share(tmp_path: Path) -> None:
    """The mean over tokens of supervised fine-tuning, the pass for reference log-probs, and what is refused."""
    ranks = distributed.run(the_rest, str(tmp_path))
    evaluated = evaluate(str(tmp_path / "evaluated alone"))
    wanted = sft(str(tmp_path / "alone"), 4)
    alone = reference_logps(tiny_runs.make_model(), tiny_runs.make_pairs(), pad_token_id=0, progress=False)
    for rank in ranks:
        close(rank["sft"], wanted)
        assert rank["logps"] == pytest.approx(alone["ref_chosen_logps"], abs=1e-4)
        assert rank["forwards"] <= 8  # of the fourteen
        assert rank["forwards again"] == 0
        assert "reward: is another one on process 1 than on process 0" in rank["told"]
        assert "1 rows do not make a batch for 2 processes" in rank["few"]
        assert rank["forwards of what is refused"] == 0
        assert len(rank["evaluation"]) == 6
        for name, metrics in rank["evaluation"].items():
            for metric, value in evaluated[f"ddp {name.split()[1]}"].items():
                if not metric.endswith(("runtime", "second", "time")):
                    assert metrics[metric] == pytest.approx(value, abs=1e-4), (name, metric)
    assert sum(rank["forwards"] for rank in ranks) == 14
