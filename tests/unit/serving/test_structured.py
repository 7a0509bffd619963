"""Answers keep to their schema whatever the model would rather say; what cannot be followed is refused by name."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import validate

from ingot.model.sampling import InputError
from ingot.serving import structured
from ingot.serving.structured import guided
from ingot.serving.tools import Unfolding, forced, prompt_of, read

TALK = [{"role": "user", "content": "Hello!"}]
FIELD = "response_format"
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["city", "sure", "n"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"enum": ["a", None, True]}, "minItems": 2, "maxItems": 3},
    "reference": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"const": "né 猫"}, "maxItems": 1}}},
    "root": {"enum": ["yes", "no"]},
}


@pytest.fixture(scope="module")
def runtime(client_of: Callable[[str], Any]) -> Any:
    return client_of("chat-completion").app.state.deployments.choose().engine.runtime


@pytest.mark.parametrize("temperature", [0.0, 100.0])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_answers_keep_to_the_schema(runtime: Any, kind: str, temperature: float) -> None:
    guide = guided(runtime, SCHEMAS[kind], FIELD)
    prompts = [runtime.chat_ids(TALK)] * 4
    answers = runtime.generate(prompts, guide=guide, max_new_tokens=80, temperature=temperature, seed=1)
    for answer in answers:
        assert answer.finish_reason == "stop"
        validate(json.loads(answer.text), SCHEMAS[kind])
    assert temperature == 0.0 or len({answer.text for answer in answers}) > 1 or kind == "reference"


def test_an_answer_that_is_cut_says_so(runtime: Any) -> None:
    [answer] = runtime.generate(
        [runtime.chat_ids(TALK)], guide=guided(runtime, SCHEMAS["object"], FIELD), max_new_tokens=3
    )
    assert answer.finish_reason == "length"


def _nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": _nested(depth - 1)} if depth else {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "bogus"}, "no valid JSON Schema"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"$ref": "#/nowhere"}, "no valid JSON Schema"),
        ({"$ref": "https://example.com/schema"}, "no valid JSON Schema"),
        ({"type": "string", "pattern": "[[["}, "no valid JSON Schema"),
        ({"enum": []}, "nothing can satisfy it"),
        ({"$ref": "#"}, "no beginning"),
        (_nested(400), "not a JSON Schema"),
        ({"not": {}, "x-guidance": {"lenient": True}}, '"not"'),
    ],
)
def test_schemas_that_cannot_be_followed(runtime: Any, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        guided(runtime, schema, FIELD)
    assert caught.value.field == FIELD
    assert words in str(caught.value)
    assert "nowhere" not in str(caught.value)


def test_without_the_extra_it_is_named(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    structured._vocabulary.cache_clear()
    with pytest.raises(InputError, match=r"ingot\[structured\]") as caught:
        guided(runtime, {"type": "object"}, FIELD)
    assert caught.value.field == FIELD


# --- calls -----------------------------------------------------------------------------------------------------------

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {"table": {"$ref": "#/$defs/table"}},
                "required": ["table"],
                "additionalProperties": False,
                "$defs": {"table": {"enum": ["small", "big"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "leave"}},
]
NAMES = {"book", "leave"}
ONE = '{"name": "book", "arguments": {"table": "big"}}'
TAGS = '{"name": "book", "arguments": {"table": "a </tool_call> b <tool_call>{ \\"}"}}'
NOTE = '"note": "</tool_call><tool_call>"}'


@pytest.mark.parametrize("place", ["$defs", "definitions"])
def test_definitions_are_objects(runtime: Any, place: str) -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {place: 5}}}
    with pytest.raises(InputError, match=f"tool_choice: .*{re.escape(place)}"):
        forced(runtime, [odd])


def test_a_forced_call_is_one_of_them(runtime: Any) -> None:
    begun, schema = forced(runtime, TOOLS[:1])
    assert begun == []  # the template has no tags
    [answer] = runtime.generate(
        [prompt_of(runtime, TALK, TOOLS)], guide=guided(runtime, schema, "tool_choice"), max_new_tokens=80
    )
    said, [call] = read(answer.text, NAMES)
    assert said == ""
    assert call["function"]["name"] == "book"
    assert json.loads(call["function"]["arguments"])["table"] in ("small", "big")


def test_the_models_own_form_of_a_call(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = runtime.tokenizer.chat_template
    monkeypatch.setattr(runtime.tokenizer, "chat_template", own + "{# <tool_call> #}")
    begun, schema = forced(runtime, TOOLS)
    assert runtime.tokenizer.decode(begun) == "<tool_call>\n"
    assert [set(one["properties"]) for one in schema["anyOf"]] == [{"name", "arguments"}] * 2
    monkeypatch.setattr(runtime.tokenizer, "chat_template", own + '{# {"name": ..., "parameters": ...} #}')
    begun, schema = forced(runtime, TOOLS[:1])
    assert begun == [] and set(schema["properties"]) == {"name", "parameters"}
    monkeypatch.setattr(runtime.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="does not show them") as caught:
        prompt_of(runtime, TALK, TOOLS)
    assert caught.value.field == "tools"


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (ONE, "", 1),
        (f" [{ONE}, {ONE}]\n", "", 2),
        ('{"name": "leave", "parameters": {}}', "", 1),
        (f"<tool_call>\n{ONE}\n</tool_call>", "", 1),
        (f"Gladly. <tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "Gladly.", 2),
        (f"<tool_call>\n{ONE}", "", 1),
        (f"Gladly. <tool_call>\n{TAGS}\n</tool_call>\n<tool_call>{ONE}</tool_call>", "Gladly.", 2),
        (f"<tool_call>{ONE[:-1]}, {NOTE}</tool_call><tool_call>{ONE[:-1]}, {NOTE}</tool_call>", "", 2),
        ("Hello!", "Hello!", 0),
        ('{"name": "rob", "arguments": {}}', '{"name": "rob", "arguments": {}}', 0),
        ('{"name": "book", "arguments": "x"}', '{"name": "book", "arguments": "x"}', 0),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", 0),
        ("[1, 2]", "[1, 2]", 0),
        ("[]", "[]", 0),
        ("a < b <tool", "a < b <tool", 0),
    ],
)
def test_answers_are_read_as_calls(text: str, said: str, calls: int) -> None:
    found, called = read(text, NAMES)
    assert (found, len(called)) == (said, calls)
    assert len({call["id"] for call in called}) == calls
    for step in (1, 3, 100):  # and so are they piece by piece, with nothing of a call among the text
        unfolding = Unfolding(NAMES)
        fed = [unfolding.feed(text[place : place + step]) for place in range(0, len(text), step)]
        rest, late, whole = unfolding.end()
        assert "".join(said for said, _ in fed) + rest == said
        assert whole is bool(calls)
        joined = _joined([delta for _, deltas in fed for delta in deltas] + late)
        assert [(one["name"], json.loads(one["arguments"])) for one in joined] == [
            (one["function"]["name"], json.loads(one["function"]["arguments"])) for one in called
        ]


def _joined(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client makes of deltas: the first of a call has its id, its name and no arguments."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta["index"] == len(calls):
            assert delta["id"] and delta["type"] == "function" and delta["function"]["arguments"] == ""
            calls.append(dict(delta["function"]))
        else:
            assert delta["index"] == len(calls) - 1 and delta.keys() == {"index", "function"}
            calls[-1]["arguments"] += delta["function"]["arguments"]
    return calls


def test_arguments_are_told_as_they_come() -> None:
    unfolding = Unfolding(NAMES)
    assert unfolding.feed('Yes. <tool_call>{"name": "book", "arguments": ') == ("Yes.", [])
    _, [first, begun] = unfolding.feed('{"a": {"b": "}')
    assert first["function"] == {"name": "book", "arguments": ""}
    assert begun == {"index": 0, "function": {"arguments": '{"a": {"b": "}'}}
    _, [ended] = unfolding.feed('\\"}"}}, "more": 1}</tool_call> <tool_call>{"arguments": {}, "name": "leave"')
    assert ended["function"]["arguments"] == '\\"}"}}'
    assert unfolding.feed("}</tool_call>") == ("", [])  # its name came last
    rest, late, whole = unfolding.end()
    assert (rest, whole, _joined([first, begun, ended, *late])[1]) == ("", True, {"name": "leave", "arguments": "{}"})


@pytest.mark.parametrize(
    ("text", "arguments", "rest"),
    [
        ('<tool_call>{"name": "book", "arguments": {"table": "b', ['{"table": "b'], ""),
        (f"<tool_call>{ONE} and</tool_call>", ['{"table": "big"}'], ""),
        (f"<tool_call>{ONE}</tool_call><tool_call>{{broken", ['{"table": "big"}'], "{broken"),
        (f'[{ONE}, {{"name": "rob"}}]', ['{"table": "big"}'], ' {"name": "rob"}]'),
    ],
)
def test_a_call_that_breaks_off_is_not_called_whole(text: str, arguments: list[str], rest: str) -> None:
    for step in (1, 100):
        unfolding = Unfolding(NAMES)
        deltas = [d for place in range(0, len(text), step) for d in unfolding.feed(text[place : place + step])[1]]
        assert unfolding.end() == (rest, [], False)
        assert [one["arguments"] for one in _joined(deltas)] == arguments
