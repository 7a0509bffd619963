"""Rows and parameters against the one table of tasks."""

import json
from typing import Any, get_args

import numpy as np
import pytest

from ingot.model.task_checks import (
    SchemaError,
    flat,
    output_schema,
    params_model,
    read_params,
    read_row,
    row_model,
)
from ingot.model.task_schemas import TASKS
from ingot.recipe_data import Task

HELLO = [{"role": "user", "content": "Hello!"}]
HALF = "\ud83d"


def test_every_task_that_is_trained_can_be_answered() -> None:
    assert set(TASKS) == {*get_args(Task), "embeddings"}


@pytest.mark.parametrize("task", TASKS)
def test_examples_and_defaults_pass(task: str) -> None:
    schema = TASKS[task]
    assert read_row(task, schema.example) == schema.example
    assert flat(task, schema.example) == schema.example
    assert read_params(task, {param.name: param.default for param in schema.params}) == {}
    assert read_params(task, {param.name: None for param in schema.params}) == {}
    row, params = row_model(task).model_json_schema(), params_model(task).model_json_schema()
    assert set(row["properties"]) == {column.name for column in schema.inputs}
    assert set(params.get("properties", {})) == {param.name for param in schema.params}
    assert set(output_schema(task)["properties"]) == {column.name for column in schema.outputs}
    json.dumps([row, params, output_schema(task)])


@pytest.mark.parametrize(
    ("task", "row", "found"),
    [
        ("chat-completion", {"": "Hi"}, {"input_string": "Hi"}),
        ("chat-completion", {"prompt": "Hi"}, {"input_string": "Hi"}),
        ("chat-completion", {"messages": json.dumps(HELLO)}, {"messages": HELLO}),
        ("chat-completion", {"messages": HELLO, "input_string": float("nan")}, {"messages": HELLO}),
        (
            "chat-completion",
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        ),
        ("translation", {"source": "Hi"}, {"input_string": "Hi"}),
        ("token-classification", {"tokens": '["a", "b"]'}, {"tokens": ["a", "b"]}),
        ("token-classification", {"tokens": '["\\ud83d\\ude42"]'}, {"tokens": ["🙂"]}),
        ("token-classification", {"tokens": np.array(["a", "b"])}, {"tokens": ["a", "b"]}),
        ("reward", {"": "Hi"}, {"text": "Hi"}),
        ("text-classification", {"input_string": "Hi"}, {"text": "Hi"}),
    ],
)
def test_rows_by_the_tables_names(task: str, row: dict[str, Any], found: dict[str, Any]) -> None:
    assert read_row(task, row) == found


@pytest.mark.parametrize(
    ("task", "row", "field", "told"),
    [
        ("chat-completion", {"mesages": HELLO}, "mesages", "did you mean messages"),
        ("chat-completion", {"messages": "x"}, "messages", "not JSON"),
        ("chat-completion", {"messages": [{"role": "robot"}]}, "messages", "each message must be"),
        ("chat-completion", {"messages": HELLO, "prompt": "x"}, "input_string", "or messages; got"),
        ("chat-completion", {}, "input_string", "each row needs input_string (or prompt, text); or messages"),
        ("question-answering", {"question": "x"}, "context", "'context' is missing"),
        ("question-answering", {"": "x"}, "", "a bare value is no row"),
        ("reward", {"prompt": "x"}, "completion", "prompt and completion"),
        ("text-classification", {"text": 3}, "text", "valid string"),
        ("token-classification", {"tokens": ["a", " "]}, "tokens", "none of them blank"),
        ("token-classification", {"tokens": "Anna lives"}, "tokens", "column text"),
        ("waffles", {}, "task", "tasks are chat-completion"),
        ("text-classification", {"text": f"a {HALF}"}, "text", "half of a surrogate pair"),
        ("token-classification", {"tokens": ["a", HALF]}, "tokens", "half of a surrogate pair"),
        ("chat-completion", {"messages": [{"role": "user", "content": HALF}]}, "messages", "half of a surrogate pair"),
        ("chat-completion", {"messages": json.dumps([{"role": "user", "content": HALF}])}, "messages", "half of a"),
        ("chat-completion", {"messages": [*HELLO, {"role": "user", "content": [{"text": HALF}]}]}, "messages", "half"),
        ("chat-completion", {"messages": [{"role": "user", "content": "a", HALF: 1}]}, "messages", "half of a"),
        ("chat-completion", {"messages": "[" * 100_000}, "messages", "not JSON"),
        ("token-classification", {"tokens": "[" * 100_000}, "tokens", "not JSON"),
    ],
)
def test_wrong_columns_are_named(task: str, row: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_row(task, row)
    assert caught.value.field == field
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("task", "params", "field"),
    [
        ("chat-completion", {"max_tokens": -1}, "max_tokens"),
        ("chat-completion", {"max_tokens": True}, "max_tokens"),
        ("chat-completion", {"temperature": "hot"}, "temperature"),
        ("chat-completion", {"top_p": 0.0}, "top_p"),
        ("chat-completion", {"top_k": 3}, "top_k"),
        ("chat-completion", {"stop": [""]}, "stop"),
        ("text-classification", {"top_k": 0}, "top_k"),
        ("multi-label-classification", {"threshold": 1.5}, "threshold"),
        ("question-answering", {"no_answer": "maybe"}, "no_answer"),
        ("reward", {"temperature": 1.0}, "temperature"),
    ],
)
def test_wrong_parameters_are_named(task: str, params: dict[str, Any], field: str) -> None:
    with pytest.raises(SchemaError) as caught:
        read_params(task, params)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_parameters_that_are_given_stay() -> None:
    given = {"max_tokens": np.int64(3), "temperature": 1, "stop": "a", "seed": 0}
    assert read_params("chat-completion", given) == {"max_tokens": 3, "temperature": 1.0, "stop": ["a"], "seed": 0}
    assert read_params("embeddings", {"normalize": False, "pooling": "last"}) == {"normalize": False, "pooling": "last"}


def test_nested_cells_become_text() -> None:
    assert flat("chat-completion", {"messages": HELLO}) == {"input_string": "Hello!"}
    twice = [{"role": "system", "content": "é"}, *HELLO]
    assert flat("chat-completion", {"messages": twice}) == {"messages": json.dumps(twice, ensure_ascii=False)}


def test_forms_show_bounds_and_choices() -> None:
    shown = params_model("embeddings").model_json_schema()["properties"]
    assert shown["pooling"]["anyOf"][0]["enum"] == ["auto", "mean", "first", "last"]
    assert params_model("embeddings") is params_model("embeddings")
    assert row_model("reward").__name__ == "RewardRow"
    shown = params_model("multi-label-classification").model_json_schema()["properties"]
    assert shown["threshold"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 1.0}
