"""Several models and adapters behind one server: each request gets the one that it names."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model

from ingot.errors import ServeError
from ingot.model.adapters import with_saved_adapter
from ingot.model.runtime import Runtime
from ingot.serving.app import create_app
from ingot.serving.endpoint_file import EndpointSection
from ingot.serving.engine import Limits, Meter
from ingot.serving.fleet import Fleet, Target, deploy, named_models
from ingot.serving.replay import Stored

PROMPTS = ["Hello!", "What is the capital of France?", "Thank you", "system user"]
TEXT = "/v1/completions"


def _adapter(base: Path, folder: Path, seed: int, targets: list[str]) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(Runtime.load(base).model, LoraConfig(r=4, lora_alpha=64, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def adapters(text_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "letters": _adapter(text_folder, tmp_path / "letters", 1, ["q_proj", "v_proj"]),
        "poems": _adapter(text_folder, tmp_path / "poems", 2, ["down_proj"]),
    }


def _client(fleet: Fleet) -> TestClient:
    deployments, stored = deploy(fleet, Limits(), lambda name: Meter())
    return TestClient(create_app(deployments, stored=stored))


def test_adapters_never_leak_between_requests(text_folder: Path, adapters: dict[str, Path]) -> None:
    """Three models' requests at once, streamed and whole, of mixed lengths, against each one's merged model."""
    wanted: dict[tuple[str, str], str] = {}
    for name in ("base", *adapters):
        runtime = Runtime.load(text_folder)
        if name in adapters:
            runtime.model = with_saved_adapter(runtime.model, adapters[name])
        wanted |= {(name, prompt): runtime.complete(prompt, max_new_tokens=16).text for prompt in PROMPTS}
    assert len(set(wanted.values())) > 9  # or a leak would not show
    fleet = Fleet((Target(text_folder, "base"),), adapters)
    with _client(fleet) as client:
        listed = {it["id"]: it.get("parent") for it in client.get("/v1/models").json()["data"]}
        assert listed == {"base": None, "letters": "base", "poems": "base"}
        assert client.post(TEXT, json={"prompt": "x", "model": "songs"}).status_code == 404

        def ask(number: int) -> bool:
            (name, prompt), text = list(wanted.items())[number % len(wanted)]
            body = {"model": name, "prompt": prompt, "max_tokens": 16}
            if number % 2:
                return bool(client.post(TEXT, json=body).json()["choices"][0]["text"] == text)
            lines = client.post(TEXT, json=body | {"stream": True}).text.split("\n\n")
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return "".join(it["choices"][0].get("text") or "" for it in events) == text

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(ask, range(5 * len(wanted) + 1)))
        # Rows of any task too: the default is the base.
        rows = {"dataframe_records": [{"prompt": PROMPTS[0]}], "params": {"max_tokens": 16}}
        answer = client.post("/invocations", json=rows).json()["predictions"][0]
        assert answer["output_string"] == wanted["base", PROMPTS[0]]


def test_several_models_by_name(text_folder: Path, head_folder: Path) -> None:
    with _client(Fleet((Target(text_folder), Target(head_folder, "grades")))) as client:
        found = client.get("/v1/models").json()["data"]
        assert [(it["id"], it["task"]) for it in found] == [
            ("text", "text-generation"),
            ("grades", "text-classification"),
        ]
        assert client.post(TEXT, json={"prompt": "x", "model": "text"}).status_code == 200
        assert client.post(TEXT, json={"prompt": "x", "model": "grades"}).status_code == 400
        asked, label = {"input_data": ["x"]}, client.post("/score?model=grades", json={"input_data": ["x"]}).json()[0]
        assert label in client.app.state.deployments.choose("grades").engine.runtime.labels
        assert client.post("/score", json=asked).json()[0] != label
        assert client.post("/score?model=other", json=asked).status_code == 404


def test_versions_are_proved_before_they_get_requests(text_folder: Path, chat_folder: Path) -> None:
    text = Runtime.load(text_folder).complete("Hello!", max_new_tokens=8).text
    stored = [Stored("test:1", {"prompt": "Hello!"}, {"output_string": text}, {"max_tokens": 8})]
    versions = {"blue": {"target": "a", "weight": 1}, "green": {"target": "b", "weight": 9}}
    section = EndpointSection.model_validate({"name": "chat", "versions": versions})
    of = {"blue": Target(text_folder, stored=stored), "green": Target(chat_folder, stored=stored)}
    with _client(Fleet(endpoint=section, versions=of)) as client:
        answers = [client.post(TEXT, json={"prompt": "Hello!", "max_tokens": 8, "model": "chat"}) for _ in range(8)]
        assert {it.headers["x-ingot-version"] for it in answers} == {"blue"}
        assert {it.json()["choices"][0]["text"] for it in answers} == {text}
        refused = client.post(TEXT, json={"prompt": "x"}, headers={"x-ingot-version": "green"})
        assert "row test:1: output_string differs from character" in refused.json()["error"]["message"]


def test_names_are_unique(text_folder: Path, head_folder: Path, tmp_path: Path) -> None:
    twice = Fleet((Target(text_folder), Target(text_folder)))
    with pytest.raises(ServeError, match=r"MODEL = .*'text'; write NAME=MODEL"):
        named_models(twice)
    versions = {"blue": {"target": "a", "weight": 1}}
    section = EndpointSection.model_validate({"name": "text", "versions": versions})
    for more in ({"adapters": {"text": tmp_path}}, {"endpoint": section}):
        options: dict[str, Any] = more
        with pytest.raises(ServeError, match="write NAME=MODEL"):
            named_models(Fleet((Target(text_folder),), **options))
    with pytest.raises(ServeError, match="one model, and 2 are given"):
        named_models(Fleet((Target(text_folder), Target(head_folder)), {"a": tmp_path}))
    with pytest.raises(ServeError, match="no such folder"):
        named_models(Fleet((Target(tmp_path / "none"),)))
