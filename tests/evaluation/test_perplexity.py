import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo.data import TokenizeConfig, tokenize_response
from reprdpo.errors import UserError
from reprdpo.evaluation.perplexity import perplexity
from reprdpo.models import load_causal_lm, load_tokenizer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "response_start": 1},
    {"input_ids": [5, 1], "response_start": 1},
    {"input_ids": [12, 13, 14, 15], "response_start": 3},
    {"input_ids": [9, 9, 9, 30, 31, 2, 2, 2, 4], "response_start": 4},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=37,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def direct(model, rows):
    """Row by row from float64 logits."""
    total, count = 0.0, 0
    for row in rows:
        ids, start = torch.tensor(row["input_ids"]), row["response_start"]
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        scored = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[start - 1 :]
        total, count = total - float(scored.sum()), count + scored.numel()
    return math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_is_the_token_weighted_mean(model, batch_size):
    model.train()
    found = perplexity(model, ROWS, batch_size=batch_size)
    assert model.training
    model.eval()
    assert found == pytest.approx(direct(model, ROWS), rel=1e-5)


def test_nothing_to_score(model):
    with pytest.raises(UserError, match="no texts"):
        perplexity(model, [])


def test_stories260k_knows_stories(real_dir):
    folder = real_dir / "models" / "stories260K"
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    story = " there was a little girl named Lily. She loved to play outside in the park."
    shuffled = " ".join(sorted(story.split()))

    def rows(text):
        return [tokenize_response(tokenizer, "Once upon a time,", text, TokenizeConfig(append_eos=False))._asdict()]

    assert perplexity(model, rows(story)) < 6 < perplexity(model, rows(" " + shuffled))
    pairs = (real_dir / "pairs" / "hh_harmless.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    config = TokenizeConfig(max_length=128, truncation_mode="keep_end")
    tokenized = [
        tokenize_response(tokenizer, pair["prompt"], pair["chosen"], config)._asdict()
        for pair in map(json.loads, pairs)
    ]
    assert perplexity(model, tokenized, batch_size=5) == pytest.approx(direct(model, tokenized), rel=1e-5)
