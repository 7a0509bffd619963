"""The engine of models that answer a row by one pass: rows of several requests are answered together."""

from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ingot.model.generate import context_limit
from ingot.model.running import alike
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.model.task_schemas import TASKS
from ingot.serving.engine import Limits, Load, Meter, now
from ingot.serving.passes import Passes, Threads
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
    request, which has used the tokens that were run for it, also where it leaves before its answer. `new`: tokens that
    may be written for each row.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], deadline: float | None, new: int = 0
    ) -> None:
        sizes = [estimated_tokens(row) + new for row in rows]
        super().__init__(sum(sizes), deadline)
        self.rows, self.todo, self.record, self.new = rows, deque(enumerate(sizes)), current(), new
        self.params = {name: value for name, value in params.items() if value is not None}
        self.found: dict[int, dict[str, Any]] = {}

    def take(self, place: int, size: int) -> None:
        """The row at `place` begins."""
        self.todo.remove((place, size))
        self.begun, self.tokens = True, self.tokens - size
        self.record.prompt_tokens += size - self.new

    @property
    def answered(self) -> bool:
        """Whether every row has its answer."""
        return len(self.found) == len(self.rows)


@dataclass
class Group:
    """Rows of similar length that run together: `asked` has the request and the place of each."""

    asked: list[tuple[Asking, int]]
    params: dict[str, Any]
    sizes: list[int]
    began: float = 0.0

    @property
    def tickets(self) -> list[Asking]:
        """The requests that have a row in it."""
        return list(dict.fromkeys(ticket for ticket, _ in self.asked))

    def of(self, ticket: Asking) -> "Group":
        """The part of one request."""
        mine = [place for place, (one, _) in enumerate(self.asked) if one is ticket]
        return Group([self.asked[place] for place in mine], self.params, [self.sizes[place] for place in mine])


class StaticEngine(Worker):
    """See `Engine`. A pass begins as soon as there is room: up to `batch_tokens` of rows that ask for the same."""

    def __init__(
        self,
        runtime: Runtime,
        limits: Limits | None = None,
        meter: Meter | None = None,
        passes: Passes | None = None,
    ) -> None:
        self._company = False
        self._running: dict[Future[list[dict[str, Any]]], Group] = {}
        self._finished: list[Future[list[dict[str, Any]]]] = []
        self._again: deque[Group] = deque()  # parts of a group that failed
        self._passes = passes or Threads(runtime)
        super().__init__(runtime, limits, meter)

    async def answer(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Runtime.answer`, together with others' rows."""
        if not rows:
            return await self.prepare(lambda runtime: runtime.answer([], params))
        # Read by itself: in a pass with others' rows a wrong parameter would be theirs, too (True is equal to 1).
        given = self.runtime.read([], params)[1]
        params = self._bounded(params, given.get("max_tokens"))
        with self._admitted(Asking(rows, params, deadline, params.get("max_tokens") or 0)) as ticket:
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

    def _bounded(self, params: dict[str, Any], wanted: int | None) -> dict[str, Any]:
        """`params` with the number of new tokens, at most as many as the server writes. Raises InputError."""
        if all(param.name != "max_tokens" for param in TASKS[self.runtime.task].params):
            return params
        own, longest = self.runtime.default_new_tokens, self.limits.answer_tokens
        if wanted is None:
            most = (own, context_limit(self.runtime.model), longest)
            return params | {"max_tokens": min(n for n in most if n is not None)}
        if longest is not None and wanted > longest:
            raise InputError("max_tokens", f"{wanted} new tokens: this server writes {longest} at most")
        return params

    def _unable(self) -> InputError:
        return InputError("model", f"this model is for {self.runtime.task}: it does not write text token by token")

    def load(self) -> Load:
        """What there is to do."""
        with self._changed:
            return Load(
                len(self._waiting),
                sum(len(group.asked) for group in list(self._running.values())),
                0,
                sum(one.tokens for one in self._waiting),
                0,
            )

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        mask = str(getattr(self.runtime.tokenizer, "mask_token", None) or "")
        example = TASKS[self.runtime.task].example.items()
        row = {name: it.replace("[MASK]", mask) if isinstance(it, str) else it for name, it in example}
        self._passes.prove(row)

    def _turn(self) -> None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(0.1)
            first = self._waiting[0] if self._waiting else None
            if isinstance(first, Job):
                self._waiting.popleft()
        if isinstance(first, Job):
            self._perform(first)
        elif first is not None or self._running:
            self._answer()

    def _answer(self) -> None:
        """Answer what waits and what comes meanwhile, until nothing runs; a job that wants the model ends this."""
        while not self._aborting.is_set():
            with self._changed:
                while not self._finished and (left := self._patience()) > 0:
                    self._changed.wait(left)
                finished, self._finished = self._finished, []
                group = None if finished else self._next()
            for job in finished:
                self._end_pass(job)
            self._flush()
            if group is not None:
                self._begin(group)
            elif not finished and not self._running:
                return

    def _patience(self) -> float:
        """Seconds until a pass may begin or something else is to be done."""
        first = self._waiting[0] if self._waiting else None
        if not (self._again or isinstance(first, Asking)) or len(self._running) >= self._passes.beside:
            return 0.1 if self._running else 0.0
        # Nobody gains by waiting for company that was not there the last time.
        if first is None or self._again or not self._company or self._closing.is_set():
            return 0.0
        return 0.0 if self._full() else first.entered + self.limits.gather_s - now()

    def _full(self) -> bool:
        return sum(one.tokens for one in self._waiting) >= self.limits.batch_tokens

    def _stirs(self) -> bool:
        """Not while every pass runs, nor while an earlier ticket waits for company: to wake a thread takes the caller
        0.1 to 0.3 ms, and each that it wakes takes Python's lock from it.
        """
        return len(self._running) < self._passes.beside and (len(self._waiting) == 1 or self._full())

    def _next(self) -> Group | None:
        """Rows that ask for the same as the oldest waiting one and are about as long; None: nothing may begin."""
        if len(self._running) >= self._passes.beside:
            return None
        while self._again:
            if not (group := self._again.popleft()).asked[0][0].left:
                return group
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
        first = self._waiting[0] if self._waiting else None
        if not isinstance(first, Asking):
            return None
        alike_ones = [one for one in self._waiting if isinstance(one, Asking) and one.params == first.params]
        room, chosen = self._room(alike_ones), list[tuple[Asking, int, int]]()
        for ticket, place, size in ((one, *row) for one in alike_ones for row in one.todo):
            if chosen and size > room:
                break
            chosen.append((ticket, place, size))
            room -= size
        taken = chosen
        if self._passes.spare is not None:
            groups = alike([size for _, _, size in chosen], self._passes.spare)
            taken = [chosen[index] for index in next((group for group in groups if 0 in group), [])]
        for ticket, place, size in taken:
            ticket.take(place, size)
            self.meter.entered(size - ticket.new)
        self._company = len(alike_ones) > 1 or bool(self._running)
        self._waiting = deque(one for one in self._waiting if not isinstance(one, Asking) or one.todo)
        return Group([(ticket, place) for ticket, place, _ in taken], first.params, [size for *_, size in taken])

    def _room(self, waiting: Sequence[Asking]) -> int:
        """Tokens that a pass may take. Rows of any length share one without padding, so the first must not take all."""
        if self._passes.spare is not None:
            return self.limits.batch_tokens
        share = sum(one.tokens for one in waiting) // (self._passes.beside - len(self._running))
        return min(self.limits.batch_tokens, share)

    def _begin(self, group: Group) -> None:
        group.began = self._turned = now()
        rows, tickets = [ticket.rows[place] for ticket, place in group.asked], group.tickets

        def stopped() -> bool:
            self._turned = now()  # what still asks has not hung
            return self._aborting.is_set() or all(ticket.left for ticket in tickets)

        job = self._passes.begin(rows, group.params, stopped, alone=not self._running and not self._waiting)
        self._running[job] = group
        job.add_done_callback(self._arrive)

    def _arrive(self, job: Future[list[dict[str, Any]]]) -> None:
        with self._changed:
            self._finished.append(job)
            self._changed.notify_all()

    def _end_pass(self, job: Future[list[dict[str, Any]]]) -> None:
        """Hand out what a pass found. Where it failed, the rows of each request run by themselves."""
        beside, group, self._turned = len(self._running), self._running.pop(job), now()
        if (error := job.exception()) is not None:
            if len(group.tickets) > 1:
                self._again.extend(group.of(ticket) for ticket in group.tickets)
            elif not group.tickets[0].left:
                self._ended(group.tickets[0], error)
            return
        self._failures = 0
        self._paced(sum(group.sizes), (self._turned - group.began) / beside)
        for (ticket, place), answer in zip(group.asked, job.result(), strict=True):
            ticket.found[place] = answer
            if ticket.new:
                written = estimated_tokens(answer)
                ticket.record.new_tokens += written
                self.meter.written(written)
        self._hand_out(group.tickets)

    def _hand_out(self, tickets: Iterable[Asking]) -> None:
        """Tell the answers of requests whose last row has been answered."""
        for ticket in tickets:
            if not ticket.left and ticket.answered:
                self.meter.first(now() - ticket.entered)
                ticket.record.first()
                self._tell(ticket, [ticket.found[place] for place in range(len(ticket.rows))])

    def _ended(self, ticket: Asking, error: BaseException) -> None:
        """`ticket` has failed: its other rows are not asked."""
        if not isinstance(error, InputError):
            self._failures += 1
        ticket.todo.clear()
        ticket.left = True
        self._tell(ticket, error)

    def _busy(self) -> bool:
        return bool(self._waiting or self._running)

    def close(self, timeout_s: float = 10.0, *, drain_s: float = 0.0) -> None:
        """As `Worker.close`."""
        super().close(timeout_s, drain_s=drain_s)
        self._passes.close()
