"""`ingot evaluate` and `ingot compare` on the command line: every kind of model, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ingot.cli import app
from ingot.evaluation.result import load_evaluation
from ingot.model.adapters import attach_adapter, save_adapter, trainable_tensors
from ingot.model.load import load_model, load_tokenizer
from ingot.model.source import model_folder
from ingot.packaging.bundle import package_model
from ingot.recipe import Adapter, Model

NANO = Model(source="ingot://nano")
TEXTS = ["Dear all, the order is late.", "Thank you for the quick answer.", "Where is my parcel?"]


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    path = tmp_path / "letters.yaml"
    path.write_text("task: letters\nversion: 1\nkind: perplexity\ndata: rows.jsonl\ntarget: text\n")
    return path


def likelihoods(folder: Path) -> list[float]:
    return [row.output["logprob"] for row in load_evaluation(folder, "letters").samples]


def measured(target: object, task: Path, out: str, *more: object) -> list[float]:
    done = ingot("evaluate", target, "--task", task, "--out", out, "--json", *more)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"]["letters"]["bits_per_byte"]["n"] == len(TEXTS)
    return likelihoods(Path(out))


def test_a_model_is_measured_once_and_read_again(task: Path) -> None:
    shown = ingot("evaluate", "ingot://nano", "--task", task, "--out", "nano")
    assert shown.exit_code == 0
    assert "letters" in shown.stdout
    assert "bits_per_byte" in shown.stdout
    assert {"letters.json", "letters.parquet", "report.html"} <= {path.name for path in Path("nano").iterdir()}
    assert "evaluate nano letters" not in ingot("evaluate", "ingot://nano", "--task", task, "--out", "nano").stderr
    again = ingot("evaluate", "ingot://nano", "--task", task, "--out", "nano", "--fresh")
    assert "evaluate nano letters" in again.stderr
    Path("others.yaml").write_text(task.read_text().replace("task: letters", "task: others"))
    assert ingot("evaluate", "ingot://nano", "--task", "others.yaml", "--out", "nano").exit_code == 0
    page = Path("nano/report.html").read_text()
    assert "letters" in page
    assert "others" in page


def test_an_adapter_is_measured_on_its_base(task: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = attach_adapter(load_model(NANO, tmp_path, "text-generation"), Adapter(rank=2), "text-generation", 0)
    for _, parameter in trainable_tensors(model):
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter", "somewhere/else")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(NANO, tmp_path).save_pretrained(tmp_path / "merged")
    found = measured("adapter", task, "a", "--base", "ingot://nano")
    assert found == pytest.approx(measured("merged", task, "m"), rel=1e-5)
    assert found != pytest.approx(measured("ingot://nano", task, "n"), rel=1e-3)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    refused = ingot("evaluate", "adapter", "--task", task, "--out", "x", "--base", "ingot://nano")
    assert refused.exit_code == 2
    assert "pickle files are never opened" in refused.stderr


@pytest.mark.filterwarnings("ignore")  # of mlflow, about its own databases
def test_a_package_is_measured_from_its_folder_and_from_a_registry(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    package = package_model(
        model_folder(NANO, tmp_path),
        tmp_path / "package",
        name="nano",
        task="text-generation",
        example_input={"input_string": "Once"},
        metadata={},
        license=None,
    )
    direct = measured("ingot://nano", task, "n")
    assert measured("package", task, "p") == direct
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/registry.db")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/registry.db")
    client.create_registered_model("nano")
    client.create_model_version("nano", str(package))
    assert measured("models:/nano/1", task, "r") == direct
    weights = package / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = ingot("evaluate", "package", "--task", task, "--out", "x")
    assert refused.exit_code != 0
    assert "changed after packaging" in refused.stderr


def test_two_models_are_compared(task: Path, tmp_path: Path) -> None:
    measured("ingot://nano", task, "nano")
    random = tmp_path / "random"
    load_model(NANO.model_copy(update={"initialization": "random"}), tmp_path, "text-generation").save_pretrained(
        random
    )
    load_tokenizer(NANO, tmp_path).save_pretrained(random)
    measured("random", task, "other")
    done = ingot("compare", "nano", "other", "--out", "both", "--json")
    assert done.exit_code == 0, done.output
    [found] = json.loads(done.stdout)
    assert found["names"] == ["nano", "other"]
    assert {it["metric"] for it in found["differences"]} == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert all(it["paired"]["difference"] != 0 for it in found["differences"])
    assert "nano and other" in Path("both/report.html").read_text()
    assert "bits_per_byte" in ingot("compare", "nano", "other").stdout
    for name in ("nano", "other"):  # folders of one name are told apart by the one around them
        Path("all", name).mkdir(parents=True)
        Path(name).rename(Path("all", name, "out"))
    [found] = json.loads(ingot("compare", "all/nano/out", "all/other/out", "--json").stdout)
    assert found["names"] == ["nano/out", "other/out"]
    assert "is named twice" in ingot("compare", "all/nano/out", "all/nano/out").stderr
    for name in ("nano", "other"):
        Path("all", name, "out").rename(name)
    task.write_text(task.read_text().replace("version: 1", "version: 2"))
    measured("random", task, "other")
    refused = ingot("compare", "nano", "other")
    assert refused.exit_code == 2
    assert "letters: version = 1" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ingot://nano"], "no such file; name a run's folder or a recipe"),
        (["ingot://nano", "--chat"], "--chat = 'True': changes nothing here, it goes with --harness"),
        (["ingot://nano", "--harness", "arc_easy", "--out", "x"], "it goes with --task"),
        (["ingot://nano", "--harness", "arc_easy", "--task", "t.yaml"], "--harness measures another way"),
        (["nowhere", "--task", "letters.yaml"], "no such folder"),
        (["ingot://nano", "--task", "missing.yaml"], "there is no such file"),
        (["models:/nope/1", "--task", "letters.yaml"], "models:/nope/1"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_input_is_told_in_a_line(
    task: Path, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///registry.db")
    refused = ingot("evaluate", *arguments)
    assert refused.exit_code == 2, refused.output
    assert named in refused.stderr
    assert not Path("evaluations").exists()


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "b"}) + "\n")
    (tmp_path / "t.yaml").write_text("task: t\nversion: 1\nkind: text-classification\ndata: rows.jsonl\n")
    refused = ingot("evaluate", "ingot://nano", "--task", "t.yaml")
    assert refused.exit_code == 2
    assert "does not name its classes" in refused.stderr


def test_another_models_evaluation_is_not_overwritten(task: Path, tmp_path: Path) -> None:
    measured("ingot://nano", task, "nano")
    other = tmp_path / "other"
    load_model(NANO, tmp_path, "text-generation").save_pretrained(other)
    load_tokenizer(NANO, tmp_path).save_pretrained(other)
    (other / "generation_config.json").write_text('{"max_length": 7}')
    refused = ingot("evaluate", "other", "--task", task, "--out", "nano")
    assert refused.exit_code == 2
    assert "holds letters of another model (ingot://nano)" in refused.stderr
    measured("other", task, "nano", "--fresh")


def test_two_tasks_of_one_name_are_refused(task: Path, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(task.read_text())
    refused = ingot("evaluate", "ingot://nano", "--task", task, "--task", "again.yaml")
    assert "--task = 'letters': two files are called so" in refused.stderr


def test_the_harness_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}).items():
        monkeypatch.setenv(name, value)
    assert "start it without torchrun" in ingot("evaluate", "ingot://nano", "--harness", "arc_easy").stderr


def test_one_evaluation_is_nothing_to_compare(task: Path) -> None:
    measured("ingot://nano", task, "nano")
    assert "one evaluation alone" in ingot("compare", "nano").stderr
    assert "holds no evaluation" in ingot("compare", "nano", "nowhere").stderr


def test_a_run_from_random_weights_is_measured(tmp_path: Path) -> None:
    """The embedded T5 has no weights: what is measured first is what training started from."""
    rows = [{"text": f"Please send {n} chairs to Oslo.", "summary": f"{n} chairs"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "drawn",
        "model": {"source": "ingot://nano-t5", "initialization": "random"},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl", "max_tokens": 48, "max_target_tokens": 16},
        "objective": {"task": "summarization"},
        "adapter": {"kind": "none"},
        "train": {"max_steps": 1, "tokens_per_step": 64, "tokens_per_microbatch": 64},
        "evaluate": {"max_new_tokens": 4, "max_rows": 2, "metrics": ["chrf"]},
    } | {name: {"enabled": False} for name in ("check", "package", "serve", "track")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = ingot("run", tmp_path / "recipe.yaml", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"]["base"]["chrf"]["n"] == 2
