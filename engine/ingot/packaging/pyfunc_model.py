"""MLflow's door to a packaged model: `mlflow.pyfunc.load_model` and `mlflow models serve` come in here.

Copied into the package beside `generate.py` and `pooling.py`, with its one import of Ingot made relative. Input columns
are strings: `input_string` (or `messages`, a JSON list, for chat models) or `text`. Output columns are `output_string`,
or `label` and `probability`.
"""

import json
from typing import Any

import pandas as pd

from ingot.model.generate import InputError
from ingot.model.runtime import Runtime

# Sampling parameters as clients name them -> as the runtime does. The signature declares exactly these.
PARAMS = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
}


def _load_pyfunc(data_path: str) -> "PackagedModel":
    """Called by MLflow with the absolute path of the package's `model` folder."""
    return PackagedModel(Runtime.load(data_path))


class PackagedModel:
    """`predict` as MLflow calls it; one answer per input row."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`data`: a DataFrame, or what makes one (a list of rows, a dict of columns). Raises `InputError`."""
        frame = _frame(data)
        if self.runtime.task == "text-classification":
            answers = self.runtime.classify(_strings(frame, "text"))
            return pd.DataFrame([{"label": label, "probability": probs[label]} for label, probs in answers])
        if self.runtime.task == "chat-completion" and "messages" in frame:
            prompts = [self.runtime.chat_ids(messages) for messages in _conversations(frame["messages"].tolist())]
        elif self.runtime.task == "chat-completion":
            turns = [[{"role": "user", "content": text}] for text in _strings(frame, "input_string")]
            prompts = [self.runtime.chat_ids(messages) for messages in turns]
        else:
            prompts = [self.runtime.prompt_ids(text) for text in _strings(frame, "input_string")]
        chosen = {PARAMS[name]: value for name, value in (params or {}).items()}
        # MLflow fills in the signature's defaults; 0 and -1 stand there for "the model's own" and "none".
        if chosen.get("max_new_tokens") == 0:
            del chosen["max_new_tokens"]
        if chosen.get("seed") == -1:
            del chosen["seed"]
        return pd.DataFrame({"output_string": [answer.text for answer in self.runtime.generate(prompts, **chosen)]})


def _frame(data: Any) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, dict):
        scalar = not any(isinstance(value, list | tuple) for value in data.values())
        return pd.DataFrame([data] if scalar else {key: pd.Series(value) for key, value in data.items()})
    return pd.DataFrame(data)


def _strings(frame: pd.DataFrame, column: str) -> list[str]:
    if column not in frame:
        raise InputError(column, f"the input needs a column {column!r}; it has: {', '.join(map(str, frame)) or 'none'}")
    values = frame[column].tolist()
    if not all(isinstance(value, str) for value in values):
        raise InputError(column, f"column {column!r} must hold strings")
    return values


def _conversations(cells: list[Any]) -> list[list[dict[str, Any]]]:
    """A cell is a conversation (a list or its JSON); an unwrapped `{"messages": [...]}` comes as one message a row."""
    if cells and all(isinstance(cell, dict) for cell in cells):
        return [cells]
    found = []
    for cell in cells:
        try:
            messages = json.loads(cell) if isinstance(cell, str) else list(cell)
        except (TypeError, ValueError) as error:
            raise InputError("messages", "column 'messages' must hold lists of messages, or their JSON") from error
        if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
            raise InputError("messages", 'each message must be an object such as {"role": "user", "content": "..."}')
        found.append(messages)
    return found
