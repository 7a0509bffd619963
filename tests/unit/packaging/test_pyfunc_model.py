"""MLflow's door: each form of input that reaches it gives the runtime's own answer."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.packaging.pyfunc_model import PackagedModel, _load_pyfunc

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


@pytest.fixture
def chat(chat_folder: Path) -> PackagedModel:
    return _load_pyfunc(str(chat_folder))


def _texts(frame: pd.DataFrame) -> list[str]:
    assert list(frame) == ["output_string"]
    return frame["output_string"].tolist()


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"messages": [json.dumps(TURNS)]}),
        pd.DataFrame({"messages": [TURNS]}),
        [{"messages": TURNS}],
        pd.DataFrame({"messages": TURNS}),  # what MLflow makes of an unwrapped {"messages": [...]}
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
    ],
)
def test_conversations_in_every_form(chat: PackagedModel, data: Any) -> None:
    assert _texts(chat.predict(data)) == [chat.runtime.chat(TURNS).text]


@pytest.mark.parametrize(
    "data", [{"input_string": "Hello!"}, [{"input_string": "Hello!"}], pd.DataFrame({"input_string": ["Hello!"]})]
)
def test_input_string_is_one_user_turn(chat: PackagedModel, data: Any) -> None:
    assert _texts(chat.predict(data)) == [chat.runtime.chat(TURNS[1:]).text]


def test_rows_come_in_order(text_folder: Path) -> None:
    model = _load_pyfunc(str(text_folder))
    words = ["Hello!", "What is the capital of France?", "Paris"]
    assert _texts(model.predict({"input_string": words})) == [model.runtime.complete(word).text for word in words]


def test_parameters_reach_the_runtime(text_folder: Path) -> None:
    model = _load_pyfunc(str(text_folder))
    defaults = {"max_tokens": 0, "temperature": 0.0, "top_p": 1.0, "stop": [], "seed": -1}
    row = [{"input_string": "Hello!"}]
    assert _texts(model.predict(row, defaults)) == [model.runtime.complete("Hello!").text]
    asked = {"max_tokens": 4, "temperature": 1.0, "top_p": 0.9, "stop": ["zzz"], "seed": 3}
    wanted = model.runtime.complete("Hello!", max_new_tokens=4, temperature=1.0, top_p=0.9, stop=["zzz"], seed=3)
    assert _texts(model.predict(row, asked)) == [wanted.text]
    unseeded = defaults | {"temperature": 1.0}
    assert _texts(model.predict(row, unseeded)) != _texts(model.predict(row, unseeded))


def test_labels_with_probability(mean_folder: Path) -> None:
    frame = _load_pyfunc(str(mean_folder)).predict({"text": ["Hello!", "Thank you very much"]})
    wanted = Runtime.load(mean_folder).classify(["Hello!", "Thank you very much"])
    assert frame.to_dict("records") == [{"label": label, "probability": probs[label]} for label, probs in wanted]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"question": "x"}, "question"),
        ({"input_string": 3}, "input_string"),
        ({"messages": "not json"}, "messages"),
        ({"messages": "{}"}, "messages"),
        ({"messages": '["x"]'}, "messages"),
        ([{"messages": 3}], "messages"),
    ],
)
def test_other_input_names_the_column(chat: PackagedModel, data: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        chat.predict(data)
    assert caught.value.field == field


def test_the_names_that_mlflow_lets_pass_are_told(chat: PackagedModel) -> None:
    """MLflow leaves out `text`, by which the endpoint also knows the column."""
    with pytest.raises(InputError, match="each row needs input_string or messages; no column") as caught:
        chat.predict(pd.DataFrame(index=[0]))
    assert "text" not in str(caught.value)
