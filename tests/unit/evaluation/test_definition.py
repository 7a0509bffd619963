"""Task files: what is read, and what is wrong with one, by file, line and field."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.definition import PROMPTED, as_recipe, list_definitions, load_definition
from ingot.recipe import Model

SUMS: dict[str, Any] = {
    "task": "sums",
    "version": 1,
    "kind": "text-generation",
    "data": "rows.jsonl",
    "prompt": "{{question}}",
    "target": "answer",
}
CHOICE = SUMS | {"kind": "multiple-choice", "target": None, "choices": ["yes", "no"], "answer": "label"}


def write(folder: Path, values: dict[str, Any], name: str = "sums.yaml") -> Path:
    path = folder / name
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def test_a_file_is_read_by_the_recipe_s_rules(tmp_path: Path) -> None:
    path = write(
        tmp_path, SUMS | {"metrics": ["bleu", {"name": "exact_match", "options": {"regexes_to_ignore": [","]}}]}
    )
    path.write_text(path.read_text(encoding="utf-8") + "stop: [no, 'on']\n", encoding="utf-8")
    made = load_definition(path, ["data.take=7", "version=2b", "fewshot.count=2"])
    assert made.stop == ("no", "on")  # YAML 1.1 would read two booleans
    assert (made.data.uri, made.data.take, made.version) == ("rows.jsonl", 7, "2b")
    assert made.fewshot is not None and made.fewshot.count == 2
    assert [use.name for use in made.metrics] == ["bleu", "exact_match"]
    assert made.metrics[1].options == {"regexes_to_ignore": [","]}


def test_fingerprints_change_with_what_they_are_of(tmp_path: Path) -> None:
    first = load_definition(write(tmp_path, SUMS))
    told = load_definition(write(tmp_path, SUMS | {"description": "Sums."}))
    scored = load_definition(write(tmp_path, SUMS | {"extract": [{"name": "last", "regex": r"\d+", "which": "last"}]}))
    asked = load_definition(write(tmp_path, SUMS | {"prompt": "{{question}} "}))
    assert told.fingerprint == first.fingerprint
    assert len({one.fingerprint for one in (first, scored, asked)}) == 3
    assert scored.asking == first.asking != asked.asking
    moved = [load_definition(write(tmp_path, SUMS | {"fewshot": {"count": 1, "data": name}})) for name in ("a", "b")]
    assert moved[0].asking == moved[1].asking != first.asking
    assert moved[0].fingerprint != moved[1].fingerprint


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (SUMS | {"promt": "x"}, "promt = 'x': unknown field, did you mean 'prompt'?"),
        (SUMS | {"version": None}, "version = None: is missing"),
        (SUMS | {"kind": "multiple-choices"}, "must be 'text-generation'"),
        (SUMS | {"task": "a b"}, "letters, digits"),
        (SUMS | {"task": "test"}, "the test rows of a recipe"),
        (SUMS | {"target": None}, "text-generation needs target"),
        (SUMS | {"choices": ["a", "b"]}, "answer and choices go together"),
        (SUMS | {"chat": {"system": "x"}}, "does not use chat"),
        (SUMS | {"extract": [{"name": "a", "regex": "("}]}, "no regular expression"),
        (SUMS | {"extract": [{"name": "a"}, {"name": "a"}]}, "'a' twice"),
        (SUMS | {"metrics": [{"name": "bleu", "ignore_case": True}]}, "metrics[0].ignore_case = True: unknown field"),
        (SUMS | {"metrics": [{"name": "bleu", "extract": "b"}]}, "wants extract 'b'"),
        (SUMS | {"data": {"uri": "x.jsonl", "weight": 2.0}}, "no weight"),
        (SUMS | {"stop": [""]}, "stop[0]"),
        (SUMS | {"kind": "chat-completion", "header": "x"}, "chat.system"),
        (CHOICE | {"choices": ["yes"]}, "two at least, not 1"),
        (CHOICE | {"choices": None}, "multiple-choice needs choices"),
        (CHOICE | {"stop": ["x"]}, "does not use stop"),
        ({**SUMS, "kind": "perplexity"}, "perplexity does not use prompt"),
        ({**SUMS, "kind": "text-classification"}, "does not use prompt"),
        ({**SUMS, "prompt": None}, "without prompt does not use target"),
        ({**SUMS, "prompt": None, "target": None, "data": {"uri": "x", "take": 3}}, "no data.skip and data.take"),
    ],
)
def test_what_is_wrong_is_told_with_its_file(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_definition(write(tmp_path, values))
    assert said in str(caught.value)
    assert "sums.yaml" in str(caught.value)


def test_errors_point_at_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, SUMS | {"max_new_tokens": 0})
    with pytest.raises(RecipeError, match=r"sums\.yaml:7: max_new_tokens = 0: must be greater than 0"):
        load_definition(path)


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty; a task needs at least task"), ("- a", "mapping of sections")]
)
def test_what_is_no_task_file_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        load_definition(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="there is no such file"):
        load_definition(tmp_path / "y.yaml")


def test_files_are_listed_by_their_tasks(tmp_path: Path) -> None:
    write(tmp_path, SUMS)
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", SUMS | {"task": "others"})
    assert list(list_definitions(tmp_path)) == ["others", "sums"]
    write(tmp_path / "more", SUMS, "again.yaml")
    with pytest.raises(RecipeError, match="same name"):
        list_definitions(tmp_path)


def test_the_page_s_examples_are_task_files(repo_root: Path, tmp_path: Path) -> None:
    page = (repo_root / "docs" / "tasks.md").read_text(encoding="utf-8")
    kinds = []
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        kinds.append(load_definition(tmp_path / f"{number}.yaml").kind)
    assert kinds == [*PROMPTED, "text-classification"]


def test_supervised_kinds_are_recipes(tmp_path: Path) -> None:
    labeled = {"task": "topics", "version": 1, "kind": "text-classification", "data": "rows.csv"}
    belongs = {"group": "user", "slices": ["language"]}
    made = load_definition(
        write(tmp_path, labeled | belongs | {"columns": {"label": "topic"}, "metrics": ["accuracy"]})
    )
    recipe = as_recipe(made, Model(source="ingot://nano"))
    assert recipe.data.test is not None and recipe.data.test.uri == "rows.csv"
    assert (recipe.objective.task, recipe.evaluate.metrics) == ("text-classification", ["accuracy"])
    assert recipe.data.columns == {"label": "topic"}
    assert (recipe.evaluate.cluster_by, recipe.evaluate.slices) == ("user", ["language"])
    chats = load_definition(write(tmp_path, {**labeled, "kind": "chat-completion"}))
    assert as_recipe(chats, Model(source="ingot://nano")).objective.task == "chat-completion"
    with pytest.raises(IngotError, match="says itself how to ask"):
        as_recipe(load_definition(write(tmp_path, SUMS)), Model(source="ingot://nano"))
