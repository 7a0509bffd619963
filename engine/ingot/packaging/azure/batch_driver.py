"""Driver for Azure ML's batch endpoints: `init` loads the package, `run` answers the rows of some files.

Each row of a file gives one row of the output: `file`, `row` (from 0), the model's output columns and `error`, so that
what Azure appends to `predictions.csv`, which has no header, can be joined to what was sent. Files: .csv, .parquet,
.jsonl and .json.
"""

import json
import os
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd

ROWS_AT_ONCE = 64
model: Any = None


def init() -> None:
    """Load the package that AZUREML_MODEL_DIR holds; called once a worker."""
    global model
    root = Path(os.environ["AZUREML_MODEL_DIR"])
    found = [root] if (root / "MLmodel").is_file() else sorted(path.parent for path in root.rglob("MLmodel"))
    if len(found) != 1:
        raise FileNotFoundError(f"AZUREML_MODEL_DIR holds {len(found)} MLmodel files instead of one")
    model = mlflow.pyfunc.load_model(str(found[0]))


def run(mini_batch: list[str]) -> pd.DataFrame:
    """One output row for each row of the files of `mini_batch`, in their order.

    A file that cannot be read or answered has one row instead, -1, with what is wrong as its `error`; the others are
    answered all the same. Where no file can be, that raises: Azure counts the mini batch against `error_threshold`.
    """
    found, errors = [], []
    for path in map(Path, mini_batch):
        try:
            found += _of_file(path)
        except Exception as error:  # of any kind: of the disk, of a file's form, of the model
            errors.append(f"{path.name}: {error}")
            found.append({"file": path.name, "row": -1, "error": str(error)})
    if errors and len(errors) == len(mini_batch):
        raise ValueError("; ".join(errors))
    outputs = model.metadata.get_output_schema().input_names()
    return pd.DataFrame(found, columns=["file", "row", *outputs, "error"])


def _of_file(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path)
    answers: list[dict[str, Any]] = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        answers += model.predict(rows[at : at + ROWS_AT_ONCE]).to_dict("records")
    if len(answers) != len(rows):
        raise ValueError(f"{len(rows)} rows were given {len(answers)} answers")
    return [{"file": path.name, "row": number, **answer, "error": ""} for number, answer in enumerate(answers)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as input columns: those that the model's signature names, where it has others too."""
    kind = path.suffix.lower()
    if kind == ".csv":
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    elif kind in (".parquet", ".pqt"):
        frame = pd.read_parquet(path)
    elif kind in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8-sig")
        frame = pd.DataFrame(json.loads(text) if kind == ".json" else [json.loads(it) for it in text.split("\n") if it])
    else:
        raise ValueError(f"{kind or 'no ending'}; this driver reads .csv, .parquet, .jsonl and .json")
    known = [name for name in model.metadata.get_input_schema().input_names() if name in frame]
    return frame[known].to_dict("records") if known else frame.to_dict("records")
