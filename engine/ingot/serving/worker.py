"""A thread that owns a model, and the requests that wait for it: what both engines share."""

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.serving.engine import (
    ClosedError,
    DeadlineError,
    Limits,
    Meter,
    QueueFullError,
    Result,
    now,
    retry_after,
)
from ingot.serving.record import current

log = logging.getLogger("ingot.serve")

FAILURES = 3  # in a row, then the engine no longer counts as ready
AGAIN_S = 1.0  # until it is then tried again
STUCK_S = 300.0  # a turn that takes longer has hung: no pass over the most tokens of a turn comes near it


class Ticket:
    """One request on its way through an engine. What becomes of it arrives in its caller's event loop."""

    def __init__(self, tokens: int, deadline: float | None) -> None:
        until = current().until if deadline is None else now() + deadline
        self.tokens, self.entered, self.left, self.begun = tokens, now(), False, False
        self.loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._timer = None if until is None else self.loop.call_later(until - self.entered, self._expire)

    def _expire(self) -> None:
        self.left = True
        self._items.put_nowait(DeadlineError())

    def hand(self, item: Any) -> None:
        """Called in the caller's loop. An exception is raised there."""
        self._items.put_nowait(item)

    async def next(self) -> Any:
        """The next thing that came of it."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def leave(self) -> None:
        """Nobody waits for it any more: its work ends after the running token."""
        self.left = True
        if self._timer is not None:
            self._timer.cancel()


class Job(Ticket):
    """A function that has the model for itself."""

    def __init__(self, work: Callable[[Runtime], Any], deadline: float | None) -> None:
        super().__init__(0, deadline)
        self.work = work


class Worker:
    """The thread, the queue in front of it and its end. Subclasses say what a turn of the thread is."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        self.runtime, self.limits, self.meter = runtime, limits or Limits(), meter or Meter()
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._inside: set[Ticket] = set()  # all that somebody waits for, in the queue or begun
        self._told: list[tuple[Ticket, Any]] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ingot-reader")
        self._closing, self._aborting, self._warm = threading.Event(), threading.Event(), threading.Event()
        self._preparing = 0
        self._failures, self._proved, self._turned = 0, 0.0, now()
        self._pace = 0.0  # tokens a second, of late
        self._thread = threading.Thread(target=self._work, name="ingot-engine", daemon=True)
        self._thread.start()

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._prove()
        self._warm.set()
        while not self._closing.is_set():
            self._guarded_turn()
            if self._failures >= FAILURES and not self._busy() and now() - self._proved > AGAIN_S:
                self._prove()  # who asks for readiness before sending would never see it recover
        while self._busy() and not self._aborting.is_set():
            self._guarded_turn()
        self._abandon(ClosedError())
        self._flush()

    def _guarded_turn(self) -> None:
        """A turn. An error that is no request's own fails them all: a thread that ended would leave them waiting."""
        self._turned = now()
        try:
            self._turn()
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))  # the message may hold a part of a request
            log.error("a defect of the engine: %s\n%s", type(error).__name__, where)
            self._failures = FAILURES
            self._abandon(error)
        self._flush()

    def _prove(self) -> None:
        self._proved = now()
        try:
            self._warm_up()
            self._failures = 0
        except Exception as error:
            # Of its own example: nothing here is a request's.
            log.error("the model does not answer: %s", "".join(traceback.format_exception(error)))
            self._failures = FAILURES

    def _warm_up(self) -> None:
        """Prove that the model answers."""
        raise NotImplementedError

    def _turn(self) -> None:
        """Wait a little for work where there is none, and do a piece of it."""
        raise NotImplementedError

    def _busy(self) -> bool:
        """Whether something that has begun is not finished."""
        return False

    def _stirs(self) -> bool:
        """Whether a thread that waits has something to do now that a ticket has come. Called with the lock."""
        return True

    def _abandon(self, error: Exception) -> None:
        """Fail everything that somebody waits for."""
        with self._changed:
            self._waiting.clear()
            for ticket in self._inside:
                if not ticket.left:
                    ticket.left = True
                    self._tell(ticket, error)

    def _perform(self, job: Job) -> None:
        if job.left:
            return
        try:
            self._tell(job, (job.work(self.runtime),))
        except Exception as error:
            self._tell(job, error)

    def _tell(self, ticket: Ticket, item: Any) -> None:
        """Hand `item` to the caller of `ticket` at the next `_flush`."""
        self._told.append((ticket, item))

    def _flush(self) -> None:
        """One call for everything that was told: each wakes an event loop by a write to its pipe."""
        told, self._told = self._told, []
        for loop in {ticket.loop for ticket, _ in told}:
            mine = [(ticket, item) for ticket, item in told if ticket.loop is loop]
            try:
                loop.call_soon_threadsafe(_hand_out, mine)
            except RuntimeError:  # the loop has ended, and with it whoever waited
                continue

    def _paced(self, tokens: int, seconds: float) -> None:
        """Note that so many tokens took so long."""
        rate = tokens / max(seconds, 1e-6)
        self._pace = rate if not self._pace else 0.9 * self._pace + 0.1 * rate

    # --- from the event loop -----------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be worked on."""
        well = self._warm.is_set() and self._failures < FAILURES
        alive = self._thread.is_alive() and now() - self._turned < STUCK_S
        return well and alive and not self._closing.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the warm-up is over; whether it went well."""
        self._warm.wait(timeout_s)
        return self.ready

    def _submit(self, ticket: Ticket) -> None:
        with self._changed:
            if self._closing.is_set():
                self.meter.refused("closed")
                raise ClosedError
            tokens = sum(one.tokens for one in self._waiting)
            most = self.limits.waiting_tokens
            if ticket.tokens > most:
                raise InputError("prompt", f"the request is for {ticket.tokens} tokens in all; {most} may wait here")
            cause = "requests" if len(self._waiting) >= self.limits.waiting_requests else ""
            cause = cause or ("tokens" if tokens + ticket.tokens > most else "")
            if cause:
                self.meter.refused(cause)
                raise QueueFullError(cause, retry_after(tokens / self._pace if self._pace else 1.0))
            self._waiting.append(ticket)
            self._inside.add(ticket)
            if self._stirs():
                self._changed.notify()

    @contextmanager
    def _admitted(self, ticket: Ticket) -> Iterator[Ticket]:
        """`ticket` in the queue, and gone from the engine afterwards."""
        try:
            self._submit(ticket)
            yield ticket
        except DeadlineError:
            self.meter.refused("deadline")
            current().cause = "deadline"
            raise
        except ClosedError:
            current().cause = "closed"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.meter.refused("left")
            raise
        finally:
            ticket.leave()
            with self._changed:
                self._inside.discard(ticket)
                with suppress(ValueError):  # it may have begun
                    self._waiting.remove(ticket)  # a long pass would leave it there, and no room for others

    async def run(self, job: Callable[[Runtime], Result], *, deadline: float | None = None) -> Result:
        """Wait for `job(runtime)`. Raises what it raises, and as `Engine` says."""
        with self._admitted(Job(job, deadline)) as ticket:
            result: Result = (await ticket.next())[0]
            return result

    async def prepare(self, job: Callable[[Runtime], Result]) -> Result:
        """`job(runtime)` beside the model's work."""
        if self._closing.is_set():
            raise ClosedError
        if self._preparing >= self.limits.waiting_requests:
            self.meter.refused("requests")
            raise QueueFullError("requests", retry_after(1.0))
        until = current().until
        self._preparing += 1
        try:
            async with asyncio.timeout(None if until is None else until - now()):
                return await asyncio.get_running_loop().run_in_executor(self._reader, job, self.runtime)
        except TimeoutError:
            self.meter.refused("deadline")
            current().cause = "deadline"
            raise DeadlineError from None
        finally:
            self._preparing -= 1

    def close(self, timeout_s: float = 10.0, *, drain_s: float = 0.0) -> None:
        """Take nothing more, fail what waits, give what runs `drain_s` seconds, and wait for the worker."""
        with self._changed:
            self._closing.set()
            waiting, self._waiting = list(self._waiting), deque(one for one in self._waiting if one.begun)
            self._changed.notify()
        for ticket in waiting:
            if not ticket.begun:
                self._fail(ticket)
        self._thread.join(drain_s)
        self._aborting.set()
        self._thread.join(timeout_s)
        self._reader.shutdown(wait=False)

    def _fail(self, ticket: Ticket) -> None:
        try:
            ticket.loop.call_soon_threadsafe(ticket.hand, ClosedError())
        except RuntimeError:
            return


def _hand_out(told: Sequence[tuple[Ticket, Any]]) -> None:
    for ticket, item in told:
        ticket.hand(item)
