"""What the serving process and its supervisor tell each other. Standard library only."""

import contextlib
import os
import signal
import socket
import threading
from typing import Self

FDS_VARIABLE = "INGOT_SERVE_FDS"


class Parent:
    """The supervisor, as seen by the serving process. `listener`: the address that both share."""

    def __init__(self, listener: socket.socket, control: socket.socket) -> None:
        self.listener, self._control = listener, control
        self._go = threading.Event()

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
        parent = cls(listener, control)
        threading.Thread(target=parent._hear, name="ingot-supervisor", daemon=True).start()
        return parent

    def ready(self) -> None:
        """Say that requests would be answered now, and wait until the supervisor leaves them to this process."""
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
        # Nobody could stop this process any more, or start it again.
        self._go.set()
        os.kill(os.getpid(), signal.SIGTERM)
