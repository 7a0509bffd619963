"""`evaluate.during` and `train.best_by`: what is refused before training, and a whole run, also a killed one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ingot
from ingot.data.splits import load_splits
from ingot.errors import DataError, RecipeError
from ingot.evaluation.measure import measure
from ingot.model.load import load_model, load_tokenizer
from ingot.preparation import preflight, prepare
from ingot.progress import Progress
from ingot.recipe_io import parse_recipe
from ingot.runfolder import open_run
from ingot.stages import _course
from ingot.track import read_metrics
from ingot.watching import as_asked, validation_rows

TASK = """
task: sums
version: 1
kind: multiple-choice
data: sums.jsonl
prompt: "{{ a }} + {{ b }} ="
choices: "{{ choices }}"
answer: 0
"""


class Notes(Progress):
    """Keeps what is said; where a line begins with `cut`, the power fails."""

    def __init__(self, cut: str | None = None) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []
        self._cut = cut

    def note(self, text: str) -> None:
        self.said.append(text)
        if self._cut is not None and text.startswith(self._cut):
            raise Power


class Power(Exception):
    """A failure that nobody expects."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rows = [{"prompt": f"item {n} costs", "completion": f" {n % 7} euros and ten cents"} for n in range(90)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [{"a": n, "b": 1, "sum": str(n + 1), "choices": [str(n + 1), str(n)]} for n in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "sums.yaml").write_text(TASK)
    return tmp_path


@pytest.fixture
def recipe(model_folder: Path, home: Path):
    def make(during: dict | None, task: str = "text-generation", **sections: dict):
        train = {"tokens_per_step": 256, "tokens_per_microbatch": 64, "max_steps": 6, **sections.pop("train", {})}
        data = {"train": "a.jsonl", "max_tokens": 64, "cache": "cache", **sections.pop("data", {})}
        evaluate = {"max_new_tokens": 8, **sections.pop("evaluate", {}), **({"during": during} if during else {})}
        return parse_recipe(
            {
                "name": "t",
                "output": str(home / "runs"),
                "model": {"source": str(model_folder)},
                "data": {"validation_share": 0.2, "test_share": 0.1, **data},
                "objective": {"task": task},
                "optim": {"lr": 2e-2},
                "train": train,
                "evaluate": evaluate,
                "track": {"enabled": False},
                **sections,
            }
        )

    return make


def checked(recipe, home: Path, notes: Progress | None = None):
    """What comes before training."""
    return preflight(recipe, home, prepare(recipe, home), notes or Notes())


def test_a_run_without_it_measures_nothing(recipe, home) -> None:
    assert checked(recipe(None), home) is None


@pytest.mark.parametrize(
    ("during", "best_by", "message"),
    [
        ({}, "rougel", None),  # other capitals are the same name
        ({}, "rougeLL", r"train\.best_by = 'rougeLL': .*rougeL"),
        ({}, "accuracy", r"train\.best_by = 'accuracy': text-generation has "),
        ({}, "chrf", r"train\.best_by = 'chrf': is not measured .*\(bleu, rougeL\).*evaluate\.during\.metrics"),
        ({"metrics": ["chrf"]}, "chrf", None),
        ({"metrics": ["chfr"]}, "validation_loss", r"evaluate\.during\.metrics = 'chfr': .*chrf"),
        (
            {"metrics": ["json_exact_match"]},
            "validation_loss",
            r"during\.metrics = 'json_exact_match': .* the validation rows: ",
        ),
        ({"max_new_tokens": 250}, "validation_loss", r"evaluate\.max_new_tokens = 250: the prompt has"),
        ({"tasks": ["sums.yaml"]}, "sums/acc", None),
        ({"tasks": ["sums.yaml"]}, "sums/akk", r"train\.best_by = 'sums/akk': .*sums/acc"),
        (
            {"tasks": ["sums.yaml", "sums.yaml"]},
            "validation_loss",
            r"during\.tasks = 'sums\.yaml': two tasks are called sums",
        ),
        ({"tasks": ["gone.yaml"]}, "validation_loss", r"gone\.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(recipe, home, during, best_by, message) -> None:
    asked = recipe({"every_steps": 2, **during}, train={"best_by": best_by})
    if message is None:
        found = checked(asked, home)
        assert found.best_by == {"rougel": "rougeL"}.get(best_by, best_by)
        return
    with pytest.raises((RecipeError, DataError), match=message):
        checked(asked, home)


def test_without_validation_rows_it_is_refused(recipe, home) -> None:
    asked = recipe({"every_steps": 2}, data={"validation_share": 0})
    with pytest.raises(
        RecipeError, match=r"data\.validation_share = 0.*: there is no validation row for evaluate\.during"
    ):
        checked(asked, home)


def test_best_by_a_metric_wants_it_to_be_measured(recipe) -> None:
    with pytest.raises(RecipeError, match=r"best_by = bleu is measured by evaluate\.during, which is not set"):
        recipe(None, train={"best_by": "bleu"})


def test_more_steps_than_there_are_is_said(recipe, home) -> None:
    notes = Notes()
    checked(recipe({"every_steps": 50}), home, notes)
    assert any("every_steps = 50 is more than the 6 steps" in said for said in notes.said)
    checked(recipe({"every_steps": 6}), home, notes := Notes())
    assert not any("every_steps" in said for said in notes.said)


def test_rows_are_those_of_validation_and_drawn_once(recipe, home) -> None:
    asked = recipe({"every_steps": 2, "max_rows": 5})
    splits = load_splits(asked, home)
    rows = validation_rows(asked, home)
    assert len(rows) == 5 < len(splits.validation)
    known = {row.where for row in splits.validation}
    assert {row.where for row in rows} <= known
    assert rows == validation_rows(asked, home)


def scores(run) -> list[tuple[int, dict[str, list[float]]]]:
    measured = open_run(run.folder).record()["stages"]["finetune"]["measured"]
    return [(it["step"], {name: list(score.values()) for name, score in it["scores"].items()}) for it in measured]


def test_a_run_and_one_that_was_killed(recipe, home, model_folder) -> None:
    during = {"every_steps": 2, "metrics": ["rougeL", "chrf"], "max_rows": 6, "tasks": ["sums.yaml"]}
    asked = recipe(during, train={"best_by": "chrf", "checkpoint_every_steps": 1})
    notes = Notes()
    run = ingot.finetune(asked, home=home, progress=notes)
    record = run.record()["stages"]["finetune"]
    curve = scores(run)
    assert [step for step, _ in curve] == [0, 2, 4, 6]
    assert list(curve[0][1]) == ["rougeL", "chrf", "sums/acc", "sums/acc_norm"]

    # Step 0 is the base model, measured as the final evaluation would on these rows.
    base = load_model(asked.model, home, "text-generation", dtype=torch.float32)
    rows = validation_rows(asked, home)
    alone = measure("base", base, load_tokenizer(asked.model, home), rows, (), as_asked(asked)).scores
    for name in ("rougeL", "chrf"):
        assert curve[0][1][name] == pytest.approx([alone[name].value, alone[name].low, alone[name].high])

    values = {step: found["chrf"][0] for step, found in curve if step}
    best = max(values, key=values.__getitem__)  # the first of equal ones
    assert (record["best_by"], record["best_step"], record["final_step"]) == ("chrf", best, best)
    assert record["chosen"].startswith(f"step {best}: the highest chrf, ")
    lines = [line for line in notes.said if line.startswith("step ")]
    assert len(lines) == 4
    assert lines[0].startswith("step 0 (base model): rougeL ")
    assert f"(base {curve[0][1]['chrf'][0]:.1f})" in lines[1]
    assert f"model: {record['chosen']}" in notes.said
    points = {it["step"]: it["metrics"] for it in read_metrics(run.metrics)}
    assert {step for step, it in points.items() if "validation/chrf" in it} == {0, 2, 4, 6}
    assert points[2]["validation/sums/acc"] == curve[1][1]["sums/acc"][0]
    drawn = _course(record)
    assert (drawn.name, drawn.chosen, [point[0] for point in drawn.points]) == ("chrf", best, [0, 2, 4, 6])

    killed = home / "killed"
    again = asked.model_copy(update={"output": str(killed)})
    with pytest.raises(Power):
        ingot.finetune(again, home=home, progress=Notes("step 4:"))
    [folder] = killed.iterdir()
    resumed = Notes()
    other = ingot.finetune(again, home=home, resume=folder, progress=resumed)
    assert not any(line.startswith(("step 0", "step 2")) for line in resumed.said)
    assert scores(other) == curve
    assert other.record()["stages"]["finetune"]["chosen"] == record["chosen"]
    # Best and last step alike: whatever was exported is the same to the bit, with what decided it.
    for name in ("adapter/adapter_model.safetensors", "checkpoints/last/state-0.safetensors"):
        paths = [it.folder / name for it in (run, other)]
        if name.startswith("checkpoints"):
            paths = [sorted((it.checkpoints / "last").glob("*.safetensors"))[0] for it in (run, other)]
        one, two = map(load_file, paths)
        assert all(torch.equal(one[key], two[key]) for key in one | two)
    merged = load_file(run.model / "model.safetensors")
    assert any(
        not torch.equal(value, merged[key]) for key, value in load_file(model_folder / "model.safetensors").items()
    )
