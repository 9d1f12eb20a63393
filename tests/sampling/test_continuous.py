import dataclasses
import threading

import numpy as np
import pytest
import torch
import transformers
from transformers import ContinuousBatchingManager

from reprdpo.errors import UserError
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.sampling import ContinuousBatchingEngine, SamplingConfig, TransformersEngine, continuous, sample_responses
from reprdpo.sampling.continuous import _PickProcessor

PROMPTS = ["a", "hello there", "what is", "a longer prompt than the others", "zz", "hello there"]
CONFIG = SamplingConfig(num_responses=3, max_new_tokens=12, batch_size=7)


@pytest.fixture(scope="module")
def plain(make_model, tokenizer):
    """Another copy of the weights: continuous batching works on a model of its own."""
    return TransformersEngine(make_model(), tokenizer)


@pytest.fixture(scope="module")
def engine(make_model, tokenizer):
    return ContinuousBatchingEngine(make_model(), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 2, "top_k": 5},
        {"top_p": 0.7, "temperature": 1.3, "seed": 4},
        {"temperature": 0.0},
        {"max_new_tokens": 1},
    ],
)
def test_gives_the_transformers_engines_texts(engine, plain, changes):
    config = dataclasses.replace(CONFIG, **changes)
    found = list(engine.generate(PROMPTS, config, prompt_ids=range(3, 9)))
    assert [place for place, _ in found] == list(range(len(PROMPTS)))
    assert dict(found) == dict(plain.generate(PROMPTS, config, prompt_ids=range(3, 9)))
    assert engine.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", "Qwen3Moe"])
def test_other_architectures(kind, make_model, tokenizer):
    """Sliding windows, alternating layers, experts."""
    common = make_model().config.to_dict()
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    settings = {name: common[name] for name in (*kept, "max_position_embeddings", "eos_token_id", "pad_token_id")}
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "Qwen3Moe" else {}
    config = getattr(transformers, f"{kind}Config")(
        **settings, **extra, num_hidden_layers=4, head_dim=8, sliding_window=6, initializer_range=0.2
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    expected = dict(TransformersEngine(model, tokenizer).generate(PROMPTS, CONFIG))
    assert dict(ContinuousBatchingEngine(model, tokenizer).generate(PROMPTS, CONFIG)) == expected


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_cache_of_pages_is_refused(tokenizer):
    config = transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    for engine in (ContinuousBatchingEngine, TransformersEngine):
        with pytest.raises(UserError, match=r"engine (continuous|transformers): cannot"):
            list(engine(model, tokenizer).generate(PROMPTS, CONFIG))


def test_a_full_cache_changes_nothing(engine, plain, monkeypatch):
    """With room for two sequences where seven are at work, some are set aside and read again."""
    made = engine._cache_config

    def tight(longest, config):
        found = made(longest, config)
        found.page_size, found.num_blocks = 8, 8
        return found

    monkeypatch.setattr(engine, "_cache_config", tight)
    config = dataclasses.replace(CONFIG, max_new_tokens=20)
    assert dict(engine.generate(PROMPTS, config)) == dict(plain.generate(PROMPTS, config))


def test_leaves_the_model_as_it_was(engine):
    engine.model.train()
    implementation = engine.model.config._attn_implementation
    torch.manual_seed(5)
    threads = threading.active_count()
    for _ in engine.generate(PROMPTS, CONFIG):
        break  # a caller that stops early
    assert engine.model.training
    assert engine.model.config._attn_implementation == implementation
    assert threading.active_count() == threads
    engine.model.eval()


def test_rests_while_the_caller_has_the_model(engine):
    """A hook sees the caller's forwards alone, so that taps on the model read what they should."""
    seen = []
    for _ in engine.generate(PROMPTS, CONFIG):
        hook = engine.model.register_forward_hook(lambda *_: seen.append(threading.current_thread()))
        engine.model(torch.tensor([[3, 4, 5]]))
        hook.remove()
    assert seen == [threading.current_thread()] * len(PROMPTS)


def test_one_engine_goes_on_with_the_others_file(engine, plain, tmp_path):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    path = sample_responses(plain, rows, tmp_path / "samples.jsonl", CONFIG, progress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert sample_responses(engine, rows, path, CONFIG, progress=False).read_bytes() == whole


def test_real_model(real_dir):
    folder = real_dir / "models" / "stories260K"
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    prompts = [f"Once upon a time, a {animal}" for animal in ("cat", "dog", "red fox")]
    config = SamplingConfig(num_responses=4, max_new_tokens=16, batch_size=5)
    expected = dict(TransformersEngine(model, tokenizer).generate(prompts, config))
    assert dict(ContinuousBatchingEngine(model, tokenizer).generate(prompts, config)) == expected


def test_bad_input(engine, make_model, tokenizer, monkeypatch):
    assert list(engine.generate([], CONFIG)) == []
    with pytest.raises(UserError, match="prompt 1: has more than the 116 tokens"):
        list(engine.generate(["a", "a" * 117], CONFIG))
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        list(ContinuousBatchingEngine(broken, tokenizer).generate(["a"], CONFIG))
    monkeypatch.setattr(continuous, "_SUPPORTED", False)
    with pytest.raises(UserError, match="has no continuous batching that can pause; upgrade it"):
        ContinuousBatchingEngine(engine.model, tokenizer)


@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_dies_is_said(make_model, tokenizer, monkeypatch):
    ask = ContinuousBatchingEngine(make_model(), tokenizer)
    steps = [0]
    step = ContinuousBatchingManager._generation_step

    def dying(manager):
        steps[0] += 1
        if steps[0] == 4:
            raise RuntimeError("out of\nblocks")
        step(manager)

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", dying)
    with pytest.raises(UserError, match=r"cannot run this model here \(out of blocks\); .*use the engine transformers"):
        list(ask.generate(PROMPTS, CONFIG))


def test_uniforms_of_one_never_pick_the_impossible():
    config = SamplingConfig(top_k=2)
    processor = _PickProcessor({}, config)
    almost = torch.tensor([np.nextafter(np.float32(1), np.float32(0))]).view(torch.int32)
    scores = processor(torch.tensor([[3.0, 1.0, -2.0, -9.0]]), almost)
    assert scores.argmax(-1).tolist() == [1]
    assert scores.isfinite().sum() == 1
