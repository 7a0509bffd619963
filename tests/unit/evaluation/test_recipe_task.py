"""A recipe's rows as a task: what makes two questions the same, and which answers are used again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import SECTION

from ingot.data.conversation import Conversation, Message, PromptCompletion
from ingot.data.example import Example
from ingot.data.preference import Preference
from ingot.errors import DataError
from ingot.evaluation.measure import RecipeTask
from ingot.evaluation.runner import evaluate_task
from ingot.evaluation.samples import Output
from ingot.recipe_io import parse_recipe


def chat(system: str = "Be brief.", tools: tuple[dict[str, Any], ...] = (), where: str = "f:1") -> Conversation:
    turns = (Message("system", system), Message("user", "What is it?"), Message("assistant", "A fox."))
    return Conversation(turns, tools, where)


def pair(rejected: str, where: str = "f:1") -> Preference:
    return Preference(PromptCompletion("q", "yes", where), PromptCompletion("q", rejected, where), where)


def task_of(rows: list[Example], task: str = "chat-completion", **given: Any) -> RecipeTask:
    recipe = parse_recipe(
        {"name": "x", "model": {"source": "m"}, "data": {"train": "t"}, "objective": {"task": task} | given}
    )
    return RecipeTask(recipe, lambda: iter([rows]), (), None, None)


def digest(row: Example, **given: Any) -> str:
    [[item]] = task_of([row], **given).windows()
    return item.digest()


@pytest.mark.parametrize(
    ("one", "other", "given"),
    [
        (chat(), chat("Answer at length."), {}),
        (chat(), chat(tools=({"type": "function", "function": {"name": "look"}},)), {}),
        (pair("no"), pair("never"), {"task": "text-generation", "method": "dpo"}),
    ],
    ids=["system prompt", "tools", "rejected answer"],
)
def test_rows_that_differ_in_anything_are_other_documents(one: Example, other: Example, given: Any) -> None:
    assert digest(one, **given) != digest(other, **given)


def test_where_a_row_stands_is_no_part_of_it() -> None:
    assert digest(chat()) == digest(chat(where="other:9"))
    given = {"task": "text-generation", "method": "dpo"}
    assert digest(pair("no"), **given) == digest(pair("no", where="other:9"), **given)


def test_long_conversations_are_asked_together() -> None:
    """By all that is read, not by the last question."""
    long, short = chat("word " * 100), chat("word")
    task = task_of([short, long])
    [[a, b]] = task.windows()
    assert task.size(b) > task.size(a)
    assert a.prompt == b.prompt


def asked_of(row: Example, folder: Path, model: dict[str, Any]) -> int:
    """How many rows are asked when `row` is evaluated in `folder`."""
    count = 0

    class Counting(RecipeTask):
        def answer(self, subject: Any, items: Any) -> list[Output]:
            nonlocal count
            count += len(items)
            return [{"text": "A fox."} for _ in items]

    recipe = task_of([row])._recipe
    task = Counting(recipe, lambda: iter([[row]]), (), None, None)
    nobody: Any = object()
    evaluate_task(task, lambda: nobody, folder, name="x", model=model, section=SECTION)
    return count


def test_answers_to_another_system_prompt_are_not_used_again(tmp_path: Path) -> None:
    model = {"fingerprint": "f", "template": "t"}
    assert asked_of(chat(), tmp_path, model) == 1
    assert asked_of(chat(), tmp_path, model | {"source": "typed otherwise", "kind": "run"}) == 0
    assert asked_of(chat("Answer at length."), tmp_path, model) == 1
    assert asked_of(chat("Answer at length."), tmp_path, model | {"template": "another"}) == 1


def test_a_prompt_without_room_is_told_before_anything_is_asked(tiny_tokenizer: Any) -> None:
    rows: list[Example] = [PromptCompletion("the fox", " jumps", "f:1"), PromptCompletion("the " * 40, " fox", "f:2")]
    recipe = parse_recipe(
        {
            "name": "x",
            "model": {"source": "m"},
            "data": {"train": "t"},
            "objective": {"task": "text-generation"},
            "evaluate": {"max_new_tokens": 8, "metrics": ["exact_match"]},
        }
    )

    def windows() -> Iterator[list[Example]]:
        yield rows

    task = RecipeTask(recipe, windows, (), tiny_tokenizer, 24)
    [items] = task.windows()
    assert task.metrics(items[:1]) == ["exact_match"]
    with pytest.raises(DataError, match=r"f:2: evaluate\.max_new_tokens = 8"):
        task.metrics(items)
