"""JSON over HTTP with the standard library: retried with back-off, bounded in time and size, and stoppable."""

import contextlib
import datetime
import email.utils
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from reprdpo.errors import UserError

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 60.0
_LARGEST_ANSWER = 32 * 2**20
_LONGEST_EXCERPT = 200


class StoppedError(Exception):
    """The client was stopped while a request waited or ran."""


class HTTPStatusError(UserError):
    """A server's refusal; ``status`` is its number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _TryAgainError(Exception):
    """What came instead of an answer, and how long the server asked to wait."""

    def __init__(self, what: str, delay: float | None = None, status: int | None = None) -> None:
        super().__init__(what)
        self.delay, self.status = delay, status


class JsonClient:
    """A client of one server, used from many threads; every request has a connection of its own.

    Redirects are not followed and no proxy is used, so that a key goes to the named server or nowhere.

    Args:
        base_url: http:// or https://, a host, perhaps a port and a path.
        key: sent as a bearer token; it stands in no message.
        timeout: seconds an answer may take, and any silence last.
        retries: times a request is sent again after a lost connection, a timeout or a status that may pass, with waits
            that double from half a second, or as long as the server's Retry-After asks; none exceeds a minute.

    Raises:
        UserError: a URL that is none.
    """

    def __init__(self, base_url: str, *, key: str | None = None, timeout: float = 600.0, retries: int = 6) -> None:
        self.base_url = base_url.rstrip("/")
        self._secure, self._host, self._port, self._path = _parts(self.base_url)
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UserError("the API key holds characters that no header can; set the variable again")
        self._key, self._timeout, self._retries = key, timeout, retries
        self._stopped = threading.Event()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def get(self, path: str, *, retries: int | None = None) -> Any:
        """The JSON at ``base_url`` + ``path``; raises as :meth:`post`."""
        return self._request("GET", path, None, self._retries if retries is None else retries)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send ``body`` to ``base_url`` + ``path``; the JSON that came back.

        Raises:
            HTTPStatusError: a status that is no success, for good or after all retries.
            UserError: no connection after all retries, or an answer that is not JSON.
            StoppedError: :meth:`stop` was called.
        """
        return self._request("POST", path, json.dumps(body).encode(), self._retries)

    def stop(self) -> None:
        """Cut every request short, those in flight too; the client is of no use after it."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _request(self, method: str, path: str, body: bytes | None, retries: int) -> Any:
        where = f"{self.base_url}{path}"
        for attempt in range(retries + 1):
            try:
                return self._parsed(where, *self._exchange(method, path, body))
            except _TryAgainError as error:
                if self._stopped.is_set():
                    raise StoppedError from None
                if attempt == retries:
                    times = f"{retries + 1} times" if retries else "once"
                    message = f"{where}: {self._redacted(str(error))} (tried {times}); see that the server runs"
                    if error.status is not None:
                        raise HTTPStatusError(message, error.status) from None
                    raise UserError(message) from None
                # Apart from each other, or the clients that a stumbling server dropped together return together.
                backed_off = _FIRST_DELAY * 2**attempt * random.uniform(0.75, 1.25)
                if self._stopped.wait(min(_LONGEST_DELAY, backed_off if error.delay is None else error.delay)):
                    raise StoppedError from None
        raise AssertionError("unreachable")

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            with self._connection() as connection:
                connection.request(method, self._path + path, body, headers)
                response = connection.getresponse()
                return (
                    response.status,
                    {name.lower(): value for name, value in response.headers.items()},
                    self._read(connection, response),
                )
        except TimeoutError:
            raise _TryAgainError(f"gave no answer within {self._timeout:g} s") from None
        except (socket.gaierror, ssl.SSLCertVerificationError, ssl.CertificateError) as error:
            raise UserError(f"{self.base_url}: cannot be reached ({_reason(error)}); check base_url") from None
        except http.client.RemoteDisconnected:
            raise _TryAgainError("closed the connection without an answer") from None
        except http.client.BadStatusLine:
            raise _TryAgainError("does not answer in HTTP") from None
        except http.client.IncompleteRead as error:
            raise _TryAgainError(f"died amid its answer, {len(error.partial)} bytes into it") from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(f"cannot be reached ({_reason(error)})") from None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        if self._secure:
            context = ssl.create_default_context()
            made: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout, context=context
            )
        else:
            made = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        with self._lock:
            if self._stopped.is_set():
                raise StoppedError
            self._open.add(made)
        try:
            yield made
        finally:
            with self._lock:
                self._open.discard(made)
            made.close()

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bytes:
        """The body, within ``timeout`` as a whole: a server that sends a byte now and then is a hanging one."""
        deadline, body = time.monotonic() + self._timeout, bytearray()
        while chunk := response.read1(65536):
            body += chunk
            if len(body) > _LARGEST_ANSWER:
                raise UserError(f"{self.base_url}: answered with more than {_LARGEST_ANSWER >> 20} MiB; check base_url")
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # read1 ends quietly where the connection does
            raise http.client.IncompleteRead(bytes(body), response.length)
        return bytes(body)

    def _parsed(self, where: str, status: int, headers: Mapping[str, str], body: bytes) -> Any:
        if status in RETRIED_STATUSES:
            raise _TryAgainError(
                f"answered {status}: {excerpt(body)}", _retry_after(headers.get("retry-after")), status
            )
        said = self._redacted(excerpt(body))
        if 300 <= status < 400:
            raise HTTPStatusError(f"{where}: has moved to {headers.get('location')!r}; set base_url to that", status)
        if status in (401, 403):
            given = "was refused" if self._key else "was not given"
            raise HTTPStatusError(f"{where}: answered {status}: {said}; an API key {given}, see api_key_env", status)
        if not 200 <= status < 300:
            raise HTTPStatusError(f"{where}: answered {status}: {said}", status)
        try:
            return json.loads(body)
        except ValueError:
            raise UserError(f"{where}: answered with something that is not JSON: {said}; check base_url") from None

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def api_root(base_url: str) -> str:
    """Where an OpenAI-compatible API lies: ``base_url``, with /v1 where it has no path."""
    base_url = base_url.rstrip("/")
    return base_url if base_url.count("/") > 2 else f"{base_url}/v1"


def excerpt(body: bytes | str) -> str:
    """What a server said, on one line: its message where the body is an error in JSON, else the body's beginning."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        text = found if isinstance(found, str) else json.dumps(found)
    line = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(line.split())
    return (line if len(line) <= _LONGEST_EXCERPT else line[: _LONGEST_EXCERPT - 3] + "...") or "nothing"


def _parts(url: str) -> tuple[bool, str, int | None, str]:
    try:
        found = urlsplit(url)
        port = found.port
    except ValueError as error:
        raise UserError(f"base_url: {url!r} is not a URL ({error})") from None
    if "@" in found.netloc:
        raise UserError("base_url: holds a user or password; give the key in the environment, see api_key_env")
    if found.scheme not in ("http", "https") or not found.hostname:
        raise UserError(f"base_url: {url!r} is not http:// or https:// and a host, as in http://127.0.0.1:8000/v1")
    if found.query or found.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"base_url: {url!r} is more than a host, a port and a path; leave out the rest")
    return found.scheme == "https", found.hostname, port, found.path


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number of them or a date."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(header)
        return max(0.0, seconds) if seconds == seconds else None
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(header)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
