"""What an engine offers to the routes, whatever runs the model behind it; how much it takes, and how it refuses."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, Sampling

Result = TypeVar("Result")


class QueueFullError(Exception):
    """More waits than the queue holds. `cause`: "requests" or "tokens". `retry_after_s`: when there may be room."""

    def __init__(self, cause: str, retry_after_s: int) -> None:
        self.cause, self.retry_after_s = cause, retry_after_s
        super().__init__(cause)


class ClosedError(Exception):
    """The engine is shutting down, or could not start."""


class DeadlineError(Exception):
    """The time that a request had is over; its work has been stopped."""


@dataclass(frozen=True)
class Limits:
    """What an engine takes. Tokens of a request: its prompts and the most that it may have written."""

    waiting_requests: int = 256
    waiting_tokens: int = 262_144
    rows: int = 64  # written together
    answer_tokens: int | None = None  # of one answer; None: what the model's context leaves
    cache_tokens: int | None = None  # keys and values held, padding counted; None: what a quarter of free memory holds
    prompt_tokens: int = 1024  # run between two tokens of the rows that are being written
    batch_tokens: int = 8192  # of rows of several requests that are answered together
    gather_s: float = 0.004  # that a request waits for others to be answered with


@dataclass(frozen=True)
class Load:
    """What an engine has to do. `queue`: requests that wait; `running`: rows; `tokens` of keys and values held."""

    queue: int
    running: int
    tokens: int
    waiting_tokens: int = 0
    tokens_limit: int = 0


class Meter:
    """Hears what an engine does; this one keeps nothing. All but `refused` are called on the engine's thread."""

    def entered(self, prompt_tokens: int) -> None:
        """A prompt was run."""

    def first(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""

    def between(self, seconds: float, rows: int) -> None:
        """So many rows have a further token, so long after the one before."""

    def written(self, tokens: int) -> None:
        """Tokens were written."""

    def refused(self, cause: str) -> None:
        """A request was not answered: "requests", "tokens", "deadline", "left", "closed"."""


class Engine(Protocol):
    """One model, whose work is done on a thread of its own: the event loop never waits for a forward pass.

    `deadline`: seconds from now that a request has; None: what its HTTP request has left, if anything. Whatever ends a
    request early (deadline, cancellation, leaving a stream) ends its work after the running token. Every call raises
    QueueFullError, ClosedError, DeadlineError and InputError.
    """

    runtime: Runtime

    async def run(self, job: Callable[[Runtime], Result], *, deadline: float | None = None) -> Result:
        """`job(runtime)`, while nothing else uses the model. What is written goes on behind it: for short work."""

    async def prepare(self, job: Callable[[Runtime], Result]) -> Result:
        """`job(runtime)` beside the model's work: for what needs the tokenizer and the chat template only."""

    async def answer(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Runtime.answer`, together with others' rows."""

    async def write(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> list[Generation]:
        """Answers to prompts of token ids, in their order. Row i draws from (its seed, i), whoever shares the batch."""

    def stream(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """(index, piece) as `Row.piece` makes them, and at the end of each row (index, Generation). Errors of the input
        are raised before the first one.
        """

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be worked on: the model has proved it, and the worker lives."""

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the warm-up is over; whether it went well."""

    def load(self) -> Load:
        """What there is to do."""

    def close(self, timeout_s: float = 10.0, *, drain_s: float = 0.0) -> None:
        """Take nothing more, fail what waits, give what runs `drain_s` seconds, and wait for the worker."""


def retry_after(seconds: float) -> int:
    """Whole seconds for a Retry-After header: 1 to 60."""
    return max(1, min(60, int(seconds + 0.999)))


def now() -> float:
    """Seconds of the clock that deadlines are told by."""
    return time.monotonic()
