"""An OpenAI-style endpoint over HTTP: who may be asked with which key, what is tried again, what ends at once.

The only file that knows httpx. Nothing of a request or an answer is logged, and no error shows the key.
"""

import contextlib
import email.utils
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Self

import httpx

from ingot.address import Address
from ingot.errors import EndpointError

AGAIN = (408, 409, 425, 429)  # and 5xx: may go well a moment later
NEVER = (501, 505)  # of 5xx: will not
OUT_OF_QUOTA = "insufficient_quota"  # a 429 that waiting does not mend
MAX_BYTES = 64 * 1024 * 1024
MAX_MESSAGE = 300  # characters of a server's words


@dataclass(frozen=True)
class Limits:
    """How long, how often, how many at once. `deadline_s` holds for one request with all its tries; before try n + 1
    stand up to `backoff_s` * 2^n seconds, at most `longest_wait_s`, drawn evenly from 0 (full jitter).
    """

    at_once: int = 8
    tries: int = 6
    connect_s: float = 10.0
    read_s: float = 120.0
    deadline_s: float = 600.0
    backoff_s: float = 0.5
    longest_wait_s: float = 30.0


DEFAULT = Limits()


class Refused(EndpointError):
    """The endpoint answered, and asking again would not help. `status`: of HTTP; `words`: the server's own."""

    def __init__(self, message: str, status: int, words: str = "") -> None:
        self.status, self.words = status, words
        super().__init__(message)


class _Again(Exception):
    """A try that failed and may go well later. `after_s`: what the server asks to wait."""

    def __init__(self, what: str, after_s: float | None = None) -> None:
        self.after_s = after_s
        super().__init__(what)


class Api:
    """Requests to one endpoint; may be used by several threads. `sleep`, `clock` (seconds, rising), `now` (seconds of
    1970) and `draw` (0 to 1) are for tests.
    """

    def __init__(
        self,
        address: Address,
        key: str | None = None,
        limits: Limits = DEFAULT,
        *,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.address, self.limits = address, limits
        self._key, self._stop = key, threading.Event()
        self._sleep = sleep or self._stop.wait  # ends early when the work is given up
        self._clock, self._now, self._draw = clock, now, draw
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(limits.read_s, connect=limits.connect_s),
            limits=httpx.Limits(max_connections=limits.at_once, max_keepalive_connections=limits.at_once),
            follow_redirects=False,  # a key must not follow to another host
            trust_env=not address.loopback,  # a proxy is for other machines
        )

    def close(self) -> None:
        """End what is under way."""
        self._stop.set()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises EndpointError."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers `body`. Raises Refused for what the server will not do, else EndpointError."""
        return self._ask("POST", path, body)

    def each(self, ask: Callable[[Any], Any], questions: Sequence[Any]) -> list[Any]:
        """`ask` of every question, `limits.at_once` at a time; in order. After an error none is begun any more, those
        under way finish, and the first error is raised.
        """
        self._stop.clear()
        first: list[BaseException] = []

        def run(question: Any) -> Any:
            if self._stop.is_set():
                return None
            try:
                return ask(question)
            except BaseException as error:
                first.append(error)
                self._stop.set()  # nobody waits for a next try any more
                raise

        pool = ThreadPoolExecutor(self.limits.at_once, thread_name_prefix="ingot-endpoint")
        try:
            futures = [pool.submit(run, question) for question in questions]
            wait(futures)
            if first:
                raise first[0]
            return [it.result() for it in futures]
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        end = self._clock() + self.limits.deadline_s
        what, last = f"{method} {self.address.url}{path}", _Again("was not tried")
        for number in range(self.limits.tries):
            try:
                return self._try(method, path, body, end, what)
            except _Again as problem:
                last = problem
            left = end - self._clock()
            delay = self._delay(number, last.after_s)
            if number + 1 == self.limits.tries or self._stop.is_set():
                break
            if delay >= left:
                wanted = f"; it asks to wait {last.after_s:.0f} s" if last.after_s else ""
                raise EndpointError(f"{what} {last} within {self.limits.deadline_s:g} s{wanted}; try again later")
            self._sleep(delay)
        raise EndpointError(f"{what} {last}, {number + 1} times; see whether the endpoint is up and try again")

    def _delay(self, number: int, after_s: float | None) -> float:
        if after_s is not None:
            return after_s
        return self._draw() * float(min(self.limits.longest_wait_s, self.limits.backoff_s * 2**number))

    def _try(self, method: str, path: str, body: dict[str, Any] | None, end: float, what: str) -> Any:
        # Not httpx's own JSON: half of a character, which a model may well write, is no UTF-8.
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            with self._client.stream(method, self._url(path), content=content, headers=headers) as response:
                found = b"".join(self._chunks(response, end))
        except httpx.TimeoutException:
            raise _Again("did not answer in time") from None
        except httpx.InvalidURL as error:
            raise Refused(f"{self.address.url} is no address: {error}", 0) from None
        except (httpx.RequestError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._client.is_closed:
                raise
            raise _Again(f"failed ({type(error).__name__}: {self._clean(str(error))})") from None
        if response.is_success:
            try:
                return json.loads(found)
            except ValueError:
                raise _Again("answered with something that is no JSON") from None
        status, (words, code) = response.status_code, _words(found)
        words = self._clean(words)
        said = f"answered {status}" + (f": {words}" if words else "")
        again = (status in AGAIN or status >= 500) and status not in NEVER and code != OUT_OF_QUOTA
        if again:
            raise _Again(said, self._retry_after(response.headers.get("Retry-After")))
        raise Refused(f"{what} {said}{_fix(status)}", status, words)

    def _chunks(self, response: httpx.Response, end: float) -> Iterator[bytes]:
        size = 0
        for chunk in response.iter_bytes():
            size += len(chunk)
            if size > MAX_BYTES:
                raise EndpointError(f"{self.address.url} answered with more than {MAX_BYTES} bytes")
            if self._clock() > end:  # a trickle never trips the timeout between two pieces
                raise _Again("did not finish its answer")
            yield chunk

    def _url(self, path: str) -> str:
        return f"{self.address.url}{path}" + (f"?{self.address.query}" if self.address.query else "")

    def _retry_after(self, value: str | None) -> float | None:
        """Seconds that the header asks to wait: a number, or a date."""
        if value is None:
            return None
        with contextlib.suppress(ValueError):
            return max(0.0, float(value))
        with contextlib.suppress(ValueError, TypeError, IndexError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - self._now())
        return None

    def _clean(self, words: str) -> str:
        """A server's words as a part of a line: short, without what breaks lines, without the key."""
        words = " ".join("".join(sign if sign.isprintable() else " " for sign in words).split())
        for secret in (self._key, self.address.query):
            words = words.replace(secret, "***") if secret else words
        return words if len(words) <= MAX_MESSAGE else f"{words[:MAX_MESSAGE]}…"


def _words(content: bytes) -> tuple[str, str | None]:
    """What a server says about an error, and its code: `{"error": {"message", "code"}}` and what others write."""
    try:
        said = json.loads(content)
    except ValueError:
        text = content[:2000].decode("utf-8", "replace")
        return ("" if "<" in text[:20] else text), None  # a page of a proxy says nothing in its first words
    error = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return str(error), None
    words = next((error[name] for name in ("message", "detail") if error.get(name)), "")
    return str(words), str(error.get("code") or error.get("type") or "") or None


def _fix(status: int) -> str:
    if 300 <= status < 400:
        return "; it points to another address: name that one, with its /v1"
    return {
        401: "; put a valid key into the environment variable of --key-env",
        403: "; the key has no right to this",
        404: "; see whether the address ends as the server's does, often in /v1",
    }.get(status, "")
