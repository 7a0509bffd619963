"""What training saw, as texts: of a recipe's rows and of files of any shape."""

import json
from pathlib import Path
from typing import Any

import pytest

from ingot.data.conversation import Conversation, Document, Message
from ingot.data.labeled import Asked, Labeled
from ingot.data.seen import File, Seen, check_files, files_of, in_file, learned, parts_of, texts_in
from ingot.errors import DataError
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe


def test_parts_are_what_is_asked_and_what_is_answered() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Me")]
    messages = tuple(Message(*turn) for turn in turns)
    assert parts_of(Conversation(messages)) == ("Hi\nHello\nWho?", "Me")
    assert parts_of(Conversation((messages[0], messages[2]))) == ("Be brief.", "Hello")
    assert parts_of(Labeled("my card", "lost")) == ("my card", "lost")
    assert parts_of(Asked("Who?", "It was me.", (("me", 7),))) == ("Who?\nIt was me.", "me")
    assert parts_of(Document("all")) == ("all",)


def test_texts_of_a_row_of_any_shape() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"id": 7, "tokens": ["New", "York"], "messages": turns, "note": None, "empty": " ", "more": {"a": "b"}}
    assert list(texts_in(row)) == ["New York", "Hi", "Hello", "b"]
    assert list(texts_in({"messages": json.dumps(turns)})) == ["Hi", "Hello"]
    assert list(texts_in({"text": "[{broken"})) == ["[{broken"]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_that_only_begins_like_a_chat_is_a_text() -> None:
    text = '[{"role": ' + "[" * 100_000
    assert list(texts_in(text)) == [text]


def test_rows_of_a_file_know_where_they_stand(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"q": "one", "a": "two", "n": 3}, ["no object"], {"q": "", "a": None}, {"q": "x"}])
    file = File("a.jsonl", tmp_path, "--against")
    first, bad, last = Seen("a.jsonl:1", ("one", "two")), Seen("a.jsonl:2", (), True), Seen("a.jsonl:4", ("x",))
    assert list(in_file(file)) == [first, bad, last]
    check_files([file])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.jsonl", [], "holds no text (there is no row that can be read)"),
        ("a.jsonl", [{"n": 1, "m": None}], "holds no text (its columns are n, m)"),
        ("", None, "is empty; name a file"),
        ("a.weights", [{"q": "x"}], "its extension is not known; name one of .jsonl"),
    ],
)
def test_files_without_texts_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(DataError) as refused:
        check_files([File(name, tmp_path, "evaluate.contamination.against[0]")])
    assert (refused.value.field, refused.value.value) == ("evaluate.contamination.against[0]", name)
    assert message in str(refused.value)


def recipe(**data: Any) -> Recipe:
    values = {"name": "t", "model": {"source": "m"}, "objective": {"task": "text-generation"}, "data": data}
    return parse_recipe({**values, "train": {"max_steps": 1}, "evaluate": {"contamination": {"against": ["b.csv"]}}})


def test_rows_of_a_recipe_are_those_of_training(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    written(tmp_path / "train.jsonl", rows)
    made = recipe(train="train.jsonl", validation_share=0.2, test_share=0.2)
    seen = list(learned(made, tmp_path))
    assert len(seen) == 12
    assert all(it.parts[0].removeprefix("question ") == it.parts[1].removeprefix("answer ") for it in seen)
    streamed = recipe(train="train.jsonl", streaming=True, validation_share=0, test_share=0)
    assert [it.where for it in learned(streamed, tmp_path)] == [f"train.jsonl:{n + 1}" for n in range(20)]
    assert files_of(made, tmp_path) == (File("b.csv", tmp_path, "evaluate.contamination.against[0]"),)
