"""Targets that answer over HTTP on loopback: MLflow's server, ours, MLServer, and the clients that ask them."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

from ingot.model.runtime import WRITING

from .case import Answers, Case, Mismatch, Record, Unavailable
from .processes import CHILDREN, OURS, PYTHON, ask_child, free_port, ingot, post, server
from .venvs import environment

# MLServer 1.7 answers 500 under pandas 3: its codec does not know the dtype of that one's text columns.
MLSERVER = ("mlserver>=1.6", "mlserver-mlflow>=1.6", "pandas>=2.2,<3")
OPENAI = ("openai>=1.40",)


def bodies(row: Record) -> dict[str, dict[str, Any]]:
    """Every form in which MLflow's /invocations takes a row."""
    split = {"columns": list(row), "data": [list(row.values())]}
    return {
        "dataframe_split": {"dataframe_split": split},
        "dataframe_records": {"dataframe_records": [row]},
        "instances": {"instances": [row]},
        "inputs": {"inputs": {name: [value] for name, value in row.items()}},
    }


def invocations(case: Case, url: str) -> Answers:
    """The rows by every form of body."""
    for form in bodies(case.rows[0]):
        yield form, [_prediction(post(case, f"{url}/invocations", bodies(row)[form])) for row in case.rows]


def _prediction(answer: Any) -> Record:
    found = answer.get("predictions") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise Mismatch("/invocations did not answer one row with one record under predictions")
    return found[0]


def mlflow_serve(case: Case) -> Answers:
    """`mlflow models serve --env-manager local`, every form of body."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["-m", str(case.package), "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    command = [str(PYTHON), "-m", "mlflow", "models", "serve", *flags]
    env = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(math.ceil(case.timeout_s))}  # its own is 60 s
    with server(case, "mlflow-serve", command, f"{url}/ping", env):
        yield from invocations(case, url)


def mlflow_client(case: Case) -> Answers:
    """MLflow's own client of scoring servers, on our endpoint."""
    with _endpoint(case) as url:
        yield "frame", ask_child(case, CHILDREN / "mlflow_child.py", port=int(url.rpartition(":")[2]))


def ingot_serve(case: Case) -> Answers:
    """`ingot serve`: /invocations, and the OpenAI routes of models that write."""
    with _endpoint(case) as url:
        yield from invocations(case, url)
        if case.task in WRITING:
            yield "openai", [openai_row(case, url, row) for row in case.rows]


@contextlib.contextmanager
def _endpoint(case: Case) -> Iterator[str]:
    """`ingot serve` in a process of its own, without the keys and settings of the user's environment: its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["--port", str(port), "--deadline", str(case.timeout_s), "--no-supervise"]
    with server(case, "ingot-serve", ingot("serve", str(case.package), *flags), f"{url}/ready", OURS):
        yield url


def openai_row(case: Case, url: str, row: Record, model: str | None = None) -> Record:
    """One row by the OpenAI route of its task."""
    body: dict[str, Any] = {"temperature": 0} if model is None else {"temperature": 0, "model": model}
    if model is not None:  # other servers have another default length
        body["max_tokens"] = case.about.get("new_tokens", 128)
    if case.task != "chat-completion":
        answer = post(case, f"{url}/v1/completions", body | {"prompt": row["input_string"].rstrip(" ")})
        return {"output_string": answer["choices"][0]["text"]}
    text = row.get("input_string", "")
    turns = json.loads(row["messages"]) if "messages" in row else [{"role": "user", "content": text}]
    answer = post(case, f"{url}/v1/chat/completions", body | {"messages": turns})
    return {"output_string": answer["choices"][0]["message"]["content"]}


def openai_client(case: Case) -> Answers:
    """OpenAI's own Python client on our endpoint, at once and as a stream."""
    if case.task not in WRITING:
        raise Unavailable(f"OpenAI's client has no call for {case.task}")
    python = environment("openai", OPENAI, install=case.install)
    with _endpoint(case) as url:
        found = ask_child(case, CHILDREN / "openai_child.py", python, url=url)
    for form in ("whole", "streamed"):
        yield form, [it[form] for it in found]


def mlserver(case: Case) -> Answers:
    """MLServer's MLflow runtime, asked by KServe's V2 protocol."""
    python = environment("mlserver", MLSERVER, install=case.install)
    place = case.scratch / "mlserver"
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "parallel_workers": 0}
    settings |= {"metrics_port": free_port(), "metrics_endpoint": None, "debug": False}
    (place / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    model = {
        "name": "model",
        "implementation": "mlserver_mlflow.MLflowRuntime",
        "parameters": {"uri": str(case.package)},
    }
    (place / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    url = f"http://127.0.0.1:{port}/v2"
    command = [str(python), "-c", "from mlserver.cli import main; main()", "start", str(place)]
    with server(case, "mlserver", command, f"{url}/models/model/ready"):
        yield "v2", [of_v2(post(case, f"{url}/models/model/infer", v2(row))) for row in case.rows]


def v2(row: Record) -> dict[str, Any]:
    """A row of strings as a V2 request: a frame of one row."""
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [value], "parameters": {"content_type": "str"}}
        for name, value in row.items()
    ]
    return {"parameters": {"content_type": "pd"}, "inputs": inputs}


def of_v2(answer: Any) -> Record:
    """The record of a V2 answer. Columns of lists and objects come as JSON, and say so."""
    found = {}
    for it in answer["outputs"]:
        [value] = it["data"]
        nested = (it.get("parameters") or {}).get("content_type") == "pd_json"
        found[it["name"]] = json.loads(value) if nested else value
    return found
