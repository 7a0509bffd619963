"""The engine of models that vLLM runs.

Prompts and answers are token ids of our own tokenizer; text, stop strings and ends are decided here, from the tokens,
as by every other engine.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError, Row, Sampling, Told
from ingot.serving.engine import Limits, Load, Meter, Result, now
from ingot.serving.vllm_model import Vllm
from ingot.serving.worker import STUCK_S
from ingot.serving.writing import Writing, WritingWorker, most_tokens

ENDS = {None: "", "stop": "stop", "length": "length"}  # vLLM's reasons -> ours


class VllmEngine(WritingWorker):
    """See `Engine`. vLLM decides which rows it runs together; no more than `limits.rows` are given to it at a time."""

    def __init__(
        self,
        runtime: Runtime,
        vllm: Vllm,
        limits: Limits | None = None,
        meter: Meter | None = None,
        adapter: str | None = None,
    ) -> None:
        self._vllm, self._adapter = vllm, adapter
        self._rows: dict[int, tuple[Row, Future[None]]] = {}  # that run, by id()
        self._arrived: list[tuple[Row, Any]] = []
        self._heard = now()
        self.cache_tokens = (limits or Limits()).cache_tokens or 1 << 60
        vllm.enter(self)
        super().__init__(runtime, limits, meter)

    # --- from the event loop -----------------------------------------------------------------------------------------

    async def run(self, job: Callable[[Runtime], Result], *, deadline: float | None = None) -> Result:
        """Raises InputError: the weights are in vLLM's hands, and it tells no likelihoods of prompts here."""
        raise InputError("echo", "echo: this server's engine, vllm, does not tell it; --engine own does")

    def _writing(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], streaming: bool, deadline: float | None
    ) -> Writing:
        asked = [self._vllm.sampling(one, place, self._ends) for place, one in enumerate(samplings)]
        ticket = super()._writing(prompts, [replace(one, guide=None) for one in samplings], streaming, deadline)
        ticket.asked = asked
        return ticket

    def load(self) -> Load:
        """What there is to do."""
        with self._changed:
            queue = sum(not ticket.begun for ticket in self._waiting)
            waiting = sum(ticket.tokens for ticket in self._waiting)
        rows = [row for row, _ in list(self._rows.values())]
        held = sum(len(row.prompt) + len(row.ids) for row in rows)
        return Load(queue, len(rows), held, waiting, self.limits.cache_tokens or 0)

    def close(self, timeout_s: float = 10.0, *, drain_s: float = 0.0) -> None:
        """As `Engine.close`; vLLM ends with the last engine that uses it."""
        super().close(timeout_s, drain_s=drain_s)
        self._vllm.leave(self)

    # --- on vLLM's thread --------------------------------------------------------------------------------------------

    def _arrive(self, row: Row, said: Any) -> None:
        with self._changed:
            self._arrived.append((row, said))
            self._changed.notify()

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        said: list[Any] = []
        sampling = self._vllm.sampling(Sampling(2), 0, self._ends)
        future = self._vllm.begin(self.runtime.prompt_ids("a"), sampling, self._adapter, said.append)
        try:
            future.result(STUCK_S)
        finally:
            future.cancel()
        if isinstance(said[-1], Exception):
            raise said[-1]

    def _turn(self) -> None:
        with self._changed:
            self._drop_left()
            entering = self._entering()
            if not entering and not self._arrived:
                self._changed.wait(0.1)
            arrived, self._arrived = self._arrived, []
        for row, asked in entering:
            self._heard = self._heard if self._rows else now()
            future = self._vllm.begin(row.prompt, asked, self._adapter, partial(self._arrive, row))
            self._rows[id(row)] = row, future
        if arrived:
            tokens, began = sum(self._hear(row, said) for row, said in arrived), self._heard
            self._heard = now()
            self._paced(tokens, self._heard - began)
        elif self._rows and now() - self._heard > STUCK_S:
            raise TimeoutError("vLLM says nothing of what it is asked")

    def _drop_left(self) -> None:
        """Forget what nobody waits for, and end its work."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
        for row, _ in list(self._rows.values()):
            if self._of[id(row)].left:
                self._end(row)

    def _entering(self) -> list[tuple[Row, Any]]:
        """The rows that begin now, in the order of arrival, with what vLLM is asked of each."""
        if len(self._rows) >= self.limits.rows:
            return []
        chosen: list[tuple[Row, Any]] = []
        held = sum(most_tokens(row) for row, _ in self._rows.values())
        for ticket in [one for one in self._waiting if isinstance(one, Writing) for _ in one.todo]:
            held, running = held + most_tokens(ticket.todo[0]), len(self._rows) + len(chosen)
            if running >= self.limits.rows or (running and held > self.cache_tokens):
                break
            row = self._enter(ticket)
            chosen.append((row, ticket.asked[row.index]))
        self._begun([row for row, _ in chosen])
        return chosen

    def _hear(self, row: Row, said: Any) -> int:
        """Give `row` what vLLM said of it; how many tokens that were."""
        ticket = self._of.get(id(row))
        if ticket is None or ticket.left:
            return 0
        if isinstance(said, Exception) or said.finish_reason not in ENDS:
            self._break(ticket, said if isinstance(said, Exception) else RuntimeError(f"ended: {said.finish_reason}"))
            return 0
        self._failures = 0
        if not row.ids:
            self.meter.entered(len(row.prompt))
            ticket.record.prompt_tokens += len(row.prompt)
        tokens, ended, before = list(said.token_ids), ENDS[said.finish_reason], len(row.ids)
        for place, token in enumerate(tokens):
            if row.sampling.top_logprobs is not None:
                row.told.append(_told(token, said.logprobs[place], row.sampling.top_logprobs))
            self._push(row, token, ended if place == len(tokens) - 1 else "")
            if row.finish_reason:
                break
        if ended and not row.finish_reason:
            self._push(row, None, ended)
        self._measure(ticket, len(row.ids) - before)
        if row.finish_reason:
            self._end(row)
        return len(row.ids) - before

    def _measure(self, ticket: Writing, tokens: int) -> None:
        self.meter.written(tokens)
        moment = now()
        if not ticket.last:
            self.meter.first(moment - ticket.entered)
            ticket.record.first()
        else:
            self.meter.between(moment - ticket.last, 1)
        ticket.last = moment

    def _end(self, row: Row) -> None:
        """`row` runs no longer: where it has not finished, vLLM is told."""
        _, future = self._rows.pop(id(row))
        future.cancel()
        del self._of[id(row)]

    def _break(self, ticket: Writing, error: Exception) -> None:
        """vLLM failed on a row: its request fails."""
        if isinstance(error, ValueError):  # as vLLM says that it does not take a request
            error = InputError("model", "this server's engine does not take this request")
        else:
            self._failures += 1
        ticket.left = True
        self._tell(ticket, error)

    def _busy(self) -> bool:
        return bool(self._rows) or bool(self._waiting)

    def _abandon(self, error: Exception) -> None:
        super()._abandon(error)
        for row, _ in list(self._rows.values()):
            self._end(row)
        self._of.clear()


def _told(token: int, likely: Mapping[int, Any], top: int) -> Told:
    """vLLM's log-probabilities at a place: of the token and the likeliest ones, {id: `logprob` ...}."""
    others = sorted(((one, float(it.logprob)) for one, it in likely.items()), key=lambda it: -it[1])
    return Told(token, float(likely[token].logprob), tuple(others[:top]))
