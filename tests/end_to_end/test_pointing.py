"""Label sets, tags, answers and gaps from the command line: proved, trained, measured, packaged and asked, and
what users get wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ingot.data.synthetic import generate
from ingot.errors import ServeError
from ingot.evaluation.samples import Samples

NAMES = ("Anna", "Paul", "Maria")
CITIES = ("France", "Paris", "city", "table")
SETS, TAGS, POINT, GAPS = "multi-label-classification", "token-classification", "question-answering", "fill-mask"


def sets(start: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(start, start + count):
        found = [kind for place, kind in enumerate(("good", "late", "broken")) if n >> place & 1]
        rows.append({"text": f"table {n} is {' and '.join(found) or 'here'}", "labels": found})
    return rows


def tags(start: int, count: int) -> list[dict[str, Any]]:
    rows = [(str(n), NAMES[n % 3], "is", "in", CITIES[n % 4]) for n in range(start, start + count)]
    return [{"tokens": row, "tags": ["O", "B-person", "O", "O", "B-city"]} for row in rows]


def questions(start: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(start, start + count):
        who, where = NAMES[n % 3], CITIES[n % 4]
        context = f"The quick brown fox jumps over {n} and {7 * n}. {who} is in {where} today."
        found = {"text": [where], "answer_start": [context.index(where)]}
        rows.append({"question": f"Where is {who} {n}?", "context": context, "answers": found})
    return rows


def texts(start: int, count: int) -> list[dict[str, Any]]:
    rows = range(start, start + count)
    return [{"text": f"The quick brown fox jumps over {CITIES[n % 4]} {n} and {7 * n}."} for n in rows]


CASES: dict[str, tuple[Callable[[int, int], list[dict[str, Any]]], dict[str, Any], set[str]]] = {
    SETS: (sets, {}, {"f1_micro", "f1_macro", "subset_accuracy"}),
    TAGS: (tags, {}, {"entity_f1", "entity_precision", "entity_recall"}),
    POINT: (questions, {"max_tokens": 24, "overlap_tokens": 6}, {"squad_exact_match", "squad_f1"}),
    GAPS: (texts, {}, {"masked_accuracy", "perplexity"}),
}
OTHER = {SETS: {"labels": ["none"]}, TAGS: {"tags": ["O"]}, POINT: {"answer": "nowhere"}}  # never a stored answer


@pytest.fixture
def gap_folder(encoder_folder: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """The tiny encoder with a tokenizer that knows a mask token, a CLS and segments."""
    tokenizer = make_tokenizer(None, mask_token="<|im_start|>", model_input_names=["input_ids", "token_type_ids"])
    tokenizer.save_pretrained(encoder_folder)
    return encoder_folder


@pytest.fixture
def start(make_project: Any, gap_folder: Path) -> Callable[..., Any]:
    """start(task) -> a project with rows of that task."""

    def make(task: str, **sections: Any) -> Any:
        project = make_project(gap_folder, "text-classification")
        rows, data, _ = CASES[task]
        project.rows("train", rows(0, 24))
        project.rows("test", rows(31, 8))
        project.write(objective={"task": task}, data=data, train={"tokens_per_step": 150})
        project.write(**sections)
        return project

    return make


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (TAGS, "lora"),
        *(pytest.param(task, "lora", marks=pytest.mark.slow) for task in (SETS, POINT, GAPS)),
        *(pytest.param(task, "none", marks=pytest.mark.slow) for task in (POINT, GAPS)),
    ],
)
def test_proved_trained_and_measured(task: str, kind: str, ingot: Any, start: Any, replayed: Any) -> None:
    forms = ["merged", "adapter"] if kind == "lora" else ["merged"]
    later = {"package": {"enabled": True, "forms": forms}, "serve": {"enabled": True}}
    project = start(task, adapter={"kind": kind}, train={"max_steps": 6}, **later)
    done = ingot("run", project.recipe, "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert set(summary["metrics"]["tuned"]) == CASES[task][2]
    assert summary["stages"]["package"]["verified"]
    assert list(summary["stages"]["package"]["forms"]) == forms
    assert summary["question"]
    assert summary["answer"]
    losses = project.losses()
    assert sum(losses[-2:]) < sum(losses[:2])
    first = Samples(project.run / "evaluation" / "tuned" / "test.parquet")[0]
    assert first.prompt
    assert first.references
    assert set(first.numbers) == CASES[task][2]
    if task == GAPS:
        with pytest.raises(ServeError, match=r"--replay = 4: .*not which ones were said"):
            replayed(project.run)
        return
    assert replayed(project.run) == (200, '{"status":"ready"}')
    status, told = replayed(project.run, lambda stored: replace(stored, expected=OTHER[task]))
    assert status == 503
    assert "4 of 4 rows were not answered as stored" in told


@pytest.mark.parametrize("task", CASES)
def test_inspect_shows_rows(task: str, ingot: Any, start: Any) -> None:
    done = ingot("inspect", start(task).recipe)
    assert done.code == 0, done.err
    wanted = {SETS: "labels 0", TAGS: "labels 2 1 2 2 0", POINT: "labels", GAPS: "hidden"}
    assert wanted[task] in done.out, done.out


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        (TAGS, {"evaluate": {"metrics": ["bleu"]}}, "token-classification has entity_f1"),
        (SETS, {"data": {"streaming": True, "validation_share": 0}, "train": {"max_steps": 2}}, "know every class"),
        (POINT, {"data": {"batches": "packed"}}, "use padded"),
        (GAPS, {"parallel": {"context": 2}}, "parallel.context"),
        (GAPS, {"model": {"source": "ingot://nano"}}, "has no mask token"),
        (POINT, {"serve": {"enabled": True, "question": "Where?"}}, "serve.question"),
    ],
    ids=["metric of another task", "streamed classes", "packed answers", "context", "no mask token", "half a row"],
)
def test_settings_that_do_not_fit(task: str, sections: dict[str, Any], message: str, ingot: Any, start: Any) -> None:
    done = ingot("run", start(task, **sections).recipe)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_generated_sets_are_read_by_their_names(ingot: Any, start: Any) -> None:
    project = start(POINT)
    project.write(
        data={"train": "ingot://people", "test": {"uri": "ingot://people", "split": "test"}, "max_tokens": 96}
    )
    done = ingot("inspect", project.recipe)
    assert done.code == 0, done.err
    assert next(generate("people"))["question"].split()[0] in done.out
