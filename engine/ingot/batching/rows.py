"""A row of a batch on its way: what the file holds -> what the model is asked -> an answer or a failure."""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from ingot.data.sources import BadRow, Row
from ingot.errors import DataError, FieldError

REQUEST = ("custom_id", "method", "url", "body")
"""The columns of a line of an OpenAI batch file."""
ROUTES = "/v1/"
LATER = (429, 500, 502, 503, 504)  # what an endpoint answers that may answer the same line another time


@dataclass(frozen=True)
class Failure:
    """Why a row has no answer: the part of it, and what is wrong in words that hold nothing of its content.

    `unexpected`: not the row's fault, as far as can be told. `response`: what an endpoint answered instead of 200.
    """

    field: str
    message: str
    unexpected: bool = False
    response: dict[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A row that is asked. `place` counts over the whole input. `where`: file and line, for people. `columns`: what the
    model reads; `kept`: what goes into the output as it is. `problem`: why it cannot be asked.
    """

    place: int
    id: Any
    where: str
    columns: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    problem: Failure | None = None


Outcome = dict[str, Any] | Failure
"""A record of output columns, or why there is none."""


@dataclass(frozen=True)
class Reading:
    """How rows are read. `forms`: the sets of columns of which the model reads one. `mapping`: the model's column ->
    the file's. `keep`: the output's column -> the file's. `requests`: rows are lines of an OpenAI batch file.
    """

    forms: tuple[tuple[str, ...], ...] = ()
    id_column: str | None = None
    keep: dict[str, str] = field(default_factory=dict)
    mapping: dict[str, str] = field(default_factory=dict)
    requests: bool = False

    def entry(self, row: Row | BadRow, place: int) -> Entry:
        """`row` as it is asked, with its problem where it cannot be."""
        if isinstance(row, BadRow):
            return Entry(place, row.where, row.where, problem=Failure("row", row.reason))
        if self.requests:
            return _request(row, place)
        values = row.values
        name = self.id_column or next((one for one in ("custom_id", "id") if values.get(one) is not None), None)
        called = None if name is None else values.get(name)
        called = row.where if called is None else called
        for column in (*self.keep.values(), *([] if name is None else [name])):
            if column not in values:
                problem = Failure(column, f"the row has no column {column!r}")
                return Entry(place, called, row.where, problem=problem)
        kept = {shown: values[column] for shown, column in self.keep.items()}
        for form in self._wanted():
            named = {column: self.mapping.get(column, column) for column in form}
            if all(values.get(source) is not None for source in named.values()):
                columns = {column: values[source] for column, source in named.items()}
                return Entry(place, called, row.where, columns, kept)
        missing = [self.mapping.get(column, column) for form in self._wanted()[:1] for column in form]
        first = next(column for column in missing if values.get(column) is None)
        problem = Failure(first, f"the row has no value in column {first!r}")
        return Entry(place, called, row.where, kept=kept, problem=problem)

    def _wanted(self) -> tuple[tuple[str, ...], ...]:
        """The forms that hold every mapped column."""
        return tuple(form for form in self.forms if self.mapping.keys() <= set(form))

    def check_mapping(self) -> None:
        """Raise FieldError for a mapping to a column that the model does not read."""
        known = list(dict.fromkeys(column for form in self.forms for column in form))
        for column in self.mapping:
            if column not in known:
                fix = f"the model reads {', '.join(known)}; write --map {known[0]}={self.mapping[column]}"
                raise FieldError("--map", f"{column}={self.mapping[column]}", fix)
        if not self._wanted():
            ways = " or ".join(" with ".join(form) for form in self.forms)
            raise FieldError("--map", ", ".join(self.mapping), f"these do not go together; the model reads {ways}")

    def check_first(self, row: Row) -> None:
        """Raise DataError where the first row of a file lacks a column: the others will not be better."""
        there = [form for form in self.forms if set(form) <= row.values.keys()]
        if len(there) > 1 and not self.mapping:
            names = " or ".join(" with ".join(form) for form in there)
            fix = f"the model could read {names}: say which, --map {there[0][0]}={there[0][0]}"
            raise DataError("columns", ", ".join(map(str, row.values)), fix, where=row.where)
        problem = self.entry(row, 0).problem
        if problem is None or problem.field in row.values:
            return
        fix = f"the row has no such column, but {', '.join(map(str, row.values)) or 'none'}"
        if self.requests:
            fix += "; all lines of a batch file need custom_id, method, url and body"
        elif problem.field == self.id_column:
            fix += "; name one of them with --id-column"
        elif problem.field in self.keep.values():
            fix += "; name some of them with --keep"
        else:
            ways = " or ".join(" with ".join(form) for form in self.forms)
            fix += f". The model reads {ways}: say which column that is, --map {self.forms[0][0]}=COLUMN"
        raise DataError("column", problem.field, fix, where=row.where)


def is_request(row: Row | BadRow) -> bool:
    """Whether `row` is a line of an OpenAI batch file."""
    return isinstance(row, Row) and set(REQUEST) <= set(row.values)


def _request(row: Row, place: int) -> Entry:
    values, called = row.values, row.values.get("custom_id")
    problem: Failure | None = None
    if not isinstance(called, str) or not called:
        called, problem = row.where, Failure("custom_id", "custom_id must be a string")
    elif values.get("method") != "POST":
        problem = Failure("method", "method must be POST")
    elif not isinstance(values.get("url"), str) or not values["url"].startswith(ROUTES):
        problem = Failure("url", f"url must be a route of the endpoint, such as {ROUTES}chat/completions")
    elif not isinstance(values.get("body"), dict):
        problem = Failure("body", "body must be an object")
    elif values["body"].get("stream"):
        problem = Failure("body", "a batch holds whole answers: remove stream")
    elif unknown := set(values) - set(REQUEST):
        problem = Failure(min(unknown), f"unknown beside {', '.join(REQUEST)}")
    columns = {} if problem else {"url": values["url"], "body": values["body"]}
    return Entry(place, called, row.where, columns, problem=problem)


def outcome_of(entry: Entry, status: int, body: Any, counts: dict[str, int]) -> Outcome:
    """A line of OpenAI's output form, or of its error file; tokens of an answer are added to `counts`."""
    line = response_line(entry, {"status_code": status, "request_id": request_id(entry), "body": body})
    if status == 200 and isinstance(body, dict):
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        for name, key in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            if isinstance(usage.get(key), int):
                counts[name] = counts.get(name, 0) + usage[key]
        return line
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"the endpoint answered {status}")
    return Failure(str(said.get("param") or "body"), message, unexpected=status in LATER, response=line["response"])


def request_id(entry: Entry) -> str:
    """The same for the same line of the same file, however often it is asked."""
    return f"batch_req_{sha256(f'{entry.place}/{entry.id}'.encode('utf-8', 'backslashreplace')).hexdigest()[:24]}"


def response_line(entry: Entry, response: dict[str, Any] | None, error: dict[str, Any] | None = None) -> dict[str, Any]:
    """A line as OpenAI writes them."""
    return {"id": request_id(entry), "custom_id": entry.id, "response": response, "error": error}
