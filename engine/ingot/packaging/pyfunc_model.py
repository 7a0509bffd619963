"""MLflow's door to a packaged model: `mlflow.pyfunc.load_model` and `mlflow models serve` come in here.

Copied into the package beside the runtime, with its imports of Ingot made relative. Columns and parameters are those of
`task_schemas.py`.
"""

from typing import Any

import pandas as pd

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.model.task_schemas import TASKS


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
        if not len(frame.columns):
            # MLflow leaves out columns that the signature has not, the other names of a column among them.
            forms = TASKS[self.runtime.task].forms
            needs = " or ".join(" and ".join(form) for form in forms)
            raise InputError(forms[0][0], f"each row needs {needs}; no column of these names was sent")
        return pd.DataFrame(self.runtime.answer(_rows(frame), params))


def _frame(data: Any) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, dict):
        scalar = not any(isinstance(value, list | tuple) for value in data.values())
        return pd.DataFrame([data] if scalar else {key: pd.Series(value) for key, value in data.items()})
    return pd.DataFrame(data)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A mapping a row. An unwrapped `{"messages": [...]}` comes as one message a row: it is one conversation."""
    records: list[dict[str, Any]] = [
        {str(name): cell for name, cell in row.items()} for row in frame.to_dict("records")
    ]
    turns = [row["messages"] for row in records if isinstance(row.get("messages"), dict)]
    if turns and len(turns) == len(records):
        return [{"messages": turns}]
    return [row if set(row) != {"0"} else {"": row["0"]} for row in records]  # a list of bare strings
