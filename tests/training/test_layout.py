"""One training step in every layout: the same loss, confidence, reward and gradients; and which layout a model gets."""

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_models import GROUPED, SIZES, tiny_causal_lm
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reprdpo.data import PackingCollator, PreferenceCollator
from reprdpo.errors import UserError
from reprdpo.reward import HybridReward, RewardMetadata
from reprdpo.training import ReprDPOTrainer, layout, reference_logps
from reprdpo.training import trainer as trainer_module
from reprdpo.training.layout import model_inputs, packing_collator, segment_mask_function

Make = Callable[..., Any]
PADDED = PreferenceCollator(0)
VARLEN = "varlen_on_a_cpu"
LAYOUTS = {
    "prefix": PackingCollator(PADDED, ("prefix",)),
    "prefix in short rows": PackingCollator(PADDED, ("prefix",), max_row_tokens=34, score_cost=1.0),
    "packed, nothing shared": PackingCollator(PADDED, ("prefix",), share_prefix=False, pad_to_multiple_of=8),
    "varlen": PackingCollator(PADDED, ("varlen",)),
}


@pytest.fixture
def odd_pairs() -> list[dict[str, Any]]:
    """Nothing in common, the same response twice, prompts of unequal starts, one-token responses, one long pair."""
    spans = [([], 1, 2), ([4, 5], 1, 1), ([6, 7, 8], 4, 0), ([9] * 5, 2, 6), ([*range(3, 17)], 9, 5), ([20], 1, 3)]
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(spans):
        chosen_ids = [*prompt, *range(30, 31 + chosen), 2]
        rejected_ids = [*prompt, *range(40, 41 + rejected), 2] if rejected else chosen_ids
        start = max(len(prompt), 1)
        rows.append(
            {
                "pair_id": number,
                "chosen_input_ids": chosen_ids,
                "chosen_response_start": start,
                "rejected_input_ids": rejected_ids,
                "rejected_response_start": start + (number == 4),
                "ref_chosen_logps": -20.0 + number,
                "ref_rejected_logps": -21.0,
            }
        )
    return rows


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash attention's variable-length kernels make of transformers' arguments, a sequence after another."""
    if "cu_seq_lens_q" not in kwargs:  # the padded batch; padding is on the right, so that causality hides it
        return causal(query, key, value, scaling).transpose(1, 2), None
    assert mask is None
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    bounds = kwargs["cu_seq_lens_q"].tolist()
    assert max(b - a for a, b in itertools.pairwise(bounds)) == kwargs["max_length_q"]
    parts = [
        causal(*(states[:, :, a:b] for states in (query, key, value)), scaling) for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )


@pytest.fixture
def _varlen_attention() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping[VARLEN]


def build(config_class: str, attention: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings, initializer_range=0.3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def random_reward(model: Any, pool: str) -> HybridReward:
    generator = torch.Generator().manual_seed(1)
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    numbers = [torch.randn(*shape, generator=generator) for shape in ((L, D), (L,), (L, D), (L,))]
    return HybridReward(*numbers, alpha=0.3, metadata=RewardMetadata(L, D, pool=pool))


def one_step(trainer: ReprDPOTrainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a step decides, with an upstream gradient that is not 1."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    loss = trainer.compute_loss(trainer.model, batch)
    (3 * loss).backward()
    found = {f"gradient of {name}": value.grad.clone() for name, value in trainer.model.named_parameters()}
    found |= {f"reward's {name}": value.detach().clone() for name, value in trainer.reward.named_parameters()}
    metrics = trainer._windows[True].drain(lambda row: row)
    # Of the pair whose responses are the same, rounding decides which reward is larger.
    return found | {name: torch.tensor(value) for name, value in metrics.items() if "accuracies" not in name}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=2e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


MODELS = [
    ("LlamaConfig", "sdpa", GROUPED),
    ("LlamaConfig", "eager", GROUPED),
    ("Qwen2Config", "sdpa", GROUPED | {"tie_word_embeddings": True}),
    ("GPT2Config", "sdpa", SIZES),  # learned absolute positions
    ("GPT2Config", "eager", SIZES),
    ("Gemma2Config", "eager", GROUPED | {"head_dim": 8, "sliding_window": 64}),
]


@pytest.mark.usefixtures("_varlen_attention")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # the name that every transformers 5 has
@pytest.mark.parametrize(("config_class", "attention", "settings"), MODELS)
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_layout_is_the_same_training(
    make_config: Make,
    odd_pairs: list[dict[str, Any]],
    config_class: str,
    attention: str,
    settings: dict[str, Any],
    pool: str,
    checkpointed: bool,
) -> None:
    if checkpointed and pool == "mean":
        pytest.skip("two ways through the same code")

    def step(collator: Any, implementation: str = attention) -> dict[str, Tensor]:
        model = build(config_class, implementation, **settings)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = make_config(packing="padded", beta=0.3)
        return one_step(ReprDPOTrainer(model, config, reward=random_reward(model, pool)), collator(odd_pairs))

    expected = step(PADDED)
    assert any(value.abs().max() > 0.01 for name, value in expected.items() if name.startswith("gradient"))
    for name, collator in LAYOUTS.items():
        if name == "varlen" and (attention == "eager" or config_class == "GPT2Config"):
            continue
        assert_same(step(collator, VARLEN if name == "varlen" else attention), expected)


def test_the_mask_function_is_that_of_the_definition(odd_pairs: list[dict[str, Any]]) -> None:
    """A token sees those of its own sequence that lie no later, and padding what keeps its softmax defined."""
    batch = PackingCollator(PADDED, ("prefix",), max_row_tokens=34, pad_to_multiple_of=16, score_cost=1.0)(odd_pairs)
    rows, length = batch["segment_ids"].shape
    assert rows > 1
    expected = torch.zeros(rows * length, rows * length, dtype=torch.bool)
    for padded_places in batch["token_index"]:
        places = padded_places[padded_places >= 0]
        expected[places[:, None], places] |= torch.ones(len(places), len(places)).tril().bool()
    visible = segment_mask_function(batch["segment_ids"], batch["prefix_ids"])
    for row in range(rows):
        real = batch["segment_ids"][row] >= 0
        at = slice(row * length, (row + 1) * length)
        q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
        mask = visible(torch.tensor(row), None, q, k)
        assert torch.equal(mask[real], expected[at, at][real])
        assert mask.diagonal().all()


def test_flex_blocks_hold_the_same_mask(odd_pairs: list[dict[str, Any]]) -> None:
    batch = PackingCollator(PADDED, ("prefix",), pad_to_multiple_of=128)(odd_pairs)
    model = build("LlamaConfig", "flex_attention", **GROUPED)
    blocks = model_inputs(model, batch)["attention_mask"]
    dense = model_inputs(build("LlamaConfig", "sdpa", **GROUPED), batch)["attention_mask"]
    assert blocks.shape == dense.shape
    assert torch.equal(create_mask(blocks.mask_mod, 1, None, 128, 128, device="cpu"), dense)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mpt_unused_scale", "position_ids"),
        ("mamba", "position_ids"),
        ("recurrent_gemma_own_name", "linear_attention|what else is in its row"),  # as transformers names it or not
        ("falcon_h1_multiplier", "hybrid"),
    ],
)
def test_models_that_depend_on_the_row_fall_back_and_say_so(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_causal_lm(name)
    with caplog.at_level(logging.WARNING):
        assert packing_collator(model, PADDED).layouts == ("padded",)
    assert [bool(re.search(reason, record.message)) for record in caplog.records] == [True]
    with pytest.raises(UserError, match=reason):
        packing_collator(model, PADDED, packing="prefix")


@pytest.mark.parametrize(
    ("config_class", "settings", "reason"),
    [
        ("MistralConfig", {"sliding_window": 8}, "what else is in its row"),
        ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}, "what else is in its row"),
        (
            "GPTNeoConfig",
            {"num_layers": 3, "attention_types": [[["local"], 3]], "window_size": 8},
            "else is in its row",
        ),
        ("DogeConfig", {"keep_window_size": 4}, "else is in its row"),
        ("Qwen3NextConfig", {"num_experts": 2, "moe_intermediate_size": 8}, "linear_attention"),
        ("Mamba2Config", {"num_heads": 4, "head_dim": 8, "hidden_size": 16, "n_groups": 1}, "position_ids"),
    ],
)
def test_windows_and_linear_attention_fall_back(
    config_class: str, settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows shorter than the rows that the check is made with; wider ones bound the rows."""
    model = build(config_class, "eager", **GROUPED | settings)
    with caplog.at_level(logging.WARNING):
        assert packing_collator(model, PADDED).layouts == ("padded",)
    assert [reason in record.message for record in caplog.records] == [True]


def test_alibi_is_recognised() -> None:
    model = build("FalconConfig", "eager", **SIZES, alibi=True)
    with pytest.raises(UserError, match="ALiBi"):
        packing_collator(model, PADDED, packing="prefix")


def test_a_model_that_says_nothing_is_found_out(make_model: Make) -> None:
    """Layers that read what lies before them in the row, whatever the mask says."""
    model = make_model()
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, 1))
    with pytest.raises(UserError, match="depend on what else is in its row"):
        packing_collator(model, PADDED, packing="prefix")


def test_rows_stay_within_a_sliding_window(odd_pairs: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    gemma = GROUPED | {"head_dim": 8}
    wide = packing_collator(build("Gemma2Config", "eager", **gemma, sliding_window=64), PADDED, packing="prefix")
    assert wide.max_row_tokens == 64
    for doge, rows in (({"keep_window_size": 200}, 200), ({}, 2048), ({"sliding_window": 150}, 150)):
        assert packing_collator(build("DogeConfig", "sdpa", **GROUPED, **doge), PADDED).max_row_tokens == rows
    assert packing_collator(build("Qwen2Config", "sdpa", **GROUPED, sliding_window=8), PADDED).max_row_tokens == 4096
    with caplog.at_level(logging.WARNING):
        narrow = packing_collator(build("Gemma2Config", "eager", **gemma, sliding_window=8), PADDED)
    assert narrow.layouts == ("padded",)
    assert len(caplog.records) == 1


def test_what_cannot_be_served_is_refused_by_name(
    make_model: Make, make_config: Make, make_reward: Make, pairs: Dataset, odd_pairs: list[dict[str, Any]]
) -> None:
    def trainer(**settings: Any) -> ReprDPOTrainer:
        return ReprDPOTrainer(make_model(), make_config(**settings), train_dataset=pairs, reward=make_reward())

    with pytest.raises(UserError, match=r"packing: .*varlen.*flash_attention_2"):
        trainer(packing="varlen")
    with pytest.raises(UserError, match="attn_implementation: flash_attention_2"):
        trainer(attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="no backward on a CPU"):
        trainer(attn_implementation="flex_attention", packing="prefix")
    with pytest.raises(UserError, match="packing: got 'tight'"):
        trainer(packing="tight")
    with pytest.raises(UserError, match=r"training data: 4 of 14 pairs.*raise max_row_tokens"):
        trainer(packing="prefix", max_row_tokens=9)
    assert trainer(attn_implementation="eager").model.config._attn_implementation == "eager"


@pytest.mark.usefixtures("_varlen_attention")
def test_auto_takes_what_the_attention_serves(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing_collator(make_model(), PADDED).layouts == ("padded", "prefix")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_on_a_cpu", varlen_attention)
    model = make_model()
    model.config._attn_implementation_internal = "flash_on_a_cpu"
    assert packing_collator(model, PADDED).layouts == ("padded", "varlen")
    assert packing_collator(model, PADDED, packing="varlen").layouts == ("varlen",)
    with pytest.raises(UserError, match="takes no such mask"):
        packing_collator(model, PADDED, packing="prefix")


def test_whole_runs_agree(make_model: Make, make_reward: Make, make_config: Make, pairs: Dataset) -> None:
    ends = []
    for packing in ("padded", "prefix", "auto"):
        config = make_config(packing=packing, optim="sgd", eval_strategy="steps", eval_steps=2)
        trainer = ReprDPOTrainer(make_model(), config, pairs, pairs.select(range(5)), reward=make_reward())
        trainer.train()
        ends.append([value.detach() for module in (trainer.model, trainer.reward) for value in module.parameters()])
        ends[-1].append(torch.tensor(trainer.evaluate()["eval_loss"]))
    for other in ends[1:]:
        for got, expected in zip(other, ends[0], strict=True):
            assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("packing", ["padded", "prefix"])
def test_in_half_precision_the_first_step_costs_log_2(
    make_config: Make, pairs: Dataset, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is computed in the layout of training, since each rounds in a way of its own."""
    monkeypatch.setattr(layout, "_score_cost", lambda model: 0.0)  # several pairs a row
    model = build("LlamaConfig", "sdpa", **GROUPED)
    settings = {"bf16": True, "beta": 5.0, "max_steps": 1, "confidence_source": "fixed", "packing": packing}
    sizes = {"per_device_train_batch_size": len(pairs), "precompute_ref_batch_size": 2 * len(pairs)}

    def first_loss(output: str, data: Dataset) -> float:
        config = make_config(**settings, **sizes, output_dir=output)
        trainer = ReprDPOTrainer(model, config, data)
        with torch.autocast("cpu", torch.bfloat16):
            batch = trainer.data_collator(list(trainer.train_dataset))
            return trainer.compute_loss(trainer.model.eval(), batch).item()

    folder = make_config().output_dir
    assert first_loss(folder, pairs) == pytest.approx(math.log(2), abs=1e-6)
    other = PackingCollator(PADDED, ("padded" if packing == "prefix" else "prefix",))
    settings_of_reference = {"batch_size": 2 * len(pairs), "autocast_dtype": torch.bfloat16, "progress": False}
    data = reference_logps(model, pairs, pad_token_id=0, collator=other, **settings_of_reference)
    assert abs(first_loss(folder, data) - math.log(2)) > 1e-4


def test_weights_are_read_once(
    make_config: Make, make_model: Make, make_reward: Make, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the reward's base, the reference of the training data and that of the evaluation data."""
    read: list[Any] = []
    real = trainer_module.base_fingerprint
    monkeypatch.setattr(trainer_module, "base_fingerprint", lambda model: read.append(model) or real(model))
    ReprDPOTrainer(make_model(), make_config(), pairs, pairs.select(range(3)), reward=make_reward())
    assert len(read) == 1
