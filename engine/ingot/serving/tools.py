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
TAGGED = re.compile(rf"{OPENS}\s*(.*?)\s*(?:{CLOSES}|$)", re.DOTALL)
FORCED = "tool_choice"


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
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": written}


def read(text: str, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """An answer -> what it says beside calls, and OpenAI's `tool_calls`. All of it is text where a call is broken."""
    place = text.find(OPENS)
    written = TAGGED.findall(text) if place >= 0 else [text.strip()] if text.lstrip()[:1] in ("{", "[") else []
    calls = []
    for one in written:
        try:
            value = json.loads(one)
        except (ValueError, RecursionError):
            return text, []
        for part in value if isinstance(value, list) else [value]:
            if (call := _call(part, names)) is None:
                return text, []
            calls.append(call)
    if not calls:
        return text, []
    return text[: max(place, 0)].rstrip(), calls


class Unfolding:
    """Text as it comes: what may still be the beginning of a call is held back."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.text, self.sent = names, "", 0

    def feed(self, new: str) -> str:
        """What is said for certain since the last call."""
        self.text += new
        if self.text.lstrip()[:1] in ("", "{", "["):
            return ""
        place = self.text.find(OPENS)
        if place < 0:
            begun = max((n for n in range(1, len(OPENS)) if self.text.endswith(OPENS[:n])), default=0)
            place = len(self.text) - begun
        # Spaces before a call are no part of what is said.
        said = self.text[: len(self.text[:place].rstrip())]
        new, self.sent = said[self.sent :], max(self.sent, len(said))
        return new

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of what is said, and the calls."""
        said, calls = read(self.text, self.names)
        return said[self.sent :], calls
