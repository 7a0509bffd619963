"""The engine of models that answer a row by one pass: rows of several requests are answered together."""

import copy
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

import torch

from ingot.model.generate import context_limit
from ingot.model.running import alike, pass_tokens
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.model.task_schemas import TASKS
from ingot.serving.engine import Limits, Load, Meter, now
from ingot.serving.record import current
from ingot.serving.worker import Job, Ticket, Worker

CHARACTERS = 4  # a token, where nothing has been encoded yet
SEVERAL_PASSES = ("summarization", "translation")
BESIDE = 8  # passes at most; each has a tokenizer of its own


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

    @property
    def answered(self) -> bool:
        """Whether every row has its answer."""
        return len(self.found) == len(self.rows)


class Passes:
    """Groups of rows through one model: on a CPU side by side, each with its share of the threads.

    Threads of one pass wait for each other at every layer, and longest where other programs use the cores, too. 64
    questions to a BERT of 6 layers in 4 groups on 2 busy cores: 19 ms a row one after the other with two threads, 6 ms
    side by side.
    """

    def __init__(self, runtime: Runtime) -> None:
        model: Any = runtime.model
        device = next(model.parameters()).device
        self._runtime, self._spare = runtime, pass_tokens(device)
        alone = device.type != "cpu" or runtime.task in SEVERAL_PASSES
        self._threads = 1 if alone else torch.get_num_threads()
        self._beside = min(self._threads, BESIDE)
        self._free: SimpleQueue[Runtime] = SimpleQueue()
        for _ in range(self._beside):  # a tokenizer refuses a second thread while it is set to cut texts
            self._free.put(Runtime(model, copy.deepcopy(runtime.tokenizer), runtime.about))
        # A thread that has not asked for their number takes that of the process again at its first operation.
        self._pool = ThreadPoolExecutor(self._beside, "ingot-pass", torch.get_num_threads)

    def answers(
        self, rows: Sequence[dict[str, Any]], sizes: Sequence[int], params: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """(places of rows, their answers) of each group, as they come. `sizes`: about how many tokens the rows have."""
        groups = alike(sizes, self._spare)
        if len(groups) == 1 or self._beside == 1:
            for group in groups:
                yield group, self._runtime.answer([rows[place] for place in group], params)
            return
        threads = self._threads // min(len(groups), self._beside)
        jobs = {
            self._pool.submit(self._answer, [rows[place] for place in group], params, threads): group
            for group in groups
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            for job in jobs:
                job.cancel()

    def _answer(self, rows: list[dict[str, Any]], params: dict[str, Any], threads: int) -> list[dict[str, Any]]:
        torch.set_num_threads(threads)  # of this thread
        runtime = self._free.get()
        try:
            return runtime.answer(rows, params)
        finally:
            self._free.put(runtime)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class StaticEngine(Worker):
    """See `Engine`. Each turn answers up to `batch_tokens` of rows that ask for the same."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None) -> None:
        self._running, self._company = 0, False
        self._passes = Passes(runtime)
        super().__init__(runtime, limits, meter)

    async def answer(
        self, rows: Sequence[dict[str, Any]], params: dict[str, Any], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Runtime.answer`, together with others' rows."""
        with self._admitted(Asking(rows, self._bounded(params), deadline)) as ticket:
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

    def _bounded(self, params: dict[str, Any]) -> dict[str, Any]:
        """`params` for at most as many new tokens as the server writes. Raises InputError."""
        longest = self.limits.answer_tokens
        if longest is None or all(param.name != "max_tokens" for param in TASKS[self.runtime.task].params):
            return params
        wanted = self.runtime.read([], params)[1].get("max_tokens")
        if wanted is None:
            own = min(self.runtime.default_new_tokens, context_limit(self.runtime.model) or longest)
            return params | {"max_tokens": min(own, longest)}
        if wanted > longest:
            raise InputError("max_tokens", f"{wanted} new tokens: this server writes {longest} at most")
        return params

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
            for group, answers in self._passes.answers(rows, sizes, parts[0][0].params):
                for place, answer in zip(group, answers, strict=True):
                    ticket, row = asked[place]
                    ticket.found[row] = answer
                self._hand_out(dict.fromkeys(asked[place][0] for place in group))
        except Exception as error:
            left = [(ticket, places) for ticket, places in parts if not ticket.answered]
            if len(left) > 1:
                for part in left:
                    self._answer([part])
                return
            self._ended(left[0][0], error)
            return
        finally:
            self._running = 0
        self._failures = 0
        self._paced(sum(sizes), now() - began)

    def _hand_out(self, tickets: Iterable[Asking]) -> None:
        """Tell the answers of requests whose last row has been answered: their clients ask again while others' rows
        are computed.
        """
        for ticket in tickets:
            if ticket.answered:
                self.meter.first(now() - ticket.entered)
                ticket.record.first()
                self._tell(ticket, [ticket.found[place] for place in range(len(ticket.rows))])
        self._flush()

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

    def close(self, timeout_s: float = 10.0, *, drain_s: float = 0.0) -> None:
        """As `Worker.close`."""
        super().close(timeout_s, drain_s=drain_s)
        self._passes.close()
