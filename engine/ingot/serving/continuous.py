"""The engine of models that write: rows of all requests are written together, and join and leave between two tokens."""

import time
from collections import deque
from typing import Any

import torch

from ingot.model.generate_cache import plain, token_bytes
from ingot.model.kinds import pad_id
from ingot.model.memory import free_bytes, give_back
from ingot.model.packed import pack
from ingot.model.running import Batch, accepted, alike, begin, joined, pass_tokens, step, unfinished
from ingot.model.runtime import Runtime
from ingot.model.sampling import Row, choose
from ingot.serving.engine import Limits, Load, Meter, now
from ingot.serving.worker import Job
from ingot.serving.writing import Writing, WritingWorker, most_tokens

# Rows enter together: each entry is a pass of its own through all weights. Unless so many of those that run could be
# joined, waiting rows let so many tokens pass.
ENTRY_SHARE = 8
ENTRY_TOKENS = 4


class ContinuousEngine(WritingWorker):
    """See `Engine`. A model whose cache cannot be joined writes one batch of rows after the other."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        model: Any = runtime.model
        pack(model)
        self._known = accepted(model)
        self._joining = "position_ids" in self._known and plain(model.config)
        self._pad = pad_id(runtime.tokenizer)
        self._batch: Batch | None = None
        self._patience = 0
        self._wrote = False  # since memory was last given back
        self._pass_tokens = pass_tokens(next(model.parameters()).device)
        self.cache_tokens = (limits or Limits()).cache_tokens or free_tokens(model)
        super().__init__(runtime, limits, meter)

    # --- from the event loop -----------------------------------------------------------------------------------------

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
            idle = not self._waiting and self._batch is None and not self._changed.wait(0.1)
            job = next((ticket for ticket in self._waiting if isinstance(ticket, Job)), None)
            if job is not None:
                self._waiting.remove(job)
            self._drop_left()
            if entering := self._entering():
                self._patience = 0
        if job is not None:
            self._perform(job)
        if idle and self._wrote:
            self._wrote = False
            give_back()
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
        most, longest = max(map(most_tokens, running), default=0), 0
        budget = self.limits.prompt_tokens if self._joining else self.cache_tokens
        for ticket in tickets:
            while ticket.todo and len(chosen) < free:
                row = ticket.todo[0]
                most, longest = max(most, most_tokens(row)), max(longest, len(row.prompt))
                rows = len(chosen) + 1
                if (chosen and rows * longest > budget) or (len(running) + rows) * most > self.cache_tokens:
                    return self._begun(chosen)
                chosen.append(self._enter(ticket))
        return self._begun(chosen)

    def _write(self, entering: list[Row]) -> None:
        """One token for the rows that enter, else for those that run."""
        began, model, self._wrote = time.perf_counter(), self.runtime.model, True
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

    def _measure(self, rows: list[Row], entering: bool, seconds: float) -> None:
        self._paced(len(rows), seconds)
        self.meter.written(len(rows))
        moment = now()
        for ticket in {id(one): one for one in (self._of[id(row)] for row in rows)}.values():
            if entering and not ticket.last:
                self.meter.first(moment - ticket.entered)
                ticket.record.first()
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
    free = free_bytes(next(model.parameters()).device) or 0
    return max(4096, min(1_048_576, free // 4 // token_bytes(model)))
