"""From predictions to saved evaluations, and the comparisons that are refused."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import pytest

from ingot.errors import IngotError
from ingot.evaluation.runner import (
    Comparison,
    Evaluation,
    Item,
    compare,
    evaluate_likelihoods,
    evaluate_texts,
    load_comparison,
    load_scores,
    merge_items,
)
from ingot.evaluation.statistics import Paired
from ingot.recipe import Evaluate

SECTION = Evaluate(bootstrap_samples=200)


def items_of(references: list[str]) -> list[Item]:
    return [Item(f"test.jsonl:{i}", f"question {i}", [i], [r]) for i, r in enumerate(references, start=1)]


def chat(name: str, predictions: list[str], references: list[str]) -> Evaluation:
    return evaluate_texts(name, items_of(references), predictions, SECTION, "chat-completion", time.perf_counter())


def test_chat_rows_and_scores() -> None:
    evaluation = chat("tuned", ["yes", "no", "no"], ["yes", "no", "yes"])
    assert list(evaluation.scores) == ["exact_match"]
    score = evaluation.scores["exact_match"]
    assert score.value == pytest.approx(2 / 3)
    assert (score.n, score.higher_is_better) == (3, True)
    assert score.low < score.value < score.high
    assert [row.prediction for row in evaluation.rows] == ["yes", "no", "no"]
    assert [row.numbers["exact_match"][0] for row in evaluation.rows] == [1.0, 1.0, 0.0]
    assert evaluation.rows[2].id == "test.jsonl:3"
    assert evaluation.seconds >= 0


def test_json_references_choose_json_metrics() -> None:
    evaluation = chat("tuned", ['{"b": 2, "a": 1}', "oops"], ['{"a": 1, "b": 2}', '{"a": 1}'])
    assert {name: score.value for name, score in evaluation.scores.items()} == {
        "json_exact_match": 0.5,
        "json_argument_f1": 0.5,
        "json_valid": 0.5,
    }


def test_classes() -> None:
    predicted, truth = ["a", "b", "b", "a"], ["a", "b", "a", "a"]
    evaluation = evaluate_texts("base", items_of(truth), predicted, SECTION, "text-classification", time.perf_counter())
    assert evaluation.scores["accuracy"].value == 0.75
    assert evaluation.scores["f1_macro"].value == pytest.approx((0.8 + 2 / 3) / 2)


def test_perplexity_is_weighted_by_tokens() -> None:
    section = Evaluate(metrics=["perplexity", "loss"], bootstrap_samples=200)
    evaluation = evaluate_likelihoods("base", items_of(["x", "y"]), [1.0, 30.0], [10, 20], section, time.perf_counter())
    assert evaluation.scores["perplexity"].value == pytest.approx(math.exp(31 / 30))
    assert evaluation.scores["loss"].value == pytest.approx(31 / 30)
    low, high = evaluation.scores["perplexity"].low, evaluation.scores["perplexity"].high
    assert low == pytest.approx(math.exp(0.1))  # both draws of the first row alone
    assert high == pytest.approx(math.exp(1.5))
    assert not evaluation.scores["perplexity"].higher_is_better
    assert evaluation.rows[1].numbers["loss"] == [30.0, 20.0]


def test_likelihoods_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(IngotError, match="not finite"):
        evaluate_likelihoods("base", items_of(["x"]), [float("nan")], [10], SECTION, time.perf_counter())


def test_a_row_without_a_token_to_predict_is_named() -> None:
    with pytest.raises(IngotError, match=r"test\.jsonl:2"):
        evaluate_likelihoods("base", items_of(["x", "y"]), [1.0, 0.0], [10, 0], SECTION, time.perf_counter())


def test_a_likelihood_too_bad_for_perplexity_is_refused() -> None:
    with pytest.raises(IngotError, match="perplexity came out as inf"):
        evaluate_likelihoods("base", items_of(["x"]), [1e5], [10], SECTION, time.perf_counter())


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(IngotError, match=r"data\.test"):
        evaluate_texts("base", [], [], SECTION, "chat-completion", time.perf_counter())
    with pytest.raises(IngotError, match=r"data\.test"):
        evaluate_likelihoods("base", [], [], [], SECTION, time.perf_counter())


def test_a_missing_prediction_is_never_passed_over() -> None:
    with pytest.raises(ValueError, match="zip"):
        chat("tuned", ["yes"], ["yes", "no"])


# --- merging ---


def test_items_of_one_prompt_merge_in_the_order_of_first_sight() -> None:
    items = [Item("1", "p", [1], ["a"]), Item("2", "q", [2], ["b"]), Item("3", "p", [1], ["c"])]
    assert merge_items(items) == [Item("1", "p", [1], ["a", "c"]), Item("2", "q", [2], ["b"])]
    assert items[0].references == ["a"]  # what came in is untouched


def test_merged_references_raise_bleu() -> None:
    first, second = "the red house stands by the lake", "by the lake there stands a red house"
    items = [Item("1", "p", [1], [first]), Item("2", "p", [1], [second])]
    section = Evaluate(metrics=["bleu"], bootstrap_samples=200)
    merged = evaluate_texts("x", merge_items(items), [second], section, "text-generation", 0.0)
    apart = evaluate_texts("x", items, [second, second], section, "text-generation", 0.0)
    assert merged.scores["bleu"].value == pytest.approx(100.0)
    assert merged.scores["bleu"].n == 1
    assert apart.scores["bleu"].value < 90


# --- files ---


def test_scores_and_rows_come_back_from_the_folder(tmp_path: Path) -> None:
    evaluation = chat("tuned", ["yes", "né\n\u2028x"], ["yes", "no"])
    evaluation.save(tmp_path / "evaluation")
    assert load_scores(tmp_path / "evaluation", "tuned") == evaluation.scores
    with (tmp_path / "evaluation" / "tuned_rows.jsonl").open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    assert rows == [dataclasses.asdict(row) for row in evaluation.rows]
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == ["tuned.json", "tuned_rows.jsonl"]


def test_a_save_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat("tuned", ["yes"], ["yes"]).save(tmp_path)
    before = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}

    def cut(*args: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        chat("tuned", ["no"], ["yes"]).save(tmp_path)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in before} == before


def test_a_comparison_comes_back_from_the_folder(tmp_path: Path) -> None:
    base, tuned = chat("base", ["no", "no"], ["yes", "no"]), chat("tuned", ["yes", "no"], ["yes", "no"])
    comparison = compare(base, tuned, SECTION)
    comparison.save(tmp_path)
    assert load_comparison(tmp_path) == comparison
    assert isinstance(comparison.metrics["exact_match"], Paired)


def test_one_model_alone_has_no_comparison(tmp_path: Path) -> None:
    assert load_comparison(tmp_path) is None


# --- comparing ---


def test_a_better_model_is_found() -> None:
    truth = ["yes"] * 40
    comparison = compare(chat("base", ["no"] * 30 + ["yes"] * 10, truth), chat("tuned", truth, truth), SECTION)
    result = comparison.metrics["exact_match"]
    assert (result.difference, result.n) == (0.75, 40)
    assert result.mcnemar_p == pytest.approx(2 * 0.5**30)
    assert result.p_value <= 2 / SECTION.bootstrap_samples
    assert result.low > 0.5


def test_the_same_answers_are_no_difference() -> None:
    answers, truth = ["yes", "no", "no"] * 5, ["yes", "yes", "no"] * 5
    result = compare(chat("base", answers, truth), chat("tuned", answers, truth), SECTION).metrics["exact_match"]
    assert (result.difference, result.p_value, result.mcnemar_p) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"id": "other"}, "id"), ({"prompt": "other"}, "prompt"), ({"references": ["other"]}, "references")],
)
def test_rows_that_differ_are_not_compared(change: dict[str, object], named: str) -> None:
    base, tuned = chat("base", ["a", "b"], ["a", "b"]), chat("tuned", ["a", "b"], ["a", "b"])
    rows = [tuned.rows[0], dataclasses.replace(tuned.rows[1], **change)]  # type: ignore[arg-type]
    with pytest.raises(IngotError, match=f"{named} of row test.jsonl:2"):
        compare(base, dataclasses.replace(tuned, rows=rows), SECTION)


def test_the_same_rows_in_another_order_are_not_compared() -> None:
    base, tuned = chat("base", ["a", "b"], ["a", "b"]), chat("tuned", ["a", "b"], ["a", "b"])
    with pytest.raises(IngotError, match="id of row"):
        compare(base, dataclasses.replace(tuned, rows=tuned.rows[::-1]), SECTION)


def test_another_number_of_rows_is_not_compared() -> None:
    with pytest.raises(IngotError, match="base and tuned were measured on 2 and 1 rows"):
        compare(chat("base", ["a", "b"], ["a", "b"]), chat("tuned", ["a"], ["a"]), SECTION)


def test_a_comparison_is_plain_json() -> None:
    comparison = Comparison({"accuracy": Paired(0.1, 0.0, 0.2, 0.04, None, 10)})
    assert json.loads(json.dumps(comparison.as_dict())) == {
        "accuracy": {"difference": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.04, "mcnemar_p": None, "n": 10}
    }
