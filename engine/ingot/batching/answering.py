"""Answers to the rows of a bucket: what fails for a moment is tried again, and a row that cannot be answered is found
by halves, so that it costs the others nothing.
"""

import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, Protocol

import torch

from ingot.batching.rows import Entry, Failure, Outcome
from ingot.errors import IngotError
from ingot.model.sampling import InputError

RETRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 2, 1.0, 30.0


class Answerer(Protocol):
    """What answers rows."""

    def check(self) -> None:
        """Raise FieldError for parameters that the model does not take."""

    def answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One outcome an entry, in order. Raises IngotError where nothing can be answered any more."""

    def tokens(self) -> dict[str, int]:
        """Tokens since the last call, by "input" and "output"; empty where nobody counts them."""

    def close(self) -> None:
        """Give back what it holds."""


class Patience:
    """How often a call that failed is tried again, after 1 s, 2 s, 4 s ... `sleep` is for tests."""

    def __init__(self, retries: int = RETRIES, sleep: Callable[[float], object] = time.sleep) -> None:
        self.retries, self._sleep = retries, sleep

    def wait(self, number: int) -> None:
        """Before try `number` + 2."""
        self._sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**number))


def isolated(
    ask: Callable[[Sequence[Entry]], list[dict[str, Any]]], entries: Sequence[Entry], patience: Patience
) -> list[Outcome]:
    """`ask` of all entries at once; where that fails, of halves, down to the rows at fault.

    An InputError is the fault of a row and is not tried again. Anything else may be of the moment: all of `entries` are
    tried again, then halved.
    """
    for number in range(patience.retries + 1):
        try:
            return list(ask(entries))
        except (InputError, torch.OutOfMemoryError) as error:
            failure = failure_of(error)
            break
        except IngotError:
            raise
        except Exception as error:
            failure = failure_of(error)
            if number < patience.retries:
                patience.wait(number)
    if len(entries) == 1:
        return [failure]
    half, once = len(entries) // 2, Patience(0)
    return [*isolated(ask, entries[:half], once), *isolated(ask, entries[half:], once)]


def failure_of(error: Exception) -> Failure:
    """What to tell of an error: an unexpected one by its name only, since its words may hold the row's."""
    if isinstance(error, InputError):
        return Failure(error.field, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return Failure("row", "the memory is not enough for this row")
    return Failure("row", f"{type(error).__name__} while the row was answered", unexpected=True)


def require_alive(outcomes: Sequence[Outcome]) -> None:
    """Raise IngotError where no row of several was answered, and not for a row's own fault: it is the model's."""
    lost = [one for one in outcomes if isinstance(one, Failure) and one.unexpected]
    if len(outcomes) > 1 and len(lost) == len(outcomes):
        raise IngotError(
            f"the model answers no row any more ({lost[0].message}); what is done is kept, and the same command goes on"
        )


def seeded(params: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """`params`, with a seed of these rows where one is given: rows are numbered from 0 in every call, and would draw
    the same in every bucket.
    """
    if not params.get("temperature") or params.get("seed") in (None, -1) or not entries:
        return params
    digest = sha256(f"{params['seed']}/{entries[0].place}".encode()).digest()
    return params | {"seed": int.from_bytes(digest[:4]) >> 1}
