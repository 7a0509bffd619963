"""Azure ML: its inference server with the scoring file that the package ships, and what it needs to host without."""

import json
from typing import Any

import yaml

from .case import Answers, Case, Mismatch, Unavailable
from .processes import free_port, post, server
from .venvs import environment

SERVER = ("azureml-inference-server-http>=1.4.1",)
HOSTED = ("azureml-inference-server-http", "azureml-ai-monitoring")
SCALARS = {"string", "long", "integer", "float", "double", "boolean"}


def azure_server(case: Case) -> Answers:
    """azureml-inference-server-http with azure/score.py, /score in Azure's forms of body."""
    score = case.package / "azure" / "score.py"
    if not score.is_file():
        raise Unavailable("the package ships no azure/score.py; package the model again")
    python = environment("azure", SERVER, install=case.install)
    port = free_port()
    # Azure mounts the folder that holds the package.
    mounted = str(case.package.parent)
    arguments = ["--entry_script", str(score), "--model_dir", mounted, "--port", str(port)]
    code = "from azureml_inference_server_http.amlserver import run; run()"
    env = {"AZUREML_MODEL_DIR": mounted, "MLFLOW_MODEL_FOLDER": case.package.name}
    env |= {"AML_APP_ROOT": str(case.scratch), "AML_HTTP_HOST": "127.0.0.1"}
    url = f"http://127.0.0.1:{port}"
    with server(case, "azure-server", [str(python), "-c", code, *arguments], url, env):
        for form in ("split", "rows", "columns"):
            yield form, [_only(post(case, f"{url}/score", {"input_data": azure_data(row, form)})) for row in case.rows]


def azure_data(row: dict[str, Any], form: str) -> Any:
    """A row in one of Azure's forms of `input_data`."""
    if form == "split":
        return {"columns": list(row), "index": [0], "data": [list(row.values())]}
    return [row] if form == "rows" else {name: [value] for name, value in row.items()}


def _only(answer: Any) -> dict[str, Any]:
    found = json.loads(answer) if isinstance(answer, str) else answer
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise Mismatch("/score did not answer one row with a list of one record")
    return found[0]


def azure_no_code(case: Case) -> Answers:
    """What Azure's own scoring script reads of an MLflow model: checked by its files, nothing is run."""
    model = yaml.safe_load((case.package / "MLmodel").read_text(encoding="utf-8"))
    if broken := no_code_faults(case, model):
        raise Mismatch("; ".join(broken))
    yield "contract", case.expected


def no_code_faults(case: Case, model: dict[str, Any]) -> list[str]:
    """What Azure's hosting without a scoring file would trip over; empty where nothing is."""
    found = []
    if "python_function" not in (model.get("flavors") or {}):
        found.append("MLmodel has no python_function flavour")
    example = model.get("saved_input_example_info") or {}
    if example.get("type") not in ("dataframe", "ndarray"):
        found.append(f"the input example is of type {example.get('type')!r}: it must be dataframe or ndarray")
    else:
        file = case.package / str(example.get("artifact_path"))
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        values = [value for row in data.get("data", []) for value in (row if isinstance(row, list) else [row])]
        if not values or not all(isinstance(value, str | int | float | bool) for value in values):
            found.append("the input example holds no rows of scalar values")
    signature = model.get("signature") or {}
    for part in ("inputs", "outputs"):
        columns = json.loads(signature.get(part) or "[]")
        if not columns:
            found.append(f"the signature names no {part}")
        elif part == "inputs" and (nested := [it.get("name") for it in columns if it.get("type") not in SCALARS]):
            found.append(f"the signature's {part} {', '.join(map(str, nested))} are no scalars")
    conda = case.package / "conda.yaml"
    packages = yaml.safe_load(conda.read_text(encoding="utf-8"))["dependencies"] if conda.is_file() else []
    listed = [line for it in packages if isinstance(it, dict) for line in it.get("pip", [])]
    missing = [needed for needed in HOSTED if not any(line.startswith(needed) for line in listed)]
    return found + [f"conda.yaml does not install {needed}: the container would answer 502" for needed in missing]
