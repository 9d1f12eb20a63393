import collections
import dataclasses
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from reprdpo.errors import UserError
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.sampling import SamplingConfig, TransformersEngine
from reprdpo.sampling.engine import pick_tokens

PROMPTS = ["a", "hello there", "what is", "a longer prompt than the others", "zz", "hello there"]
CONFIG = SamplingConfig(num_responses=3, max_new_tokens=12, batch_size=6)


def drawn(engine, prompts=PROMPTS, config=CONFIG, **kwargs):
    return dict(engine.generate(prompts, config, **kwargs))


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer)


def test_yields_every_prompt_in_order(engine):
    found = list(engine.generate(PROMPTS, CONFIG))
    assert [place for place, _ in found] == list(range(len(PROMPTS)))
    assert all(len(responses) == 3 for _, responses in found)
    assert len(drawn(engine, config=dataclasses.replace(CONFIG, num_responses=5))[0]) == 5


def test_batching_and_padding_change_nothing(engine):
    whole = drawn(engine)
    for size in (1, 9, 1000):
        assert drawn(engine, config=dataclasses.replace(CONFIG, batch_size=size)) == whole
    for number in (3, 0):  # a part of the set, named by its ids
        assert drawn(engine, [PROMPTS[number]], prompt_ids=[number])[0] == whole[number]


def test_streams_extend(engine):
    fewer = drawn(engine, config=dataclasses.replace(CONFIG, num_responses=2))
    shorter = drawn(engine, config=dataclasses.replace(CONFIG, max_new_tokens=5))
    for number, responses in drawn(engine).items():
        assert responses[:2] == fewer[number]
        for long, short in zip(responses, shorter[number], strict=True):
            assert long.text.startswith(short.text)


def test_streams_differ(engine):
    found = drawn(engine)
    assert found[1] != found[5]  # the same text under another id
    assert len({response.text for response in found[3]}) == 3
    assert drawn(engine, config=dataclasses.replace(CONFIG, seed=1)) != found


def test_ignores_and_keeps_the_global_state(engine):
    torch.manual_seed(5)
    first = drawn(engine)
    state = torch.get_rng_state()
    engine.model.train()
    again = drawn(engine)
    assert engine.model.training
    engine.model.eval()
    assert again == first
    assert torch.equal(state, torch.get_rng_state())


def test_greedy_is_transformers_greedy(engine, tokenizer):
    config = SamplingConfig(num_responses=2, max_new_tokens=10, temperature=0.0)
    for prompt, responses in zip(PROMPTS, drawn(engine, config=config).values(), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = engine.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert [response.text.rstrip("\ufffd") for response in responses] == [
            tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        ] * 2
        assert responses[0].truncated == (tokenizer.eos_token_id not in ids.tolist())


def test_cached_sampling_is_uncached_sampling(engine, model, tokenizer):
    """Each token is redrawn from a forward over the whole text so far, without cache, padding or batch."""
    found = drawn(engine)
    for number, prompt in enumerate(PROMPTS[:4]):
        for copy in range(3):
            stream = np.random.Generator(np.random.Philox(np.random.SeedSequence((0, number, copy)))).random(12)
            ids = tokenizer(prompt)["input_ids"]
            start = len(ids)
            for uniform in stream:
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
                ids.append(int(pick_tokens(logits, torch.tensor([uniform]), CONFIG)))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            text = tokenizer.decode(ids[start:], skip_special_tokens=True)
            ended = ids[-1] == tokenizer.eos_token_id
            assert found[number][copy].text == (text if ended else text.rstrip("\ufffd"))
            assert found[number][copy].truncated == (not ended)


def test_truncated_marks_what_had_no_end(make_model, tokenizer):
    never = TransformersEngine(make_model(eos_bias=-50.0), tokenizer)
    always = TransformersEngine(make_model(eos_bias=80.0), tokenizer)
    assert all(response.truncated for responses in drawn(never).values() for response in responses)
    assert all(response == ("", False) for responses in drawn(always).values() for response in responses)


def test_sliding_window_layers(make_model, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    assert {type(layer).__name__ for layer in DynamicCache(config=config).layers} == {
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
    }
    engine = TransformersEngine(model, tokenizer)
    batched = drawn(engine, config=dataclasses.replace(CONFIG, temperature=0.0))
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert batched[number][0].text.rstrip("\ufffd") == text.rstrip("\ufffd")


def test_learned_positions_do_not_count_the_padding(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(0)
    engine = TransformersEngine(GPT2LMHeadModel(GPT2Config(initializer_range=0.5, **size, **ids)).eval(), tokenizer)
    assert drawn(engine) == drawn(engine, config=dataclasses.replace(CONFIG, batch_size=1))


def test_chat_prompts_go_through_the_template(engine, tokenizer):
    chat = [[{"role": "user", "content": "hi"}]]
    with pytest.raises(UserError, match="chat template"):
        drawn(engine, chat)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    try:
        assert drawn(engine, chat) == drawn(engine, ["hi>"])
    finally:
        tokenizer.chat_template = None


def test_long_prompts(engine):
    prompt = "x" * 110 + "the end"
    config = dataclasses.replace(CONFIG, max_new_tokens=20)
    with pytest.raises(UserError, match=r"prompt 7: .*108 tokens.*keep_end"):
        drawn(engine, [prompt], config, prompt_ids=[7])
    kept = drawn(engine, [prompt], dataclasses.replace(config, truncation_mode="keep_end"))
    assert kept == drawn(engine, [prompt[-108:]], config)
    shorter = dataclasses.replace(config, truncation_mode="keep_start", max_prompt_length=10)
    assert drawn(engine, [prompt], shorter) == drawn(engine, [prompt[:10]], config)
    with pytest.raises(UserError, match="128 positions"):
        drawn(engine, ["a"], dataclasses.replace(config, max_new_tokens=128))


def test_broken_model_is_refused(make_model, tokenizer):
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        drawn(TransformersEngine(broken, tokenizer))


@pytest.mark.parametrize(
    "change",
    [
        {"num_responses": 0},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"batch_size": 0},
        {"truncation_mode": "drop"},
        {"max_prompt_length": 0},
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        SamplingConfig(**change)


def test_fingerprint_names_weights_and_vocabulary(make_model, tokenizer):
    one, same, other = (TransformersEngine(make_model(seed), tokenizer).fingerprint() for seed in (0, 0, 1))
    assert one == same != other
    larger = deepcopy(tokenizer)
    larger.add_tokens(["new"])
    assert TransformersEngine(make_model(0), larger).fingerprint() != one


def test_a_token_that_the_generation_configuration_ends_with_ends_and_is_no_text(make_model, tokenizer):
    """An ordinary one, the commonest in what the same streams give without it."""
    model = make_model()
    whole = [
        response.text for responses in drawn(TransformersEngine(model, tokenizer)).values() for response in responses
    ]
    letters = collections.Counter(letter for text in whole for letter in text if letter.isascii())
    end, _ = letters.most_common(1)[0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer(end)["input_ids"]]
    found = [response for responses in drawn(TransformersEngine(model, tokenizer)).values() for response in responses]
    assert any(end in text for text in whole)
    for response, text in zip(found, whole, strict=True):
        if end in text:
            assert response == (text.split(end)[0], False)


class TestPickTokens:
    logits = torch.tensor([[2.0, 1.0, 0.5, float("-inf"), 0.0]])

    def frequencies(self, config):
        uniform_B = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        tokens_B = pick_tokens(self.logits.expand(20000, -1), uniform_B, config)
        return torch.bincount(tokens_B, minlength=5) / 20000

    def close(self, found, expected):
        assert torch.allclose(found, expected.float(), atol=2e-4)

    def test_softmax(self):
        self.close(self.frequencies(SamplingConfig()), self.logits[0].double().softmax(-1))

    def test_temperature(self):
        self.close(self.frequencies(SamplingConfig(temperature=0.5)), (self.logits[0].double() * 2).softmax(-1))

    def test_top_k(self):
        kept = torch.tensor([2.0, 1.0, -np.inf, -np.inf, -np.inf]).softmax(-1)
        self.close(self.frequencies(SamplingConfig(top_k=2)), kept)
        self.close(self.frequencies(SamplingConfig(top_k=50)), self.logits[0].softmax(-1))

    def test_top_p(self):
        # softmax is .567 .208 .126 0 .077
        self.close(self.frequencies(SamplingConfig(top_p=0.7)), torch.tensor([2.0, 1.0] + [-np.inf] * 3).softmax(-1))
        self.close(self.frequencies(SamplingConfig(top_p=1e-6)), torch.tensor([1.0, 0, 0, 0, 0]))

    def test_top_p_is_the_smallest_set_that_holds_as_much(self):
        uniform_B = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
        picked_B = pick_tokens(torch.zeros(8, 4), uniform_B, SamplingConfig(top_p=0.5))  # each has a quarter
        assert picked_B.tolist() == [0] * 4 + [1] * 4

    def test_ends_of_the_distribution(self):
        logits_BV = torch.tensor([[-np.inf, 0.0, 0.0, -np.inf]]).expand(2, -1)
        uniform_B = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
        assert pick_tokens(logits_BV, uniform_B, SamplingConfig()).tolist() == [1, 2]


def test_stories260k_continues_with_its_spaces(real_dir):
    folder = real_dir / "models" / "stories260K"
    engine = TransformersEngine(load_causal_lm(folder), load_tokenizer(folder))
    config = SamplingConfig(num_responses=4, max_new_tokens=24)
    prompts = ["Once upon a time, there was a", "One day, a girl named Lily"]
    found = drawn(engine, prompts, config)
    assert drawn(engine, prompts, dataclasses.replace(config, batch_size=1)) == found
    texts = [response.text for responses in found.values() for response in responses]
    assert all(text.startswith((" ", ",", "'", ".")) or text[:1].isalpha() for text in texts)
    assert sum(text.startswith(" ") for text in texts) >= 4
    assert all(response.truncated for responses in found.values() for response in responses)
