import json
import re

import pytest

from ingot.data.conversation import Conversation, Document, Message, PromptCompletion
from ingot.data.example import required_columns, to_example
from ingot.data.labeled import Labeled
from ingot.data.sources import BadRow, Row
from ingot.errors import DataError
from ingot.recipe import Data, Objective

CHAT, GENERATION, LANGUAGE, CLASSES = (
    Objective(task=task) for task in ("chat-completion", "text-generation", "language-modeling", "text-classification")
)


def read(values: dict, objective: Objective, **data):
    return to_example(Row(values, "f:7"), Data(train="f", **data), objective)


def reason(values: dict, objective: Objective, **data) -> str:
    result = read(values, objective, **data)
    assert isinstance(result, BadRow), result
    assert result.where == "f:7"
    return result.reason


QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_messages_in_both_known_shapes():
    wanted = Conversation((Message("user", "What is 2 + 2?"), Message("assistant", "4")))
    sharegpt = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert read({"messages": [QUESTION, ANSWER]}, CHAT) == wanted
    assert read({"messages": json.dumps([QUESTION, ANSWER])}, CHAT) == wanted
    assert read({"conversations": sharegpt}, CHAT, columns={"messages": "conversations"}) == wanted
    assert read({"messages": [QUESTION, ANSWER]}, CHAT).where == "f:7"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_templates_under_the_names_they_use(key):
    example = read({"messages": [{**QUESTION, key: "no"}, {**ANSWER, key: "2 and 2."}]}, CHAT)
    assert example.messages[1].reasoning == "2 and 2."
    assert example.messages[1].as_dict() == {**ANSWER, "reasoning_content": "2 and 2.", "thinking": "2 and 2."}
    assert example.messages[0].as_dict() == QUESTION
    assert read({"messages": [QUESTION, {**ANSWER, key: " "}]}, CHAT).messages[1].as_dict() == ANSWER
    assert f"messages[1].{key} must be text" in reason({"messages": [QUESTION, {**ANSWER, key: ["a"]}]}, CHAT)


@pytest.mark.parametrize(
    ("switch", "learned"),
    [({"train": False}, False), ({"weight": 0}, False), ({"train": True}, True), ({"weight": 1}, True), ({}, True)],
)
def test_turns_can_be_switched_off(switch, learned):
    turns = [QUESTION, {**ANSWER, **switch}, QUESTION, ANSWER]
    example = read({"messages": turns}, CHAT)
    assert [turn.learned for turn in example.messages] == [True, learned, True, True]
    assert example.messages[1].as_dict() == ANSWER
    alone = read({"messages": turns[:2]}, CHAT)
    assert isinstance(alone, Conversation) == learned
    assert learned or "switched off" in alone.reason


@pytest.mark.parametrize("switch", [{"train": "no"}, {"weight": 0.5}, {"weight": [0]}])
def test_a_switch_that_is_neither_on_nor_off_is_refused(switch):
    found = reason({"messages": [QUESTION, {**ANSWER, **switch}]}, CHAT)
    assert f"messages[1].{next(iter(switch))} must be" in found


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_tool_calls_and_tools(arguments):
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    turns = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
        ANSWER,
    ]
    example = read({"messages": turns, "tools": json.dumps([{"type": "function"}])}, CHAT)
    assert example.tools == ({"type": "function"},)
    assert example.messages[1].tool_calls == (CALL,)
    assert example.messages[1].content == ""
    assert example.messages[1].answer() == '{"name": "add", "arguments": {"a": 2}}'
    assert example.messages[2].as_dict() == turns[2]
    assert "tool_calls" not in example.messages[3].as_dict()
    assert example.last_assistant == 3


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("not json", "not JSON"),
        ([], "list of turns"),
        (["hello"], "must be an object"),
        ([QUESTION], "no assistant turn"),
        ([ANSWER, QUESTION], "nothing to answer"),
        ([{"role": "narrator", "content": "x"}, ANSWER], "role 'narrator'"),
        ([{"role": ["user"], "content": "x"}, ANSWER], "role"),
        ([QUESTION, {"role": "assistant", "content": "  "}], r"messages\[1\].content is empty"),
        ([QUESTION, {"role": "assistant", "content": None}], "missing"),
        ([QUESTION, {"role": "assistant", "content": ["x"]}], "must be text"),
        ([QUESTION, {"role": "assistant", "content": "x\ud800"}], "Unicode"),
        ([{**QUESTION, "tool_calls": [CALL]}, ANSWER], "only the assistant calls"),
        ([QUESTION, {**ANSWER, "tool_calls": "add(2)"}], "list of objects"),
        ([QUESTION, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
        ([QUESTION, {**ANSWER, "tool_calls": [{"id": "1"}]}], "function.name"),
    ],
)
def test_conversations_that_cannot_be_used(messages, why):
    assert re.search(why, reason({"messages": messages}, CHAT))


def test_a_system_turn_may_be_empty():
    example = read({"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]}, CHAT)
    assert example.messages[0] == Message("system", "")


def test_prompts_are_formatted_over_the_columns_of_the_row():
    data = {"columns": {"prompt": "mr", "completion": "ref"}, "prompt_template": "{{{area}}} {prompt}\nText {year}:"}
    example = read({"mr": "name[X]", "ref": "X is nice.", "area": "city", "year": 1999}, GENERATION, **data)
    assert example == PromptCompletion("{city} name[X]\nText 1999:", "X is nice.")


def test_values_with_braces_are_not_formatted_again():
    assert read({"prompt": "{completion}", "completion": "x"}, GENERATION).prompt == "{completion}"


def test_lists_of_words_become_text():
    example = read({"prompt": ["New", "York"], "completion": ["B", "I"]}, GENERATION)
    assert example == PromptCompletion("New York", "B I")


@pytest.mark.parametrize("template", ["{", "{}", "{prompt!r}", "{prompt:>10}"])
def test_templates_that_cannot_be_read(template):
    with pytest.raises(DataError) as caught:
        read({"prompt": "a", "completion": "b"}, GENERATION, prompt_template=template)
    assert caught.value.field == "data.prompt_template"


def test_template_names_are_columns_and_never_attributes():
    assert "no column 'prompt.__class__'" in reason(
        {"prompt": "a", "completion": "b"}, GENERATION, prompt_template="{prompt.__class__}"
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": " \n", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": None}, "completion must be text"),
        ({"prompt": {"a": 1}, "completion": "b"}, "prompt must be text"),
        ({"prompt": "a", "completion": True}, "bool"),
        ({"prompt": "a"}, "no column 'completion'; there are: prompt"),
    ],
)
def test_pairs_that_cannot_be_used(values, why):
    assert why in reason(values, GENERATION)


@pytest.mark.parametrize(("label", "wanted"), [("refund", "refund"), (3, "3"), (0, "0")])
def test_labels_are_text_or_integers(label, wanted):
    assert read({"text": "hi", "label": label}, CLASSES) == Labeled("hi", wanted)


@pytest.mark.parametrize("label", ["", None, 1.5, ["a"]])
def test_labels_that_cannot_be_used(label):
    assert "label" in reason({"text": "hi", "label": label}, CLASSES)


def test_documents():
    assert read({"body": "hi"}, LANGUAGE, columns={"text": "body"}) == Document("hi")
    assert "empty" in reason({"text": "\n"}, LANGUAGE)
    assert "Unicode" in reason({"text": "half a pair: \ud83d"}, LANGUAGE)


def test_required_columns_follow_the_task_and_the_mapping():
    data = Data(train="f", columns={"prompt": "mr", "completion": "ref"}, prompt_template="{area}: {prompt}")
    assert required_columns(data, Objective(task="text-generation")) == {
        "data.columns.prompt": "mr",
        "data.prompt_template": "area",
        "data.columns.completion": "ref",
    }
    assert required_columns(data, Objective(task="chat-completion")) == {"data.columns.messages": "messages"}
    assert required_columns(data, Objective(task="text-classification")) == {
        "data.columns.text": "text",
        "data.columns.label": "label",
    }
