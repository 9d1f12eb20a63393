import dataclasses
import json

import pytest
from datasets import Dataset

from reprdpo.errors import UserError
from reprdpo.sampling import SamplingConfig, TransformersEngine
from reprdpo.sampling.best_of_n import best_of_n, rank_responses, read_samples, sample_responses

ROWS = [
    {"prompt": text, "category": "S1" if number % 2 else None, "harmful": bool(number % 2)}
    for number, text in enumerate(
        ["a", "hello there", "what is", "a longer prompt", "zz", "hello there", "b", "cc\u2028c"]
    )
]
CONFIG = SamplingConfig(num_responses=2, max_new_tokens=8, batch_size=6)


class CountingEngine:
    """Passes on to an engine and counts prompts; stops like a killed process after ``lives`` batches."""

    def __init__(self, engine, lives=None):
        self.engine, self.lives, self.asked = engine, lives, 0

    def fingerprint(self):
        return self.engine.fingerprint()

    def generate(self, prompts, config, *, prompt_ids=None):
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives = None if self.lives is None else self.lives - 1
        self.asked += len(prompts)
        return self.engine.generate(prompts, config, prompt_ids=prompt_ids)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer)


def length_score(prompts, responses):
    assert len(prompts) == len(responses)
    return [float(len(response)) for response in responses]


def run(engine, path, config=CONFIG, rows=ROWS, **kwargs):
    return sample_responses(engine, rows, path, config, score=length_score, progress=False, **kwargs)


def test_writes_a_header_and_one_line_a_prompt(engine, tmp_path):
    path = run(engine, tmp_path / "new" / "samples.jsonl")
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert lines[0]["format"]
    assert [line["prompt_id"] for line in lines[1:]] == list(range(len(ROWS)))
    for record, row in zip(lines[1:], ROWS, strict=True):
        assert {name: record[name] for name in row} == row
        assert len(record["responses"]) == 2
        for response in record["responses"]:
            assert response["reward"] == len(response["text"])
            assert isinstance(response["truncated"], bool)
    assert read_samples(path) == lines[1:]


def test_responses_are_the_engines(engine, tmp_path):
    records = read_samples(run(engine, tmp_path / "samples.jsonl"))
    direct = dict(engine.generate([row["prompt"] for row in ROWS], CONFIG))
    for record in records:
        assert [r["text"] for r in record["responses"]] == [r.text for r in direct[record["prompt_id"]]]


def test_takes_a_dataset_and_no_score(engine, tmp_path):
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS[:2]])
    path = sample_responses(engine, rows, tmp_path / "samples.jsonl", CONFIG, progress=False)
    assert [response["reward"] for record in read_samples(path) for response in record["responses"]] == [None] * 4
    assert read_samples(path)[0]["category"] is None


@pytest.mark.parametrize("lives", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_the_same(engine, tmp_path, lives):
    whole = run(engine, tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(CountingEngine(engine, lives), path)
    again = CountingEngine(engine)
    run(again, path, dataclasses.replace(CONFIG, batch_size=6))
    assert path.read_bytes() == whole
    assert again.asked == len(ROWS) - 3 * lives
    idle = CountingEngine(engine, lives=0)
    run(idle, path)
    assert path.read_bytes() == whole


def test_a_batch_of_which_some_is_missing_is_drawn_whole(engine, tmp_path):
    """In another shape the same response could round to another token."""
    path = run(engine, tmp_path / "samples.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4] + lines[5:]))
    again = CountingEngine(engine)
    assert run(again, path).read_bytes() == whole
    assert again.asked == CONFIG.prompts_per_batch == 3


def test_every_torn_end_is_mended(engine, tmp_path):
    whole = run(engine, tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "torn.jsonl"
    ends = [0, 5, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1]
    for end in ends:
        path.write_bytes(whole[:end])
        assert run(engine, path).read_bytes() == whole


def test_a_smaller_batch_may_go_on(engine, tmp_path):
    whole = run(engine, tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(CountingEngine(engine, 1), path)
    run(engine, path, dataclasses.replace(CONFIG, batch_size=2))
    assert path.read_bytes() == whole


def test_another_runs_file_is_refused(engine, make_model, tokenizer, tmp_path):
    path = run(engine, tmp_path / "samples.jsonl")
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"samples.jsonl: .*another prompt set; delete it"):
        run(engine, path, rows=[*ROWS[:-1], {"prompt": "other"}])
    with pytest.raises(UserError, match="another configuration"):
        run(engine, path, dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(UserError, match="another model"):
        run(TransformersEngine(make_model(3), tokenizer), path)
    with pytest.raises(UserError, match="'key'"):
        run(engine, path, key="another reward")
    with pytest.raises(UserError, match="'scored'"):
        sample_responses(engine, ROWS, path, CONFIG, progress=False)
    assert path.read_bytes() == whole


def test_bad_files_are_refused(engine, tmp_path):
    path = run(engine, tmp_path / "samples.jsonl")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]

    def broken(*content):
        bad = tmp_path / "bad.jsonl"
        bad.write_text("".join(line + "\n" for line in content), encoding="utf-8")
        return bad

    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is empty"):
        read_samples(broken())
    with pytest.raises(UserError, match="line 1: is no header"):
        read_samples(broken(*lines[1:]))
    with pytest.raises(UserError, match="line 3: prompt_id 0 stands twice"):
        read_samples(broken(lines[0], lines[1], lines[1]))
    with pytest.raises(UserError, match="line 2: is not JSON"):
        read_samples(broken(lines[0], "{", lines[1]))
    with pytest.raises(UserError, match="line 2: lacks prompt_id"):
        read_samples(broken(lines[0], "{}"))
    stray = lines[1].replace('"prompt_id": 0', '"prompt_id": 99')
    with pytest.raises(UserError, match="99 is not one of 8"):
        run(engine, broken(lines[0], stray))
    with pytest.raises(UserError, match="no prompts"):
        run(engine, tmp_path / "empty.jsonl", rows=[])


def test_a_reward_that_is_not_finite_is_null(engine, tmp_path):
    path = sample_responses(
        engine, ROWS[:1], tmp_path / "s.jsonl", CONFIG, score=lambda p, r: [float("nan"), 1.0], progress=False
    )
    (record,) = read_samples(path)
    assert [response["reward"] for response in record["responses"]] == [None, 1.0]
    assert best_of_n(record) == record["responses"][1]


def test_drawn_responses_are_ranked_anew(engine, tmp_path, monkeypatch):
    source = run(engine, tmp_path / "samples.jsonl")
    asked = []

    def score(prompts, responses):
        asked.extend(zip(prompts, responses, strict=True))
        return [-float(len(prompt) + len(response)) for prompt, response in zip(prompts, responses, strict=True)]

    path = tmp_path / "ranked.jsonl"
    options = {"key": "minus"}
    monkeypatch.setitem(rank_responses.__globals__, "_RANKED_AT_ONCE", 3)
    rank_responses(source, path, score, **options)
    whole, drawn = path.read_bytes(), read_samples(source)
    for record, before in zip(read_samples(path), drawn, strict=True):
        assert [answer["text"] for answer in record["responses"]] == [answer["text"] for answer in before["responses"]]
        for answer in record["responses"]:
            assert answer["reward"] == -len(record["prompt"]) - len(answer["text"])
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + b'{"torn')
    asked.clear()
    assert rank_responses(source, path, score, **options).read_bytes() == whole
    assert len(asked) == 2 * (len(ROWS) - 3)
    first = read_samples(rank_responses(source, tmp_path / "first.jsonl", score, first=1, **options))
    assert [record["responses"] for record in first] == [record["responses"][:1] for record in read_samples(path)]


def test_a_ranking_of_other_responses_or_by_another_reward_is_refused(engine, tmp_path):
    source, path = run(engine, tmp_path / "samples.jsonl"), tmp_path / "ranked.jsonl"
    rank_responses(source, path, length_score, key="length")
    for changed in ({"key": "other"}, {"key": "length", "first": 1}):
        with pytest.raises(UserError, match="another 'key'"):
            rank_responses(source, path, length_score, **changed)
    other = run(engine, tmp_path / "others.jsonl", dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(UserError, match="another configuration"):
        rank_responses(other, path, length_score, key="length")
    with pytest.raises(UserError, match="fewer than 3 responses"):
        rank_responses(source, tmp_path / "more.jsonl", length_score, key="length", first=3)


def test_best_of_n():
    def record(*rewards):
        return {"responses": [{"text": str(n), "reward": reward} for n, reward in enumerate(rewards)]}

    assert best_of_n(record(0.1, 2.0, None, 2.0))["text"] == "1"
    assert best_of_n(record(-3.0))["text"] == "0"
    assert best_of_n(record(None, None))["text"] == "0"
