"""The generated sets: deterministic, split by sentence pattern, and learnable from the request alone."""

import hashlib
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

import ingot
from ingot.data.synthetic import corpus, generate
from ingot.data.synthetic.patterns import ARGUMENTS, NO_TOOL, PATTERNS, TEST, TOOLS, TRAIN
from ingot.data.synthetic.tool_calls import REFUSAL, SIZES
from ingot.errors import DataError

DIGEST = """
import hashlib, itertools, json
from ingot.data.synthetic import generate
for name, split in (("tool-calls", "test"), ("nano-corpus", "train")):
    rows = list(itertools.islice(generate(name, split), 400))
    print(hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest())
"""


def words(pattern: str) -> set[str]:
    return set(re.findall(r"[a-z-]+", re.sub(r"\{\w+\}", " ", pattern.lower())))


SLOTS = {
    "money": r"\S+(?: (?:[A-Z]{3}|\w+s|yen|[\d.,]+))?",
    "date": r"(?:\d+ \w+ \d{4}|\w+ \d+, \d{4}|\d{4}-\d\d-\d\d)",
    "time": r"(?:\d\d:\d\d|\d+ [ap]m)",
    "person": r"(?-i:[A-Z]\w+ [A-Z]\w+)",
    "company": r"(?-i:[A-Z]\w+ [A-Z]\w+)",
    "city": r"(?-i:[A-Z]\w+)",
    "origin": r"(?-i:[A-Z]\w+)",
    "destination": r"(?-i:[A-Z]\w+)",
    "order": r"(?-i:[A-Z]\d+)",
    "task": r"\w+(?: \w+){1,3}",
    "amount": r"[\d.,]+",
    "thing": r"\w+(?: \w+){0,2}",
}


def as_regex(pattern: str) -> re.Pattern[str]:
    """What a sentence of `pattern` looks like, with any values and whatever stands around it."""
    parts = re.split(r"\{(\w+)\}", pattern.rstrip(".?"))
    body = "".join(SLOTS.get(part, r"\w+") if number % 2 else re.escape(part) for number, part in enumerate(parts))
    return re.compile(rf"\b{body}\b", re.IGNORECASE)


@pytest.mark.parametrize("split", list(SIZES))
def test_split_has_its_size_and_every_tool(split: str) -> None:
    rows = list(generate("tool-calls", split))
    assert len(rows) == SIZES[split]
    assert {row["tool"] for row in rows} == {*TOOLS, NO_TOOL}


def test_no_pattern_stands_in_two_splits() -> None:
    skeletons = {split: {corpus.skeleton(p) for ps in table.values() for p in ps} for split, table in PATTERNS.items()}
    assert not skeletons["train"] & skeletons["test"]
    assert not skeletons["train"] & skeletons["validation"]
    assert not skeletons["validation"] & skeletons["test"]


@pytest.mark.parametrize("tool", [*TOOLS, NO_TOOL])
def test_each_tool_is_tested_in_words_that_training_does_not_use(tool: str) -> None:
    known = {word for patterns in TRAIN.values() for pattern in patterns for word in words(pattern)}
    new = [pattern for pattern in TEST[tool] if words(pattern) - known]
    assert len(TEST[tool]) >= 5
    assert len(new) >= 4


def test_no_test_request_is_a_training_request() -> None:
    seen = {row["messages"][0]["content"] for row in generate("tool-calls", "train")}
    assert not [row for row in generate("tool-calls", "test") if row["messages"][0]["content"] in seen]


@pytest.mark.parametrize("split", list(SIZES))
def test_answers_are_typed_and_follow_from_the_request(split: str) -> None:
    for row in generate("tool-calls", split):
        request, written = (message["content"] for message in row["messages"])
        answer = json.loads(written)
        if row["tool"] == NO_TOOL:
            assert answer == REFUSAL
            continue
        assert list(answer) == ["tool", "arguments"]
        assert answer["tool"] == row["tool"]
        assert tuple(answer["arguments"]) == ARGUMENTS[row["tool"]]
        for kind, value in zip(TOOLS[row["tool"]], answer["arguments"].values(), strict=True):
            if kind == "amount":
                assert isinstance(value, int | float)
                assert not isinstance(value, bool)
                assert f"{value:.2f}".removesuffix(".00") in request.replace(",", "")
            elif kind == "date":
                year, month, day = value.split("-")
                assert len(month) == len(day) == 2
                assert year in request
                assert day.lstrip("0") in request
            elif kind not in ("currency", "target", "time"):
                assert value.lower() in request.lower()


def test_corpus_knows_neither_tools_nor_answer_format() -> None:
    for row in islice(generate("nano-corpus", "train"), 20_000):
        assert not [tool for tool in TOOLS if tool in row["text"]]
        assert '"tool"' not in row["text"]
        assert "arguments" not in row["text"]


def test_corpus_holds_no_test_pattern() -> None:
    text = "|".join(row["text"] for row in islice(generate("nano-corpus", "train"), 20_000))
    for patterns in TEST.values():
        for pattern in patterns:
            found = as_regex(pattern).search(text)
            assert found is None, f"{pattern} -> {found and found[0]}"


def test_the_pattern_search_finds_what_it_should() -> None:
    for split, limit in (("test", 100), ("train", 200)):
        for row in islice(generate("tool-calls", split), limit):
            _, tool, number = row["pattern"].split("/")
            request = row["messages"][0]["content"]
            assert as_regex(PATTERNS[split][tool][int(number)]).search(f"x|{request} Topic?"), request


@pytest.mark.parametrize("name", ["nano-corpus", "nano-copying"])
def test_dialogues_are_closed_and_short_and_end_with_the_assistant(name: str) -> None:
    for row in islice(generate(name, "validation"), 1000):
        assert row["text"].endswith(f"{row['messages'][-1]['content']}{corpus.END}")
        assert row["messages"][-1]["role"] == "assistant"
        assert len(row["text"]) < 500


def test_copying_asks_for_what_stands_there() -> None:
    for row in generate("nano-copying", "validation"):
        assert row["messages"][0]["content"].endswith(f": {row['messages'][1]['content']}")


def test_same_rows_in_another_process() -> None:
    root = str(Path(ingot.__file__).parents[1])
    environment = {"PYTHONPATH": root, "PATH": "", "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    here = []
    for name, split in (("tool-calls", "test"), ("nano-corpus", "train")):
        rows = list(islice(generate(name, split), 400))
        here.append(hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest())
    assert told.stdout.split() == here


def test_unknown_names_are_turned_away() -> None:
    with pytest.raises(DataError, match="tool-calls"):
        generate("tool-call")
    with pytest.raises(DataError, match="validation"):
        generate("tool-calls", "valid")
