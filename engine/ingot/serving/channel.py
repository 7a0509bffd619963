"""What the serving process and its supervisor tell each other. Standard library only."""

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Self

FDS_VARIABLE = "INGOT_SERVE_FDS"


class Parent:
    """The supervisor, as seen by the serving process. `listener`: the address that both share."""

    def __init__(self, listener: socket.socket, control: socket.socket) -> None:
        self.listener, self._control = listener, control
        self._go = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_environment(cls) -> Self | None:
        """The supervisor that started this process; None where none did. To be asked once: it clears the variable."""
        given = os.environ.pop(FDS_VARIABLE, "")
        if not given:
            return None
        listener, control = (socket.socket(fileno=int(fd)) for fd in given.split(","))
        for one in (listener, control):
            one.set_inheritable(False)  # not for processes that a library starts
        control.setblocking(True)
        # The supervisor's, before it kills a process that hangs: every thread's place in the code, on standard error.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        parent = cls(listener, control)
        threading.Thread(target=parent._hear, name="ingot-supervisor", daemon=True).start()
        return parent

    def ready(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Say that requests would be answered now, and wait until the supervisor leaves them to this process. Whether
        it still answers is asked from then on, and said by `loop`, which answers requests.
        """
        self._loop = loop
        self._control.sendall(b"ready\n")
        self._go.wait()

    def refuse(self, status: int) -> None:
        """Say that starting again would not help: a user has to mend something first."""
        with contextlib.suppress(OSError):
            self._control.sendall(f"refused {status}\n".encode())

    def _hear(self) -> None:
        with contextlib.suppress(OSError):
            while heard := self._control.recv(64):
                if b"go" in heard:
                    self._go.set()
                if b"alive?" in heard:
                    self._call_from_loop(self._say_alive)
        # Nobody could stop this process any more, or start it again.
        self._go.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def _call_from_loop(self, function: Callable[[], None]) -> None:
        if self._loop is None:
            function()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: this process ends
                self._loop.call_soon_threadsafe(function)

    def _say_alive(self) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(b"alive\n")
