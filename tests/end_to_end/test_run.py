"""The whole path on tiny random models, one test a task: every stage, what it leaves behind, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ingot.evaluation.samples import Samples

STAGES = ["check", "finetune", "evaluate", "package", "serve"]


def check_summary(summary: dict[str, Any], project: Any, metrics: set[str]) -> None:
    """`summary` tells of both models, of every stage, and of paths that exist."""
    assert set(summary["metrics"]) == {"base", "tuned"}
    for scores in summary["metrics"].values():
        assert set(scores) == metrics
        for score in scores.values():
            low, high = score["interval"]
            assert low <= score["value"] <= high
            assert score["n"] > 0
    assert list(summary["stages"]) == STAGES
    assert all(stage["seconds"] > 0 for stage in summary["stages"].values())
    assert {"run", "model", "package", "picture"} <= set(summary["paths"])
    assert all(Path(path).exists() for path in summary["paths"].values())
    assert Path(summary["paths"]["run"]) == project.run
    assert json.loads((project.run / "summary.json").read_text()) == summary
    assert summary["comparison"]
    assert summary["stages"]["finetune"]["final_step"] == 4
    record = json.loads((project.run / "run.json").read_text())
    assert record["status"] == "finished"
    assert summary["recipe_hash"] == record["recipe_hash"]


def everything(ingot: Any, project: Any, metrics: set[str], verify: bool = False, **sections: Any) -> dict[str, Any]:
    project.write(package={"enabled": True, "verify": verify}, serve={"enabled": True}, **sections)
    done = ingot("run", project.recipe, "--json", "--summary", "summary.json")
    assert done.code == 0, done.err
    summary = done.json()
    assert json.loads((project.folder / "summary.json").read_text()) == summary
    check_summary(summary, project, metrics)
    assert summary["stages"]["package"]["verified"] is verify
    return summary


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_chat(ingot, chat_project):
    summary = everything(
        ingot,
        chat_project,
        {"json_exact_match", "json_argument_f1", "json_valid"},
        verify=True,
        track={"enabled": True},
    )
    assert summary["question"] == "book 30 tables"
    assert isinstance(summary["answer"], str)
    assert "adapter" in summary["paths"]
    assert "chat_template" in " ".join(path.name for path in (chat_project.run / "model").iterdir())
    assert len(Samples(chat_project.run / "evaluation" / "tuned" / "test.parquet")) == 6
    assert "json_exact_match" in (chat_project.run / "evaluation" / "report.html").read_text(encoding="utf-8")
    check_tracking(chat_project, summary)

    listed = ingot("runs", "--json").json()
    assert [run["folder"] for run in listed] == [str(Path("runs") / chat_project.run.name)]
    assert listed[0]["metrics"] == summary["metrics"]
    shown = ingot("runs").out
    assert "finished" in shown
    assert "json_valid" in shown

    before = snapshot(chat_project.run)
    again = ingot("run", chat_project.recipe, "--json", "--resume", chat_project.run)
    assert again.code == 0, again.err
    assert again.json() == summary
    after = snapshot(chat_project.run)
    assert {path for path in after if after[path] != before.get(path)} <= {
        chat_project.run / "run.json",
        chat_project.run / "summary.json",
    }
    assert ingot("evaluate", chat_project.run, "--json").json()["metrics"] == summary["metrics"]


def check_tracking(project: Any, summary: dict[str, Any]) -> None:
    """MLflow holds the run: once, with params, with the curves of training and the scores, and the files."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ingot")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.005"
    assert run.data.params["model.dtype"] == "float32"
    assert len(run.data.params) <= 200
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert [point.value for point in losses] == pytest.approx(project.losses())
    assert "tokens_per_second" in run.data.metrics
    assert "validation_loss" in run.data.metrics
    for part, scores in summary["metrics"].items():
        for name, score in scores.items():
            assert run.data.metrics[f"{part}/{name}"] == score["value"]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"resolved.yaml", "picture.png", "evaluation"} <= files
    inside = {item.path for item in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {f"evaluation/{name}" for name in ("base", "tuned", "comparison.json")} <= inside
    assert "report/report.html" in {item.path for item in client.list_artifacts(run.info.run_id, "report")}


def test_text_with_merged_references_and_full_fine_tuning(ingot, project):
    summary = everything(
        ingot,
        project,
        {"bleu", "rougeL"},
        evaluate={"merge_references": True},
        adapter={"kind": "none"},
        train={"final": "last"},
    )
    assert "adapter" not in summary["paths"]
    assert summary["question"] == "item 30"
    assert summary["stages"]["evaluate"]["rows"] == 6  # of twelve test rows, two to a prompt
    facts = summary["stages"]["finetune"]
    assert facts["trainable_parameters"] == facts["parameters"]
    assert len(Samples(project.run / "evaluation" / "tuned" / "test.parquet")[0].references) == 2
    base = load_file(Path(project.values["model"]["source"]) / "model.safetensors")
    tuned = load_file(project.run / "model" / "model.safetensors")
    assert base.keys() == tuned.keys()
    assert all((base[name] != tuned[name]).any() for name in base)


def test_language_modeling(ingot, make_project, model_folder):
    project = make_project(model_folder, "language-modeling")
    summary = everything(ingot, project, {"perplexity"})
    assert summary["metrics"]["tuned"]["perplexity"]["value"] < summary["metrics"]["base"]["perplexity"]["value"]
    assert summary["comparison"]["perplexity"]


def test_classification_with_an_encoder(ingot, make_project, encoder_folder):
    project = make_project(encoder_folder, "text-classification")
    summary = everything(ingot, project, {"accuracy", "f1_macro"}, verify=True)
    assert summary["answer"] in ("praise", "blame")
    about = json.loads((project.run / "model" / "ingot.json").read_text())
    assert about["labels"] == ["blame", "praise"]
    assert about["pooling"] == "mean"  # without it a reader draws a random head
    assert about["max_tokens"] == 96


def test_classification_with_a_trained_head(ingot, make_project, classifier_folder):
    project = make_project(classifier_folder, "text-classification")
    everything(ingot, project, {"accuracy", "f1_macro"})
    config = json.loads((project.run / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "blame", "1": "praise"}


def test_what_a_person_sees(ingot, project):
    done = ingot("run", project.recipe, "package.enabled=true", "package.verify=false", "serve.enabled=true")
    assert done.code == 0, done.err
    for part in (
        "bleu",
        "asked over HTTP",
        "item 30",
        "answered",
        "stages",
        "finetune",
        "next: ingot serve runs/tiny-",
    ):
        assert part in done.out
    assert "4/4 steps" in done.err


def test_stages_that_are_off(ingot, project):
    done = ingot("run", project.recipe, "evaluate.enabled=false", "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert list(summary["stages"]) == ["check", "finetune"]
    assert "metrics" not in summary or summary["metrics"] == {}
    assert "package" not in summary["paths"]


def test_verbs_one_by_one(ingot, project):
    """finetune, evaluate and package leave what `run` leaves."""
    done = ingot("finetune", project.recipe, "package.verify=false", "--json")
    assert Path(done.json()["run"]) == project.run
    scores = ingot("evaluate", project.run)
    assert "bleu" in scores.out
    assert "base" in scores.out
    packaged = ingot("package", project.run, "--json").json()["package"]
    assert (Path(packaged) / "MLmodel").is_file()
    summary = ingot("run", project.recipe, "package.verify=false", "--resume", project.run, "--json").json()
    assert list(summary["stages"]) == ["finetune", "evaluate", "package"]


def test_base_model_alone(ingot, project):
    done = ingot("evaluate", project.recipe, "evaluate.max_rows=3", "--json")
    assert done.code == 0, done.err
    assert set(done.json()["metrics"]) == {"base"}
    assert done.json()["metrics"]["base"]["bleu"]["n"] == 3
    assert not (project.folder / "runs").exists()
    refused = ingot("evaluate", project.folder, "evaluate.max_rows=3")
    assert refused.code == 2
    assert "overrides = 'evaluate.max_rows=3'" in refused.err
