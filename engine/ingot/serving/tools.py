"""Calls of functions: how a request asks for them, and how an answer's text is read as them.

Two forms are read: JSON between `<tool_call>` tags, and an answer that is nothing but JSON. An object with the name of
a function that the request offers, and `arguments` or `parameters`, is a call; anything else stays text.
"""

import json
import re
import uuid
from typing import Any

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError

OPENS, CLOSES = "<tool_call>", "</tool_call>"
SPACE, CLOSED = re.compile(r"\s*"), re.compile(rf"\s*(?:{CLOSES}|\Z)")
JSON = json.JSONDecoder()
FORCED = "tool_choice"
# A call up to its arguments, in the order that models write it in; in another one it is told once it is whole.
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
FIRST, BETWEEN = re.compile(r"\s*\[?"), re.compile(r"\s*\}\s*,")  # before calls that stand by themselves


def prompt_of(runtime: Runtime, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
    """The conversation with its tools, as ids. Raises InputError for a template that leaves the tools out."""
    ids = runtime.chat_ids(messages, tools)
    if tools and ids == runtime.chat_ids(messages):
        raise InputError("tools", "tools: the model's chat template does not show them to the model")
    return ids


def _form(runtime: Runtime, tools: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether the model's calls stand between tags, and under which name their arguments."""
    template = str(runtime.tokenizer.get_chat_template(None, tools))  # type: ignore[arg-type]
    named = "parameters" if '"parameters"' in template and '"arguments"' not in template else "arguments"
    return OPENS in template, named


def forced(runtime: Runtime, tools: list[dict[str, Any]]) -> tuple[list[int], dict[str, Any]]:
    """What is put behind the prompt, and the schema of what then follows, for an answer that calls one of `tools`."""
    tagged, named = _form(runtime, tools)
    calls: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool["function"]
        wanted = dict(function.get("parameters") or {"type": "object"})
        for place in ("$defs", "definitions"):
            if not isinstance(wanted.get(place, {}), dict):
                raise InputError(FORCED, f"{FORCED}: {place} of a function's parameters is not an object")
            # A reference starts at the root of the whole schema.
            for name, schema in (wanted.pop(place, None) or {}).items():
                if shared.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise InputError(FORCED, f"{FORCED}: two functions define a schema {place} of one name differently")
        properties = {"name": {"const": function["name"]}, named: wanted}
        calls.append(
            {"type": "object", "properties": properties, "required": ["name", named], "additionalProperties": False}
        )
    schema = (calls[0] if len(calls) == 1 else {"anyOf": calls}) | shared
    return list(runtime.tokenizer(f"{OPENS}\n", add_special_tokens=False)["input_ids"]) if tagged else [], schema


def _call(value: Any, names: set[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    written = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _id(), "type": "function", "function": written}


def _id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def read(text: str, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """An answer -> what it says beside calls, and OpenAI's `tool_calls`. All of it is text where a call is broken."""
    place = text.find(OPENS)
    try:
        written = _tagged(text) if place >= 0 else [json.loads(text.strip())] if text.lstrip()[:1] in ("{", "[") else []
    except (ValueError, RecursionError):
        return text, []
    calls = []
    for value in written:
        for part in value if isinstance(value, list) else [value]:
            if (call := _call(part, names)) is None:
                return text, []
            calls.append(call)
    if not calls:
        return text, []
    return text[: max(place, 0)].rstrip(), calls


def _tagged(text: str) -> list[Any]:
    """The JSON after each opening tag; tags in its texts mean nothing. Raises ValueError for anything else."""
    found, place = [], text.find(OPENS)
    while place >= 0:
        value, end = JSON.raw_decode(text, SPACE.match(text, place + len(OPENS)).end())  # type: ignore[union-attr]
        closed = CLOSED.match(text, end)
        if closed is None:
            raise ValueError("something stands behind it")
        found.append(value)
        place = text.find(OPENS, closed.end())
    return found


class Unfolding:
    """Text as it comes -> what is said, and OpenAI's deltas of calls. What may still be the beginning of a call is held
    back; a call is told from where its arguments begin, and then as they come. It is not taken back where it breaks.
    """

    def __init__(self, names: set[str]) -> None:
        self.names, self.text, self.sent = names, "", 0
        self._calls, self._at = 0, 0  # calls that were told, and where the last one's arguments ended or go on
        self._depth, self._inside, self._quoted, self._escaped = 0, False, False, False

    def feed(self, new: str) -> tuple[str, list[dict[str, Any]]]:
        """What is certain since the last call."""
        self.text += new
        return self._said(), self._called()

    def end(self) -> tuple[str, list[dict[str, Any]], bool]:
        """The rest of both, and whether all calls are whole."""
        said, calls = read(self.text, self.names)
        if calls or not self._calls:
            late = [part for place, call in enumerate(calls) if place >= self._calls for part in _deltas(place, call)]
            return said[self.sent :], late, bool(calls)
        begins = None if self._inside else self._next()
        return "" if begins is None else self.text[begins:], [], False

    @property
    def _bare(self) -> bool:
        return self.text.lstrip()[:1] in ("", "{", "[")

    def _said(self) -> str:
        if self._bare:
            return ""
        place = self.text.find(OPENS)
        if place < 0:
            begun = max((n for n in range(1, len(OPENS)) if self.text.endswith(OPENS[:n])), default=0)
            place = len(self.text) - begun
        # Spaces before a call are no part of what is said.
        said = self.text[: len(self.text[:place].rstrip())]
        new, self.sent = said[self.sent :], max(self.sent, len(said))
        return new

    def _called(self) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        while True:
            if self._inside and (piece := self._arguments()):
                told.append({"index": self._calls - 1, "function": {"arguments": piece}})
            begins = None if self._inside else self._next()
            head = None if begins is None else HEAD.match(self.text, begins)
            if head is None or head[1] not in self.names:
                return told
            told.append(_begun(self._calls, _id(), head[1]))
            self._calls, self._at, self._inside = self._calls + 1, head.end(), True

    def _next(self) -> int | None:
        """Where the JSON of the next call would begin."""
        if not self._bare:
            place = self.text.find(OPENS, self._at)
            return None if place < 0 else place + len(OPENS)
        found = (BETWEEN if self._calls else FIRST).match(self.text, self._at)
        return None if found is None else found.end()

    def _arguments(self) -> str:
        """What has come of an object since the last call; `_inside` says whether it goes on."""
        begins = self._at
        while self._inside and self._at < len(self.text):
            letter = self.text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted, self._escaped = letter != '"', letter == "\\"
            elif letter == '"':
                self._quoted = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
                self._inside = self._depth > 0
        return self.text[begins : self._at]


def _begun(place: int, name: str, function: str) -> dict[str, Any]:
    return {"index": place, "id": name, "type": "function", "function": {"name": function, "arguments": ""}}


def _deltas(place: int, call: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole call as two deltas."""
    function = call["function"]
    rest = {"index": place, "function": {"arguments": function["arguments"]}}
    return [_begun(place, call["id"], function["name"]), rest]
