"""The engine of models that answer a row by one pass: rows of several requests are answered together."""

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ingot.model.running import alike, pass_tokens
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.model.task_schemas import TASKS
from ingot.serving.engine import Limits, Load, Meter, now
from ingot.serving.record import current
from ingot.serving.worker import Job, Ticket, Worker

CHARACTERS = 4  # a token, where nothing has been encoded yet


def estimated_tokens(value: Any) -> int:
    """About how many tokens the text in a row has."""
    if isinstance(value, str):
        return len(value) // CHARACTERS + 1
    if isinstance(value, dict):
        return sum(map(estimated_tokens, value.values()))
    return sum(map(estimated_tokens, value)) if isinstance(value, list) else 0


class Asking(Ticket):
    """Rows to be answered. `todo`: places and sizes of those that wait; `found`: answers by place. `record`: of the
    request, which has used the tokens that were run for it, also where it leaves before its answer.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], params: dict[str, Any], deadline: float | None) -> None:
        sizes = [estimated_tokens(row) for row in rows]
        super().__init__(sum(sizes), deadline)
        self.rows, self.todo, self.record = rows, deque(enumerate(sizes)), current()
        self.params = {name: value for name, value in params.items() if value is not None}
        self.found: dict[int, dict[str, Any]] = {}


class StaticEngine(Worker):
    """See `Engine`. Each turn answers up to `batch_tokens` of rows that ask for the same."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        model: Any = runtime.model
        self._running, self._company = 0, False
        self._pass_tokens = pass_tokens(next(model.parameters()).device)
        super().__init__(runtime, limits, meter)

    async def answer(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Runtime.answer`, together with others' rows."""
        with self._admitted(Asking(rows, params, deadline)) as ticket:
            answers: list[dict[str, Any]] = await ticket.next()
            return answers

    async def write(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> list[Generation]:
        """Raises InputError: these models write no text token by token."""
        raise self._unable()

    async def stream(
        self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], *, deadline: float | None = None
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Raises InputError, as `write`."""
        raise self._unable()
        yield  # makes this a generator

    def _unable(self) -> InputError:
        return InputError("model", f"this model is for {self.runtime.task}: it does not write text token by token")

    def load(self) -> Load:
        """What there is to do."""
        with self._changed:
            return Load(len(self._waiting), self._running, 0, sum(one.tokens for one in self._waiting), 0)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        mask = str(getattr(self.runtime.tokenizer, "mask_token", None) or "")
        example = TASKS[self.runtime.task].example.items()
        row = {name: it.replace("[MASK]", mask) if isinstance(it, str) else it for name, it in example}
        self.runtime.answer([row], {})

    def _turn(self) -> None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(0.1)
            if not self._waiting:
                return
            # Nobody gains by waiting for company that was not there the last time.
            if self._company and not self._full() and not self._closing.is_set():
                until = now() + self.limits.gather_s
                while (left := until - now()) > 0 and not self._full():
                    self._changed.wait(left)
            first = self._waiting[0] if self._waiting else None
            if isinstance(first, Job):
                self._waiting.popleft()
            parts = [] if first is None or isinstance(first, Job) else self._parts()
        if isinstance(first, Job):
            self._perform(first)
        elif parts:
            self._company = len(parts) > 1 or bool(self._waiting)
            self._answer(parts)

    def _full(self) -> bool:
        return sum(one.tokens for one in self._waiting) >= self.limits.batch_tokens

    def _parts(self) -> list[tuple[Asking, list[int]]]:
        """The requests whose turn it is, each with places of its rows: what the first one asks for, in order."""
        parts: list[tuple[Asking, list[int]]] = []
        room = self.limits.batch_tokens
        for ticket in list(self._waiting):
            if ticket.left:
                self._waiting.remove(ticket)
                continue
            if not isinstance(ticket, Asking):
                continue
            first = parts[0][0] if parts else ticket
            if ticket.params != first.params:
                continue
            places: list[int] = []
            while ticket.todo and (room >= ticket.todo[0][1] or not (parts or places)):
                place, size = ticket.todo.popleft()
                places.append(place)
                room -= size
                ticket.tokens -= size
                ticket.record.prompt_tokens += size
            if places or not ticket.todo:
                ticket.begun = True
                parts.append((ticket, places))
            if not ticket.todo:
                self._waiting.remove(ticket)
            if room <= 0:
                break
        return parts

    def _answer(self, parts: list[tuple[Asking, list[int]]]) -> None:
        """Answer these rows together; where that fails, those of each request by themselves."""
        asked = [(ticket, place) for ticket, places in parts for place in places]
        rows = [ticket.rows[place] for ticket, place in asked]
        sizes = [estimated_tokens(row) for row in rows]
        self._running, began = len(rows), now()
        try:
            for group in alike(sizes, self._pass_tokens):
                answers = self.runtime.answer([rows[place] for place in group], parts[0][0].params)
                for place, answer in zip(group, answers, strict=True):
                    ticket, row = asked[place]
                    ticket.found[row] = answer
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    self._answer([part])
                return
            self._ended(parts[0][0], error)
            return
        finally:
            self._running = 0
        self._failures = 0
        self._paced(sum(sizes), now() - began)
        for ticket, _ in parts:
            if len(ticket.found) == len(ticket.rows):
                self.meter.first(now() - ticket.entered)
                ticket.record.first()
                self._tell(ticket, [ticket.found[place] for place in range(len(ticket.rows))])

    def _ended(self, ticket: Asking, error: Exception) -> None:
        """`ticket` has failed: its other rows are not asked."""
        if not isinstance(error, InputError):
            self._failures += 1
        ticket.todo.clear()
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self._tell(ticket, error)

    def _busy(self) -> bool:
        return bool(self._waiting)
