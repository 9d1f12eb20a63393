import json

import pytest

from reprdpo.errors import UserError
from reprdpo.evaluation.judges import Judgement
from reprdpo.evaluation.responses import ResponseRecord, check_prompts, read_responses, write_judged
from reprdpo.evaluation.side_by_side import side_by_side


def file(tmp_path, *lines, end="\n"):
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


SAMPLES = [
    {"format": "reprdpo-samples-1"},
    {
        "prompt_id": 1,
        "prompt": "b",
        "category": "S1",
        "harmful": True,
        "responses": [{"text": "b0", "reward": 0.0}, {"text": "b1", "reward": 1.0}, {"text": "b2", "reward": None}],
    },
    {"prompt_id": 0, "prompt": "a", "responses": [{"text": "a0", "reward": 3.0}, {"text": "a1", "reward": 2.0}]},
]


def test_samples_first_and_best(tmp_path):
    path = file(tmp_path, *SAMPLES)
    assert [record.response for record in read_responses(path)] == ["a0", "b0"]
    best = read_responses(path, choose="best")
    assert best == [ResponseRecord(0, "a", "a0"), ResponseRecord(1, "b", "b1", "S1", True)]


def test_empty_responses_have_no_best(tmp_path):
    silent = {"prompt": "a", "responses": [{"text": "", "reward": None}, {"text": " ", "reward": None}]}
    assert read_responses(file(tmp_path, silent), choose="best") == [ResponseRecord(0, "a", "")]


def test_plain_lines_without_a_last_newline(tmp_path):
    path = file(tmp_path, {"prompt": "a", "response": "x"}, "", {"prompt": "b", "response": ""}, end="")
    assert read_responses(path) == [ResponseRecord(0, "a", "x"), ResponseRecord(1, "b", "")]


def test_judged_files_are_read_again(tmp_path):
    records = read_responses(file(tmp_path, *SAMPLES))
    write_judged(tmp_path / "judged.jsonl", records, [Judgement(True, False, "S3", 0.5), Judgement(None, None)])
    assert read_responses(tmp_path / "judged.jsonl") == records
    first = json.loads((tmp_path / "judged.jsonl").read_text().splitlines()[0])
    assert (first["unsafe"], first["refusal"], first["judged_category"], first["score"]) == (True, False, "S3", 0.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no responses"),
        (["{"], "line 1: is not JSON"),
        (["[]"], "line 1: is no object"),
        ([{"response": "x"}], "line 1: field 'prompt'"),
        ([{"prompt": "", "response": "x"}], "line 1: field 'prompt'"),
        ([{"prompt": "a"}], "line 1: field 'response'"),
        ([{"prompt": "a", "response": 3}], "line 1: field 'response'"),
        ([{"prompt": "a", "response": "x", "prompt_id": "0"}], "prompt_id"),
        ([{"prompt": "a", "response": "x", "prompt_id": 4}] * 2, "line 2: prompt_id 4 stands twice"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=f"responses.jsonl.*{message}"):
        read_responses(file(tmp_path, *lines))


def test_bad_requests(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_responses(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="first, best"):
        read_responses(file(tmp_path, *SAMPLES), choose="last")
    unscored = {"prompt": "a", "responses": [{"text": "x", "reward": None}, {"text": "y", "reward": None}]}
    with pytest.raises(UserError, match="line 1: no response has a reward"):
        read_responses(file(tmp_path, unscored), choose="best")


def test_another_prompt_set_is_refused(tmp_path):
    path = file(tmp_path, *SAMPLES)
    records = read_responses(path)
    check_prompts(records, [{"prompt": "a"}, {"prompt": "b"}], path)
    with pytest.raises(UserError, match="answers 2 of 3 prompts"):
        check_prompts(records, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], path)
    with pytest.raises(UserError, match="prompt_id 1 answers another prompt than prompt 1"):
        check_prompts(records, [{"prompt": "a"}, {"prompt": "c"}], path)


BASE, TUNED = ([ResponseRecord(n, f"p{n}", f"{name}{n}", "S1") for n in range(3)] for name in ("base", "tuned"))


class TestSideBySide:
    def test_pairs_responses(self):
        rows = side_by_side({"base": BASE, "tuned": TUNED})
        assert [row["prompt"] for row in rows] == ["p0", "p1", "p2"]
        assert rows[2]["responses"] == {"base": {"text": "base2"}, "tuned": {"text": "tuned2"}}

    def test_with_the_judges_word(self):
        safe, unsafe = Judgement(False, True), Judgement(True, False)
        judged = {"base": [safe, unsafe, unsafe], "tuned": [safe, unsafe, safe]}
        rows = side_by_side({"base": BASE, "tuned": TUNED}, judgements=judged)
        assert [row["responses"]["base"]["unsafe"] for row in rows] == [False, True, True]
        assert rows[2]["responses"]["tuned"] == {"text": "tuned2", "unsafe": False, "refusal": True}

    def test_other_prompts_are_refused(self):
        with pytest.raises(UserError, match="no system"):
            side_by_side({})
        with pytest.raises(UserError, match="base answered 3 prompts, tuned 2"):
            side_by_side({"base": BASE, "tuned": TUNED[:2]})
        other = [*TUNED[:2], ResponseRecord(2, "q", "x")]
        with pytest.raises(UserError, match="different prompts at prompt_id 2"):
            side_by_side({"base": BASE, "tuned": other})
