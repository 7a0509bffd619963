"""The parent of the process that serves: it holds the address, starts that process again when it dies, and answers
itself while there is none. It imports neither torch nor a web framework, so that little can go wrong in it.

One of the two accepts connections at a time. The child says `ready` once its models are loaded and proved; the parent
stops accepting and says `go`; only then does the child accept. Connections that arrive between wait in the kernel.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.errors import IngotError
from ingot.serving.channel import FDS_VARIABLE

MOST_DEATHS = 5  # while loading, in a row
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
STEADY_S = 60.0  # a child that served so long starts the delays over
DRAIN_S = 60.0
HUNG_S, QUESTIONS = 30.0, 3  # a child that answers none of so many questions in so long is killed
TELLING_S = 1.0  # for it to say where, before that
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEAD_BYTES, HEAD_S, IDLE_S = 16 * 1024, 5.0, 0.5
log = logging.getLogger("ingot.serve")


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code`: negative for a signal. `refused`: the exit status of an error that a user can mend."""

    code: int
    ready: bool
    seconds: float
    refused: int | None = None
    hung: bool = False

    def __str__(self) -> str:
        if self.hung:
            return "hung and was killed"
        if self.code >= 0:
            return f"ended with exit status {self.code}"
        name = signal.Signals(-self.code).name
        return f"was killed by {name}" + (" (by hand, or because memory ran out)" if name == "SIGKILL" else "")


class Supervisor:
    """Keeps a child of `command` behind `listener` until told to stop; `drain_s`: how long the child may finish;
    `hung_s`: how long it may leave questions unanswered, once it was ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket,
        *,
        drain_s: float = DRAIN_S,
        hung_s: float = HUNG_S,
        note: Callable[[str], None] = log.info,
    ) -> None:
        self.command, self.listener, self.drain_s, self.note = list(command), listener, drain_s, note
        self.hung_s = hung_s
        self.child: asyncio.subprocess.Process | None = None
        self.wanted = 0  # signals to stop
        self.state = "loading"
        self._stop, self._alive = asyncio.Event(), asyncio.Event()
        self._standin = StandIn(listener, lambda: self.state)

    async def run(self) -> int:
        """Serve until SIGTERM or Ctrl-C; the exit status. Raises IngotError when no child comes up."""
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, self.stop)
        self.listener.listen(socket.SOMAXCONN)
        self.listener.setblocking(False)
        deaths, while_loading = 0, 0
        try:
            self._standin.open()
            while True:
                ended = await self._one_life()
                if self.wanted:
                    self.note("stopped")
                    return 0
                if ended.refused is not None and not deaths:
                    return ended.refused  # it has said why
                while_loading = 0 if ended.ready else while_loading + 1
                deaths = 1 if ended.ready and ended.seconds > STEADY_S else deaths + 1
                if while_loading == MOST_DEATHS:
                    raise IngotError(
                        f"the serving process {ended} while it loaded, {MOST_DEATHS} times in a row; its last lines "
                        "say why; --no-supervise runs it alone"
                    )
                delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (deaths - 1))
                self.note(f"the serving process {ended}; it is started again in {delay:g} s")
                self.state = "restarting"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), delay)
                if self.wanted:
                    self.note("stopped")
                    return 0
        finally:
            self._standin.close()
            for number in STOPPING:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Let the child finish what it has; a second call ends it at once."""
        self.wanted += 1
        self.state = "stopping"
        self._stop.set()
        if self.wanted > 1:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(number)

    async def _one_life(self) -> Ended:
        """Start a child, and return once it is dead; the stand-in answers whenever the child does not."""
        ours, theirs = socket.socketpair()
        started, self.state = time.monotonic(), "loading"
        fds = (self.listener.fileno(), theirs.fileno())
        self.child = await asyncio.create_subprocess_exec(
            *self.command,
            pass_fds=fds,
            env=os.environ | {FDS_VARIABLE: ",".join(map(str, fds))},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells the child
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        listening = asyncio.create_task(self._listen(reader, writer))
        watching = asyncio.create_task(self._watch(writer))
        try:
            dying = asyncio.create_task(self.child.wait())
            await asyncio.wait((dying, asyncio.create_task(self._stop.wait())), return_when=asyncio.FIRST_COMPLETED)
            if not dying.done():
                self.note("stopping: requests under way are finished")
                self._signal(signal.SIGTERM)
                self._standin.open()
                await asyncio.wait((dying,), timeout=self.drain_s)
            if not dying.done():
                self.note(f"the serving process did not finish within {self.drain_s:g} s; it is killed")
                self._signal(signal.SIGKILL)
            code = await dying
            ready, refused = await listening  # the child's end is closed
            self._standin.open()
            hung = watching.done() and not watching.cancelled() and watching.result()
        finally:
            listening.cancel()
            watching.cancel()
            writer.close()
            self._signal(signal.SIGKILL)
        return Ended(code, ready, time.monotonic() - started, refused, hung)

    async def _watch(self, writer: asyncio.StreamWriter) -> bool:
        """Ask the child whether it answers, from when it is ready until it is told to stop: True once it is killed for
        not answering. Not over HTTP: a crowd of connections would hold that up, and is no reason to start it again.
        """
        wait_s, missed = self.hung_s / QUESTIONS, 0
        while missed < QUESTIONS:
            if self.state != "serving":
                await asyncio.sleep(min(1.0, wait_s))
                continue
            self._alive.clear()
            writer.write(b"alive?\n")
            try:
                await asyncio.wait_for(self._alive.wait(), wait_s)
            except TimeoutError:
                missed += 1
                self.note(f"the serving process has not answered for {round(missed * wait_s, 1):g} s")
            else:
                missed = 0
                await asyncio.sleep(wait_s)
        self._signal(signal.SIGUSR1)  # it has every thread say where it is
        await asyncio.sleep(TELLING_S)
        self._signal(signal.SIGKILL)
        return True

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bool, int | None]:
        """What the child says until it is gone: (whether it was ready, the status it refuses to go on with)."""
        ready, refused = False, None
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                word, _, value = line.decode(errors="replace").strip().partition(" ")
                if word == "ready":
                    if not self.wanted:
                        self._standin.close()
                        ready, self.state = True, "serving"
                    writer.write(b"go\n")
                elif word == "alive":
                    self._alive.set()
                elif word == "refused":
                    refused = int(value)
        return ready, refused


class StandIn:
    """Answers on the parent's address while no child does: alive, not ready, try again."""

    def __init__(self, listener: socket.socket, state: Callable[[], str]) -> None:
        self.listener, self.state = listener, state
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()  # connections that have not asked anything

    # Not asyncio's server: closing that drops, without a word, connections that it accepted in the same moment (3.11).

    def open(self) -> None:
        """Accept connections."""
        asyncio.get_running_loop().add_reader(self.listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop accepting. Who connected and does not ask soon is hung up on, to ask the child instead."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listener.fileno())
        for task in self._idle:
            loop.call_later(IDLE_S, self._hang_up, task)

    def _hang_up(self, task: asyncio.Task[None]) -> None:
        if task in self._idle:
            task.cancel()

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:  # who knocked is gone, or there are too many open files: the next one may do
            return
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._answer(connection))
        for group in (self._tasks, self._idle):
            group.add(task)
            task.add_done_callback(group.discard)

    async def _answer(self, connection: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(HEAD_S):
                reader, writer = await asyncio.open_connection(sock=connection, limit=HEAD_BYTES)
                first = await reader.read(1)
                self._idle.discard(task)
                head = first + await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head, self.state()))
                await writer.drain()
                writer.write_eof()
                # A connection closed with a body unread is reset, and the answer with it.
                while await reader.read(64 * 1024):
                    pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # an answer is owed only to a whole request
        finally:
            connection.close()


def _response(head: bytes, state: str) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    body: Any = {"status": "alive" if path == b"/health" else "ready"}
    status = "200 OK"
    # `serving`: who asks connected just before the child took over.
    if path != b"/health" and not (path == b"/ready" and state == "serving"):
        message = f"no model serves now ({state}); try again"
        status, body = (
            "503 Service Unavailable",
            {"error": {"message": message, "type": "overloaded_error", "param": None}},
        )
    text = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(text)}"]
    lines += ["Connection: close", *(["Retry-After: 2"] if status.startswith("503") else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == b"HEAD" else text)


def supervise(
    command: Sequence[str], listener: socket.socket, *, drain_s: float = DRAIN_S, hung_s: float = HUNG_S
) -> int:
    """Keep `command` serving behind `listener`, which is bound; the exit status once it was told to stop."""

    async def main() -> int:
        return await Supervisor(command, listener, drain_s=drain_s, hung_s=hung_s).run()

    return asyncio.run(main())
