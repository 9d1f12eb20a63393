"""Tokenisation: the boundary, BOS and EOS, the truncation rules, chats; then the same on real pairs."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from reprdpo.data import (
    PromptTooLongError,
    TokenizeConfig,
    load_preferences,
    render_prompt,
    tokenize_nonempty,
    tokenize_pair,
    tokenize_preferences,
    tokenize_prompt,
    tokenize_response,
    tokenize_responses,
)
from reprdpo.errors import UserError
from reprdpo.models import load_tokenizer

BOS, EOS = 1, 2
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer(adds: str = "bos", template: str | None = None) -> PreTrainedTokenizerFast:
    """One id a character, but ``ab``, ``bc`` and ``abc`` merge; ``adds`` names the special tokens it puts itself."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = ["<unk>", "<s>", "</s>", *characters, "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    single = {"bos": "<s> $A", "both": "<s> $A </s>", "none": "$A"}[adds]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_a_token_merged_across_the_boundary_belongs_to_the_response(characters: Any) -> None:
    pair = tokenize_pair(characters, "xa", "bz", "cz", TokenizeConfig())
    assert pair.chosen_ids == [BOS, *ids_of(characters, "x", "ab", "z"), EOS]
    assert pair.rejected_ids == [BOS, *ids_of(characters, "x", "a", "c", "z"), EOS]
    assert (pair.chosen_start, pair.rejected_start) == (2, 3)
    assert pair.prompt_ids == [BOS, *ids_of(characters, "x")]


@pytest.mark.parametrize(("prompt", "response", "start"), [("xab", "c!", 2), ("xab", "bc", 3), ("a", "bc", 1)])
def test_the_start_is_the_first_token_that_differs(characters: Any, prompt: str, response: str, start: int) -> None:
    found = tokenize_response(characters, prompt, response, TokenizeConfig())
    alone, whole = characters(prompt).input_ids, characters(prompt + response).input_ids
    assert found.input_ids == [*whole, EOS]
    assert found.response_start == start
    assert alone[:start] == whole[:start]
    assert alone[start : start + 1] != whole[start : start + 1]


def test_without_bos_a_wholly_merged_prompt_keeps_one_token() -> None:
    found = tokenize_response(character_tokenizer("none"), "ab", "cx", TokenizeConfig())
    assert len(found.input_ids) == 3
    assert found.response_start == 1


@pytest.mark.parametrize("adds", ["none", "bos", "both"])
def test_bos_and_eos_stand_once(adds: str) -> None:
    tokenizer = character_tokenizer(adds)
    for prompt, response in [("hi", "yes"), ("<s>hi", "yes"), ("hi", "yes</s>")]:
        ids, start = tokenize_response(tokenizer, prompt, response, TokenizeConfig())
        assert ids.count(EOS) == 1
        assert ids[-1] == EOS
        assert ids.count(BOS) == (adds != "none" or prompt.startswith("<s>"))
        assert ids[start:] == [*ids_of(tokenizer, *"yes"), EOS]
    ids, start = tokenize_response(tokenizer, "hi", "", TokenizeConfig())
    assert ids[start:] == [EOS]
    assert EOS not in tokenize_prompt(tokenizer, "hi", TokenizeConfig())


def test_eos_can_be_left_off(characters: Any) -> None:
    config = TokenizeConfig(append_eos=False)
    assert tokenize_response(characters, "hi", "yes", config).input_ids == characters("hiyes").input_ids
    with pytest.raises(UserError, match="no token of its own"):
        tokenize_response(characters, "hi", "", config)


def cut(tokenizer: Any, prompt: str, response: str, mode: str = "keep_end", **lengths: int) -> tuple[str, str]:
    config = TokenizeConfig(truncation_mode=mode, **lengths)  # type: ignore[arg-type]
    ids, start = tokenize_response(tokenizer, prompt, response, config)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) <= config.max_length
    assert tokens[-1] == "</s>"
    return "".join(tokens[:start]), "".join(tokens[start:-1])


def test_truncation_rules(characters: Any) -> None:
    # Fits: nothing is cut, whatever the mode, even where the prompt takes more than half.
    assert cut(characters, "0123456", "x", "error", max_length=10) == ("<s>0123456", "x")
    # The prompt may have what the response leaves ...
    assert cut(characters, "0123456789", "xy", max_length=10) == ("<s>456789", "xy")
    assert cut(characters, "0123456789", "xy", "keep_start", max_length=10) == ("<s>012345", "xy")
    # ... and half of max_length at least; then the response is cut from the right.
    assert cut(characters, "0123456789", "tuvwxyztuvw", max_length=10) == ("<s>6789", "tuvw")
    # max_prompt_length holds even where all would fit.
    assert cut(characters, "01234", "xy", max_length=20, max_prompt_length=3) == ("<s>34", "xy")
    assert cut(characters, "01234", "xy", max_length=20, max_prompt_length=1) == ("4", "xy")
    assert cut(characters, "01234", "xy", "keep_start", max_length=20, max_prompt_length=1) == ("<s>", "xy")
    # An EOS that the tokenizer puts behind the prompt belongs to the response, and is not cut with the prompt.
    assert cut(character_tokenizer("both"), "0123456789", "", "keep_start", max_length=10) == ("<s>01234567", "")
    # A long response after a short prompt.
    assert cut(characters, "0", "tuvwxyz", "error", max_length=6) == ("<s>0", "tuv")


def test_chosen_and_rejected_keep_the_same_prompt(characters: Any) -> None:
    config = TokenizeConfig(max_length=12, truncation_mode="keep_end")
    pair = tokenize_pair(characters, "0123456789", "x", "uvwxyz", config)
    assert pair.prompt_ids == [BOS, *ids_of(characters, *"56789")]
    assert pair.chosen_ids == [*pair.prompt_ids, *ids_of(characters, "x"), EOS]
    assert pair.rejected_ids == [*pair.prompt_ids, *ids_of(characters, *"uvwxy"), EOS]
    merged = tokenize_pair(characters, "0123456789a", "b", "uvwxyz", config)
    assert merged.chosen_ids[: merged.chosen_start] == merged.rejected_ids[: merged.chosen_start]
    assert merged.chosen_ids[merged.chosen_start] == ids_of(characters, "ab")[0]


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_a_long_prompt_says_its_length_the_limit_and_the_cure(characters: Any, mode: Any) -> None:
    config = TokenizeConfig(max_length=10, max_prompt_length=4, truncation_mode=mode)
    with pytest.raises(PromptTooLongError, match="has 7 tokens and may have 4; raise max_length or max_prompt_length"):
        tokenize_response(characters, "012345", "x", config)
    with pytest.raises(PromptTooLongError, match="has 7 tokens"):
        tokenize_prompt(characters, "012345", config)


def test_prompts_to_generate_from(characters: Any) -> None:
    config = TokenizeConfig(max_length=10, max_prompt_length=7, truncation_mode="keep_end")
    assert tokenize_prompt(characters, "012345678", config) == [BOS, *ids_of(characters, *"345678")]
    config = TokenizeConfig(max_length=9, truncation_mode="keep_end")
    assert tokenize_prompt(characters, "012345678", config) == [BOS, *ids_of(characters, *"12345678")]


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 3}, {"max_prompt_length": 0}, {"max_prompt_length": 1023}, {"truncation_mode": "middle"}],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        TokenizeConfig(**settings)


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_chats_go_through_the_template_with_special_tokens_once() -> None:
    tokenizer = character_tokenizer(template=CHATML)
    answer = [{"role": "assistant", "content": "yes"}]
    assert render_prompt(tokenizer, messages("hi")) == "<s><|user|>hi</s>\n<|assistant|>"
    pair = tokenize_pair(tokenizer, messages("hi"), answer, messages("", "no")[1:], TokenizeConfig())
    assert "".join(tokenizer.convert_ids_to_tokens(pair.prompt_ids)) == "<s><|user|>hi</s>\n<|assistant|>"
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids[pair.chosen_start :]) == [*"yes", "</s>"]
    assert pair.chosen_ids.count(BOS) == 1
    # The template's newline after the last EOS is cut, and no second EOS follows.
    assert pair.rejected_ids[-2:] == [*ids_of(tokenizer, "o"), EOS]


def test_a_template_without_eos_gets_one() -> None:
    tokenizer = character_tokenizer(template=CHATML.replace("</s>", ""))
    found = tokenize_response(tokenizer, messages("hi"), messages("", "yes")[1:], TokenizeConfig())
    assert tokenizer.convert_ids_to_tokens(found.input_ids[found.response_start :]) == [*"yes\n", "</s>"]


def test_a_chat_needs_a_template_that_takes_it(characters: Any) -> None:
    with pytest.raises(UserError, match=r"has no chat template .* plain strings"):
        render_prompt(characters, messages("hi"))
    strict = character_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    rows = datasets.Dataset.from_list([{"prompt": messages("a"), "response": messages("", "b")[1:]}])
    with pytest.raises(UserError, match=r"chats, row 1: the chat template refuses .*roles must alternate"):
        tokenize_responses(rows, strict, TokenizeConfig(), where="chats")


ROWS = [
    {"prompt": "p", "chosen": "yes", "rejected": "no", "chosen_is_safe": True},
    {"prompt": "0123456789", "chosen": "yes", "rejected": "no", "chosen_is_safe": None},
    {"prompt": "q", "chosen": "0123456789x", "rejected": "0123456789y", "chosen_is_safe": False},
    {"prompt": "p", "chosen": "no", "rejected": "yes", "chosen_is_safe": False},
]


def test_data_sets_keep_the_ids_and_labels_of_their_rows(characters: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    config = TokenizeConfig(max_length=10, max_prompt_length=6, truncation_mode="drop")
    with caplog.at_level(logging.WARNING):
        found = tokenize_preferences(dataset, characters, config, where="shop")
    assert found["pair_id"] == [0, 3], "row 1 has a long prompt, row 2 is the same tokens twice once cut"
    assert found["prompt_id"] == [0, 0]
    assert found["chosen_is_safe"] == [True, False]
    assert "shop: left out 1 of 4 rows with a prompt over its limit" in caplog.text
    assert "shop: left out 1 of 4 rows whose chosen and rejected are the same tokens" in caplog.text
    pair = tokenize_pair(characters, "p", "no", "yes", config)
    assert found[1]["chosen_input_ids"] == pair.chosen_ids
    assert found[1]["rejected_response_start"] == pair.rejected_start


def test_data_sets_name_the_row(characters: Any) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    with pytest.raises(UserError, match=r"^shop, row 2: the prompt has 11 tokens and may have 6;"):
        tokenize_preferences(dataset, characters, TokenizeConfig(max_length=20, max_prompt_length=6), where="shop")
    config = TokenizeConfig(max_length=20, max_prompt_length=6, truncation_mode="drop")
    with pytest.raises(UserError, match="no row is left of 1"):
        tokenize_preferences(dataset.select([1]), characters, config)


def test_data_sets_do_not_depend_on_the_batches_and_leave_no_file(characters: Any, tmp_path: Path) -> None:
    long = datasets.Dataset.from_list([dict(ROWS[i % 2], rejected=f"no {i}") for i in range(1203)])
    long.save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    found = tokenize_preferences(datasets.load_from_disk(tmp_path / "saved"), characters, TokenizeConfig())
    assert sorted(tmp_path.rglob("*")) == before
    assert found["pair_id"] == list(range(1203))
    assert found["prompt_id"] == [i % 2 for i in range(1203)]
    row = found[1202]
    assert (
        characters.decode(row["rejected_input_ids"][row["rejected_response_start"] : -1]).replace(" ", "") == "no1202"
    )


@pytest.mark.parametrize("name", ["hh_harmless", "refusal_direction"])
def test_real_pairs(real_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(real_dir / "models" / "stories260K")
    pairs = load_preferences(real_dir / "pairs" / f"{name}.jsonl", limit=200)
    found = tokenize_preferences(pairs, tokenizer, TokenizeConfig(max_length=4096))
    assert found["pair_id"] == list(range(200))
    for text, row in zip(pairs, found, strict=True):
        prompt_ids = tokenizer(text["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            ids, start = row[f"{side}_input_ids"], row[f"{side}_response_start"]
            assert ids == [*tokenizer(text["prompt"] + text[side]).input_ids, tokenizer.eos_token_id]
            assert ids[:start] == prompt_ids[:start]
            assert start == len(prompt_ids) or ids[start] != prompt_ids[start]
            assert len(prompt_ids) - start <= 4, "no more than a merge is lost at the boundary"


def test_real_pairs_cut_to_the_model(real_dir: Path) -> None:
    tokenizer = load_tokenizer(real_dir / "models" / "stories260K")
    pairs = load_preferences(real_dir / "pairs" / "hh_harmless.jsonl")
    found = tokenize_preferences(pairs, tokenizer, TokenizeConfig(max_length=512, truncation_mode="keep_end"))
    assert len(found) == 1150
    for row in found:
        for side in ("chosen", "rejected"):
            ids, start = row[f"{side}_input_ids"], row[f"{side}_response_start"]
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert 1 <= start < len(ids) <= 512
    with pytest.raises(PromptTooLongError, match=r"hh, row 2: the prompt has 486 tokens and may have 398"):
        tokenize_preferences(pairs, tokenizer, TokenizeConfig(max_length=512), where="hh")


def test_empty_responses_have_no_row_and_a_text_that_answers_a_chat_is_the_assistants() -> None:
    tokenizer, config = character_tokenizer(template=CHATML), TokenizeConfig()
    chat = [{"role": "user", "content": "why"}]
    said = [{"role": "assistant", "content": "so"}]
    places, rows = tokenize_nonempty(tokenizer, [chat, chat, chat], ["so", " \n", said], config)
    assert places == [0, 2]
    assert rows == [tokenize_response(tokenizer, chat, said, config)._asdict()] * 2
    assert tokenize_nonempty(tokenizer, [], [], config) == ([], [])
