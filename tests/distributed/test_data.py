"""The data path over two gloo ranks: one encodes, and what is learned in a step never depends on the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingot.recipe_io import dump_recipe, load_recipe, parse_recipe
from ingot.track import read_metrics
from ingot.verbs import finetune

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("data_ranks.py")
STEPS = 12


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(home: Path, *args: str) -> None:
    """The script on two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "engine"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "INGOT_CACHE": str(home / "cache")}
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(home), *args], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(folder: Path) -> list[float]:
    [run] = [path.parent for path in folder.glob("*/run.json")]
    return [point["metrics"]["train_loss"] for point in read_metrics(run / "metrics.jsonl") if point["metrics"]]


def alone(home: Path, name: str, out: Path, cache: Path, resume: Path | None = None) -> list[float]:
    """Losses of the same recipe in this process, the only rank."""
    recipe = load_recipe(home / f"{name}.yaml", [f"output={out}", f"data.cache={cache}"])
    run = finetune(recipe, home=home, resume=resume)
    return [point["metrics"]["train_loss"] for point in read_metrics(run.folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def two_ranks(home: Path, model_folder: Path, _done: dict) -> SimpleNamespace:
    """Two ranks have trained: with the cache, from a mixed stream of packs, and from that stream until stopped."""
    if "done" not in _done:
        write(
            home / "a.jsonl",
            [
                {"prompt": f"item {n} costs", "completion": f" {n * 7 % 50} euros{' and cents' * (n % 7)}"}
                for n in range(90)
            ],
        )
        write(home / "b.jsonl", [{"prompt": f"the capital of {n}", "completion": f" is {n * 3}"} for n in range(25)])
        write(home / "watched.jsonl", [{"prompt": f"item {n} costs", "completion": f" {n}"} for n in range(200, 206)])
        mixture = [{"uri": "a.jsonl", "weight": 2}, "b.jsonl"]
        stream = {
            "streaming": True, "stream_window_rows": 24, "batches": "packed",
            "train": mixture, "validation": "watched.jsonl", "test_share": 0,
        }  # fmt: skip
        for name, data in (("cached", {"train": mixture}), ("streamed", stream), ("stopped", stream)):
            recipe = {
                "name": name,
                "model": {"source": str(model_folder)},
                "data": {"max_tokens": 64, **data},
                "objective": {"task": "text-generation"},
                "optim": {"lr": 5e-3},
                "train": {"max_steps": STEPS, "tokens_per_step": 256, "tokens_per_microbatch": 128, "threads": 1},
                "evaluate": {"enabled": False},
                "track": {"enabled": False},
            }
            (home / f"{name}.yaml").write_text(dump_recipe(parse_recipe(recipe)))
        launch(home, "cached", "streamed", "stopped", "--stop-after", "5")
        _done["done"] = True
    return SimpleNamespace(
        losses=lambda name: losses(home / "out" / name),
        encoded=[json.loads(line) for line in (home / "encoded.jsonl").read_text().splitlines()],
        said=lambda name: json.loads((home / f"{name}.said.json").read_text()),
    )


@pytest.fixture(scope="module")
def _done() -> dict:
    return {}


def test_of_two_ranks_one_encodes_and_no_process_group_exists_yet(two_ranks, home):
    assert [line["group"] for line in two_ranks.encoded] == [False, False]  # for cached and streamed; stopped hits
    assert len([path for path in (home / "cache").iterdir() if not path.name.startswith(".")]) == 2
    assert two_ranks.encoded[1]["rows"] == 6  # a stream's own rows are not encoded before training


def test_losses_are_those_of_one_rank_with_and_without_the_cache(two_ranks, home, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cold = alone(home, "cached", tmp_path / "cold", tmp_path / "cache")
    assert alone(home, "cached", tmp_path / "warm", tmp_path / "cache") == cold
    assert alone(home, "cached", tmp_path / "none", tmp_path / "file") == cold
    assert len(cold) == STEPS
    assert two_ranks.losses("cached") == pytest.approx(cold, abs=1e-5)


def test_a_stream_gives_the_same_steps_to_one_rank_and_to_two(two_ranks, home, tmp_path):
    one = alone(home, "streamed", tmp_path / "one", tmp_path / "cache")
    assert len(one) == STEPS
    assert two_ranks.losses("streamed") == pytest.approx(one, abs=1e-5)


def test_a_stream_that_two_ranks_left_goes_on_on_one(two_ranks, home, tmp_path):
    [left] = [path.parent for path in (home / "out" / "stopped").glob("*/run.json")]
    assert 5 <= len(two_ranks.losses("stopped")) < STEPS
    whole = alone(home, "stopped", tmp_path / "whole", tmp_path / "cache")
    assert alone(home, "stopped", tmp_path / "rest", tmp_path / "cache", resume=left) == pytest.approx(whole, abs=1e-5)


def test_what_was_mixed_and_streamed_is_said_and_recorded(two_ranks, home):
    assert any(
        "data: train[0] = a.jsonl: 66.7% of the rows learned; each of its" in said for said in two_ranks.said("cached")
    )
    assert any("data: train (streamed), 6 validation (given)" in said for said in two_ranks.said("streamed"))
    assert any(said.startswith("data: first window: 24 of 24 rows learned") for said in two_ranks.said("streamed"))
    [run] = list((home / "out" / "streamed").glob("*/run.json"))
    facts = json.loads(run.read_text())["stages"]["finetune"]
    assert facts["rows"] == facts["data"]["streamed"]["rows"] >= 24
    assert facts["data"]["origins"]["train"] == "streamed"
