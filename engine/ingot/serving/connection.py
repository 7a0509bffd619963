"""A connection with a client: who is slow to ask, or does not take what was answered, cannot hold it for ever."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # for a request's whole head, from the connection or from the head's first byte on
LINGER_S = 10.0  # to take the rest of an answer, once the connection is to be closed
LOOK_S = 1.0  # between two looks at each connection


class Patient(H11Protocol):
    """uvicorn's protocol with two deadlines that it lacks. Always h11, also where httptools is installed, which takes
    a head of any length.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there, and has to ask soon."""
        super().connection_made(transport)
        self._closing_since: float | None = None
        self._waiting_since: float | None = self.loop.time()
        self._timer = self.loop.call_later(LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a head or a body."""
        super().data_received(data)
        # A body whose request is answered already counts as a next head: nobody waits for the rest of it.
        if self.cycle is not None and not self.cycle.response_complete:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self.loop.time()

    def _look(self) -> None:
        moment = self.loop.time()
        if self.transport.is_closing():
            self._closing_since = self._closing_since or moment
            if moment - self._closing_since >= LINGER_S:
                self.transport.abort()  # closing alone waits until all is taken
                return
        elif self._waiting_since is not None and moment - self._waiting_since >= HEAD_S:
            self.transport.close()
        self._timer = self.loop.call_later(LOOK_S, self._look)
