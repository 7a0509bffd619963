"""Contamination from the command line: what a run learned and what files say, held against what it is asked."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot import evaluating
from ingot.cli import app
from ingot.evaluation.contamination import FILE
from ingot.evaluation.page import FILES
from ingot.launch.value import Ranks
from ingot.progress import Progress
from ingot.task_files import open_task

CITIES = ["Lima", "Oslo", "Rome", "Bonn", "Cork", "Nice", "Bern", "Graz", "Lyon", "Turku", "Porto", "Split"]
RECIPE = """
name: cities
model: {source: "ingot://nano"}
data: {train: train.jsonl, test: test.jsonl, max_tokens: 64, validation_share: 0}
objective: {task: text-generation}
train: {max_steps: 1, tokens_per_step: 128, tokens_per_microbatch: 128}
evaluate: {max_new_tokens: 2, metrics: [rougeL], bootstrap_samples: 100, contamination: {against: [before.csv]}}
check: {enabled: false}
package: {enabled: false}
serve: {enabled: false}
track: {enabled: false}
"""
TASK = """
task: capitals
version: 1
kind: text-generation
data: test.jsonl
fewshot: {count: 2, data: {uri: train.jsonl}}
prompt: "Question: {{prompt}}\\nAnswer:"
target: completion
max_new_tokens: 2
metrics: [rougeL]
"""


def question(city: str) -> dict[str, str]:
    return {"prompt": f"Which river or lake is nearest to the city of {city}?", "completion": f"that of {city}"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six test rows: training has the second and the third, the latter with another answer; a file has the fifth."""
    monkeypatch.chdir(tmp_path)
    test = [question(city) for city in CITIES[:6]]
    others = [
        {"prompt": f"{city} {n} was founded {n} years ago.", "completion": "so"} for n in (3, 7) for city in CITIES
    ]
    train = [*others, {**test[1], "prompt": f" {test[1]['prompt'].upper()}"}, {**test[2], "completion": "none"}]
    for name, rows in (("train", train), ("test", test)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("before.csv").write_text(f'n,said\n1,"Somebody asked: {test[4]["prompt"]} And he knew."\n')
    Path("task.yaml").write_text(TASK)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ids(record: dict[str, Any]) -> dict[str, set[str]]:
    return {way: {it["id"] for it in found} for way, found in record["found"].items()}


def test_a_run_is_scored_without_the_rows_that_it_learned(project: Path) -> None:
    done = ingot("run", "recipe.yaml")
    assert done.exit_code == 0, done.output
    said = (
        "test: 3 of 6 rows are shared with the training data (2 exact, 3 n-gram, 2 MinHash; 27 training rows); without "
    )
    assert f"{said}them rougeL of tuned is " in done.stdout
    [run] = Path("runs").iterdir()
    stored = json.loads((run / "evaluation" / FILE).read_text())["tasks"]["test"]
    assert ids(stored) == {
        "exact": {"test.jsonl:2", "test.jsonl:3"},
        "ngram": {"test.jsonl:2", "test.jsonl:3", "test.jsonl:5"},
        "minhash": {"test.jsonl:2", "test.jsonl:3"},
    }
    assert {it["train"] for it in stored["found"]["ngram"]} == {"train.jsonl:25", "train.jsonl:26", "before.csv:2"}
    assert stored["texts"]["whole"] == 1
    assert {model: it["rougeL"]["n"] for model, it in stored["without"].items()} == {"base": 3, "tuned": 3}
    report = json.loads((run / "evaluation" / FILES[2]).read_text())["contamination"]
    assert report[0]["shared"] == {"exact": 2, "n-gram": 3, "MinHash": 2, "any": 3}
    assert report[0]["changes"][0]["model"] == "tuned"
    assert "2 exact, 3 n-gram, 2 MinHash, 3 any" in (run / "evaluation" / FILES[1]).read_text()
    page = (run / "evaluation" / FILES[0]).read_text()
    assert "difference from base without shared rows" in page
    # Again, and for a program; what was answered is there.
    again = json.loads(ingot("evaluate", run, "--json").stdout)["contamination"]["test"]
    assert again == {name: it for name, it in stored.items() if name != "found"}
    assert json.loads((run / "summary.json").read_text())["contamination"]["test"] == again
    # A task file, asked of a run: its own training rows, and those that its recipe names.
    done = ingot("evaluate", run, "--task", "task.yaml", "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["contamination"]["capitals"]["shared"] == stored["shared"]


def measured(*more: object) -> Any:
    done = ingot("evaluate", "ingot://nano", "--task", "task.yaml", "--out", "out", *more)
    assert done.exit_code == 0, done.output
    return done


def test_files_are_named_for_any_model(project: Path) -> None:
    stored = Path("out") / FILE
    assert "training" not in measured().stdout
    assert not stored.exists()
    said = "capitals: 3 of 6 rows are shared with the training data (2 exact, 3 n-gram, 2 MinHash; 27 training rows)"
    assert f"{said}; without them rougeL is " in measured("--against", "train.jsonl", "--against", "before.csv").stdout
    found = json.loads(stored.read_text())["tasks"]["capitals"]
    assert ids(found)["ngram"] == {"test.jsonl:2", "test.jsonl:3", "test.jsonl:5"}
    assert found["training"]["sources"] == ["train.jsonl", "before.csv"]
    with Path("before.csv").open("a") as lines:
        lines.write("too,many,cells\n")
    torn = measured("--against", "train.jsonl", "--against", "before.csv").stdout
    assert "; 27 training rows, and 1 that cannot be read)" in torn
    said = said.replace("rows)", "rows, and 1 that cannot be read)")
    assert said in measured().stdout  # what was found before is kept
    assert "Rows that training saw" in (Path("out") / FILES[1]).read_text()
    assert "shared with" not in measured("--max-rows", 3).stdout  # but not for other rows


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("trian.jsonl", "did you mean 'train.jsonl'"),
        ("numbers.jsonl", "holds no text (its columns are n)"),
        ("task.yaml", "its extension is not known"),
    ],
)
def test_a_file_without_texts_is_refused_before_a_model_is_loaded(project: Path, against: str, message: str) -> None:
    Path("numbers.jsonl").write_text('{"n": 1}\n')
    refused = ingot("evaluate", "ingot://no-such-model", "--task", "task.yaml", "--out", "out", "--against", against)
    assert refused.exit_code == 2
    assert f"--against = {against!r}" in refused.stderr
    assert message in refused.stderr
    Path("recipe.yaml").write_text(RECIPE.replace("before.csv", against))
    refused = ingot("finetune", "recipe.yaml")
    assert refused.exit_code == 2
    assert f"evaluate.contamination.against[0] = {against!r}" in refused.stderr
    assert message in refused.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize("wrong", ["threshold=0", "threshold=1.5", "ngram=2", "ways=[fuzzy]", "ways=[]", "limit=3"])
def test_wrong_settings_are_refused_when_the_recipe_is_read(project: Path, wrong: str) -> None:
    refused = ingot("finetune", "recipe.yaml", f"evaluate.contamination.{wrong}")
    assert refused.exit_code == 2
    assert f"evaluate.contamination.{wrong.partition('=')[0]}" in refused.stderr
    assert not Path("runs").exists()


def test_against_goes_with_task_files(project: Path) -> None:
    refused = ingot("evaluate", "recipe.yaml", "--against", "train.jsonl")
    assert refused.exit_code == 2
    assert "--against = 'train.jsonl': changes nothing here, it goes with --task" in refused.stderr


def test_only_the_first_rank_looks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured()

    @contextlib.contextmanager
    def alone(*args: Any) -> Iterator[None]:
        yield

    def looked(*args: Any) -> Any:
        raise AssertionError("a rank beside the first one looks")

    second = Ranks(rank=1, world=2, local=1, local_world=2, launcher="torchrun")
    monkeypatch.setattr(evaluating, "read_ranks", lambda: second)
    monkeypatch.setattr(evaluating, "process_group", alone)
    monkeypatch.setattr(evaluating.overlapping, "look", looked)
    definitions = [open_task(Path("task.yaml"))]
    _, found = evaluating.measure_target(
        "ingot://nano", definitions, Path("out"), Progress(quiet=True), against=["train.jsonl"]
    )
    assert found["capitals"].scores
    monkeypatch.setattr(evaluating, "read_ranks", Ranks)
    with pytest.raises(AssertionError, match="beside the first"):
        evaluating.measure_target(
            "ingot://nano", definitions, Path("out"), Progress(quiet=True), against=["train.jsonl"]
        )
