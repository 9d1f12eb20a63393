"""Which engine draws responses, and how it is reached."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprdpo.errors import UserError
from reprdpo.sampling.continuous import ContinuousBatchingEngine, check_supported
from reprdpo.sampling.engine import Engine, max_positions
from reprdpo.sampling.openai_engine import OpenAIEngine
from reprdpo.sampling.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class EngineConfig:
    """Where responses come from.

    Attributes:
        engine: "transformers" generates in this process, batch by batch; "continuous" does so too, by transformers'
            continuous batching, which pays where responses differ in length and flash-attn is installed; "openai" asks
            a server that speaks OpenAI's API (vLLM, SGLang, `transformers serve`) and serves the policy. Rewards are
            read from the policy in this process in every case.
        base_url: engine openai: address of the server's API, as in http://127.0.0.1:8000/v1.
        served_model: engine openai: the server's name for the model (default: the only one it lists).
        concurrency: engine openai: requests in flight.
        request_timeout: engine openai: seconds one response may take.
        request_retries: engine openai: times a request is sent again after a lost connection, a timeout, a 429 or a
            5xx, with waits that double from half a second.
        api_key_env: engine openai: environment variable that holds the server's API key, if it wants one; the key
            itself is written nowhere.
        extra_body: engine openai: fields added to every request, null takes one away; `transformers serve` samples
            only with {"generation_config": "{\\"do_sample\\": true, \\"top_k\\": 0}"}.
    """

    engine: Literal["transformers", "continuous", "openai"] = "transformers"
    base_url: str | None = None
    served_model: str | None = None
    concurrency: int = 32
    request_timeout: float = 600.0
    request_retries: int = 6
    api_key_env: str = "REPRDPO_API_KEY"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UserError(f"engine: concurrency is {self.concurrency}; give 1 or more")
        if self.request_retries < 0:
            raise UserError(f"engine: request_retries is {self.request_retries}; give 0 or more")
        if not 0 < self.request_timeout < float("inf"):
            raise UserError(f"engine: request_timeout is {self.request_timeout}; give a positive number of seconds")
        if self.engine == "openai":
            self.server()  # says what is wrong with the URL
        elif self.base_url is not None or self.served_model is not None:
            raise UserError(f'engine {self.engine}: asks no server; set engine to "openai", or leave base_url out')
        if self.engine == "continuous":
            check_supported()

    def server(
        self, tokenizer: PreTrainedTokenizerBase | None = None, max_positions: int | None = None
    ) -> OpenAIEngine:
        """The engine behind ``base_url``; nothing is sent yet."""
        if self.base_url is None:
            raise UserError("engine openai: base_url is missing; give the server's, as in http://127.0.0.1:8000/v1")
        return OpenAIEngine(
            self.base_url,
            self.served_model,
            concurrency=self.concurrency,
            timeout=self.request_timeout,
            retries=self.request_retries,
            api_key_env=self.api_key_env,
            extra_body=self.extra_body,
            tokenizer=tokenizer,
            max_positions=max_positions,
        )


def build_engine(config: EngineConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine ``config`` names, on the policy or on the server that serves it."""
    if config.engine == "openai":
        return config.server(tokenizer, max_positions(model))
    return (ContinuousBatchingEngine if config.engine == "continuous" else TransformersEngine)(model, tokenizer)
