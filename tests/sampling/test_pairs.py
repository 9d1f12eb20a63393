import json

import pytest

from reprdpo.data import load_preferences
from reprdpo.errors import UserError
from reprdpo.sampling.best_of_n import FORMAT
from reprdpo.sampling.pairs import build_pairs


def samples(tmp_path, *prompts, prompt="say"):
    """A file of samples; each of ``prompts`` is a list of (text, reward)."""
    lines = [{"format": FORMAT}]
    for number, responses in enumerate(prompts):
        answers = [{"text": text, "reward": reward, "truncated": text == "cut"} for text, reward in responses]
        lines.append({"prompt_id": number, "prompt": prompt, "category": "S2", "harmful": True, "responses": answers})
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pairs(path):
    return [(row["chosen"], row["rejected"]) for row in map(json.loads, path.read_text().splitlines())]


def test_top_and_bottom(tmp_path):
    source = samples(tmp_path, [("mid", 0.0), ("best", 2.0), ("worst", -1.5), ("good", 1.0)])
    out = tmp_path / "pairs.jsonl"
    report = build_pairs(source, out)
    assert pairs(out) == [("best", "worst")]
    assert (report.n_prompts, report.n_prompts_with_pairs, report.n_pairs, report.n_responses) == (1, 1, 1, 4)
    assert report.mean_gap == 3.5
    assert report.skipped == {}

    build_pairs(source, out, top_k=2, bottom_k=2)
    assert pairs(out) == [("best", "mid"), ("best", "worst"), ("good", "mid"), ("good", "worst")]
    build_pairs(source, out, top_k=9, bottom_k=9)  # every pair, none twice
    assert len(pairs(out)) == len(set(pairs(out))) == 6


def test_gap(tmp_path):
    source = samples(tmp_path, [("a", 1.0), ("b", 0.5)], [("a", 1.0), ("b", 1.0)], [("c", 3.0), ("d", 0.0)])
    report = build_pairs(source, tmp_path / "pairs.jsonl")
    assert pairs(tmp_path / "pairs.jsonl") == [("a", "b"), ("c", "d")]
    assert report.skipped == {"gap_too_small": 1}
    report = build_pairs(source, tmp_path / "pairs.jsonl", min_gap=1.0)
    assert pairs(tmp_path / "pairs.jsonl") == [("c", "d")]
    assert report.skipped == {"gap_too_small": 2}
    assert report.n_prompts_with_pairs == 1


def test_the_first_alone_take_part_in_the_order_they_were_drawn_in(tmp_path):
    source = samples(tmp_path, [("a", 1.0), ("b", 2.0), ("c", 1.0), ("best", 9.0), ("worst", -9.0)])
    report = build_pairs(source, tmp_path / "pairs.jsonl", top_k=2, bottom_k=2, first=3)
    assert pairs(tmp_path / "pairs.jsonl") == [("b", "a"), ("b", "c")]  # a and c are equal, a was drawn before c
    assert (report.n_responses, report.skipped) == (3, {"gap_too_small": 1})


def test_what_takes_no_part(tmp_path):
    source = samples(
        tmp_path,
        [("", 9.0), ("  \n", 8.0), ("same", 2.0), (" same ", 1.0), ("lost", None), ("cut", 0.0)],
        [("same", 1.0), ("same", 2.0)],
    )
    report = build_pairs(source, tmp_path / "pairs.jsonl")
    assert pairs(tmp_path / "pairs.jsonl") == [("same", "cut")]
    assert report.skipped == {"empty_response": 2, "identical_text": 2, "no_reward": 1, "too_few_responses": 1}
    assert report.n_truncated == 1


def test_the_reader_takes_the_file(tmp_path):
    source = samples(tmp_path, [("a", 1.0), ("b", 0.0)])
    build_pairs(source, tmp_path / "pairs.jsonl")
    (row,) = load_preferences(tmp_path / "pairs.jsonl")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("say", "a", "b")
    assert (row["category"], row["source"]) == ("S2", "sampled")


def test_chats_give_messages(tmp_path):
    source = samples(tmp_path, [("a", 1.0), ("b", 0.0)], prompt=[{"role": "user", "content": "say"}])
    build_pairs(source, tmp_path / "pairs.jsonl")
    (row,) = load_preferences(tmp_path / "pairs.jsonl")
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]


def test_refusals(tmp_path):
    unscored = samples(tmp_path, [("a", None), ("b", None)])
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match=r"samples.jsonl: gives no pair \(no_reward 2, too_few_responses 1\)"):
        build_pairs(unscored, out)
    assert not out.exists()
    for bad in ({"top_k": 0}, {"bottom_k": 0}, {"min_gap": -1.0}, {"min_gap": float("nan")}):
        with pytest.raises(UserError, match=next(iter(bad))):
            build_pairs(unscored, out, **bad)
