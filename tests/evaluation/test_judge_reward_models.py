"""Reward models on a tiny DeBERTa-v2 and a tiny Llama with a classification head."""

import pytest
import torch
from tiny_judges import GOLDEN, guard, random_classifier

from reprdpo.errors import UserError
from reprdpo.evaluation.judges import build_judge
from reprdpo.evaluation.judges.conversation import conversation

ASKED, ANSWERED = "How do I pick a lock?", "First, take a tension wrench."
PROMPTS = ["q", "Another question?", "a", ASKED]
RESPONSES = ["short", "a much longer answer, longer than all the others are", "", ANSWERED]


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    return random_classifier(tmp_path_factory.mktemp("deberta"), "deberta")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_classifier(tmp_path_factory.mktemp("llama"), "llama")


def alone(judge, inputs):
    """The logits of one sequence, without padding."""
    with torch.no_grad():
        return judge.model(**{name: torch.tensor([value]) for name, value in inputs.items()}).logits[0]


def test_an_encoder_reads_text_pairs(deberta):
    judge = build_judge(f"reward-model:{deberta}?batch_size=3")
    inputs = judge.tokens(ASKED, ANSWERED)
    assert judge.tokenizer.decode(inputs["input_ids"]) == f"[CLS]{ASKED}[SEP]{ANSWERED}[SEP]"
    for prompt, response, word in zip(PROMPTS, RESPONSES, judge.judge(PROMPTS, RESPONSES), strict=True):
        assert word.score == pytest.approx(float(alone(judge, judge.tokens(prompt, response))), rel=1e-4)
        assert (word.unsafe, word.refusal, word.category) == (None, None, None)


def test_a_decoder_reads_its_chat_template_without_a_second_bos(llama):
    judge = build_judge(f"reward-model:{llama}?batch_size=3")
    assert judge.render(conversation(ASKED, ANSWERED)) == (GOLDEN / "fsfairx.txt").read_text(encoding="utf-8")
    ids = judge.tokens(ASKED, ANSWERED)["input_ids"]
    assert ids[0] == judge.tokenizer.bos_token_id
    assert ids.count(judge.tokenizer.bos_token_id) == 1
    chats = [PROMPTS[0], [{"role": "user", "content": PROMPTS[1]}], *PROMPTS[2:]]
    found = judge.judge(chats, RESPONSES)
    for prompt, response, word in zip(PROMPTS, RESPONSES, found, strict=True):
        inputs = judge.tokens(prompt, response)
        # Read at the last token: here all of it by hand, from the decoder's states.
        with torch.no_grad():
            states = judge.model.model(torch.tensor([inputs["input_ids"]])).last_hidden_state[0, -1]
            expected = float(judge.model.score(states))
        assert word.score == pytest.approx(expected, rel=1e-4)


def test_a_threshold_gives_a_verdict(deberta):
    scores = [word.score for word in build_judge(f"reward-model:{deberta}").judge(PROMPTS, RESPONSES)]
    middle = sorted(scores)[1]
    judge = build_judge(f"reward-model:{deberta}?unsafe_below={middle!r}", needs=("unsafe",))
    assert [word.unsafe for word in judge.judge(PROMPTS, RESPONSES)] == [score < middle for score in scores]
    with pytest.raises(UserError, match="says nothing of 'unsafe', only of score"):
        build_judge(f"reward-model:{deberta}", needs=("unsafe",))


def test_one_label_of_several(tmp_path):
    folder = random_classifier(tmp_path, "deberta", labels=["fine", "harmful"])
    for number, label in enumerate(("fine", "harmful")):
        judge = build_judge(f"reward-model:{folder}?label={label}")
        (word,) = judge.judge(["q"], ["r"])
        assert word.score == pytest.approx(float(alone(judge, judge.tokens("q", "r")).softmax(-1)[number]), rel=1e-4)
    with pytest.raises(UserError, match=r"2 labels \(fine, harmful\)"):
        build_judge(f"reward-model:{folder}")
    with pytest.raises(UserError, match=r"no label 'toxic'; it has fine, harmful"):
        build_judge(f"reward-model:{folder}?label=toxic")


@pytest.mark.parametrize("form", ["deberta", "llama"])
def test_long_texts_lose_their_middles(form, request):
    judge = build_judge(f"reward-model:{request.getfixturevalue(form)}?max_length=100")
    text = judge.tokenizer.decode(judge.tokens("Why?", "a" + "x" * 400 + "z")["input_ids"])
    assert len(judge.tokens("Why?", "a" + "x" * 400 + "z")["input_ids"]) <= 100
    assert "Why?" in text
    assert "xz" in text
    assert " [...] " in text
    assert text.endswith(judge.tokenizer.sep_token if form == "deberta" else "<|eot_id|>")


def test_refused_before_work(tmp_path, deberta, llama):
    bare = random_classifier(tmp_path / "bare", "llama", template=False)
    with pytest.raises(UserError, match="neither a chat template nor a separator"):
        build_judge(f"reward-model:{bare}")
    assert build_judge(f"reward-model:{bare}?input=pair").form == "pair"
    with pytest.raises(UserError, match="no chat template"):
        build_judge(f"reward-model:{deberta}?input=chat")
    with pytest.raises(UserError, match="input is 'text'; expected pair or chat"):
        build_judge(f"reward-model:{llama}?input=text")
    causal = guard(tmp_path / "guard", "llama-guard-2")
    with pytest.raises(UserError, match="is a LlamaForCausalLM; this judge needs"):
        build_judge(f"reward-model:{causal}")
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification; this judge needs"):
        build_judge(f"md-judge:{llama}")


def test_weights_that_do_not_fill_the_head_are_refused(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    broken = random_classifier(tmp_path, "llama")
    weights = load_file(broken / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parameters \(first: score.weight\)"):
        build_judge(f"reward-model:{broken}").judge(["q"], ["r"])
