import math
from functools import partial

import pytest
import torch

from reprdpo.data import TokenizeConfig
from reprdpo.errors import UserError
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.reward import HybridReward, RewardMetadata
from reprdpo.sampling import (
    SamplingConfig,
    TransformersEngine,
    best_of_n,
    build_pairs,
    read_samples,
    sample_responses,
    score_responses,
)


def random_reward(layers, width, pool="last"):
    torch.manual_seed(1)
    metadata = RewardMetadata(num_layers=layers, hidden_size=width, pool=pool)
    parameters = (torch.randn(layers, width), torch.randn(layers), torch.randn(layers, width), torch.randn(layers))
    return HybridReward(*parameters, metadata=metadata)


def direct(model, reward, ids, pool):
    """The definition, from transformers' hidden_states: softmax-gated sum of the layers' probes."""
    with torch.no_grad():
        states_LTD = torch.cat(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]).double()
        states_LD = states_LTD[:, -1] if pool == "last" else states_LTD.mean(1)
        score_L = (states_LD * reward.probe_weight).sum(-1) + reward.probe_bias
        gate_L = ((states_LD * reward.gate_weight).sum(-1) + reward.gate_bias).softmax(0)
        return float((score_L * gate_L).sum())


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_is_the_definition(make_model, tokenizer, pool, batch_size):
    model, reward = make_model().train(), random_reward(3, 32, pool)
    prompts = ["a", "hello there", "hello there", "what is it", "x"]
    responses = [" yes", " a rather longer answer", " no", "", "\u00e9"]
    found = score_responses(model, tokenizer, reward, prompts, responses, batch_size=batch_size)
    assert model.training
    model.eval()
    assert math.isnan(found[3])
    for place in (0, 1, 2, 4):
        ids = [*tokenizer(prompts[place] + responses[place])["input_ids"], tokenizer.eos_token_id]
        assert found[place] == pytest.approx(direct(model, reward, ids, pool), abs=1e-4)


def test_a_text_answers_a_chat_as_the_assistant(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}"
    chat, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": " yes"}]
    try:
        text, message = score_responses(model, tokenizer, random_reward(3, 32), [chat] * 2, [" yes", answer])
    finally:
        tokenizer.chat_template = None
    (plain,) = score_responses(model, tokenizer, random_reward(3, 32), ["uhi"], ["a yes"])
    assert text == pytest.approx(message, abs=1e-5)
    assert text == pytest.approx(plain, abs=1e-5)


def test_bad_input(model, tokenizer):
    reward = random_reward(3, 32)
    with pytest.raises(UserError, match="2 prompts and 1 responses"):
        score_responses(model, tokenizer, reward, ["a", "b"], ["c"])
    with pytest.raises(UserError, match="may have"):
        score_responses(model, tokenizer, reward, ["a" * 99], ["c"], tokenize=TokenizeConfig(max_length=20))


def test_from_prompts_to_pairs(real_dir, tmp_path):
    folder = real_dir / "models" / "stories260K"
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    score = partial(score_responses, model, tokenizer, random_reward(5, 64))
    prompts = [{"prompt": f"Once upon a time, a {animal}", "category": None} for animal in ("cat", "dog", "red fox")]
    config = SamplingConfig(num_responses=4, max_new_tokens=12)
    engine = TransformersEngine(model, tokenizer)
    path = sample_responses(engine, prompts, tmp_path / "samples.jsonl", config, score=score, progress=False)
    records = read_samples(path)
    for record in records:
        alone = [score([record["prompt"]], [response["text"]])[0] for response in record["responses"]]
        assert [response["reward"] for response in record["responses"]] == pytest.approx(alone, abs=1e-4)
        assert best_of_n(record)["reward"] == max(response["reward"] for response in record["responses"])
    report = build_pairs(path, tmp_path / "pairs.jsonl")
    assert report.n_pairs == 3
    assert report.mean_gap > 0
    assert report.n_truncated == 12
