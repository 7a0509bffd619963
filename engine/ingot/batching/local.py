"""A model of this machine as what answers a batch: rows by `Runtime.answer`, lines of batch files by the endpoint's own
routes.
"""

import asyncio
import json
from collections.abc import Sequence
from itertools import product
from typing import Any
from urllib.parse import urlsplit

from ingot.batching.answering import Patience, failure_of, isolated, seeded
from ingot.batching.rows import LATER, Entry, Failure, Outcome, outcome_of
from ingot.errors import FieldError
from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError
from ingot.model.task_checks import schema_of
from ingot.serving.app import create_app
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import Limits
from ingot.serving.engines import start_engine
from ingot.serving.gate import Rules

KINDS = {"string": "text", "long": "int", "double": "float", "boolean": "bool"}  # of sinks.py, of the tasks' types
AT_ONCE = 64  # lines that are with the engine, which bounds what it holds of them by itself


class CountingRuntime(Runtime):
    """A model that counts the tokens it reads and writes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.counts: dict[str, int] = {}

    def generate(self, prompts: Sequence[list[int]], **params: Any) -> list[Generation]:
        """As `Runtime` does."""
        answers = super().generate(prompts, **params)
        read, wrote = sum(one.n_prompt for one in answers), sum(len(one.ids) for one in answers)
        self.counts = {
            "input": self.counts.get("input", 0) + read,
            "output": self.counts.get("output", 0) + wrote,
        }
        return answers

    def taken(self) -> dict[str, int]:
        """The tokens since the last call; empty where none were counted."""
        found, self.counts = self.counts, {}
        return found


class Rows:
    """Answers rows of columns, all of a bucket at once: the runtime makes batches of similar length of them."""

    def __init__(self, runtime: CountingRuntime, params: dict[str, Any], patience: Patience) -> None:
        self.runtime, self.params, self.patience = runtime, params, patience

    def check(self) -> None:
        """As the protocol says."""
        try:
            self.runtime.answer([], self.params)
        except InputError as error:
            raise FieldError("--param", f"{error.field}={self.params.get(error.field)}", str(error)) from error
        except (TypeError, ValueError) as error:
            given = " ".join(f"{name}={value}" for name, value in self.params.items())
            raise FieldError("--param", given, "a value is of the wrong kind; write numbers as numbers") from error

    def answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        """As the protocol says."""

        def ask(some: Sequence[Entry]) -> list[dict[str, Any]]:
            return self.runtime.answer([entry.columns for entry in some], seeded(self.params, some))

        # What is wrong with a row's form is found before anything is computed, and does not cut batches in halves.
        wrong = {entry.place: failure for entry in entries if (failure := self._wrong(entry)) is not None}
        good = [entry for entry in entries if entry.place not in wrong]
        answered = iter(isolated(ask, good, self.patience) if good else [])
        return [wrong[entry.place] if entry.place in wrong else next(answered) for entry in entries]

    def _wrong(self, entry: Entry) -> Failure | None:
        try:
            self.runtime.read([entry.columns])
        except InputError as error:
            return failure_of(error)
        return None

    def tokens(self) -> dict[str, int]:
        """As the protocol says."""
        return self.runtime.taken()

    def close(self) -> None:
        """Nothing is held."""


class Requests:
    """Answers lines of an OpenAI batch file as the endpoint would, without a network: same routes, same errors."""

    def __init__(self, runtime: Runtime, name: str, patience: Patience) -> None:
        # Nobody else sends lines: what waits needs no bound but AT_ONCE.
        engine = start_engine(runtime, Limits(waiting_requests=2 * AT_ONCE, waiting_tokens=2**40))
        self.app = create_app(Deployments(Deployed(name, engine)), rules=Rules(deadline_s=None))
        self.patience = patience
        self._counts: dict[str, int] = {}
        self._loop = asyncio.Runner()
        self._life = self.app.router.lifespan_context(self.app)
        self._loop.run(self._life.__aenter__())

    def check(self) -> None:
        """Nothing to check: every line has its own parameters."""

    def answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        """As the protocol says; a record is a line of OpenAI's output form."""
        return self._loop.run(self._answer(entries))

    async def _answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(entry: Entry) -> Outcome:
            async with places:
                status, body = await self._post(entry)
                for number in range(self.patience.retries):
                    if status not in LATER:
                        break
                    await asyncio.to_thread(self.patience.wait, number)
                    status, body = await self._post(entry)
            return outcome_of(entry, status, body, self._counts)

        return list(await asyncio.gather(*map(one, entries)))

    async def _post(self, entry: Entry) -> tuple[int, Any]:
        """Status and body of a request to the application, given to it as a server would."""
        content, path = json.dumps(entry.columns["body"]).encode(), urlsplit(entry.columns["url"]).path
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "replace"),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("batch", 0),
            "server": ("batch", 80),
        }
        status, parts, sent = 500, [], False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # it never leaves
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        try:
            await self.app(scope, receive, send)
        except Exception:  # the application has answered 500 already, and lets its server see why
            status = 500
        try:
            return status, json.loads(b"".join(parts))
        except ValueError:
            return status, None

    def tokens(self) -> dict[str, int]:
        """As the protocol says."""
        found, self._counts = self._counts, {}
        return found

    def close(self) -> None:
        """Stop the endpoint's worker."""
        self._loop.run(self._life.__aexit__(None, None, None))
        self._loop.close()


def forms_of(task: str) -> tuple[tuple[str, ...], ...]:
    """The sets of columns of which a model of this task reads one, under every name that they may have. Raises
    SchemaError for a task without answers.
    """
    schema = schema_of(task)
    names = {column.name: (column.name, *column.aliases) for column in schema.inputs}
    return tuple(some for form in schema.forms for some in product(*(names[column] for column in form)))


def kinds_of(task: str) -> dict[str, str]:
    """Output column -> kind of its values."""
    return {column.name: KINDS.get(column.type, "json") for column in schema_of(task).outputs}
