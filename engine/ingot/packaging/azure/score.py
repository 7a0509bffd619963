"""Scoring file for Azure ML's online endpoints (azureml-inference-server-http): `init` loads the package, `run` answers
one request. Nothing but the package's own requirements is imported.

Bodies, by their first key: `{"input_data": ..., "params": {...}}`, `{"input_data": {..., "parameters": {...}}}` and
`{"inputs": ..., "parameters": {...}}`. The data are a list of values or of rows, a mapping of columns, or a frame split
into `columns` and `data`. The answer is a list of rows; one conversation in `input_string` is answered by `{"output":
text}`.
"""

import json
import os
from pathlib import Path
from typing import Any

import mlflow.pyfunc

model: Any = None


def init() -> None:
    """Load the package that AZUREML_MODEL_DIR holds."""
    global model
    model = mlflow.pyfunc.load_model(str(package_folder()))


def run(raw_data: Any) -> Any:
    """Answer one body of POST /score, as text, bytes or parsed JSON. What cannot be answered is status 400."""
    try:
        body = json.loads(raw_data) if isinstance(raw_data, str | bytes | bytearray) else raw_data
        rows, params, conversation = rows_of(body)
        found = model.predict(rows, params=params or None).to_dict("records")
    except Exception as error:  # MLflow's and the runtime's own come from modules that are not imported here
        if not (isinstance(error, ValueError) or hasattr(error, "error_code")):
            raise
        return _refused(str(error))
    if conversation and len(found) == 1 and len(found[0]) == 1:
        return {"output": next(iter(found[0].values()))}
    return found


def package_folder() -> Path:
    """The folder with MLmodel in AZUREML_MODEL_DIR: itself, MLFLOW_MODEL_FOLDER in it, or the only one below."""
    root = Path(os.environ["AZUREML_MODEL_DIR"])
    for folder in (root, root / os.environ.get("MLFLOW_MODEL_FOLDER", "mlflow_model_folder")):
        if (folder / "MLmodel").is_file():
            return folder
    below = sorted(path.parent for path in root.rglob("MLmodel"))
    if len(below) != 1:
        raise FileNotFoundError(f"AZUREML_MODEL_DIR holds {len(below)} MLmodel files; set MLFLOW_MODEL_FOLDER")
    return below[0]


def rows_of(body: Any) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """(rows of input columns, parameters, whether it is one conversation). Raises ValueError for other bodies."""
    key = next((name for name in ("input_data", "inputs") if isinstance(body, dict) and name in body), None)
    if key is None:
        raise ValueError('the body must be an object with "input_data" (or "inputs")')
    data, params = body[key], dict(body.get("params") or {})
    params |= body.get("parameters") or {}
    if isinstance(data, dict) and isinstance(data.get("parameters"), dict):
        params |= data["parameters"]
        data = {name: value for name, value in data.items() if name != "parameters"}
    if isinstance(data, dict) and {"columns", "data"} <= set(data):
        return [dict(zip(data["columns"], row, strict=True)) for row in data["data"]], params, False
    if isinstance(data, dict) and is_conversation(data.get("input_string")):
        data = data["input_string"]
    if isinstance(data, dict):
        return _of_columns(data), params, False
    if not isinstance(data, list) or not data:
        raise ValueError(f"{key} must be a list that is not empty, or an object")
    if is_conversation(data):
        return [_row(data)], params, True
    return [row if isinstance(row, dict) else _row(row) for row in data], params, False


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _row(value: Any) -> dict[str, Any]:
    """The row of a bare value: of the model's first input column, or of `messages`, which are sent as JSON."""
    if is_conversation(value):
        return {"messages": json.dumps(value, ensure_ascii=False)}
    return {str(model.metadata.get_input_schema().input_names()[0]): value}


def _of_columns(data: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {name: value if isinstance(value, list) else [value] for name, value in data.items()}
    if len({len(values) for values in columns.values()}) != 1:
        raise ValueError("the columns of input_data must have equally many rows")
    if list(columns) == ["input_string"]:
        return [_row(value) if is_conversation(value) else {"input_string": value} for value in columns["input_string"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _refused(reason: str) -> Any:
    try:
        from azureml_inference_server_http.api.aml_response import AMLResponse
    except ModuleNotFoundError:  # under another server
        return {"error": {"message": reason}}
    return AMLResponse({"error": {"message": reason}}, 400, json_str=True)
