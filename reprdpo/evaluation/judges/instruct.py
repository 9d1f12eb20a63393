"""Instruct judges: a template's prompt, put to a causal LM here or to a server, and its reply read by the template."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reprdpo.data import Message
from reprdpo.data import Text as Prompt
from reprdpo.errors import UserError
from reprdpo.evaluation.judges.conversation import GAP, conversation, cut, without_special
from reprdpo.evaluation.judges.judgement import Judgement, ModelJudge, asked
from reprdpo.evaluation.judges.local_lm import LocalLM
from reprdpo.evaluation.judges.template import JudgeTemplate
from reprdpo.files import content_hash
from reprdpo.http_json import JsonClient, api_root, excerpt


class InstructJudge(ModelJudge):
    """A template's prompt put to a causal LM on this machine; of a chat, the last thing the user said is judged.

    Raises:
        UserError: a template of messages for a tokenizer without a chat template, or with one that refuses them.
    """

    def __init__(self, template: JudgeTemplate, lm: LocalLM) -> None:
        self.template, self.lm = template, lm
        self.name, self.gives = f"instruct:{template.name}@{Path(lm.where).name}", template.gives
        self.render("", "")

    def render(self, prompt: str, response: str) -> str:
        """The judge's whole prompt."""
        filled = self.template.filled(prompt, response)
        if isinstance(filled, str):
            return filled
        from jinja2 import TemplateError

        try:
            return self.lm.render(filled, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(
                f"{self.lm.where}: its chat template refuses the judge's messages ({error}); put the "
                "system's text into the user's in a template of your own"
            ) from None

    def fingerprint(self) -> str:
        """See :meth:`ModelJudge.fingerprint`."""
        return content_hash("instruct", self.template.content, self.lm.fingerprint(), self.lm.max_length)

    def stream(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """See :meth:`ModelJudge.stream`."""
        rows = [self.tokens(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        for batch in self.lm.generate(rows, self.template.max_new_tokens):
            for place, generated in batch:
                yield place, self.template.read(self.lm.text(generated.tokens))

    def tokens(self, prompt: Prompt, response: str) -> list[int]:
        """The prompt the judge reads, as token ids, cut where it is too long."""
        turns = without_special(self.lm.tokenizer, conversation(asked(prompt), response))

        def encoded(some: Sequence[Message]) -> list[int]:
            return self.lm.encode(self.render(some[0]["content"], some[1]["content"]))

        limit = self.lm.max_length - self.template.max_new_tokens
        return encoded(cut(turns, lambda some: len(encoded(some)), limit, self.lm.tokenizer))


class EndpointJudge(ModelJudge):
    """A template's prompt put to a server that speaks OpenAI's API: messages to /chat/completions, raw to /completions.

    Requests are greedy, retried, and some at once; the key is read from ``REPRDPO_API_KEY``. Nothing here knows the
    server's tokens: a text over half of ``max_characters`` loses its middle.

    Raises:
        UserError: a URL that is none, or a number under 1.
    """

    def __init__(
        self,
        template: JudgeTemplate,
        base_url: str,
        model: str,
        *,
        concurrency: int = 16,
        max_characters: int = 20000,
        timeout: float = 600.0,
        retries: int = 6,
    ) -> None:
        for option, value in (("concurrency", concurrency), ("max_characters", max_characters)):
            if value < 1:
                raise UserError(f"judge openai: {option} is {value}; expected 1 or more")
        self._settings = {
            "base_url": api_root(base_url),
            "key": os.environ.get("REPRDPO_API_KEY") or None,
            "timeout": timeout,
            "retries": retries,
        }
        self._client()  # says what is wrong with the URL
        self.template, self.model = template, model
        self.name, self.gives = f"openai:{template.name}@{model}", template.gives
        self._concurrency, self._half = concurrency, max(1, max_characters // 2)

    def fingerprint(self) -> str:
        """See :meth:`ModelJudge.fingerprint`; of the server's model, its name is all that is known."""
        return content_hash("openai", self.template.content, self.model, self._half)

    def stream(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """See :meth:`ModelJudge.stream`."""
        client = self._client()
        waiting: deque[tuple[int, Future[str]]] = deque()
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge") as pool:
            try:
                for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                    waiting.append((place, pool.submit(self._ask, client, asked(prompt), response)))
                    if len(waiting) >= 4 * self._concurrency:
                        yield self._read(*waiting.popleft())
                while waiting:
                    yield self._read(*waiting.popleft())
            finally:
                client.stop()
                pool.shutdown(wait=False, cancel_futures=True)

    def _client(self) -> JsonClient:
        settings: dict[str, Any] = self._settings
        return JsonClient(**settings)

    def _read(self, place: int, reply: Future[str]) -> tuple[int, Judgement]:
        return place, self.template.read(reply.result())

    def _ask(self, client: JsonClient, prompt: str, response: str) -> str:
        filled = self.template.filled(self._cut(prompt), self._cut(response))
        body = {"model": self.model, "max_tokens": self.template.max_new_tokens, "temperature": 0}
        if isinstance(filled, str):
            answer = client.post("/completions", {**body, "prompt": filled})
        else:
            answer = client.post("/chat/completions", {**body, "messages": filled})
        try:
            (choice,) = answer["choices"]
            said = choice["text"] if isinstance(filled, str) else choice["message"]["content"]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"judge {self.name}: the server answered without one choice: {excerpt(str(answer))}"
            ) from None
        return said or ""

    def _cut(self, text: str) -> str:
        if len(text) <= self._half:
            return text
        first, last = (self._half + 1) // 2, self._half // 2
        return f"{text[:first]}{GAP}{text[len(text) - last :]}"
