"""`tool-preferences`: the right call is the one of tool-calls, the wrong one is a call that is wrong."""

import json
from collections import Counter

import pytest

from ingot.data.synthetic import generate


@pytest.mark.parametrize(("split", "size"), [("validation", 200), ("test", 400)])
def test_rows_are_those_of_tool_calls_with_a_wrong_call(split, size):
    rows, calls = list(generate("tool-preferences", split)), list(generate("tool-calls", split))
    assert len(rows) == size
    kinds = Counter()
    for row, call in zip(rows, calls, strict=True):
        assert [*row["prompt"], *row["chosen"]] == call["messages"]
        right, wrong = (json.loads(row[name][0]["content"]) for name in ("chosen", "rejected"))
        assert right != wrong
        same_tool = right["tool"] == wrong["tool"]
        kinds["refused" if wrong["tool"] is None else "arguments" if same_tool else "tool"] += 1
        if same_tool:
            assert wrong["arguments"].keys() <= right["arguments"].keys()
    assert min(kinds.values()) > size / 20
    assert len(kinds) == 3


def test_the_same_rows_every_time():
    assert list(generate("tool-preferences", "validation")) == list(generate("tool-preferences", "validation"))
