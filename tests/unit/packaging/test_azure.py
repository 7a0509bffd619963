"""What Azure ML runs: the scoring file and the batch driver, called from inside a package as its servers call them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from every_task import packaged

from ingot.model.runtime import Runtime

TURNS = [{"role": "user", "content": "Hello!"}]


def _script(package: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"azure_{name}", package / "azure" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.init()
    return module


@pytest.fixture
def text(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Runtime]:
    out = packaged(text_folder, tmp_path / "mount" / "mlflow_model_folder")
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path / "mount"))
    return _script(out, "score"), Runtime.load(text_folder)


@pytest.mark.parametrize(
    "body",
    [
        {"input_data": ["Hello!", "Paris"], "params": {"max_tokens": 4}},
        {"input_data": {"input_string": ["Hello!", "Paris"], "parameters": {"max_tokens": 4}}},
        {"inputs": {"input_string": ["Hello!", "Paris"]}, "parameters": {"max_tokens": 4}},
        {"input_data": {"columns": ["input_string"], "data": [["Hello!"], ["Paris"]]}, "params": {"max_tokens": 4}},
        {"input_data": [{"input_string": "Hello!"}, {"input_string": "Paris"}], "params": {"max_tokens": 4}},
    ],
    ids=["list", "v2", "legacy", "split", "rows"],
)
def test_every_shape_of_a_body_gives_the_model_s_answers(text: tuple[Any, Runtime], body: dict[str, Any]) -> None:
    score, runtime = text
    wanted = [{"output_string": runtime.complete(it, max_new_tokens=4).text} for it in ("Hello!", "Paris")]
    assert score.run(json.dumps(body)) == wanted
    assert json.loads(json.dumps(score.run(json.dumps(body).encode()))) == wanted


@pytest.mark.parametrize(
    "body",
    ["not json", "[]", "{}", '{"input_data": []}', '{"input_data": {"input_string": ["a", "b"], "more": ["c"]}}'],
)
def test_a_body_that_cannot_be_read_is_the_client_s_fault(text: tuple[Any, Runtime], body: str) -> None:
    assert set(text[0].run(body)) == {"error"}


def test_an_undeclared_parameter_is_not_ignored(text: tuple[Any, Runtime]) -> None:
    found = text[0].run(json.dumps({"input_data": ["Hello!"], "params": {"max_tokens": "many"}}))
    assert set(found) == {"error"}


def test_a_conversation_is_answered_as_azure_s_chat_models_do(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packaged(chat_folder, tmp_path / "package", task="chat-completion", example_input={"messages": TURNS})
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path / "package"))
    score, runtime = _script(out, "score"), Runtime.load(chat_folder)
    wanted = runtime.chat(TURNS).text
    assert score.run(json.dumps({"input_data": {"input_string": TURNS, "parameters": {}}})) == {"output": wanted}
    assert score.run(json.dumps({"input_data": {"input_string": [TURNS]}})) == [{"output_string": wanted}]
    assert score.run(json.dumps({"input_data": ["Hello!"]})) == [{"output_string": wanted}]


def test_the_batch_driver_gives_one_row_for_each_row(
    mean_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packaged(mean_folder, tmp_path / "models" / "1", task="text-classification", example_input={"text": "Hello!"})
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path / "models"))
    driver = _script(out, "batch_driver")
    texts = [f"Hello number {i}, thank you" for i in range(70)]  # more than ROWS_AT_ONCE
    pd.DataFrame({"id": range(70), "text": texts}).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "b.jsonl").write_text('{"text": "NA"}\n', encoding="utf-8-sig")  # as editors of Windows save
    pd.DataFrame({"text": ["Good"]}).to_parquet(tmp_path / "c.parquet")
    found = driver.run([str(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.parquet")])
    assert list(found) == ["file", "row", "label", "probability", "error"]
    assert set(found["error"]) == {""}
    assert found["file"].tolist() == ["a.csv"] * 70 + ["b.jsonl", "c.parquet"]
    assert found["row"].tolist() == [*range(70), 0, 0]
    wanted = [label for label, _ in Runtime.load(mean_folder).classify([*texts, "NA", "Good"])]
    assert found["label"].tolist() == wanted
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"d\.txt"):
        driver.run([str(tmp_path / "d.txt")])


def test_a_file_that_cannot_be_read_or_answered_does_not_end_the_others(
    head_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packaged(head_folder, tmp_path / "package", task="text-classification", example_input={"text": "Hello!"})
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(out))
    driver = _script(out, "batch_driver")
    texts = {
        "d.txt": "x",
        "half.jsonl": '{"text": "a"}\n{"te',
        "other.jsonl": '{"body": "a"}\n',
        "good.csv": "text\nHi\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("d.txt", "good.csv", "half.jsonl", "gone.csv", "other.jsonl")]
    found = driver.run(files)
    assert list(found) == ["file", "row", "label", "probability", "error"]  # in the order of every other mini batch
    assert list(zip(found["file"], found["row"], strict=True)) == [
        ("d.txt", -1),
        ("good.csv", 0),
        ("half.jsonl", -1),
        ("gone.csv", -1),
        ("other.jsonl", -1),
    ]
    assert [bool(error) for error in found["error"]] == [True, False, True, True, True]
    assert "this driver reads .csv" in found["error"][0] and "text" in found["error"][4]
    assert found["label"][1] == Runtime.load(head_folder).classify(["Hi"])[0][0]
    with pytest.raises(ValueError, match=r"d\.txt: .*; half\.jsonl: "):
        driver.run([files[0], files[2]])


@pytest.mark.parametrize("place", ["mount", "mount/name", "mount/name/2"])
def test_the_package_is_found_where_azure_mounts_it(
    head_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = packaged(head_folder, tmp_path / place, task="text-classification", example_input={"text": "Hello!"})
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path / "mount"))
    assert _script(out, "score").package_folder() == out
    assert _script(out, "batch_driver").model is not None


def test_conda_holds_what_azure_s_server_is_started_by(text_folder: Path, tmp_path: Path) -> None:
    out = packaged(text_folder, tmp_path / "package")
    pip = yaml.safe_load((out / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    assert [line for line in pip if line.startswith("azureml-")] == [
        "azureml-inference-server-http>=1.4.1",
        "azureml-ai-monitoring>=1.0.0",
    ]
    assert "azureml" not in (out / "requirements.txt").read_text()
