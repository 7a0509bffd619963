"""What a row means: a conversation, a prompt with its completion, a document, or a labelled text.

`to_example` is total: it returns an example or a `BadRow` with the reason, and raises only for mistakes of the
recipe (a prompt template that cannot be read).
"""

import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ingot.data.sources import BadRow, Row, has_broken_characters
from ingot.errors import DataError
from ingot.recipe import Data, Objective, Task

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# A model may be told nothing, and a tool may return nothing; a question or an answer of no characters is a mistake.
MAY_BE_EMPTY = ("system", "developer", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` holds the calls of an assistant's turn with their arguments parsed."""

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The shape that chat templates expect; keys without a value are left out."""
        shape: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            shape["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            shape["name"] = self.name
        if self.tool_call_id is not None:
            shape["tool_call_id"] = self.tool_call_id
        return shape

    def answer(self) -> str:
        """The content, and each call on a line of its own as `{"name": ..., "arguments": {...}}`."""
        functions = [call["function"] for call in self.tool_calls]
        calls = [json.dumps({"name": it["name"], "arguments": it["arguments"]}, ensure_ascii=False) for it in functions]
        return "\n".join([self.content, *calls] if self.content else calls)


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat, at least one of them the assistant's and never the first; `tools` are JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    where: str = field(default="", compare=False)

    @property
    def last_assistant(self) -> int:
        """Index of the last turn of the assistant."""
        return max(index for index, message in enumerate(self.messages) if message.role == "assistant")


@dataclass(frozen=True)
class PromptCompletion:
    """A text to continue and its continuation."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Document:
    """A text of which every token is learned."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Labeled:
    """A text and the name of its class."""

    text: str
    label: str
    where: str = field(default="", compare=False)


Example = Conversation | PromptCompletion | Document | Labeled


class _Unusable(Exception):
    """Internal: the reason why a row is bad."""


def to_example(row: Row, data: Data, objective: Objective) -> Example | BadRow:
    """Read `row` as the task of `objective` wants it, through the column names of `data.columns`."""
    try:
        return _BUILDERS[objective.task](row, data)
    except _Unusable as error:
        return BadRow(row.where, str(error))


def required_columns(data: Data, task: Task) -> dict[str, str]:
    """Field of the recipe -> column of the file that it needs, for every column the task cannot do without."""
    if task == "text-generation":
        names = {f"data.columns.{name}" if name in ("prompt", "completion") else "data.prompt_template": name
                 for name in (*prompt_columns(data), "completion")}  # fmt: skip
    elif task == "chat-completion":
        names = {"data.columns.messages": "messages"}
    elif task == "language-modeling":
        names = {"data.columns.text": "text"}
    else:
        names = {"data.columns.text": "text", "data.columns.label": "label"}
    return {where: data.columns.get(name, name) for where, name in names.items()}


def prompt_columns(data: Data) -> list[str]:
    """Names between braces in `data.prompt_template`, in order. Raises `DataError` when it cannot be read."""
    return [name for _, name in _template_parts(data.prompt_template) if name is not None]


def _template_parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Literal text and the column after it. A name is taken whole: no attributes, indices or formats."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError("data.prompt_template", template, f"{error}; write {{{{ and }}}} for literal braces") from error
    for literal, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            fix = "between braces stands the name of a column and nothing else; write {{ and }} for literal braces"
            raise DataError("data.prompt_template", template, fix)
        yield literal, name


# --- values ----------------------------------------------------------------------------------------------------


def _value(row: Row, data: Data, name: str) -> Any:
    column = data.columns.get(name, name)
    if column not in row.values:
        raise _Unusable(f"no column {column!r}; there are: {', '.join(map(str, row.values)) or 'none'}")
    return row.values[column]


def _checked(text: str, name: str) -> str:
    if has_broken_characters(text):
        raise _Unusable(f"{name} holds characters that are not Unicode (half a surrogate pair)")
    return text


def _text(value: Any, name: str) -> str:
    """A non-empty text. Numbers are written out and lists of words (CoNLL) are joined with spaces."""
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _Unusable(f"{name} must be text, this is {'empty' if value is None else type(value).__name__}")
    if not value.strip():
        raise _Unusable(f"{name} is empty")
    return _checked(value, name)


def _parsed(value: Any, name: str) -> Any:
    """`value`, or what it says when it is JSON in a text cell (CSV, Parquet)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _Unusable(f"{name} is not JSON: {error.msg}") from error


# --- builders --------------------------------------------------------------------------------------------------


def _conversation(row: Row, data: Data) -> Conversation:
    turns = _parsed(_value(row, data, "messages"), "messages")
    if not isinstance(turns, list) or not turns:
        raise _Unusable("messages must be a list of turns")
    messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    if all(message.role != "assistant" for message in messages):
        raise _Unusable("no assistant turn: nothing to learn")
    if messages[0].role == "assistant":
        raise _Unusable("messages[0] is the assistant's: there is nothing to answer")
    tools = _parsed(row.values.get(data.columns.get("tools", "tools")) or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Unusable("tools must be a list of JSON schemas")
    return Conversation(messages, tuple(tools), row.where)


def _message(turn: Any, index: int) -> Message:
    name = f"messages[{index}]"
    if not isinstance(turn, Mapping):
        raise _Unusable(f"{name} must be an object with role and content, this is {type(turn).__name__}")
    role, content = (turn["from"], turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise _Unusable(f"{name} has the role {role!r}; known: {', '.join((*ROLES, *SHAREGPT_ROLES))}")
    calls = _tool_calls(turn.get("tool_calls"), name)
    if calls and role != "assistant":
        raise _Unusable(f"{name} is a {role} turn with tool_calls; only the assistant calls")
    if content is None and (calls or role in MAY_BE_EMPTY):
        content = ""
    if not isinstance(content, str):
        raise _Unusable(
            f"{name}.content must be text, this is {'missing' if content is None else type(content).__name__}"
        )
    if not content.strip() and not calls and role not in MAY_BE_EMPTY:
        raise _Unusable(f"{name}.content is empty")
    return Message(role, _checked(content, name), calls, turn.get("name"), turn.get("tool_call_id"))


def _tool_calls(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Calls with `arguments` as an object: the OpenAI format writes them as JSON text, templates print objects."""
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise _Unusable(f"{name}.tool_calls must be a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Unusable(f"{name}.tool_calls needs function.name and function.arguments")
        arguments = _parsed(function.get("arguments") or {}, f"{name}.tool_calls.arguments")
        if not isinstance(arguments, dict):
            raise _Unusable(f"{name}.tool_calls.arguments must be an object")
        function = {**function, "arguments": arguments}
        calls.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return tuple(calls)


def _prompt_completion(row: Row, data: Data) -> PromptCompletion:
    prompt = "".join(
        literal + ("" if name is None else _text(_value(row, data, name), name))
        for literal, name in _template_parts(data.prompt_template)
    )
    if not prompt.strip():
        raise _Unusable("prompt is empty")
    return PromptCompletion(prompt, _text(_value(row, data, "completion"), "completion"), row.where)


def _document(row: Row, data: Data) -> Document:
    return Document(_text(_value(row, data, "text"), "text"), row.where)


def _labeled(row: Row, data: Data) -> Labeled:
    label = _value(row, data, "label")
    if isinstance(label, float) or not isinstance(label, str | int):
        raise _Unusable(
            f"label must be text or an integer, this is {'empty' if label is None else type(label).__name__}"
        )
    label = str(label)
    if not label.strip():
        raise _Unusable("label is empty")
    return Labeled(_text(_value(row, data, "text"), "text"), _checked(label, "label"), row.where)


_BUILDERS: dict[Task, Callable[[Row, Data], Example]] = {
    "chat-completion": _conversation,
    "text-generation": _prompt_completion,
    "language-modeling": _document,
    "text-classification": _labeled,
}
