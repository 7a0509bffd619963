"""The engine of models that write: rows of all requests are written together, and join and leave between two tokens."""

import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch

from ingot.model.generate import end_ids, make_rows
from ingot.model.generate_cache import plain, token_bytes
from ingot.model.kinds import pad_id
from ingot.model.running import Batch, accepted, alike, begin, joined, pass_tokens, step, unfinished
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Row, Sampling, choose
from ingot.serving.engine import Limits, Load, Meter, now
from ingot.serving.record import current
from ingot.serving.worker import Job, Ticket, Worker

# Rows enter together: each entry is a pass of its own through all weights. Unless so many of those that run could be
# joined, waiting rows let so many tokens pass.
ENTRY_SHARE = 8
ENTRY_TOKENS = 4


class Writing(Ticket):
    """Answers to be written. `todo`: rows that have not begun; `last`: when its rows had their last token. `record`: of
    the request, which has used the tokens that were run and written for it, also where it leaves before its answer.
    """

    def __init__(self, rows: list[Row], streaming: bool, deadline: float | None) -> None:
        super().__init__(sum(map(_most, rows)), deadline)
        self.todo, self.streaming, self.last, self.record = deque(rows), streaming, 0.0, current()


def _most(row: Row) -> int:
    """Tokens that `row` may come to."""
    return len(row.prompt) + row.sampling.max_new_tokens


class ContinuousEngine(Worker):
    """See `Engine`. A model whose cache cannot be joined writes one batch of rows after the other."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        model: Any = runtime.model
        self._known = accepted(model)
        self._joining = "position_ids" in self._known and plain(model.config)
        self._ends, self._pad = end_ids(model, runtime.tokenizer), pad_id(runtime.tokenizer)
        self._batch: Batch | None = None
        self._of: dict[int, Writing] = {}  # by id() of each row that runs
        self._patience = 0
        self._pass_tokens = pass_tokens(next(model.parameters()).device)
        self.cache_tokens = (limits or Limits()).cache_tokens or free_tokens(model)
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
            while left:
                index, item = await ticket.next()
                left -= isinstance(item, Generation)
                yield index, item

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
            if _most(row) > self.cache_tokens:
                wanted = f"{len(row.prompt)} prompt tokens + {row.sampling.max_new_tokens} new tokens"
                raise InputError("max_tokens", f"{wanted}: this server holds {self.cache_tokens}")
        return Writing(rows, streaming, deadline)

    def load(self) -> Load:
        """What there is to do."""
        with self._changed:
            queue = sum(not ticket.begun for ticket in self._waiting)
            waiting = sum(ticket.tokens for ticket in self._waiting)
        batch = self._batch
        held = 0 if batch is None else batch.mask.numel()
        return Load(queue, len(self._of), held, waiting, self.cache_tokens)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        self.runtime.generate([self.runtime.prompt_ids("a")], max_new_tokens=2)

    def _turn(self) -> None:
        with self._changed:
            if not self._waiting and self._batch is None:
                self._changed.wait(0.1)
            job = next((ticket for ticket in self._waiting if isinstance(ticket, Job)), None)
            if job is not None:
                self._waiting.remove(job)
            self._drop_left()
            entering = self._entering()
        if job is not None:
            self._perform(job)
        with torch.inference_mode():
            for places in alike([len(row.prompt) for row in entering], self._pass_tokens):
                self._write([entering[place] for place in places])
            if self._batch is not None and not entering:
                self._write([])

    def _drop_left(self) -> None:
        """Forget what nobody waits for."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
        if self._batch is None:
            return
        for row in self._batch.rows:
            if self._of[id(row)].left:
                row.finish_reason = "left"
                del self._of[id(row)]
        with torch.inference_mode():
            self._batch = unfinished(self._batch)

    def _entering(self) -> list[Row]:
        """The rows that begin now, in the order of arrival."""
        tickets = [ticket for ticket in self._waiting if isinstance(ticket, Writing)]
        running = [] if self._batch is None else self._batch.rows
        if not tickets or (self._batch is not None and not self._batch.open):
            return []
        free, wanted = self.limits.rows - len(running), sum(len(ticket.todo) for ticket in tickets)
        self._patience += 1
        if running and min(free, wanted) < len(running) // ENTRY_SHARE and self._patience <= ENTRY_TOKENS:
            return []
        chosen: list[Row] = []
        most, longest = max(map(_most, running), default=0), 0
        budget = self.limits.prompt_tokens if self._joining else self.cache_tokens
        for ticket in tickets:
            while ticket.todo and len(chosen) < free:
                row = ticket.todo[0]
                most, longest = max(most, _most(row)), max(longest, len(row.prompt))
                rows = len(chosen) + 1
                if (chosen and rows * longest > budget) or (len(running) + rows) * most > self.cache_tokens:
                    return self._begun(chosen)
                chosen.append(ticket.todo.popleft())
                ticket.begun, ticket.tokens = True, ticket.tokens - _most(row)
                self._of[id(row)] = ticket
        return self._begun(chosen)

    def _begun(self, chosen: list[Row]) -> list[Row]:
        """`chosen`, and requests of which all rows have begun no longer wait."""
        if chosen:
            self._patience = 0
            self._waiting = deque(t for t in self._waiting if not isinstance(t, Writing) or t.todo)
        return chosen

    def _write(self, entering: list[Row]) -> None:
        """One token for the rows that enter, else for those that run."""
        began, model = time.perf_counter(), self.runtime.model
        running = None if entering else self._batch
        try:
            if running is None:
                new = begin(model, self._known, entering, self._pad, self._joining)
            else:
                step(model, self._known, running)
                new, self._batch = running, None
            tokens = choose(new.logits, new.rows)
        except Exception as error:
            self._break(entering if running is None else running.rows, error)
            return
        self._failures = 0
        for row, token in zip(new.rows, tokens, strict=True):
            self._push(row, token)
        self._measure(new.rows, bool(entering), time.perf_counter() - began)
        for row in new.rows:
            if row.finish_reason:
                self._of.pop(id(row), None)
        self._batch = joined(self._batch, unfinished(new))

    def _push(self, row: Row, token: int) -> None:
        """Give `row` its token, and its reader what came of it."""
        ticket = self._of[id(row)]
        ticket.record.new_tokens += 1
        try:
            row.push(token, self._ends)
            if ticket.streaming and (piece := row.piece()):
                self._tell(ticket, (row.index, piece))
            if row.finish_reason:
                self._tell(ticket, (row.index, row.result()))
        except Exception as error:  # of this row alone
            row.finish_reason = "failed"
            ticket.left = True
            self._tell(ticket, error)

    def _measure(self, rows: list[Row], entering: bool, seconds: float) -> None:
        self._paced(len(rows), seconds)
        self.meter.written(len(rows))
        moment = now()
        for ticket in {id(one): one for one in (self._of[id(row)] for row in rows)}.values():
            if entering and not ticket.last:
                self.meter.first(moment - ticket.entered)
            elif not entering:
                self.meter.between(moment - ticket.last, 1)
            ticket.last = moment
        if entering:
            for row in rows:
                self.meter.entered(len(row.prompt))
                self._of[id(row)].record.prompt_tokens += len(row.prompt)

    def _break(self, rows: list[Row], error: Exception) -> None:
        """The model failed: so do the rows that it was run on."""
        self._failures += 1
        if self._batch is not None and self._batch.rows is rows:
            self._batch = None
        for row in rows:
            ticket = self._of.pop(id(row))
            if not ticket.left:
                ticket.left = True
                self._tell(ticket, error)

    def _busy(self) -> bool:
        return self._batch is not None or bool(self._waiting)

    def _abandon(self, error: Exception) -> None:
        super()._abandon(error)
        self._of.clear()
        self._batch = None


def free_tokens(model: Any) -> int:
    """Tokens whose keys and values a quarter of the free memory holds: 4,096 to 1,048,576."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(4096, min(1_048_576, free // 4 // token_bytes(model)))
