"""What is known of the HTTP request that is being answered: for its log line, its limits and its deadline."""

import random
import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Record:
    """One request. Never holds a part of its input. `until`: the deadline by `time.monotonic`;
    `hurried`: the caller asked for an earlier one than the server's; `first_s`: seconds to its first token or answer.
    """

    id: str = ""
    route: str = ""
    model: str = ""
    task: str = ""
    key: str = ""
    began: float = field(default_factory=time.monotonic)
    until: float | None = None
    hurried: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    cause: str = ""
    first_s: float | None = None

    def first(self) -> None:
        """Its first token or answer is there."""
        self.first_s = time.monotonic() - self.began if self.first_s is None else self.first_s


def new_id() -> str:
    """A name for a request, which is no secret: uuid4 asks the kernel each time, 0.08 ms where a sandbox has it."""
    return f"{random.getrandbits(128):032x}"


_current: ContextVar[Record | None] = ContextVar("ingot_request", default=None)


def begin(record: Record) -> None:
    """Make `record` that of everything that this task goes on to do."""
    _current.set(record)


def current() -> Record:
    """The record of the request that this task answers; one that nobody reads outside of a request."""
    return _current.get() or Record()
