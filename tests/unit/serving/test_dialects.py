"""The forms of MLflow, Azure ML and KServe: each answers what the runtime answers, for every task."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ingot.model.task_schemas import TASKS

TALK = [{"role": "user", "content": "Hello!"}]
SERVED = (
    *("chat-completion", "text-generation", "summarization", "text-classification", "multi-label-classification"),
    *("token-classification", "question-answering", "fill-mask", "reward", "embeddings"),
)
Client = Callable[[str], Any]


def _row(task: str) -> dict[str, Any]:
    return dict(TASKS[task].example)


def _answers(client: Any, rows: list[dict[str, Any]], params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return client.app.state.deployments.choose().engine.runtime.answer(rows, params or {})


def _answered(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def _refused(response: httpx.Response, param: str | None, *words: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param, response.text
    assert all(word in response.json()["error"]["message"] for word in words), response.text


def _close(found: Any, wanted: Any) -> None:
    """Equal, but for the last bits of numbers: rows of another batch may round another way."""
    assert json.loads(json.dumps(found), parse_float=lambda t: round(float(t), 4)) == json.loads(
        json.dumps(wanted), parse_float=lambda t: round(float(t), 4)
    )


# --- every task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SERVED)
def test_every_task_has_every_route(client_of: Client, task: str) -> None:
    client, row = client_of(task), _row(task)
    [wanted] = _answers(client, [row])
    names = list(row)
    for body in (
        {"dataframe_split": {"columns": names, "data": [list(row.values())]}},
        {"dataframe_records": [row]},
        {"inputs": {name: [cell] for name, cell in row.items()}},
        {"instances": [row]},
    ):
        _close(_answered(client.post("/invocations", json=body)), {"predictions": [wanted]})
    # MLflow leaves out the envelope where the body looks like OpenAI's.
    unwrapped = bool({"messages", "prompt", "input"} & set(row))
    for body in (row, row | {"model": "tiny"}):
        bare = _answered(client.post("/invocations", json=body))
        _close(bare, [wanted] if unwrapped else {"predictions": [wanted]})
    shape = _SHAPES[task](wanted)
    for body in (
        {"inputs": {name: [cell] for name, cell in row.items()}, "parameters": {}},
        {"input_data": {name: [cell] for name, cell in row.items()} | {"parameters": {}}},
        {"input_data": row, "params": {}},
        {"input_data": {"columns": names, "index": [0], "data": [list(row.values())]}},
    ):
        _close(_answered(client.post("/score", json=body)), [shape])
    tensors = [{"name": n, "shape": [1], "datatype": "BYTES", "data": [cell]} for n, cell in row.items()]
    told = _answered(client.post("/v2/models/tiny/infer", json={"inputs": tensors}))
    assert (told["model_name"], told["model_version"]) == ("tiny", "1")
    _close({o["name"]: _cell(o) for o in told["outputs"]}, wanted)


def _cell(output: dict[str, Any]) -> Any:
    if len(output["shape"]) == 2:
        assert output["shape"] == [1, len(output["data"])]
        return output["data"]
    assert output["shape"] == [1]
    [cell] = output["data"]
    # What no tensor holds is its JSON.
    return json.loads(cell) if isinstance(cell, str) and cell[:1] == "[" else cell


_SHAPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "chat-completion": lambda a: {"output": a["output_string"]},
    "text-generation": lambda a: a["output_string"],
    "summarization": lambda a: a["output_string"],
    "text-classification": lambda a: a["label"],
    "multi-label-classification": lambda a: a["labels"],
    "token-classification": lambda a: a["tags"],
    "question-answering": lambda a: a["answer"],
    "fill-mask": lambda a: a["tokens"][0],
    "reward": lambda a: a["score"],
    "embeddings": lambda a: a["embedding"],
}


# --- Azure ML --------------------------------------------------------------------------------------------------------


def test_a_conversation_of_azure(client_of: Client) -> None:
    client = client_of("chat-completion")
    wanted = {"output": _answers(client, [{"messages": TALK}], {"max_tokens": 5})[0]["output_string"]}
    for body in (
        {"input_data": {"input_string": TALK, "parameters": {"max_new_tokens": 5}}},
        {"input_data": TALK, "params": {"max_tokens": 5}},
    ):
        assert _answered(client.post("/score", json=body)) == wanted
    two = {"input_data": {"input_string": [TALK, TALK]}, "params": {"max_new_tokens": 5}}
    assert _answered(client.post("/score", json=two)) == [wanted, wanted]


def test_azures_parameters(client_of: Client) -> None:
    client = client_of("text-generation")

    def written(**params: Any) -> Any:
        return client.post("/score", json={"input_data": ["What is"], "params": params})

    [plain] = _answers(client, [{"input_string": "What is"}], {"max_tokens": 6})
    assert _answered(written(max_new_tokens=6, do_sample=False)) == [plain["output_string"]]
    assert _answered(written(max_new_tokens=6, return_full_text=True)) == ["What is" + plain["output_string"]]
    [drawn] = _answers(client, [{"input_string": "What is"}], {"max_tokens": 6, "temperature": 1.0, "seed": 5})
    assert (
        _answered(written(max_new_tokens=6, do_sample=True, seed=5))
        == [drawn["output_string"]]
        != [plain["output_string"]]
    )
    _refused(written(do_sample=False, temperature=0.5), "do_sample")
    _refused(written(do_sample="yes"), "do_sample")
    _refused(written(max_new_tokens=6, max_tokens=6), "max_new_tokens")
    _refused(written(typical_p=0.5), "typical_p", "unknown")
    labels = client_of("text-classification")
    told = _answered(labels.post("/score", json={"input_data": ["x"], "params": {"return_all_scores": True}}))
    assert [set(one) for one in told[0]] == [{"label", "score"}] * 3
    assert sum(one["score"] for one in told[0]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"inputs": ["a"], "input_data": ["a"]}, None),
        ({"input_data": ["a"], "bogus": 1}, "bogus"),
        ({"input_data": []}, "input_data"),
        ({"input_data": {"input_string": ["a"], "parameters": {}}, "params": {}}, "parameters"),
        ({"input_data": {"input_string": ["a"], "parameters": 3}}, "parameters"),
        ({"input_data": {"columns": ["input_string"], "data": [["a", "b"]]}}, "input_data"),
        ({"input_data": {"columns": 3, "data": [["a"]]}}, "input_data"),
        ({"input_data": {"question": ["a"]}}, "question"),
    ],
)
def test_malformed_scores(client_of: Client, body: dict[str, Any], param: str | None) -> None:
    _refused(client_of("text-generation").post("/score", json=body), param)


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("chat-completion", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a\ud800b"}]}),
        ("text-classification", "/invocations", {"inputs": ["\udfff"]}),
        ("text-classification", "/v2/models/tiny/infer", {"id": "\ud83d", "inputs": []}),
    ],
)
def test_halves_of_characters_are_refused(client_of: Client, task: str, path: str, body: dict[str, Any]) -> None:
    client, headers = client_of(task), {"content-type": "application/json"}
    _refused(client.post(path, content=json.dumps(body), headers=headers), None, "surrogate")
    # Whole pairs, and a backslash before letters that look like half of one.
    whole = json.dumps({"inputs": ["\U0001f600 \\ud800"]})
    assert "\\ud83d" in whole
    assert client.post("/invocations", content=whole, headers=headers).status_code == 200


@pytest.mark.parametrize("route", ["/invocations", "/score", "/v1/completions"])
@pytest.mark.parametrize(
    "body", [b'["a\xed\xa0\x80b"]', b'["\xff"]', '["a"]'.encode("utf-16"), '["a"]'.encode("utf-16-be")]
)
def test_bytes_that_are_no_text_are_refused(client_of: Client, route: str, body: bytes) -> None:
    found = client_of("text-generation").post(route, content=body, headers={"content-type": "application/json"})
    _refused(found, None, "not UTF-8")


def test_a_context_without_text_is_refused(client_of: Client) -> None:
    rows = [{"question": "who?", "context": context} for context in ("Ann", "")]
    _refused(client_of("question-answering").post("/invocations", json={"dataframe_records": rows}), "context")


def test_long_names_are_told_in_short(client_of: Client) -> None:
    for path, body in (("/invocations", {"inputs": ["a"]}), ("/v1/completions", {"prompt": "a"})):
        told = client_of("text-generation").post(path, json=body | {"z" * 100_000: 1})
        assert told.status_code == 400
        assert "zzz" in told.text and len(told.content) < 3000


@pytest.mark.parametrize("depth", [300, 50_000])
def test_deep_bodies_are_refused(client_of: Client, depth: int) -> None:
    client, deep = client_of("text-generation"), b"[" * depth + b"]" * depth
    for path, name in (("/score", b"input_data"), ("/invocations", b"inputs"), ("/v1/completions", b"prompt")):
        body = b'{"' + name + b'": ' + deep + b"}"
        told = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert told.status_code == 400, told.text


def test_probes_of_hosts(client_of: Client) -> None:
    client = client_of("reward")
    assert client.get("/score").text == client.get("/").text == "Healthy"
    assert client.get("/ping").text == "\n"
    assert client.get("/version").text
    document = _answered(client.get("/swagger.json?version=3"))
    assert document == _answered(client.get("/openapi.json"))
    _refused(client.get("/swagger.json?version=2"), "version")


def test_azures_image_has_no_v1(client_of: Client) -> None:
    client = client_of("chat-completion")
    told = [_answered(client.post(p + "chat/completions", json={"messages": TALK})) for p in ("/v1/", "/")]
    assert told[0]["choices"] == told[1]["choices"]


# --- KServe ----------------------------------------------------------------------------------------------------------


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]} | changes


def test_what_kserve_asks_of_a_server(client_of: Client) -> None:
    client = client_of("text-classification")
    assert _answered(client.get("/v2"))["name"] == "ingot"
    assert _answered(client.get("/v2/health/live")) == {"live": True}
    assert _answered(client.get("/v2/health/ready")) == {"ready": True}
    for place in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        about = _answered(client.get(place))
        assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        assert {"name": "probability", "datatype": "FP32", "shape": [-1]} in about["outputs"]
        assert _answered(client.get(f"{place}/ready")) == {"name": "tiny", "ready": True}
    for place in ("/v2/models/other", "/v2/models/tiny/versions/7"):
        for found in (client.get(place), client.get(f"{place}/ready"), client.post(f"{place}/infer", json={})):
            assert found.status_code in (404, 400)
        assert client.get(place).status_code == 404


def test_tensors_are_columns(client_of: Client) -> None:
    client = client_of("text-classification")
    wanted = _answers(client, [{"text": "a"}, {"text": "b"}], {"top_k": 2})
    body = {
        "id": "7",
        "inputs": [_tensor(shape=[2, 1], data=[["a"], ["b"]], parameters={"content_type": "str"})],
        "outputs": [{"name": "label"}, {"name": "probabilities"}],
        "parameters": {"top_k": 2, "content_type": "pd"},
    }
    told = _answered(client.post("/v2/models/tiny/versions/1/infer", json=body))
    assert told["id"] == "7"
    label, probabilities = told["outputs"]
    assert label == {"name": "label", "shape": [2], "datatype": "BYTES", "data": [row["label"] for row in wanted]}
    _close([json.loads(cell) for cell in probabilities["data"]], [row["probabilities"] for row in wanted])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [_tensor(shape=[3])]}, "inputs.0.shape"),
        ({"inputs": [_tensor(shape=[1, 2])]}, "inputs.0.shape"),
        ({"inputs": [_tensor(datatype="FP16")]}, "inputs.0.datatype"),
        ({"inputs": [_tensor(datatype="INT64")]}, "inputs.0.data"),
        ({"inputs": [_tensor(datatype="INT64", data=[1, True])]}, "inputs.0.data"),
        ({"inputs": [_tensor(datatype="FP32", data=[1, 2.5])]}, "text"),
        ({"inputs": [_tensor(name="other")]}, "other"),
        ({"inputs": [_tensor(), _tensor()]}, "inputs.1"),
        ({"inputs": [_tensor(), _tensor(name="input_string", shape=[1], data=["a"])]}, "inputs"),
        ({"inputs": [_tensor(parameters={"content_type": "np"})]}, "inputs.0.parameters"),
        ({"inputs": [_tensor(parameters={"binary_data_size": 3})]}, "inputs.0.parameters"),
        ({"inputs": [_tensor()], "parameters": {"bogus": 1}}, "bogus"),
        ({"inputs": [_tensor()], "outputs": [{"name": "bogus"}]}, "outputs"),
        ({"inputs": [_tensor()], "outputs": [{"name": "label"}, {"name": "probabilities"}]}, "outputs"),
        ({"inputs": [_tensor(shape=[0], data=[])]}, "inputs"),
    ],
)
def test_malformed_tensors(client_of: Client, body: dict[str, Any], param: str) -> None:
    _refused(client_of("text-classification").post("/v2/models/tiny/infer", json=body), param)


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Operation with range", "ignore:.*Any type hint")  # mlflow 3.17 on pandas 3
def test_bodies_that_mlflow_makes(client_of: Client) -> None:
    """What MLflow's own code makes of an input example for its server."""
    import pandas as pd
    from mlflow.models import convert_input_example_to_serving_input

    client = client_of("text-generation")
    [wanted] = _answers(client, [{"input_string": "Hello!"}])
    for example in (pd.DataFrame({"input_string": ["Hello!"]}), ["Hello!"], {"input_string": "Hello!"}):
        body = convert_input_example_to_serving_input(example)
        assert body is not None
        told = client.post("/invocations", content=body, headers={"Content-Type": "application/json"})
        assert _answered(told) == {"predictions": [wanted]}, body
