"""Rows with two answers: every form that people's files have, and what is refused."""

import json

import pytest

from ingot.data.conversation import Conversation, Document, PromptCompletion
from ingot.data.preference import Preference
from ingot.data.sources import BadRow, Row
from ingot.recipe_io import parse_recipe


def turn(role, text):
    return {"role": role, "content": text}


ASK, GOOD, BAD = turn("user", "ask"), turn("assistant", "good"), turn("assistant", "bad")


def read(values, *, task="chat-completion", method="dpo", **data):
    from ingot.data.example import to_example

    objective = {"task": task} | ({} if task == "reward" else {"method": method})
    sections = {"data": {"train": "rows.jsonl", **data}, "objective": objective}
    recipe = parse_recipe({"name": "pairs", "model": {"source": "m"}, **sections})
    return to_example(Row(values, "row:1"), recipe.data, recipe.objective)


def texts(side):
    return [(message.role, message.content, message.learned) for message in side.messages]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": "good", "rejected": "bad"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
    ids=["texts", "turns", "turns and texts", "whole conversations", "turns in text cells"],
)
def test_a_chat_has_many_forms(values):
    found = read(values)
    assert texts(found.chosen) == [("user", "ask", True), ("assistant", "good", True)]
    assert texts(found.rejected) == [("user", "ask", True), ("assistant", "bad", True)]
    assert found.where == "row:1"


def test_what_both_sides_begin_with_is_not_learned():
    before = [turn("system", "be brief"), ASK, turn("assistant", "what?"), turn("user", "this")]
    found = read(
        {"chosen": [*before, GOOD], "rejected": [*before, BAD, turn("user", "no"), turn("assistant", "sorry")]}
    )
    flags = [message.learned for message in found.chosen.messages if message.role == "assistant"]
    assert flags == [False, True]
    flags = [message.learned for message in found.rejected.messages if message.role == "assistant"]
    assert flags == [False, True, True]


def test_a_continuation_takes_the_prompt_template():
    found = read(
        {"q": "ask", "chosen": "good", "rejected": "bad"}, task="text-generation", prompt_template="Q: {q}\nA:"
    )
    assert found == Preference(PromptCompletion("Q: ask\nA:", "good"), PromptCompletion("Q: ask\nA:", "bad"))


def test_a_reward_model_takes_rows_as_they_are():
    assert isinstance(read({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, task="reward").chosen, Conversation)
    found = read({"prompt": "ask", "chosen": "good", "rejected": "bad"}, task="reward")
    assert found.chosen == PromptCompletion("ask", "good")
    found = read({"chosen": "Human: ask Assistant: good", "rejected": "Human: ask Assistant: bad"}, task="reward")
    assert found.rejected == Document("Human: ask Assistant: bad")


def test_a_text_that_begins_as_turns_do_is_a_text():
    found = read({"prompt": "ask", "chosen": "[{ good", "rejected": "bad"}, task="text-generation")
    assert found.chosen.completion == "[{ good"


@pytest.mark.parametrize(
    ("values", "task", "reason"),
    [
        ({"prompt": "ask", "chosen": "good"}, "chat-completion", "no column 'rejected'"),
        ({"prompt": "ask", "chosen": "same", "rejected": "same"}, "chat-completion", "are the same"),
        ({"prompt": "ask", "chosen": "good", "rejected": " "}, "chat-completion", "rejected is empty"),
        ({"prompt": "ask", "chosen": "good", "rejected": None}, "chat-completion", "rejected must be text"),
        ({"prompt": "ask", "chosen": [GOOD], "rejected": "bad"}, "chat-completion", "both be text"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "text-generation", "turns of a chat"),
        ({"chosen": "good", "rejected": "bad"}, "text-generation", "no column 'prompt'"),
        ({"chosen": "good", "rejected": "bad"}, "chat-completion", "assistant's"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "chat-completion", "assistant"),
        ({"chosen": [ASK, GOOD], "rejected": [turn("user", "other"), BAD]}, "chat-completion", "different prompts"),
        ({"prompt": [ASK], "chosen": [{**GOOD, "train": False}], "rejected": [BAD]}, "chat-completion", "switched off"),
    ],
)
def test_what_cannot_be_used_says_why(values, task, reason):
    found = read(values, task=task)
    assert isinstance(found, BadRow)
    assert reason in found.reason
