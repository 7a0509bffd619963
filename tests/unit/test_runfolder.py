"""A run's folder: what is written, what is read back, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from ingot.errors import IngotError
from ingot.recipe import Recipe
from ingot.recipe_io import load_recipe, parse_recipe, recipe_hash
from ingot.runfolder import create_run, find_run, list_runs, open_run, versions, write_json


def make_recipe(output: Path, name: str = "tiny") -> Recipe:
    return parse_recipe(
        {"name": name, "output": str(output), "model": {"source": "ingot://nano"}, "data": {"train": "rows.jsonl"}}
    )


def test_created_run_is_opened_again(tmp_path):
    recipe = make_recipe(tmp_path / "runs")
    made = create_run(recipe, tmp_path / "home")
    again = open_run(made.folder)
    assert again == made
    assert again.home == tmp_path / "home"
    assert load_recipe(made.folder / "resolved.yaml") == recipe
    assert made.folder.name.startswith("tiny-")
    assert made.folder.name.endswith(recipe_hash(recipe)[:6])
    record = made.record()
    assert record["recipe_hash"] == recipe_hash(recipe)
    assert record["versions"]["torch"] == versions()["torch"]
    assert (record["status"], record["stages"]) == ("started", {})


def test_stages_are_noted_and_kept(tmp_path):
    run = create_run(make_recipe(tmp_path / "runs"), tmp_path)
    run.note(status="trained", tracking_run="abc")
    run.note_stage("finetune", 1.23456, steps=4)
    run.note_stage("evaluate", 2.0)
    assert run.finished("finetune")
    assert not run.finished("package")
    record = run.record()
    assert record["stages"] == {"finetune": {"seconds": 1.235, "steps": 4}, "evaluate": {"seconds": 2.0}}
    assert (record["status"], record["tracking_run"]) == ("trained", "abc")
    assert sorted(path.name for path in run.folder.iterdir()) == ["resolved.yaml", "run.json"]


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    recipe = make_recipe(tmp_path / "runs")
    folders = {create_run(recipe, tmp_path).folder for _ in range(3)}
    assert len(folders) == 3


def test_a_folder_that_cannot_be_written_names_the_override(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(IngotError, match=r"taken.*cannot be written.*set output=FOLDER"):
        create_run(make_recipe(tmp_path / "taken"), tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(IngotError, match=r"is no run: it has no run\.json"):
        open_run(tmp_path)


def test_a_record_that_is_damaged_is_refused(tmp_path):
    run = create_run(make_recipe(tmp_path / "runs"), tmp_path)
    (run.folder / "run.json").write_text('{"name": "ti')
    with pytest.raises(IngotError, match=r"run\.json is damaged"):
        open_run(run.folder)
    assert list_runs(tmp_path / "runs") == []


def test_list_is_newest_first_with_scores(tmp_path):
    output = tmp_path / "runs"
    old, new = (create_run(make_recipe(output, name), tmp_path) for name in ("old", "new"))
    scores = {"tuned": {"bleu": {"value": 0.5}}}
    write_json(new.folder / "summary.json", {"metrics": scores})
    old.note(created="2020-01-01T00:00:00+00:00")  # touched last, created first
    found = list_runs(output)
    assert [record["folder"] for record in found] == [str(new.folder), str(old.folder)]
    assert [record["metrics"] for record in found] == [scores, {}]
    assert list_runs(tmp_path / "nothing") == []


def test_a_restarted_job_finds_its_unfinished_run(tmp_path):
    recipe, gone = make_recipe(tmp_path / "runs"), {"pid": 1, "born": "0", "machine": "another"}
    mine = create_run(recipe, tmp_path, "slurm::7")
    assert find_run(recipe, "slurm::7") is None, "its process is alive: the job trains twice at a time"
    for run in (mine, create_run(recipe, tmp_path, "slurm::8"), create_run(recipe, tmp_path)):
        run.note(process=gone)
    assert find_run(recipe, "slurm::7") == mine
    assert find_run(recipe, "slurm::9") is None
    assert find_run(recipe, None) is None
    assert (
        find_run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})}), "slurm::7") is None
    )
    mine.note(status="finished")
    assert find_run(recipe, "slurm::7") is None


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})

    def fails(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def test_versions_name_ingot_even_when_it_is_only_on_the_import_path(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from ingot import runfolder

    def find(name: str) -> str:
        if name == "ingot":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(runfolder, "version", find)
    assert versions()["ingot"] == "not installed"
    assert versions()["torch"] == "1.0"
