"""A row in the words of a task file: its question, its choices, what is right.

A text of the file is the name of a column, or a Jinja template over the row's columns. Templates are run in Jinja's
sandbox: they come with files that people pass on. A column that is not there, or is null, is an error and never an
empty text.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment, SecurityError

from ingot.data.sources import Row
from ingot.errors import DataError, RecipeError
from ingot.evaluation.definition import Definition
from ingot.evaluation.marks import column_text, no_column

_ONE_WORD = re.compile(r"[A-Za-z_]\w*\Z")
CONSTANT = ("header", "chat.system")  # a word here is meant as it stands
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?\Z")


class _Null(ValueError):
    """A template writes a null."""


def _written(value: Any) -> Any:
    if value is None:
        raise _Null
    return value


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def environment() -> SandboxedEnvironment:
    """Jinja as task files know it: nothing is escaped, a last line break is kept, `regex_replace` is a filter."""
    # Same settings as lm-evaluation-harness's, or its prompts would differ in their blanks.
    found = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written)
    found.filters["regex_replace"] = _regex_replace
    return found


@dataclass(frozen=True)
class Wording:
    """What a definition makes of rows. Made by `wording_of`."""

    definition: Definition
    templates: Mapping[str, Template]
    named: frozenset[str] = frozenset()
    """Columns that the template of `prompt` names."""

    def text(self, field: str, row: Row) -> str:
        """The text of `field`. Raises DataError when it is no text."""
        value = self._value(field, row)
        if isinstance(value, bool | list | dict) or not isinstance(value, str | int | float):
            raise self._unfit(field, row, f"must be text, and is a {type(value).__name__}")
        return str(value)

    def prompt(self, row: Row) -> str:
        """The question."""
        return self.text("prompt", row)

    def question(self, row: Row) -> str:
        """What the row itself asks: the columns that `prompt` names, without the words of its template. Where one of
        them is no text, all of the prompt.
        """
        if turns := self.turns(row):
            asked = [turn["content"] for turn in turns if turn["role"] != "system"] or [it["content"] for it in turns]
            return "\n".join(map(str, asked))
        values = self._names(row)
        names = {self._source("prompt")} if self._source("prompt") in values else self.named
        texts = [values[name] for name in values if name in names]
        written = texts and all(isinstance(text, str) for text in texts)
        return "\n".join(texts) if written else self.prompt(row)

    def targets(self, row: Row) -> list[str]:
        """The right answers, one or more. Raises DataError for none, or an empty one."""
        if self.definition.answer is not None:
            choices = self.choices(row)
            return [choices[place] for place in self.answers(row, choices)]
        value = self._value("target", row)
        is_column = self._source("target") in self._names(row)
        found = value if is_column else _list_in(value)
        texts = found if isinstance(found, list) else [value]
        if not texts:
            raise self._unfit("target", row, "is an empty list; a row needs a right answer, or leave it out")
        for text in texts:
            if isinstance(text, bool | list | dict) or text is None:
                raise self._unfit("target", row, f"must be text or a list of texts, and holds {text!r}")
            if not str(text).strip():
                raise self._unfit("target", row, "is empty; a row needs a right answer, or leave it out")
        return [str(text) for text in texts]

    def choices(self, row: Row) -> list[str]:
        """The texts to choose from. Raises DataError for fewer than two, or an empty one."""
        value: Any = self.definition.choices
        if isinstance(value, str):
            value = self._value("choices", row)
            value = _list_in(value) if isinstance(value, str) else value
        if isinstance(value, dict):
            value = list(value.values())
        if not isinstance(value, list | tuple):
            raise self._unfit("choices", row, f"must give a list, and gives {self._value('choices', row)!r}")
        texts = [str(text) if isinstance(text, int | float) and not isinstance(text, bool) else text for text in value]
        if any(not isinstance(text, str) or not text for text in texts):
            raise self._unfit("choices", row, f"must be texts that are not empty, and are {texts!r}")
        if len(texts) < 2:
            raise self._unfit("choices", row, f"must be two at least, and {len(texts)} is there")
        return texts

    def answers(self, row: Row, choices: list[str]) -> list[int]:
        """Places of the right choices, from 0. Raises DataError for an answer that is none of them."""
        value: Any = self.definition.answer
        if isinstance(value, str):
            value = self._value("answer", row)
            found = _list_in(value) if isinstance(value, str) else value
            value = found if isinstance(found, list) else value
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise self._unfit("answer", row, "is an empty list; a row needs a right choice")
        return [self._place(one, row, choices) for one in values]

    def _place(self, value: Any, row: Row, choices: list[str]) -> int:
        readings = _readings(value, choices)
        match self.definition.answer_as:
            case "index-or-text":
                wanted = ["index"] if "index" in readings else ["text"]
            case "text":
                wanted = ["index"] if isinstance(value, int) else ["text"]
            case "auto":
                wanted = list(readings)
            case one:
                wanted = [one]
        places = {readings[name] for name in wanted if name in readings}
        if len(places) > 1:
            both = ", ".join(f"{name} gives {choices[place]!r}" for name, place in readings.items())
            raise self._unfit("answer", row, f"{value!r} can be read in two ways ({both}); set answer_as")
        if not places:
            how = "" if self.definition.answer_as == "auto" else f" as {self.definition.answer_as}"
            fix = f"{value!r} is none of the {len(choices)} choices{how} (0 to {len(choices) - 1}, A to "
            raise self._unfit("answer", row, f"{fix}{chr(ord('A') + len(choices) - 1)}, or {choices!r})")
        return places.pop()

    def example_answer(self, row: Row) -> str:
        """The right answer of an example; the first, where there are several."""
        return self.targets(row)[0]

    def column(self, field: str, name: str, row: Row) -> str:
        """A column's value as text, for a group, a slice or an id. Raises DataError where there is none."""
        return column_text(field, name, self._names(row), row.where)

    def optional(self, field: str, name: str, row: Row) -> str | None:
        """The same, or None where the row has nothing in that column. Raises DataError where no row has the column."""
        values = self._names(row)
        return None if name in values and values[name] in (None, "") else self.column(field, name, row)

    def turns(self, row: Row) -> list[dict[str, Any]] | None:
        """The turns of a chat, where `prompt` names a column of them. Raises DataError when the last is the answer."""
        turns = self._names(row).get(self.definition.prompt or "")
        if not isinstance(turns, list):
            return None
        if not turns or not all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in turns):
            raise self._unfit("prompt", row, 'must be turns: [{"role": ..., "content": ...}, ...]')
        if turns[-1]["role"] == "assistant":
            raise self._unfit("prompt", row, "ends with the assistant's turn, which it should ask for; take it out")
        return turns

    def _value(self, field: str, row: Row) -> Any:
        """The column that `field` names, as it is, or the text that its template writes."""
        written = self._source(field)
        values = self._names(row)
        if written in values:
            if values[written] is None:
                raise self._unfit(field, row, f"column {written!r} is null; fill it, or leave the row out")
            return values[written]
        if _ONE_WORD.match(written) and field not in CONSTANT:
            raise no_column(field, written, row.values, row.where)
        try:
            return self.templates[field].render(values)
        except UndefinedError as error:
            name = re.match(r"'([^']+)' is undefined", str(error))
            if name:
                raise no_column(field, name[1], row.values, row.where) from None
            raise self._unfit(field, row, f"the template asks for what is not there: {error}") from error
        except _Null:
            raise self._unfit(field, row, "the template writes a null; fill the column, or write {{x or ''}}") from None
        except SecurityError as error:
            raise self._unfit(field, row, f"the template is not allowed to do that: {error}") from error
        except Exception as error:  # a template is a program: it raises anything
            raise self._unfit(field, row, f"the template fails: {type(error).__name__}: {error}") from error

    def _source(self, field: str) -> str:
        return str(self.definition.chat.system if field == "chat.system" and self.definition.chat else
                   getattr(self.definition, field))  # fmt: skip

    def _names(self, row: Row) -> dict[str, Any]:
        """Everything that a template may name: the row's columns, and what the definition calls them."""
        values = dict(row.values)
        for name, column in self.definition.columns.items():
            if column not in row.values:
                raise no_column(f"columns.{name}", column, row.values, row.where)
            values[name] = row.values[column]
        return values

    def _unfit(self, field: str, row: Row, fix: str) -> DataError:
        return DataError(field, self._source(field), fix, where=row.where)


def wording_of(definition: Definition) -> Wording:
    """Compile the templates. Raises RecipeError for one that is no Jinja."""
    system = definition.chat.system if definition.chat else None
    named = {name: getattr(definition, name) for name in ("header", "prompt", "target", "choices", "answer")}
    made = environment()
    templates = {}
    for field, text in (*named.items(), ("chat.system", system)):
        if isinstance(text, str):
            try:
                templates[field] = made.from_string(text)
            except TemplateSyntaxError as error:
                raise RecipeError(
                    field, text, f"is no Jinja template: {error.message} (line {error.lineno})"
                ) from error
    columns = meta.find_undeclared_variables(made.parse(definition.prompt or ""))
    return Wording(definition, templates, frozenset(columns))


def _readings(value: Any, choices: list[str]) -> dict[str, int]:
    """How `value` may be meant -> the place that it then means."""
    found: dict[str, int] = {}
    if isinstance(value, bool):
        return found
    text = str(value).strip()
    if isinstance(value, int) or re.fullmatch(r"\d+", text, re.ASCII):
        if 0 <= int(text) < len(choices):
            found["index"] = int(text)
    elif letter := _LETTER.match(text):
        place = ord(letter[1].upper()) - ord("A")
        if place < len(choices):
            found["letter"] = place
    if isinstance(value, str) and value in choices:
        found["text"] = choices.index(value)
    elif isinstance(value, str) and text in choices:
        found["text"] = choices.index(text)
    return found


def _list_in(text: str) -> Any:
    """The list that `text` writes in Python's or JSON's way, or the text itself."""
    if not (len(text) >= 2 and text[0] == "[" and text[-1] == "]"):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
