"""The command line in this process, and small projects (data, model, recipe) as a user would have them in a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ingot.track import read_metrics

Lines = list[dict[str, Any]]
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def ingot(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """ingot("run", recipe, ...) -> Done. An exception that reaches the user as a traceback is raised here too."""
    from typer.testing import CliRunner

    from ingot.cli import app

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "INGOT_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Done:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return call


def conversations(start: int, count: int) -> Lines:
    return [
        {
            "messages": [
                {"role": "user", "content": f"book {n} tables"},
                {"role": "assistant", "content": json.dumps({"tool": "book", "n": n})},
            ]
        }
        for n in range(start, start + count)
    ]


def facts(start: int, count: int) -> Lines:
    """Every fact is told twice, in two ways."""
    told = ("costs about {} euros today", "is sold for {} euros")
    return [
        {"prompt": f"item {n}", "completion": " " + text.format(n * 7 % 50)}
        for n in range(start, start + count)
        for text in told
    ]


def documents(start: int, count: int) -> Lines:
    return [{"text": f"The quick brown fox jumps over {n} lazy dogs."} for n in range(start, start + count)]


def labeled(start: int, count: int) -> Lines:
    return [
        {"text": f"{'good' if n % 2 else 'bad'} table {n}", "label": "praise" if n % 2 else "blame"}
        for n in range(start, start + count)
    ]


ROWS: dict[str, Callable[[int, int], Lines]] = {
    "chat-completion": conversations,
    "text-generation": facts,
    "language-modeling": documents,
    "text-classification": labeled,
}


def write_rows(path: Path, rows: Lines) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Project:
    """A folder with train.jsonl, test.jsonl and recipe.yaml; commands are typed in it."""

    def __init__(self, folder: Path, model: Path, task: str) -> None:
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        write_rows(folder / "train.jsonl", ROWS[task](0, 24))
        write_rows(folder / "test.jsonl", ROWS[task](30, 6))
        self.values: dict[str, Any] = {
            "name": "tiny",
            "model": {"source": str(model)},
            "data": {"train": "train.jsonl", "test": "test.jsonl", "max_tokens": 96},
            "objective": {"task": task},
            "optim": {"lr": 5e-3},
            "train": {"max_steps": 4, "tokens_per_step": 300, "tokens_per_microbatch": 300},
            "evaluate": {"max_new_tokens": 8, "bootstrap_samples": 100},
            "package": {"enabled": False},
            "serve": {"enabled": False},
            "track": {"enabled": False},
        }
        self.write()

    def write(self, **sections: dict[str, Any]) -> Path:
        """Write recipe.yaml with `sections` changed."""
        for name, values in sections.items():
            self.values[name] = self.values.get(name, {}) | values
        self.recipe.write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        return self.recipe

    def rows(self, part: str, rows: Lines) -> None:
        write_rows(self.folder / f"{part}.jsonl", rows)

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "runs").glob("*/run.json"))

    @property
    def run(self) -> Path:
        """The only run."""
        [run] = self.runs
        return run

    def losses(self) -> list[float]:
        return [point["metrics"]["train_loss"] for point in read_metrics(self.run / "metrics.jsonl")]


@pytest.fixture
def make_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Project]:
    """make_project(model folder, task) -> Project; the working folder is its folder."""

    def make(model: Path, task: str) -> Project:
        folder = tmp_path / "project"
        folder.mkdir()
        monkeypatch.chdir(folder)
        return Project(folder, model, task)

    return make


@pytest.fixture
def project(make_project: Callable[[Path, str], Project], model_folder: Path) -> Project:
    """A project of the task text-generation."""
    return make_project(model_folder, "text-generation")


@pytest.fixture
def chat_project(make_project: Callable[[Path, str], Project], model_folder: Path) -> Project:
    return make_project(model_folder, "chat-completion")


@pytest.fixture
def clean_env() -> dict[str, str]:
    """The environment for a command in a process of its own: one thread, both roots importable, no launcher."""
    root = Path(__file__).resolve().parents[2]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join([str(root / "engine"), str(root / "kernels")])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _bert(tokenizer: Any, **more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


@pytest.fixture
def encoder_folder(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """A tiny random encoder without a head."""
    import torch
    from transformers import BertModel

    tokenizer, folder = make_tokenizer(None), tmp_path / "encoder"
    torch.manual_seed(0)
    BertModel(_bert(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier_folder(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """A tiny random encoder with a head of its own, over two labels of other names than the data's."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer, folder = make_tokenizer(None), tmp_path / "classifier"
    torch.manual_seed(0)
    BertForSequenceClassification(_bert(tokenizer, num_labels=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _mlflow_serve(package: Path, place: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port, in an environment that does not know Ingot; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    where = ["-m", str(package), "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *where],
            cwd=place,
            env=kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    httpx.get(f"{url}/ping", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    running = server.poll() is None and time.monotonic() < deadline
                    assert running, (place / "server.log").read_text()[-3000:]
                    time.sleep(0.3)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture
def mlflow_serve(tmp_path: Path) -> Callable[[Path], AbstractContextManager[str]]:
    """mlflow_serve(package): a context with the URL of `mlflow models serve`."""
    return lambda package: _mlflow_serve(package, tmp_path)


@pytest.fixture
def replayed() -> Callable[..., tuple[int, str]]:
    """replayed(run, change): status and text of /ready once four stored rows of a run were asked; `change`: of what was
    stored.
    """
    from fastapi.testclient import TestClient

    from ingot.replaying import stored_rows
    from ingot.serving.app import create_app
    from ingot.serving.engine import Limits, Meter
    from ingot.serving.fleet import Fleet, Target, deploy

    def ask(run: Path, change: Callable[[Any], Any] = lambda stored: stored) -> tuple[int, str]:
        target = Target(run, "tiny", [change(stored) for stored in stored_rows(run, 4)])
        deployments, stored = deploy(Fleet((target,)), Limits(), lambda name: Meter())
        with TestClient(create_app(deployments, stored=stored)) as client:
            answer = client.get("/ready")
        return answer.status_code, answer.text

    return ask
