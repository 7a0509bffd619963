"""One worker thread that owns the model, behind a bounded queue: the event loop never waits for a forward pass."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from ingot.model.generate import Generation
from ingot.model.runtime import Runtime

Result = TypeVar("Result")
END = object()


class QueueFullError(Exception):
    """More requests wait than the queue holds."""


class ClosedError(Exception):
    """The engine is shutting down."""


class Engine:
    """Runs jobs on `runtime` one at a time, in the order of arrival. At most `max_waiting` wait."""

    def __init__(self, runtime: Runtime, max_waiting: int = 32) -> None:
        self.runtime = runtime
        self._jobs: queue.Queue[tuple[Callable[[Runtime], Any], Future[Any]]] = queue.Queue(max_waiting)
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._work, name="ingot-engine", daemon=True)
        self._worker.start()

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be worked on."""
        return self._worker.is_alive() and not self._closing.is_set()

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                job, future = self._jobs.get(timeout=0.1)
            except queue.Empty:
                continue
            if not future.set_running_or_notify_cancel():
                continue  # the client left while it waited
            try:
                future.set_result(job(self.runtime))
            except BaseException as error:
                future.set_exception(error)

    def _submit(self, job: Callable[[Runtime], Result]) -> "Future[Result]":
        if self._closing.is_set():
            raise ClosedError
        future: Future[Result] = Future()
        try:
            self._jobs.put_nowait((job, future))
        except queue.Full:
            raise QueueFullError from None
        return future

    async def run(self, job: Callable[[Runtime], Result]) -> Result:
        """Wait for `job(runtime)`. Raises what it raises, `QueueFullError` or `ClosedError`."""
        return await asyncio.wrap_future(self._submit(job))

    async def stream(
        self, start: Callable[[Runtime], Iterator[str | Generation]]
    ) -> AsyncGenerator[str | Generation, None]:
        """Iterate over `start(runtime)` on the worker. Leaving the iteration ends the work after the running token."""
        loop, pieces, left = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def job(runtime: Runtime) -> None:
            try:
                for piece in start(runtime):
                    if left.is_set():
                        return
                    if self._closing.is_set():
                        raise ClosedError
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
                loop.call_soon_threadsafe(pieces.put_nowait, END)
            except BaseException as error:
                if not left.is_set():
                    loop.call_soon_threadsafe(pieces.put_nowait, error)

        future = self._submit(job)
        try:
            while (piece := await pieces.get()) is not END:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            future.cancel()

    def close(self, timeout_s: float = 10.0) -> None:
        """Take nothing more, end a running stream after its token, fail what waits, and wait for the worker."""
        self._closing.set()
        self._worker.join(timeout_s)
        while True:
            try:
                _, future = self._jobs.get_nowait()
            except queue.Empty:
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(ClosedError())
