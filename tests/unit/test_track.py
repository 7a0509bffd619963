"""JSONL and MLflow tracking."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from ingot.errors import FieldError, Interrupted
from ingot.recipe import Track
from ingot.track import MAX_PARAM_CHARS, MAX_PARAMS, Tracker, choose_params, read_metrics, redact

LOCAL_ONLY = Track(enabled=False)


@pytest.fixture(autouse=True)
def _no_server_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder for the module: making MLflow's database takes seconds."""
    pytest.importorskip("mlflow")
    return tmp_path_factory.mktemp("runs")


def client(output: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")


def test_jsonl_is_always_written(tmp_path: Path) -> None:
    with Tracker.start(LOCAL_ONLY, tmp_path / "run", "r", {}, enabled_rank0=True) as tracker:
        assert tracker.run_id is None
        tracker.metrics({"loss": 2.0, "lr": 1e-4}, 1)
        tracker.metrics({"loss": float("nan")}, 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["metrics"] == {"loss": 2.0, "lr": 1e-4}
    assert lines[1]["metrics"] == {"loss": None}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Tracker.start(Track(), tmp_path / "run", "r", {"a": "b"}, enabled_rank0=False) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        tracker.artifact(tmp_path)
        tracker.tag({"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_resumed_log_survives_a_killed_write(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "time": 0, "metrics": {"loss": 3.0}}\n{"step": 2, "ti')
    assert [point["step"] for point in read_metrics(log)] == [1]
    with Tracker.start(LOCAL_ONLY, tmp_path, "r", {}, enabled_rank0=True) as tracker:
        tracker.metrics({"loss": 2.0}, 2)
        tracker.metrics({"loss": 2.5}, 1)
    points = read_metrics(log)
    assert [(point["step"], point["metrics"]["loss"]) for point in points] == [(1, 2.5), (2, 2.0)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    with Tracker.start(Track(enabled=False), tmp_path, "run", {}, True) as tracker:
        for step in range(1, 6):
            tracker.metrics({"train_loss": 1.0}, step)
        tracker.rewind(5)
        tracker.rewind(3)
        tracker.metrics({"train_loss": 2.0}, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["metrics"]["train_loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    Tracker.start(Track(enabled=False), tmp_path / "other", "run", {}, False).rewind(0)
    assert not (tmp_path / "other").exists()


def test_params_are_chosen_cut_and_redacted() -> None:
    params = {f"other.{index}": "x" * 600 for index in range(250)} | {"optim.lr": "0.1", "model.hub_token": "abc"}
    chosen = choose_params(params)
    assert len(chosen) == MAX_PARAMS
    assert chosen["optim.lr"] == "0.1"
    assert chosen["model.hub_token"] == "[redacted]"
    assert len(chosen["other.0"]) == MAX_PARAM_CHARS
    assert chosen["other.0"].endswith("…")


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("data.max_tokens", "1024", "1024"),
        ("train.tokens_per_step", "8", "8"),
        ("api_key", "abc", "[redacted]"),
        ("db.password", "abc", "[redacted]"),
        ("x", "http://bob:pw@host/path", "http://[redacted]@host/path"),
        ("x", "https://h/b?sv=1&sig=abc%3D&x=2", "https://h/b?sv=1&sig=[redacted]&x=2"),
        ("x", "hf_" + "a" * 20, "[redacted]"),
        ("x", "hf://Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B"),
    ],
)
def test_secrets_are_redacted_and_nothing_else(key: str, value: str, kept: str) -> None:
    assert redact(key, value) == kept


def test_mlflow_gets_params_metrics_tags_and_artifacts(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_VARIABLE", "of the environment")
    picture = output / "picture.txt"
    picture.write_text("p")
    with Tracker.start(Track(), output / "r1", "r1", {"optim.lr": "0.1", "api_key": "s3cr3t"}, True) as tracker:
        for step in range(120):
            tracker.metrics({"loss": 1.0 / (step + 1)}, step)
        tracker.artifact(picture, "pictures")
        tracker.tag({"recipe_hash": "h"})
    assert tracker.run_id is not None
    run = client(output).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((output / "mlartifacts").as_uri())
    assert run.data.params == {"optim.lr": "0.1", "api_key": "[redacted]"}
    assert run.data.tags["recipe_hash"] == "h"
    assert [m.step for m in client(output).get_metric_history(tracker.run_id, "loss")] == list(range(120))
    assert (output / "mlartifacts" / tracker.run_id / "artifacts" / "pictures" / "picture.txt").read_text() == "p"
    everything = "".join(path.read_text(errors="ignore") for path in output.rglob("*") if path.is_file())
    assert "s3cr3t" not in everything
    assert "of the environment" not in everything


def test_many_params_keep_the_whole_as_an_artifact(output: Path) -> None:
    params = {f"x.{index}": str(index) for index in range(300)}
    with Tracker.start(Track(), output / "r2", "r2", params, True) as tracker:
        pass
    assert tracker.run_id is not None
    assert len(client(output).get_run(tracker.run_id).data.params) == MAX_PARAMS
    saved = output / "mlartifacts" / tracker.run_id / "artifacts" / "params.json"
    assert json.loads(saved.read_text()) == params


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError(), "FAILED"), (Interrupted("x"), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_status_says_how_the_run_ended(output: Path, error: BaseException, status: str) -> None:
    tracker = Tracker.start(Track(), output / "r3", "r3", {}, True)
    with pytest.raises(type(error)), tracker:
        raise error
    assert client(output).get_run(tracker.run_id).info.status == status


def test_a_later_stage_goes_on_with_the_run(output: Path) -> None:
    with Tracker.start(Track(), output / "r4", "r4", {}, True) as first:
        first.metrics({"loss": 1.0}, 1)
    with Tracker.start(Track(), output / "r4", "r4", {}, True, run_id=first.run_id) as second:
        second.metrics({"tuned/score": 0.9}, 1)
    assert second.run_id == first.run_id
    run = client(output).get_run(first.run_id)
    assert run.data.metrics == {"loss": 1.0, "tuned/score": 0.9}
    assert run.info.status == "FINISHED"


def test_lost_server_warns_once_and_the_log_goes_on(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    calls = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise ConnectionError("http://bob:pw@server is gone")

    with (
        caplog.at_level(logging.WARNING, "ingot.track"),
        Tracker.start(Track(), output / "r5", "r5", {}, True) as tracker,
    ):
        monkeypatch.setattr(MlflowClient, "log_batch", broken)
        for step in range(200):
            tracker.metrics({"loss": 1.0}, step)
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "tracking stopped (http://[redacted]@server is gone): the run goes on, metrics are in metrics.jsonl"
    ]
    assert len(read_metrics(output / "r5" / "metrics.jsonl")) == 200


def test_server_that_is_absent_at_the_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(FieldError) as caught:
        Tracker.start(Track(uri="http://bob:pw@127.0.0.1:9"), tmp_path / "run", "r", {}, True)
    assert caught.value.field == "track.uri"
    assert "track.enabled=false" in caught.value.fix
    assert "pw" not in str(caught.value)


def test_environment_names_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://x")
    with pytest.raises(FieldError, match="no-such-scheme"):
        Tracker.start(Track(), tmp_path / "run", "r", {}, True)


def test_without_mlflow_only_the_log_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING, "ingot.track"), Tracker.start(Track(), tmp_path, "r", {}, True) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    assert tracker.run_id is None
    assert "pip install mlflow" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
