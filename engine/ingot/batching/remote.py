"""A model behind an OpenAI-style endpoint as what answers a batch."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ingot.batching.rows import Entry, Failure, Outcome, outcome_of
from ingot.errors import EndpointError, FieldError
from ingot.evaluation.api import Api, Refused
from ingot.evaluation.endpoint import CHAT, TEXT
from ingot.model.task_checks import SchemaError, read_row

FORMS = (("messages",), ("input_string",), ("prompt",))
KINDS = {"output_string": "text"}
OURS = ("model", "messages", "prompt", "stream", "n")
ENDING = (401, 403, 404)  # of a model or a key: no other row will fare better
ENDING_LINES = (401, 403)  # lines of a batch file each name their own model and route


class Remote:
    """Rows, or lines of a batch file where `requests`, asked one by one, many at once; `api` tries again what may go
    well later. `params` go into every body as they are: the endpoint says which it takes.
    """

    def __init__(self, api: Api, model: str, params: dict[str, Any], requests: bool) -> None:
        self.api, self.model, self.params = api, model, params
        self._one: Callable[[Entry], Outcome] = self._line if requests else self._row
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()  # of the counts, to which every thread adds

    def check(self) -> None:
        """As the protocol says, of what is decided here; the rest is for the endpoint to say."""
        for name in OURS:
            if name in self.params:
                raise FieldError("--param", f"{name}={self.params[name]}", "the batch decides this; remove it")

    def answer(self, entries: Sequence[Entry]) -> list[Outcome]:
        """As the protocol says."""
        return self.api.each(self._one, entries)

    def tokens(self) -> dict[str, int]:
        """As the protocol says."""
        found, self._counts = self._counts, {}
        return found

    def close(self) -> None:
        """End the connections."""
        self.api.close()

    def _row(self, entry: Entry) -> Outcome:
        body: dict[str, Any] = {"model": self.model, **self.params}
        path = TEXT if "prompt" in entry.columns else CHAT
        try:
            body |= _asked(entry, path)
        except SchemaError as error:
            return Failure(error.field, str(error))
        status, answer = self._post(path, body)
        found = self._outcome(entry, status, answer)
        if isinstance(found, Failure):
            return found
        said = _said(answer, path)
        if said is None:
            return Failure("body", "the endpoint answered without choices", unexpected=True)
        return {"output_string": said}

    def _line(self, entry: Entry) -> Outcome:
        path = str(entry.columns["url"]).removeprefix("/v1")
        return self._outcome(entry, *self._post(path, entry.columns["body"], ENDING_LINES))

    def _outcome(self, entry: Entry, status: int, body: Any) -> Outcome:
        with self._lock:
            return outcome_of(entry, status, body, self._counts)

    def _post(self, path: str, body: dict[str, Any], ending: tuple[int, ...] = ENDING) -> tuple[int, Any]:
        """Status and body. A refusal keeps its status only: an endpoint of others may repeat the row in its words."""
        try:
            return 200, self.api.post(path, body)
        except Refused as error:
            if error.status in ending:
                raise EndpointError(f"{self.api.address.url}{path} answered {error.status}: {error.words}") from None
            return error.status, None


def _said(answer: dict[str, Any], path: str) -> str | None:
    """The text of the first choice, empty where a message holds none; None where there is no choice."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(one, dict) for one in choices):
        return None
    if path == TEXT:
        said = choices[0].get("text")
    else:
        message = choices[0].get("message")
        said = (message.get("content") or "") if isinstance(message, dict) else None
    return said if isinstance(said, str) else None


def _asked(entry: Entry, path: str) -> dict[str, Any]:
    """The row as fields of a body. Raises SchemaError."""
    if path == TEXT:
        return {"prompt": read_row("text-generation", entry.columns)["input_string"]}
    row = read_row("chat-completion", entry.columns)
    return {"messages": row.get("messages") or [{"role": "user", "content": row["input_string"]}]}
