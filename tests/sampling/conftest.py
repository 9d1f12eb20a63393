"""A tiny random Llama with a tokenizer of its own, and HTTP servers that do as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<s>"]


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, spaces and all, so that every text comes back."""
    vocabulary = {name: number for number, name in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _byte_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    def make(seed: int = 0, eos_bias: float = 0.0, **changes: object) -> PreTrainedModel:
        settings: dict[str, object] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
        if eos_bias:
            head = torch.nn.Linear(32, len(tokenizer))
            head.weight = model.lm_head.weight
            with torch.no_grad():
                head.bias.zero_()
                head.bias[tokenizer.eos_token_id] = eos_bias
            model.lm_head = head
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(eos_bias=2.0)


class Reply(NamedTuple):
    """What a scripted server does with a request; ``hang`` sends nothing until the test ends."""

    body: bytes | str | dict[str, object] | list[object] = b""
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    hang: bool = False
    promise: int | None = None  # the Content-Length, where it is a lie


Answer = Callable[[str, dict[str, object] | None], Reply]


class ScriptedServer:
    """An HTTP server on a free loopback port that answers by a function of (path, body or None)."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[tuple[str, dict[str, object] | None, dict[str, str]]] = []
        self._over, self._lock = threading.Event(), threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with script._lock:
                    script.requests.append((self.path, body, dict(self.headers)))
                    reply = answer(self.path, body)
                if reply.hang:
                    script._over.wait(60)
                    return
                raw = reply.body if isinstance(reply.body, bytes) else None
                if raw is None:
                    raw = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw) if reply.promise is None else reply.promise))
                self.end_headers()
                self.wfile.write(raw)
                self.close_connection = True

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that hang up are what some tests are about
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def stop(self) -> None:
        """Stop listening; later connections are refused."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start scripted servers; they stop with the test."""
    running: list[ScriptedServer] = []

    def start(answer: Answer) -> ScriptedServer:
        running.append(ScriptedServer(answer))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off without the waiting."""
    monkeypatch.setattr("reprdpo.sampling.http_json._FIRST_DELAY", 0.001)
