"""Scores without the rows that training saw: those of an evaluation that never had these rows."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import SECTION, Questions, Scripted, evaluated, right

from ingot.data.seen import Seen
from ingot.errors import IngotError
from ingot.evaluation import contamination, shared_rows
from ingot.evaluation.compare import compare
from ingot.evaluation.contamination import Contamination, find_shared, record, sentence, with_scores, without
from ingot.evaluation.ranking import ranking
from ingot.evaluation.result import Evaluation, Score, without_nan
from ingot.evaluation.samples import Item
from ingot.recipe_evaluate import Contamination as Section

WAYS = ("exact", "ngram", "minhash")
SEEN = {0, 3, 4, 17}


class Some(Questions):
    """Questions without some of them."""

    def windows(self) -> Iterator[list[Item]]:
        for window in super().windows():
            yield [item for item in window if int(item.prompt.split()[1]) not in SEEN]


def training(rows: set[int], task: Questions) -> Iterator[Seen]:
    for number, (prompt, answers) in enumerate(task.texts()):
        yield Seen(f"train:{number}", (prompt, answers[0]) if number in rows else (f"another matter, {number}", "no"))


def looked(rows: set[int], task: Questions, **settings: Any) -> Contamination:
    *_, found = find_shared([task], training(rows, task), ["train.jsonl"], Section(**settings))
    assert isinstance(found, list)
    return found[0]


def swapped(prompt: str) -> str:
    return right(int(prompt.split()[1])) if int(prompt.split()[1]) % 5 else "neither"


METRIC_NAMES = ("exact_match", "bleu", "rougeL")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Evaluation]:
    task = Questions(40, metrics=METRIC_NAMES)
    return {
        "base": evaluated(task, Scripted(), tmp_path / "base", name="base"),
        "tuned": evaluated(task, Scripted(swapped), tmp_path / "tuned", name="tuned"),
    }


def test_scores_are_those_of_the_other_rows_alone(models: dict[str, Evaluation], tmp_path: Path) -> None:
    found = with_scores(looked(SEEN, Questions(40)), models, SECTION)
    assert found.shared == SEEN
    alone = {
        name: evaluated(Some(40, metrics=METRIC_NAMES), Scripted(answer), tmp_path / f"{name} alone", name=name)
        for name, answer in (("base", None), ("tuned", swapped))
    }
    for name, scores in found.without.items():
        assert scores == alone[name].scores
        assert scores != models[name].scores
    settings = {"samples": SECTION.bootstrap_samples, "confidence": SECTION.confidence}
    expected = compare({"questions": alone["base"]}, {"questions": alone["tuned"]}, **settings)
    assert found.comparisons == [expected]
    left = without(models["tuned"], SEEN, SECTION).samples
    assert [row.document for row in left] == [row.document for row in alone["tuned"].samples]
    assert left[-2:] == [left[34], left[35]]


def test_what_is_stored_names_both_rows(models: dict[str, Evaluation], tmp_path: Path) -> None:
    found = with_scores(looked(SEEN, Questions(40)), models, SECTION)
    contamination.save(tmp_path, {"questions": record(found, models, Section())})
    stored = contamination.load(tmp_path)["questions"]
    assert stored["shared"] == {"exact": 4, "n-gram": 0, "MinHash": 4, "any": 4}
    assert stored["texts"] == {"prompt": 4, "whole": 4}
    assert stored["training"] == {"sources": ["train.jsonl"], "rows": 40, "words": stored["training"]["words"]} | {
        "unreadable": 0,
        "stopped": False,
    }
    assert stored["found"]["minhash"][0] == {"id": "q:0", "train": "train:0", "text": "prompt", "similarity": 1.0}
    assert {it["id"] for it in stored["found"]["exact"]} == {f"q:{n}" for n in SEEN}
    assert contamination.scores_in(stored) == found.without
    assert "found" not in contamination.summary(tmp_path, ["questions", "another"])["questions"]
    (tmp_path / contamination.FILE).write_text("{")
    assert contamination.load(tmp_path) == {}


def test_the_answer_for_people(models: dict[str, Evaluation], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"tuned": models["tuned"]}

    def said(rows: set[int], evaluations: dict[str, Evaluation] = tuned, **settings: Any) -> str:
        found = with_scores(looked(rows, Questions(40), **settings), evaluations, SECTION)
        return sentence(found, evaluations, settings.get("ways", WAYS))

    assert said(set()) == (
        "questions: none of 40 rows is shared with the training data (exact, n-gram, MinHash; 40 training rows)"
    )
    assert said(SEEN) == (
        "questions: 4 of 40 rows are shared with the training data (4 exact, 0 n-gram, 4 MinHash; 40 training rows); "
        "without them exact_match is 0.806 instead of 0.800"
    )
    assert said({4}, models, ways=["exact"]) == (
        "questions: 1 of 40 rows is shared with the training data (1 exact; 40 training rows); "
        "without it exact_match of tuned is 0.795 instead of 0.800"
    )
    assert said(set(range(40))).endswith("40 training rows); none is left to be scored without them")
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 10)
    assert "; the first 10 training rows (40 words; evaluate.contamination.max_words says" in said(set(), max_words=9)


def test_several_tasks_are_looked_for_in_one_reading() -> None:
    class Other(Questions):
        name = "other"

        def texts(self) -> Iterator[tuple[str, list[str]]]:
            return ((f"other {prompt}", answers) for prompt, answers in super().texts())

    first, other = Questions(20), Other(30)
    rows = [*training({1}, first), *training({25, 29}, other)]
    once = iter(rows)
    *_, found = find_shared([first, other], once, [], Section())
    assert isinstance(found, list)
    assert [(it.task, it.rows, it.shared) for it in found] == [("questions", 20, {1}), ("other", 30, {25, 29})]
    assert next(once, None) is None


def test_a_metric_that_is_undefined_on_the_rest_is_no_number(models: dict[str, Evaluation]) -> None:
    """The area under a curve needs both classes; the other metrics are still compared."""
    real = np.arange(40) < 4
    statistic = ranking("AUC_binary", (real * 0.6 + 0.2)[:, None], real[:, None].astype(float))
    name, found, odd = "AUC_binary", looked({0, 1, 2, 3}, Questions(40)), {}
    for model, it in models.items():
        score = Score(statistic.value(), 0.9, 1.0, 40, True)
        odd[model] = replace(it, scores={**it.scores, name: score}, statistics={**it.statistics, name: statistic})
    scored = with_scores(found, odd, SECTION)
    assert math.isnan(scored.without["tuned"][name].value)
    assert [it.metric for it in scored.comparisons[0].differences] == list(METRIC_NAMES)
    stored = json.loads(json.dumps(without_nan(record(scored, odd, Section()))))
    assert stored["without"]["tuned"][name]["value"] is None
    assert math.isnan(contamination.scores_in(stored)["tuned"][name].low)


def test_other_rows_than_those_looked_for_are_an_error(models: dict[str, Evaluation]) -> None:
    with pytest.raises(IngotError, match="tuned has 40 rows of questions, and 41 were looked for"):
        with_scores(looked(SEEN, Questions(41)), {"tuned": models["tuned"]}, SECTION)
