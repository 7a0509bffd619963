"""Task files of a recipe: both models are asked them, and what is wrong with one is told before training."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot.cli import app
from ingot.errors import ModelError, RecipeError
from ingot.evaluation.metrics import DEFAULTS
from ingot.model.load import load_tokenizer
from ingot.recipe_io import parse_recipe_text
from ingot.task_files import check_tasks

RECIPE = """
name: asks
model: {source: "ingot://nano"}
data: {train: rows.jsonl, test: rows.jsonl, max_tokens: 64}
objective: {task: text-generation}
train: {max_steps: 1, tokens_per_step: 128, tokens_per_microbatch: 128}
evaluate: {tasks: [letters.yaml, which.yaml], max_new_tokens: 4, metrics: [exact_match], max_rows: 3}
check: {enabled: false}
package: {enabled: false}
serve: {enabled: false}
track: {enabled: false}
"""
LETTERS = "task: letters\nversion: 1\nkind: perplexity\ndata: rows.jsonl\ntarget: prompt\n"
WHICH = """
task: which
version: 1
kind: multiple-choice
data: rows.jsonl
prompt: prompt
choices: [one, two]
answer: "{{ place }}"
metrics: [acc]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {n} or {n + 1}", "completion": str(n), "place": n % 2} for n in range(6)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("letters.yaml").write_text(LETTERS)
    Path("which.yaml").write_text(WHICH)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def ingot(*arguments: str) -> Any:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_run_asks_both_models_its_tasks(project: Path) -> None:
    done = ingot("run", "recipe.yaml", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["metrics"]["tuned"]) == {"exact_match"}
    assert set(result["tasks"]) == {"letters", "which"}
    for name, metric in (("letters", "bits_per_byte"), ("which", "acc")):
        found = result["tasks"][name]
        assert found["metrics"]["base"][metric]["n"] == found["metrics"]["tuned"][metric]["n"] == 3  # max_rows
        assert metric in found["comparison"]
    assert result["table"][0]["metric"] == "exact_match"
    assert "which: acc" in [row["metric"] for row in result["table"]]
    page = Path(result["paths"]["run"], "evaluation", "report.html").read_text()
    assert "letters" in page
    assert "which" in page


def test_a_run_says_once_what_its_rows_cannot_see_and_cuts_them(project: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("max_rows: 3", "max_rows: 3, cluster_by: place, slices: [place]"))
    Path("which.yaml").write_text(WHICH + "slices: [prompt]\n")
    done = ingot("run", "recipe.yaml")
    assert done.exit_code == 0, done.output
    said = done.stderr.splitlines()
    assert sum(line.startswith("evaluate: 3 rows of 2 groups cannot see any difference") for line in said) == 1
    for name in ("evaluate: which", "evaluate: letters", "which", "letters"):  # before training, before asking
        assert sum(line.startswith(f"{name}: 3 rows cannot see") for line in said) == 1
    assert sum(line.startswith("test: 3 rows of 2 groups cannot see") for line in said) == 1
    assert "test: 3 rows of 2 groups: whole groups are resampled" in done.stdout
    [run] = Path("runs").iterdir()
    small = json.loads((run / "evaluation" / "comparison.json").read_text())["small"]
    assert small["test"] in ({"place = 0": 2, "place = 1": 1}, {"place = 1": 2, "place = 0": 1})
    assert set(small["which"].values()) == {1}
    assert "letters" not in small
    assert "whole groups are resampled" in (run / "evaluation" / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("recipe.yaml", "which.yaml]", "whihc.yaml]", "which.yaml"),
        ("which.yaml", "task: which", "task: letters", "two files are called so"),
        ("which.yaml", "metrics: [acc]", "metrics: [rouge1]", "multiple-choice has"),
        ("which.yaml", "{{ place }}", "{{ place + 7 }}", "answer"),
        ("which.yaml", "data: rows", "data: no-rows", "no-rows.jsonl"),
        ("which.yaml", "kind: multiple-choice", "kind: fill-mask", "does not use"),
        ("letters.yaml", "perplexity\ndata: rows.jsonl\ntarget: prompt", "fill-mask\ndata: rows.jsonl", "remove it"),
    ],
)
def test_what_is_wrong_with_a_task_is_told_before_training(
    project: Path, file: str, old: str, new: str, told: str
) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))
    done = ingot("finetune", "recipe.yaml")
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()


def test_a_chat_task_needs_a_template(project: Path, tiny_tokenizer: Any) -> None:
    chat = WHICH.replace("multiple-choice", "chat-completion").replace("choices: [one, two]\n", "")
    chat = chat.replace('answer: "{{ place }}"', "target: completion").replace("acc", "exact_match")
    Path("which.yaml").write_text(chat)
    recipe = parse_recipe_text(Path("recipe.yaml").read_text())
    found = check_tasks(recipe, project, load_tokenizer(recipe.model, project), ())
    assert [(it.task, it.rows, *it.metrics) for it, _ in found] == [
        ("letters", 3, *DEFAULTS["perplexity"]),
        ("which", 3, "exact_match"),
    ]
    letters, which = (seen for _, seen in found)
    assert letters.startswith("3 rows cannot see less than 1.6 standard deviations")  # likelihoods: no shares
    assert which.startswith("3 rows cannot see any difference (discordance assumed 10 %")
    tiny_tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        check_tasks(recipe, project, tiny_tokenizer, ())


def test_labels_that_training_never_sees_are_refused(project: Path) -> None:
    Path("labels.jsonl").write_text('{"text": "a", "label": "yes"}\n{"text": "b", "label": "maybe"}\n')
    Path("letters.yaml").write_text("task: asks\nversion: 1\nkind: text-classification\ndata: labels.jsonl\n")
    text = RECIPE.replace("text-generation", "text-classification").replace(", which.yaml", "")
    recipe = parse_recipe_text(text.replace("metrics: [exact_match], ", ""))
    with pytest.raises(RecipeError, match="no training row of the recipe has this label"):
        check_tasks(recipe, project, load_tokenizer(recipe.model, project), ("no", "yes"))
    one = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_rows": 1})})
    for asked, rows, shown in ((recipe, 2, "2 rows"), (one, 1, "1 row")):
        [(it, seen)] = check_tasks(asked, project, load_tokenizer(recipe.model, project), ("maybe", "yes"))
        assert (it.task, it.rows, seen.partition(" cannot see")[0]) == ("asks", rows, shown)
