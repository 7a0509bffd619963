"""Rows of text to write: a conversation, a prompt with its completion, a document, a text and its translation."""

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ingot.data.fields import Unusable, checked, parsed, text_of, value_of
from ingot.data.sources import Row
from ingot.errors import DataError
from ingot.recipe import Data

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# A model may be told nothing, and a tool may return nothing; a question or an answer of no characters is a mistake.
MAY_BE_EMPTY = ("system", "developer", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # how rows call it
TEMPLATE_REASONING = ("reasoning_content", "thinking")  # how templates do: Qwen, GLM, Nemotron, Gemma; gpt-oss, LFM2


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` holds the calls of an assistant's turn with their arguments parsed.

    `reasoning` is what the assistant thinks before it answers; `learned` is false where the row switches a turn off.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    learned: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The shape that chat templates expect; keys without a value are left out."""
        shape: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            shape["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            shape["name"] = self.name
        if self.tool_call_id is not None:
            shape["tool_call_id"] = self.tool_call_id
        if self.reasoning is not None:
            shape |= dict.fromkeys(TEMPLATE_REASONING, self.reasoning)
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
class SourceTarget:
    """A text, and its summary or translation."""

    source: str
    target: str
    where: str = field(default="", compare=False)


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


# --- builders --------------------------------------------------------------------------------------------------


def conversation(row: Row, data: Data) -> Conversation:
    """The row's `messages` and `tools`."""
    turns = parsed(value_of(row, data, "messages"), "messages")
    if not isinstance(turns, list) or not turns:
        raise Unusable("messages must be a list of turns")
    messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    if all(message.role != "assistant" for message in messages):
        raise Unusable("no assistant turn: nothing to learn")
    if messages[0].role == "assistant":
        raise Unusable("messages[0] is the assistant's: there is nothing to answer")
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise Unusable("every assistant turn is switched off (train: false or weight: 0): nothing to learn")
    tools = parsed(row.values.get(data.columns.get("tools", "tools")) or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools must be a list of JSON schemas")
    return Conversation(messages, tuple(tools), row.where)


def _message(turn: Any, index: int) -> Message:
    name = f"messages[{index}]"
    if not isinstance(turn, Mapping):
        raise Unusable(f"{name} must be an object with role and content, this is {type(turn).__name__}")
    role, content = (turn["from"], turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise Unusable(f"{name} has the role {role!r}; known: {', '.join((*ROLES, *SHAREGPT_ROLES))}")
    calls = _tool_calls(turn.get("tool_calls"), name)
    if calls and role != "assistant":
        raise Unusable(f"{name} is a {role} turn with tool_calls; only the assistant calls")
    if content is None and (calls or role in MAY_BE_EMPTY):
        content = ""
    if not isinstance(content, str):
        raise Unusable(
            f"{name}.content must be text, this is {'missing' if content is None else type(content).__name__}"
        )
    if not content.strip() and not calls and role not in MAY_BE_EMPTY:
        raise Unusable(f"{name}.content is empty")
    reasoning, learned = (_reasoning(turn, name), _learned(turn, name)) if role == "assistant" else (None, True)
    return Message(role, checked(content, name), calls, turn.get("name"), turn.get("tool_call_id"), reasoning, learned)


def _reasoning(turn: Mapping[str, Any], name: str) -> str | None:
    """The thoughts of an assistant's turn; blank ones are none."""
    for key in REASONING:
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            raise Unusable(f"{name}.{key} must be text, this is {type(value).__name__}")
        if value and value.strip():
            return checked(value, name)
    return None


def _learned(turn: Mapping[str, Any], name: str) -> bool:
    """Whether the turn is learned: `train`, or `weight` as in OpenAI's format."""
    switches = {key: turn[key] for key in ("train", "weight") if turn.get(key) is not None}
    for key, value in switches.items():
        if value not in (0, 1):
            known = "true or false" if key == "train" else "0 or 1"
            raise Unusable(f"{name}.{key} must be {known}, this is {value!r}")
    return all(switches.values())


def _tool_calls(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Calls with `arguments` as an object: the OpenAI format writes them as JSON text, templates print objects."""
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Unusable(f"{name}.tool_calls must be a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(f"{name}.tool_calls needs function.name and function.arguments")
        arguments = parsed(function.get("arguments") or {}, f"{name}.tool_calls.arguments")
        if not isinstance(arguments, dict):
            raise Unusable(f"{name}.tool_calls.arguments must be an object")
        function = {**function, "arguments": arguments}
        calls.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return tuple(calls)


def prompt_of(row: Row, data: Data) -> str:
    """The prompt, as `data.prompt_template` writes it."""
    prompt = "".join(
        literal + ("" if name is None else text_of(value_of(row, data, name), name))
        for literal, name in _template_parts(data.prompt_template)
    )
    if not prompt.strip():
        raise Unusable("prompt is empty")
    return prompt


def prompt_completion(row: Row, data: Data) -> PromptCompletion:
    """The prompt, and the column `completion`."""
    completion = text_of(value_of(row, data, "completion"), "completion")
    return PromptCompletion(prompt_of(row, data), completion, row.where)


def document(row: Row, data: Data) -> Document:
    """The column `text`."""
    return Document(text_of(value_of(row, data, "text"), "text"), row.where)


def source_target(row: Row, data: Data, names: tuple[str, str]) -> SourceTarget:
    """The two columns `names`."""
    source, target = (text_of(value_of(row, data, name), name) for name in names)
    return SourceTarget(source, target, row.where)
