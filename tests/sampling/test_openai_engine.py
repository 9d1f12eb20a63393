import dataclasses
import json
import threading
import warnings

import pytest

from reprdpo.errors import UserError
from reprdpo.sampling import OpenAIEngine, SamplingConfig, read_samples, sample_responses
from reprdpo.sampling.openai_engine import request_seed

PROMPTS = ["a", "hello there", [{"role": "user", "content": "what is"}], "zz"]
CONFIG = SamplingConfig(num_responses=3, max_new_tokens=5, temperature=0.7, top_p=0.9)
MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 1, "root": "/models/tiny"}]}


def echo(reply, wrong=None):
    """A server whose responses name what was asked; ``wrong`` may give another reply to a request's body."""

    def answer(path, body):
        if path == "/v1/models":
            return reply(MODELS)
        if wrong is not None and (other := wrong(body)) is not None:
            return other
        text = f"{body.get('prompt', body.get('messages'))} {body['seed']}"
        finish = "length" if body["seed"] % 2 else "stop"
        if path == "/v1/chat/completions":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        else:
            assert path == "/v1/completions"
            choice = {"index": 0, "text": text, "finish_reason": finish}
        return reply({"choices": [choice]})

    return answer


def engine(server, **settings):
    return OpenAIEngine(server.url, **{"retries": 1, "timeout": 30} | settings)


def test_texts_are_completed_and_chats_answered(serve, reply):
    server = serve(echo(reply))
    found = list(engine(server, concurrency=3).generate(PROMPTS, CONFIG, prompt_ids=[4, 5, 6, 7]))
    assert [place for place, _ in found] == [0, 1, 2, 3]
    for number, (prompt, (_, responses)) in enumerate(zip(PROMPTS, found, strict=True), start=4):
        seeds = [request_seed(0, number, copy) for copy in range(3)]
        assert [response.text for response in responses] == [f"{prompt} {seed}" for seed in seeds]
        assert [response.truncated for response in responses] == [bool(seed % 2) for seed in seeds]
    bodies = [body for path, body, _ in server.requests if path != "/v1/models"]
    assert all(
        (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("tiny", 5, 0.7, 0.9)
        for body in bodies
    )
    assert all("top_k" not in body and ("prompt" in body) != ("messages" in body) for body in bodies)
    assert len({body["seed"] for body in bodies}) == 12


def test_order_holds_whatever_comes_first(serve, reply):
    """The first prompt's responses are held back until a later one's have come."""
    ask, late, waited = engine(serve(echo(reply)), concurrency=4), threading.Event(), []
    first = ask._ask

    def held(client, prompt, *rest):
        if prompt == "p0":
            waited.append(late.wait(20))
        response = first(client, prompt, *rest)
        if prompt == "p12":
            late.set()
        return response

    ask._ask = held
    config = dataclasses.replace(CONFIG, num_responses=1)
    found = list(ask.generate([f"p{n}" for n in range(20)], config))
    assert waited == [True]
    assert [place for place, _ in found] == list(range(20))
    assert [responses[0].text.split()[0] for _, responses in found] == [f"p{n}" for n in range(20)]


def test_no_more_requests_fly_than_allowed(serve, reply):
    flying, most, lock, both = [0], [0], threading.Lock(), threading.Event()
    ask = engine(serve(echo(reply)), concurrency=3)
    first = ask._ask

    def counted(*arguments):
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
            if flying[0] == 3:
                both.set()
        both.wait(20)
        try:
            return first(*arguments)
        finally:
            with lock:
                flying[0] -= 1

    ask._ask = counted
    assert len(list(ask.generate(["x"] * 10, CONFIG))) == 10
    assert most[0] == 3


def test_seeds_name_responses():
    seeds = {request_seed(seed, number, copy) for seed in range(4) for number in range(40) for copy in range(8)}
    assert len(seeds) == 4 * 40 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(0, 1, 2) == request_seed(0, 1, 2)


def test_greedy_asks_once(serve, reply):
    server = serve(echo(reply))
    found = dict(engine(server).generate(["a", "b"], dataclasses.replace(CONFIG, temperature=0.0)))
    assert [len(set(responses)) for responses in found.values()] == [1, 1]
    assert [len(responses) for responses in found.values()] == [3, 3]
    assert len(server.requests) == 3


def test_extra_fields(serve, reply):
    server = serve(echo(reply, lambda body: reply({"choices": [{"text": "x"}]})))
    extra = {"top_p": None, "seed": None, "min_p": 0.1, "nested": {"a": [1]}}
    list(engine(server, extra_body=extra).generate(["a"], dataclasses.replace(CONFIG, top_k=4)))
    _, body, _ = server.requests[-1]
    assert body["min_p"] == 0.1
    assert body["nested"] == {"a": [1]}
    assert body["top_k"] == 4
    assert "seed" not in body
    assert "top_p" not in body


def test_fingerprint(serve, reply):
    server, other = serve(echo(reply)), serve(echo(reply))
    found = engine(server).fingerprint()
    assert found.startswith("openai:tiny-")
    assert engine(other).fingerprint() == found  # the same model elsewhere
    assert engine(server, model="other").fingerprint() != found
    assert engine(server, extra_body={"min_p": 0.1}).fingerprint() != found
    assert OpenAIEngine(server.url.removesuffix("/v1")).fingerprint() == found

    moved = {"data": [{**MODELS["data"][0], "root": "/models/other"}]}
    assert engine(serve(lambda path, body: reply(moved))).fingerprint() != found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "named", "unnamed"),
    [
        (({"data": []},), None, "lists no model; name one with served_model"),
        (({"data": [{"id": "b"}, {"id": "a"}]},), None, "lists a, b; name one with served_model"),
        (("Internal Server Error", 500), None, "answered 500"),
        (("nothing here", 404), None, "answered 404: nothing here; name the model with served_model"),
        (({"error": "who?"}, 401), "an API key was not given", "an API key was not given"),
        (({"models": []},), 'is no list of models: {"models": ..}', "is no list of models"),
        (([1],), "is no list of models", "is no list of models"),
        (({"data": [{"name": "x"}]},), "is no list of models", "is no list of models"),
        (("<html>",), "not JSON: <html>", "not JSON"),
    ],
)
def test_lists_of_models(serve, reply, answer, named, unnamed):
    server = serve(lambda path, body: reply(*answer))
    with pytest.raises(UserError, match=unnamed):
        engine(server).fingerprint()
    if named is None:
        assert engine(server, model="m").fingerprint().startswith("openai:m-")
    else:
        with pytest.raises(UserError, match=named):
            engine(server, model="m").fingerprint()


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {"choices": []},
        {"choices": [{"text": "a"}, {"text": "b"}]},
        {"choices": [{"message": {"content": "a"}}]},
        {"choices": [{"text": None}]},
        {"choices": ["a"]},
        {"choices": [{"text": "a", "finish_reason": "abort"}]},
        {"error": {"message": "a choice I shall not make"}},
        [1, 2],
        "text",
        None,
    ],
)
def test_nonsense_says_what_came(serve, reply, nonsense):
    server = serve(echo(reply, lambda body: reply(json.dumps(nonsense))))
    with pytest.raises(UserError, match=r"prompt 0: http.*/v1/completions: expected one choice with a text, got: .+"):
        list(engine(server).generate(["a"], CONFIG))


def test_chat_nonsense(serve, reply):
    chat = [[{"role": "user", "content": "x"}]]
    server = serve(echo(reply, lambda body: reply({"choices": [{"text": "a"}]})))
    with pytest.raises(UserError, match="expected one choice with a message"):
        list(engine(server).generate(chat, CONFIG))
    silent = serve(echo(reply, lambda body: reply({"choices": [{"message": {"content": None}}]})))
    assert {r.text for r in dict(engine(silent).generate(chat, CONFIG))[0]} == {""}


def test_a_refused_prompt_is_named(serve, reply):
    def too_long(body):
        return reply({"error": {"message": "maximum context length is 8"}}, 400) if body["prompt"] == "b" else None

    with pytest.raises(UserError, match=r"prompt 11: .*answered 400: maximum context length is 8"):
        list(engine(serve(echo(reply, too_long))).generate(["a", "b"], CONFIG, prompt_ids=[10, 11]))


def test_a_text_cut_amid_a_character(serve, reply):
    choice = {"text": "caf\ufffd", "finish_reason": "length"}
    server = serve(echo(reply, lambda body: reply({"choices": [choice]})))
    assert dict(engine(server).generate(["a"], CONFIG))[0][0] == ("caf", True)


def test_prompts_that_do_not_fit(serve, reply, tokenizer):
    server = serve(echo(reply))
    fitting = {"tokenizer": tokenizer, "max_positions": 20}
    with pytest.raises(UserError, match="prompt 1: has more than the 15 tokens"):
        list(engine(server, **fitting).generate(["a" * 15, "a" * 16], CONFIG))
    assert not [path for path, _, _ in server.requests if path != "/v1/models"]  # said before any work
    keep = dataclasses.replace(CONFIG, truncation_mode="keep_end", max_prompt_length=4)
    found = dict(engine(server, **fitting).generate(["abcdefgh", "ab"], keep))
    assert found[0][0].text.startswith("efgh ")
    assert found[1][0].text.startswith("ab ")
    with pytest.raises(UserError, match="need the policy's tokenizer"):
        list(engine(server).generate(["a"], keep))


def test_says_when_the_server_does_not_sample(serve, reply):
    greedy = serve(echo(reply, lambda body: reply({"choices": [{"text": body["prompt"], "finish_reason": "stop"}]})))
    with pytest.warns(UserWarning, match="equal responses at temperature 0.7") as found:
        list(engine(greedy).generate([f"p{n}" for n in range(9)], CONFIG))
    assert len(found) == 1
    for config in (dataclasses.replace(CONFIG, temperature=0.0), dataclasses.replace(CONFIG, num_responses=1)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(engine(greedy).generate([f"p{n}" for n in range(9)], config))


ROWS = [{"prompt": "x" * (12 - number)} for number in range(12)]
RUN = dataclasses.replace(CONFIG, batch_size=6)


def run(asked, path, **kwargs):
    def score(prompts, responses):
        return [float(len(text)) for text in responses]

    return sample_responses(asked, ROWS, path, RUN, score=score, progress=False, **kwargs)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("end", ["refuse", "garbage", "torn", "gone"])
def test_a_server_that_dies_midway_loses_nothing_written(serve, reply, tmp_path, end):
    whole = run(engine(serve(echo(reply))), tmp_path / "whole.jsonl").read_bytes()
    path, answered = tmp_path / "samples.jsonl", [0]

    def dies(body):
        answered[0] += 1
        if answered[0] <= 16:  # five prompts of three: a batch of two, another, and one by itself
            return None
        return {
            "refuse": reply("overloaded", 503),
            "garbage": reply("<html>Bad gateway</html>"),
            "torn": reply('{"choices": [{"te', promise=500),
            "gone": reply(b"", promise=9),
        }[end]

    ask = engine(serve(echo(reply, dies)), concurrency=1)
    with pytest.raises(UserError, match=r"prompt 5: "):
        run(ask, path)
    assert [record["prompt_id"] for record in read_samples(path)] == [0, 1, 2, 3, 4]
    again = serve(echo(reply))
    assert run(engine(again, concurrency=5), path).read_bytes() == whole
    assert len([body for _, body, _ in again.requests if body]) == (12 - 5) * 3  # what is there is not asked again


def test_a_failing_score_ends_the_requests(serve, reply, tmp_path):
    ask = engine(serve(echo(reply, lambda body: reply(hang=True) if body["prompt"] == "x" else None)), concurrency=2)

    def failing(prompts, responses):
        raise UserError("no memory left")

    with pytest.raises(UserError, match="no memory left"):
        sample_responses(ask, ROWS, tmp_path / "s.jsonl", RUN, score=failing, progress=False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sampling")]


def test_a_file_of_another_served_model_is_refused(serve, reply, tmp_path):
    server = serve(echo(reply))
    path = run(engine(server), tmp_path / "samples.jsonl")
    with pytest.raises(UserError, match="another model"):
        run(engine(server, model="other"), path)
