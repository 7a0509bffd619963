"""What engines of models that write share: how a request's rows come in, and how its caller hears of their tokens."""

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ingot.model.generate import end_ids, make_rows
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Row, Sampling
from ingot.serving.engine import Limits, Meter
from ingot.serving.record import current
from ingot.serving.worker import Ticket, Worker


class Writing(Ticket):
    """Answers to be written. `todo`: rows that have not begun; `last`: when its rows had their last token. `record`: of
    the request, which has used the tokens that were run and written for it, also where it leaves before its answer.
    `asked`: each row's sampling, as an engine that is not ours takes it.
    """

    asked: Sequence[Any] = ()

    def __init__(self, rows: list[Row], streaming: bool, deadline: float | None) -> None:
        super().__init__(sum(map(most_tokens, rows)), deadline)
        self.todo, self.streaming, self.last, self.record = deque(rows), streaming, 0.0, current()


def most_tokens(row: Row) -> int:
    """Tokens that `row` may come to."""
    return len(row.prompt) + row.sampling.max_new_tokens


class WritingWorker(Worker):
    """See `Engine`. `cache_tokens`: most that a row may come to."""

    cache_tokens: int

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        self._ends = end_ids(runtime.model, runtime.tokenizer)
        self._of: dict[int, Writing] = {}  # by id() of each row that runs
        if limits is not None and limits.answer_tokens is not None:  # who asks for no number gets what is allowed
            runtime.default_new_tokens = min(runtime.default_new_tokens, limits.answer_tokens)
        super().__init__(runtime, limits, meter)

    # --- from the event loop -----------------------------------------------------------------------------------------

    async def answer(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Runtime.answer`, each row written beside whatever else is."""

        def read(runtime: Runtime) -> tuple[list[list[int]], Sampling]:
            asked, given = runtime.read(rows, params)
            prompts = [runtime.prompt_of(row) for row in asked]
            return prompts, runtime.sampling(prompts, runtime.sampling_params(given))

        prompts, sampling = await self.prepare(read)
        answers = await self.write(prompts, [sampling] * len(prompts), deadline=deadline)
        return [{"output_string": answer.text} for answer in answers]

    async def write(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> list[Generation]:
        """Answers to prompts of token ids, in their order."""
        found: dict[int, Generation] = {}
        with self._admitted(self._writing(prompts, samplings, False, deadline)) as ticket:
            while len(found) < len(prompts):
                index, answer = await ticket.next()
                found[index] = answer
        return [found[index] for index in range(len(prompts))]

    async def stream(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """(index, piece), and at the end of each row (index, Generation)."""
        left = len(prompts)
        with self._admitted(self._writing(prompts, samplings, True, deadline)) as ticket:
            while True:
                index, item = await ticket.next()
                left -= isinstance(item, Generation)
                if not left:
                    break
                yield index, item
        yield index, item  # out there: who has the last one may close this, and has not left early

    def _writing(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], streaming: bool, deadline: float | None
    ) -> Writing:
        rows = make_rows(self.runtime.model, self.runtime.tokenizer, prompts, samplings)
        longest = self.limits.answer_tokens
        for row in rows:
            if longest is not None and row.sampling.max_new_tokens > longest:
                raise InputError(
                    "max_tokens", f"{row.sampling.max_new_tokens} new tokens: this server writes {longest} at most"
                )
            if most_tokens(row) > self.cache_tokens:
                wanted = f"{len(row.prompt)} prompt tokens + {row.sampling.max_new_tokens} new tokens"
                raise InputError("max_tokens", f"{wanted}: this server holds {self.cache_tokens}")
        return Writing(rows, streaming, deadline)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _enter(self, ticket: Writing) -> Row:
        """The next row of `ticket`, which now runs."""
        row = ticket.todo.popleft()
        ticket.begun, ticket.tokens = True, ticket.tokens - most_tokens(row)
        self._of[id(row)] = ticket
        return row

    def _begun(self, chosen: list[Row]) -> list[Row]:
        """`chosen`, and requests of which all rows have begun no longer wait."""
        if chosen:
            self._waiting = deque(t for t in self._waiting if not isinstance(t, Writing) or t.todo)
        return chosen

    def _push(self, row: Row, token: int | None, ended: str = "") -> None:
        """Give `row` its token, and its reader what came of it. `ended`: why it ends, where its own rules say nothing;
        then there need not be a token.
        """
        ticket = self._of[id(row)]
        try:
            if token is not None:
                ticket.record.new_tokens += 1
                row.push(token, self._ends)
            row.finish_reason = row.finish_reason or ended
            if ticket.streaming and (piece := row.piece()):
                self._tell(ticket, (row.index, piece))
            if row.finish_reason:
                self._tell(ticket, (row.index, row.result()))
        except Exception as error:  # of this row alone
            row.finish_reason = "failed"
            ticket.left = True
            self._tell(ticket, error)
