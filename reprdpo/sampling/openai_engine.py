"""Sampling from a server that speaks OpenAI's API: vLLM, SGLang, `transformers serve` and others."""

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from reprdpo.errors import UserError
from reprdpo.files import content_hash
from reprdpo.http_json import HTTPStatusError, JsonClient, api_root, excerpt
from reprdpo.sampling.engine import Prompt, Response, SamplingConfig, encode_prompt

_LOOK_AHEAD = 4  # requests handed out for each one running, so that a slow first response leaves no worker idle
_ALIKE = 3  # prompts with all responses alike before the user is told


class OpenAIEngine:
    """An :class:`~reprdpo.sampling.engine.Engine` behind /v1/completions (texts) and /v1/chat/completions (chats).

    Every response is a request of its own with a ``seed`` drawn from (seed, prompt id, response number), so that a
    server that honours seeds gives a resumed run the responses of the unbroken one (`transformers serve`, whose
    requests share one random state, does at ``concurrency=1``). The server applies its own tokenizer and chat template:
    they should be the policy's. It sends text alone, so rewards are read elsewhere.

    Sent are ``temperature``, ``top_p``, ``max_tokens``, ``seed`` and, where it is set, ``top_k``, which OpenAI's API
    lacks and vLLM and SGLang take. What else a server wants goes into ``extra_body``; `transformers serve` is greedy,
    whatever the temperature, until ``{"generation_config": '{"do_sample": true, "top_k": 0}'}`` is there, and drops
    the leading space of a completion where the tokenizer's decoder does.

    Args:
        base_url: where the API lies, as in http://127.0.0.1:8000/v1; without a path, /v1 is added.
        model: the name the server gives the model; None is the one it lists, where it lists one.
        concurrency: requests in flight.
        timeout: seconds a response may take.
        retries: times a request is sent again; see :class:`~reprdpo.http_json.JsonClient`.
        api_key_env: environment variable that holds the API key, if one is needed.
        extra_body: fields added to every request; null takes one away.
        tokenizer: the policy's; with it a prompt too long is met before the server sees it, else the server decides.
        max_positions: positions of the model; None is what the server says.

    Raises:
        UserError: a URL that is none.
    """

    independent = True

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 6,
        api_key_env: str = "REPRDPO_API_KEY",
        extra_body: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.base_url = api_root(base_url)
        key = os.environ.get(api_key_env) or None
        self._client = partial(JsonClient, self.base_url, key=key, timeout=timeout, retries=retries)
        self._client()  # says what is wrong with the URL
        self._model, self._concurrency = model, concurrency
        self._extra_body = dict(extra_body or {})
        self._tokenizer, self._max_positions = tokenizer, max_positions
        self._served: dict[str, Any] | None = None

    def fingerprint(self) -> str:
        """The model's name and, where the server says it, its origin; and ``extra_body``. The address is left out.

        Raises:
            UserError: the server cannot be reached, or lists no model or several where none was named.
        """
        served = self._served_model()
        origin = {name: served.get(name) for name in ("root", "parent") if served.get(name)}
        return f"openai:{served['id']}-{content_hash(origin, self._extra_body)[:8]}"

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Response]]]:
        """See :meth:`Engine.generate`.

        Raises:
            UserError: a prompt too long or refused, a server that cannot be reached, died or answered nonsense.
        """
        count = config.num_responses
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        copies = 1 if config.temperature == 0 else count
        waiting: deque[tuple[int, list[Future[Response]]]] = deque()
        served = self._served_model()
        fitted = [self._fitted(prompt, number, config, served) for number, prompt in zip(ids, prompts, strict=True)]
        client, alike = self._client(), _AlikeWarning(config.temperature, copies)
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="sampling") as pool:
            try:
                for place, (number, prompt) in enumerate(zip(ids, fitted, strict=True)):
                    futures = [
                        pool.submit(self._ask, client, prompt, number, copy, config, served["id"])
                        for copy in range(copies)
                    ]
                    waiting.append((place, futures))
                    if sum(len(futures) for _, futures in waiting) >= _LOOK_AHEAD * self._concurrency:
                        yield _gathered(waiting.popleft(), count, alike)
                while waiting:
                    yield _gathered(waiting.popleft(), count, alike)
            finally:
                client.stop()
                pool.shutdown(wait=False, cancel_futures=True)

    def _served_model(self) -> dict[str, Any]:
        """What /models says of the model, at least its ``id``; a server that lists nothing serves what was named."""
        if self._served is None:
            try:
                answer = self._client().get("/models", retries=2)
            except HTTPStatusError as error:
                if self._model is None or error.status in (401, 403):
                    raise UserError(f"{error}; name the model with served_model") from None
                answer = {"data": []}
            rows = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(rows, list) or not all(
                isinstance(r, dict) and isinstance(r.get("id"), str) for r in rows
            ):
                said = excerpt(json.dumps(answer))
                raise UserError(f"{self.base_url}/models: is no list of models: {said}; check base_url")
            self._served = self._chosen({row["id"]: row for row in rows})
        return self._served

    def _chosen(self, listed: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if self._model is not None:
            # A name that is not listed may still be served: an alias, or a folder under `transformers serve`.
            return listed.get(self._model, {"id": self._model})
        if len(listed) == 1:
            return next(iter(listed.values()))
        names = ", ".join(sorted(listed)[:10]) or "no model"
        raise UserError(f"{self.base_url}/models: lists {names}; name one with served_model")

    def _fitted(self, prompt: Prompt, number: int, config: SamplingConfig, served: Mapping[str, Any]) -> Prompt:
        """The prompt, cut where the configuration says so; refused where it is too long."""
        listed = served.get("max_model_len")
        positions = self._max_positions or (listed if isinstance(listed, int) and listed > 0 else None)
        if self._tokenizer is None:
            if config.max_prompt_length is not None or config.truncation_mode != "error":
                raise UserError(
                    "sampling: max_prompt_length and truncation_mode need the policy's tokenizer; give the engine one"
                )
            return prompt
        if positions is None and config.max_prompt_length is None:
            return prompt
        tokens = encode_prompt(self._tokenizer, prompt, number, config, positions)
        unlimited = SamplingConfig(max_new_tokens=config.max_new_tokens)
        if tokens == encode_prompt(self._tokenizer, prompt, number, unlimited, None):
            return prompt
        if not isinstance(prompt, str):
            raise UserError(
                f"prompt {number}: is a chat longer than {len(tokens)} tokens, which a server cannot cut; shorten it"
            )
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _ask(
        self, client: JsonClient, prompt: Prompt, number: int, copy: int, config: SamplingConfig, model: str
    ) -> Response:
        body = {
            "model": model,
            **({"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}),
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": request_seed(config.seed, number, copy),
            **({"top_k": config.top_k} if config.top_k else {}),
        } | self._extra_body
        path = "/completions" if isinstance(prompt, str) else "/chat/completions"
        try:
            answer = client.post(path, {name: value for name, value in body.items() if value is not None})
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
        try:
            return _response(answer, chat=not isinstance(prompt, str))
        except (KeyError, TypeError, ValueError):
            said = excerpt(json.dumps(answer))
            expected = "one choice with a message" if path.startswith("/chat") else "one choice with a text"
            raise UserError(
                f"prompt {number}: {self.base_url}{path}: expected {expected}, got: {said}; check base_url"
            ) from None


def request_seed(seed: int, prompt_id: int, copy: int) -> int:
    """The seed of one response, below 2^31, which every server takes."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{copy}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _response(answer: Any, *, chat: bool) -> Response:
    (choice,) = answer["choices"]
    text, reason = (choice["message"]["content"] if chat else choice["text"]), choice.get("finish_reason")
    if chat and text is None:  # a refusal, or nothing but reasoning
        text = ""
    if not isinstance(text, str) or reason in ("abort", "error"):
        raise ValueError
    truncated = reason == "length"
    # A text cut amid a character's bytes ends in replacement marks, which the model never said.
    return Response(text.rstrip("\ufffd") if truncated else text, truncated)


def _gathered(
    waiting: tuple[int, list[Future[Response]]], count: int, alike: "_AlikeWarning"
) -> tuple[int, list[Response]]:
    place, futures = waiting
    responses = [future.result() for future in futures]
    alike.see(responses)
    return place, responses * (count // len(responses))


class _AlikeWarning:
    """Says once that a server seems to sample greedily."""

    def __init__(self, temperature: float, copies: int) -> None:
        self._temperature, self._left = temperature, _ALIKE if copies > 1 else -1

    def see(self, responses: list[Response]) -> None:
        self._left = self._left - 1 if len(set(responses)) == 1 else -1
        if self._left == 0:
            warnings.warn(
                f"the first {_ALIKE} prompts have equal responses at temperature {self._temperature}: the server may "
                "not sample (`transformers serve` does only with extra_body "
                '{"generation_config": "{\\"do_sample\\": true, \\"top_k\\": 0}"})',
                stacklevel=3,
            )
