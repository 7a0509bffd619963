"""Driver for Azure ML's batch endpoints: `init` loads the package, `run` answers the rows of some files.

Each row of a file gives one row of the output: `file`, `row` (from 0) and the model's output columns, so that what
Azure appends to `predictions.csv` can be joined to what was sent. Files: .csv, .parquet, .jsonl and .json.
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

    A file that cannot be read or answered raises, with its name: Azure counts it against `error_threshold`.
    """
    return pd.concat([_of_file(Path(path)) for path in mini_batch], ignore_index=True)


def _of_file(path: Path) -> pd.DataFrame:
    rows = read_rows(path)
    try:
        parts = [model.predict(rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from error
    answers = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if len(answers) != len(rows):
        raise ValueError(f"{path.name}: {len(rows)} rows were given {len(answers)} answers")
    answers.insert(0, "row", range(len(rows)))
    answers.insert(0, "file", path.name)
    return answers


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as input columns: those that the model's signature names, where it has others too."""
    kind = path.suffix.lower()
    if kind == ".csv":
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    elif kind in (".parquet", ".pqt"):
        frame = pd.read_parquet(path)
    elif kind in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8")
        frame = pd.DataFrame(json.loads(text) if kind == ".json" else [json.loads(it) for it in text.split("\n") if it])
    else:
        raise ValueError(f"{path.name}: {kind or 'no ending'}; this driver reads .csv, .parquet, .jsonl and .json")
    known = [name for name in model.metadata.get_input_schema().input_names() if name in frame]
    return frame[known].to_dict("records") if known else frame.to_dict("records")
