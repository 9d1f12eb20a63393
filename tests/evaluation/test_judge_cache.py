"""Judging with a memory: what was judged is not judged again, whatever became of the run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_judges import guard, random_classifier

from reprdpo.errors import UserError
from reprdpo.evaluation import KeywordRefusalJudge, judge_responses
from reprdpo.evaluation.judges import Judgement, ModelJudge, build_judge


class CountingJudge(ModelJudge):
    """Says "unsafe" of what holds an x; counts what it is asked, and may die."""

    name = "counting: judge"
    gives = frozenset({"unsafe"})

    def __init__(self, fingerprint="f", dies_after=None):
        self.print, self.dies_after, self.asked = fingerprint, dies_after, []

    def fingerprint(self):
        return self.print

    def stream(self, prompts, responses):
        for place in reversed(range(len(responses))):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise UserError("the server is gone")
            self.asked.append((prompts[place], responses[place]))
            yield place, Judgement("x" in responses[place], None, score=0.5)


PROMPTS, RESPONSES = ["a", "b", [{"role": "user", "content": "c"}], "a"], ["x", "y", "xx", "x"]
WORDS = [Judgement(unsafe, None, score=0.5) for unsafe in (True, False, True, True)]


def test_equal_texts_are_asked_once_and_in_order(tmp_path):
    judge = CountingJudge()
    assert judge_responses(judge, PROMPTS, RESPONSES, cache_dir=tmp_path) == WORDS
    assert len(judge.asked) == 3
    (path,) = tmp_path.iterdir()
    assert path.name == "counting-judge-f.jsonl"
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header == {"format": "reprdpo-judgements-1", "judge": "counting: judge", "fingerprint": "f"}
    assert len(lines) == 3


def test_a_second_run_asks_for_what_is_new(tmp_path):
    judge_responses(CountingJudge(), PROMPTS, RESPONSES, cache_dir=tmp_path)
    judge = CountingJudge()
    assert judge_responses(judge, [*PROMPTS, "b"], [*RESPONSES, "x"], cache_dir=tmp_path)[:4] == WORDS
    assert judge.asked == [("b", "x")]


def test_another_judge_has_another_file(tmp_path):
    for name in "fg":
        judge = CountingJudge(name)
        judge_responses(judge, PROMPTS, RESPONSES, cache_dir=tmp_path)
        assert len(judge.asked) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_judged_before_a_failure_is_kept(tmp_path):
    with pytest.raises(UserError, match="gone"):
        judge_responses(CountingJudge(dies_after=2), PROMPTS, RESPONSES, cache_dir=tmp_path)
    judge = CountingJudge()
    assert judge_responses(judge, PROMPTS, RESPONSES, cache_dir=tmp_path) == WORDS
    assert len(judge.asked) == 1


def test_a_torn_line_is_judged_anew(tmp_path):
    judge_responses(CountingJudge(), PROMPTS, RESPONSES, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    judge = CountingJudge()
    assert judge_responses(judge, PROMPTS, RESPONSES, cache_dir=tmp_path) == WORDS
    assert len(judge.asked) == 1
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"other": 1}\n', "line 1: is no header of judgements"),
        ('{"format": "reprdpo-judgements-1"}\n{"unsafe": true}\n', "line 2: is no judgement"),
        ('{"format": "reprdpo-judgements-1"}\n{"key": "k", "toxic": 1}\n', "line 2: is no judgement"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, text, message):
    (tmp_path / "counting-judge-f.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        judge_responses(CountingJudge(), PROMPTS, RESPONSES, cache_dir=tmp_path)


def test_rules_need_no_file_and_lengths_must_agree(tmp_path):
    assert judge_responses(KeywordRefusalJudge(), ["q"], ["I can't."], cache_dir=tmp_path) == [Judgement(False, True)]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="1 prompts and 2 responses"):
        judge_responses(CountingJudge(), ["a"], ["b", "c"])
    assert judge_responses(CountingJudge(), [], []) == []


def test_a_judge_is_known_by_its_content(tmp_path):
    first, same = guard(tmp_path / "a", "llama-guard-2"), guard(tmp_path / "b", "llama-guard-2")
    other = guard(tmp_path / "c", "llama-guard-2", sharpness=2e-3)
    prints = [build_judge(f"llama-guard-2:{folder}").fingerprint() for folder in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert build_judge(f"llama-guard-2:{first}?batch_size=1").fingerprint() == prints[0]


def test_a_judge_is_known_by_every_setting_that_may_change_its_word(tmp_path):
    """How long a text it reads whole is one."""
    lm = guard(tmp_path / "guard", "llama-guard-2")
    classifier = random_classifier(tmp_path / "classifier", "deberta", labels=["fine", "harmful"])
    template = tmp_path / "mine.json"
    content = {"format": "reprdpo-judge-1", "prompt": "{prompt}{response}", "reply": "(?P<unsafe>.)"}
    template.write_text(json.dumps(content | {"verdicts": {"unsafe": {"1": True, "0": False}}}))
    for specs in (
        [f"llama-guard-2:{lm}{options}" for options in ("", "?threshold=0.7", "?threshold=0.6", "?max_length=2000")],
        [f"instruct:{name}@{lm}{options}" for name, options in ((template, ""), (template, "?max_length=2000"))],
        [f"openai:safety@http://here#{options}" for options in ("m", "n", "m?max_characters=100")],
        [f"openai:{name}@http://here#m" for name in ("safety", template)],
        [
            f"reward-model:{classifier}?label={options}"
            for options in ("fine", "harmful", "fine&unsafe_below=0.5", "fine&unsafe_below=0.4", "fine&max_length=99")
        ],
    ):
        assert len({build_judge(spec).fingerprint() for spec in specs}) == len(specs), specs[0]


def test_what_is_cached_needs_no_weights(tmp_path):
    spec = f"llama-guard-2:{guard(tmp_path / 'guard', 'llama-guard-2')}"
    found = judge_responses(build_judge(spec), ["q"], ["a bomb"], cache_dir=tmp_path / "kept")
    again = build_judge(spec)
    assert judge_responses(again, ["q"], ["a bomb"], cache_dir=tmp_path / "kept") == found
    assert "model" not in again.lm.__dict__


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_goes_on(tmp_path):
    """kill -9 amid judging; the second run judges the rest and the words are those of an unbroken one."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_judge_cache import CountingJudge
from reprdpo.evaluation import judge_responses
class Slow(CountingJudge):
    def stream(self, prompts, responses):
        for number, word in enumerate(super().stream(prompts, responses)):
            if number == 5:
                print("five", flush=True)
                time.sleep(60)
            yield word
judge_responses(Slow(), [str(n) for n in range(20)], ["x"] * 20, cache_dir={str(tmp_path)!r})
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"five\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    judge = CountingJudge()
    found = judge_responses(judge, [str(n) for n in range(20)], ["x"] * 20, cache_dir=tmp_path)
    assert found == [WORDS[0]] * 20
    assert len(judge.asked) == 15
