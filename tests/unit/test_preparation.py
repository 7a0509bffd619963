"""What is known and said before any training, from a cold cache and from a warm one."""

import json
from pathlib import Path

import pytest

from ingot import preparation
from ingot.data import cache
from ingot.data.plan import Cursor, PlannedFeed
from ingot.data.stream import StreamFeed
from ingot.errors import DataError, RecipeError
from ingot.evaluation.measure import recipe_task
from ingot.evaluation.runner import rows_of
from ingot.preparation import preflight, prepare
from ingot.progress import Progress
from ingot.recipe_io import parse_recipe


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


LINES = [
    {"prompt": f"thing {n} costs", "completion": f" {n} euros and ten cents", "shop": n % 5, "town": "x"}
    for n in range(20)
]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write(tmp_path / "a.jsonl", [{"prompt": f"item {n} costs", "completion": f" {n} euros"} for n in range(90)])
    write(tmp_path / "b.jsonl", [{"prompt": f"capital {n}", "completion": f" is {n}"} for n in range(30)])
    write(
        tmp_path / "test.jsonl",
        [{"prompt": f"thing {n % 4} costs", "completion": f" {n} euros and ten cents"} for n in range(12)],
    )
    return tmp_path


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path):
    def make(steps: int | None = None, evaluate: dict | None = None, **data):
        return parse_recipe(
            {
                "name": "t",
                "model": {"source": str(model_folder)},
                "data": {"train": "a.jsonl", "max_tokens": 64, "cache": "cache", **data},
                "objective": {"task": "text-generation"},
                "train": {"tokens_per_step": 256, "tokens_per_microbatch": 64, "max_steps": steps},
                "evaluate": evaluate or {},
            }
        )

    return make


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_checks_before_training_are_the_same_with_a_cold_and_a_warm_cache(home, recipe, state, monkeypatch):
    if state == "warm":
        prepare(recipe(test="test.jsonl"), home)
        monkeypatch.setattr(cache, "_encode", lambda *_: pytest.fail("encoded again"))
    notes = Notes()
    asked = recipe(test="test.jsonl", evaluate={"merge_references": True, "max_new_tokens": 16})
    prepared = prepare(asked, home, notes)
    preflight(asked, home, prepared, notes)
    assert any("evaluate: 4 rows cannot see less than" in said for said in notes.said)  # twelve rows ask four questions
    assert any("86 train (given), 4 validation (drawn from train), 12 test (given)" in said for said in notes.said)
    wordy = recipe(test="test.jsonl", evaluate={"max_new_tokens": 250})
    with pytest.raises(DataError, match=r"test\.jsonl:1: evaluate\.max_new_tokens = 250: the prompt has"):
        preflight(wordy, home, prepare(wordy, home), notes)
    unknown = recipe(test="test.jsonl", evaluate={"metrics": ["bleus"]})
    with pytest.raises(RecipeError, match="bleu"):
        preflight(unknown, home, prepare(unknown, home), notes)
    assert prepared.data_facts() == {
        "rows": 86,
        "data": prepared.facts.report.as_dict() | {"truncation": prepared.facts.dropped.as_dict()},
    }


def test_a_mixture_is_learned_by_weight_and_said(home, recipe):
    notes = Notes()
    options = {"train": [{"uri": "a.jsonl", "weight": 1}, {"uri": "b.jsonl", "weight": 3}]}
    prepared = prepare(recipe(**options, validation_share=0, test_share=0), home, notes)
    assert "data: train[0] = a.jsonl: 25.0% of the rows learned; each of its 90 rows 0.33 times an epoch" in notes.said
    assert "data: train[1] = b.jsonl: 75.0% of the rows learned; each of its 30 rows 3.00 times an epoch" in notes.said
    feed = prepared.rows.train
    assert isinstance(feed, PlannedFeed)
    seen = [feed.rows[row].where for portion in feed.start(Cursor()) for row in portion.indices]
    assert len(seen) == 120
    assert sum(where.startswith("b.jsonl") for where in seen) == 90
    assert {seen.count(f"b.jsonl:{line}") for line in range(1, 31)} == {3}


def test_a_stream_is_tried_at_its_head_and_refused_before_anything_is_read(home, recipe, monkeypatch):
    notes = Notes()
    options = {"streaming": True, "validation_share": 0, "test": "test.jsonl"}
    prepared = prepare(recipe(steps=3, **options), home, notes)
    assert isinstance(prepared.rows.train, StreamFeed)
    assert "data: train (streamed), 12 test (given)" in notes.said
    assert prepared.facts.example == {"input_string": "thing 0 costs"}
    steps = prepared.rows.train.start(Cursor())
    next(steps)
    steps.close()
    facts = prepared.data_facts()
    assert facts["rows"] == facts["data"]["streamed"]["rows"] >= 90
    monkeypatch.setattr(preparation, "load_tokenizer", lambda *_: pytest.fail("went on"))
    with pytest.raises(RecipeError, match="max_steps"):
        prepare(recipe(**options), home)


def test_a_stream_without_test_rows_shows_its_first_row(home, recipe):
    options = {"streaming": True, "validation_share": 0, "test_share": 0}
    prepared = prepare(recipe(steps=3, **options), home)
    assert prepared.facts.example == {"input_string": "item 0 costs"}
    assert len(prepared.rows.validation) == 0


def test_columns_that_cut_and_group_rows_are_read_before_training(home, recipe) -> None:
    write(home / "shops.jsonl", LINES)
    notes, asked = (
        Notes(),
        recipe(test="shops.jsonl", evaluate={"cluster_by": "shop", "slices": ["town"], "max_new_tokens": 16}),
    )
    preflight(asked, home, prepare(asked, home), notes)
    assert any("evaluate: 20 rows of 5 groups cannot see less than" in said for said in notes.said)
    for section, told in (
        ({"cluster_by": "shops"}, r"shops\.jsonl:1: evaluate\.cluster_by = 'shops': .*did you mean 'shop'"),
        ({"slices": ["land"]}, r"shops\.jsonl:1: evaluate\.slices = 'land': the row has no such column"),
        ({"cluster_by": "town"}, r"group = 'x': all 20 rows of test are of this group"),
    ):
        wrong = recipe(test="shops.jsonl", evaluate={"max_new_tokens": 16, **section})
        with pytest.raises(DataError, match=told):
            preflight(wrong, home, prepare(wrong, home), notes)


def test_marks_of_rows_are_those_of_their_lines(home, recipe) -> None:
    write(home / "shops.jsonl", LINES)
    asked = recipe(test="shops.jsonl", evaluate={"cluster_by": "shop", "slices": ["place"], "max_rows": 7})
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"columns": {"place": "town"}})})
    rows = rows_of(recipe_task(asked, home, None, None))
    lines = {line["prompt"]: line for line in LINES}
    assert len(rows) == 7
    assert [(row.group, row.slices) for row in rows] == [
        (str(lines[row.prompt]["shop"]), {"place": "x"}) for row in rows
    ]
