"""Every metric against the library or the definition it stands for, and the inputs on which it is undefined."""

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.judge_metrics import JUDGED
from ingot.evaluation.metrics import (
    DEFAULTS,
    METRICS,
    OF_TASK,
    canonical,
    finite,
    metric_names,
    parse_object,
    statistic_of,
)
from ingot.evaluation.statistics import interval
from ingot.evaluation.vocabulary import ALIASES, ALIASES_OF_TASK
from ingot.recipe import Evaluate

PREDICTIONS = [
    "The Eagle is a cheap coffee shop near the river.",
    "Blue Spice serves Chinese food in the city centre",
    "",
    "There is a place, Alimentum, that is not family-friendly.",
]
REFERENCES = [
    ["The Eagle is a cheap coffee shop by the river.", "Near the river there is a cheap coffee shop, The Eagle."],
    ["Blue Spice is a Chinese restaurant in the city centre."],
    ["Aromi is a pub in the riverside area."],
    [
        "In the city centre there is Alimentum, a place that is not family-friendly.",
        "Alimentum is a place. It is no place for families.",
    ],
]


def value(name: str, predictions: list[str], references: list[list[str]]) -> float:
    return METRICS[name].compute(predictions, references).value()


def one(name: str, prediction: str, *references: str) -> float:
    return value(name, [prediction], [list(references)])


def labelled(n: int, classes: int, seed: int) -> tuple[list[str], list[str]]:
    """Truth with classes of very different sizes, and predictions that are right about half of the time."""
    draw = random.Random(seed)
    names = [f"class {i}" for i in range(classes)]
    truth = draw.choices(names, weights=[1 / (i + 1) for i in range(classes)], k=n)
    return truth, [t if draw.random() < 0.5 else draw.choice([*names, "never true"]) for t in truth]


# --- golden values ---


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_f1_equals_sklearn(average: str, seed: int) -> None:
    truth, predicted = labelled(200, 7, seed)
    expected = f1_score(truth, predicted, average=average, zero_division=0)
    assert value(f"f1_{average}", predicted, [[t] for t in truth]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["f1_macro", "f1_weighted", "accuracy"])
def test_class_metrics_of_a_resample_equal_sklearn_on_those_rows(name: str) -> None:
    # Twelve rows of seven classes: most draws lose classes, which are then no classes of that resample.
    truth, predicted = labelled(12, 7, seed=3)
    statistic = METRICS[name].compute(predicted, [[t] for t in truth])
    draw = np.random.default_rng(0)
    for _ in range(20):
        rows = draw.integers(0, 12, size=12)
        t, p = [truth[i] for i in rows], [predicted[i] for i in rows]
        expected = (
            accuracy_score(t, p)
            if name == "accuracy"
            else f1_score(t, p, average=name.removeprefix("f1_"), zero_division=0)
        )
        assert statistic.value_of(statistic.rows[rows].sum(0)) == pytest.approx(expected, abs=1e-12)


def test_bleu_equals_sacrebleu_and_tells_its_signature() -> None:
    streams = [[refs[0] for refs in REFERENCES], [refs[1] if len(refs) > 1 else None for refs in REFERENCES]]
    statistic = METRICS["bleu"].compute(PREDICTIONS, REFERENCES)
    assert statistic.value() == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, streams).score, abs=1e-9)
    assert 1 < statistic.value() < 99
    signature = statistic.details["signature"]
    assert signature.startswith("nrefs:var|")
    assert (
        METRICS["bleu"]
        .compute(PREDICTIONS, [refs[:1] for refs in REFERENCES])
        .details["signature"]
        .startswith("nrefs:1|")
    )
    assert "tok:13a" in signature
    assert f"version:{sacrebleu.__version__}" in signature
    assert "nrefs:var" in signature  # rows have one or two references
    assert "eff:no" in signature  # what was computed, not what the per-row counts were collected with


def test_bleu_without_a_matching_4_gram_is_smoothed_as_sacrebleu_does() -> None:
    prediction, reference = "the red house by the old lake", "an old lake near the red house"
    statistic = METRICS["bleu"].compute([prediction], [[reference]])
    assert statistic.value() == pytest.approx(sacrebleu.corpus_bleu([prediction], [[reference]]).score, abs=1e-9)
    assert statistic.value() > 1  # and not the 0 of an unsmoothed product
    assert "smooth:exp" in statistic.details["signature"]


def test_bleu_of_a_resample_equals_sacrebleu_on_those_rows() -> None:
    references = [refs[:1] for refs in REFERENCES]
    statistic = METRICS["bleu"].compute(PREDICTIONS, references)
    for rows in ([0, 0, 1, 3], [3, 3, 3, 3], [2, 1, 0, 2]):
        expected = sacrebleu.corpus_bleu([PREDICTIONS[i] for i in rows], [[references[i][0] for i in rows]]).score
        assert float(statistic.value_of(statistic.rows[rows].sum(0))) == pytest.approx(expected, abs=1e-9)


def test_bleu_is_one_value_per_resample() -> None:
    statistic = METRICS["bleu"].compute(PREDICTIONS, REFERENCES)
    sums = np.stack([statistic.rows.sum(0), statistic.rows[:2].sum(0), statistic.rows[3]])
    values = statistic.value_of(sums)
    assert values.shape == (3,)
    assert values[0] == statistic.value()
    assert len(set(values.tolist())) == 3


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_equals_rouge_score_and_takes_the_best_reference(name: str) -> None:
    scorer = RougeScorer([name], use_stemmer=False)
    best = [
        max(scorer.score(ref, prediction)[name].fmeasure for ref in refs)
        for prediction, refs in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    statistic = METRICS[name].compute(PREDICTIONS, REFERENCES)
    assert statistic.per_row() == pytest.approx(best)
    assert statistic.value() == pytest.approx(sum(best) / len(best))


def test_rouge_does_not_stem() -> None:
    statistic = METRICS["rouge1"].compute(["running houses"], [["run house"]])
    assert (statistic.value(), statistic.details) == (0.0, {"stemmer": False})


def test_rouge_lsum_reads_lines_and_rouge_l_does_not() -> None:
    prediction, reference = "b c\na d", "a d\nb c"
    assert one("rougeLsum", prediction, reference) == 1.0
    assert one("rougeL", prediction, reference) == 0.5


def test_bleu_of_real_references(shared_dir: Path) -> None:
    path = shared_dir / "data" / "e2e" / "devset.csv"
    if not path.is_file():
        pytest.skip("the E2E development set is not on this machine")
    by_prompt: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_prompt.setdefault(row["mr"], []).append(row["ref"])
    sets = [refs for refs in by_prompt.values() if len(refs) > 2][:60]
    assert len(sets) == 60
    copied = value("bleu", [refs[0] for refs in sets], sets)
    human = value("bleu", [refs[0] for refs in sets], [refs[1:] for refs in sets])
    single = value("bleu", [refs[0] for refs in sets], [refs[1:2] for refs in sets])
    swapped = value("bleu", [refs[0] for refs in sets], [refs[1:] for refs in sets[1:] + sets[:1]])
    assert copied == pytest.approx(100.0)
    assert copied > human > max(single, swapped)  # more references match more, and another row's match less
    streams = [[refs[1:][i] if i < len(refs) - 1 else None for refs in sets] for i in range(max(map(len, sets)) - 1)]
    assert human == pytest.approx(sacrebleu.corpus_bleu([refs[0] for refs in sets], streams).score, abs=1e-9)


# --- text ---


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("yes", ["yes"], 1.0),
        (" yes\n", ["yes"], 1.0),
        ("yes", ["no", "yes"], 1.0),
        ("Yes", ["yes"], 0.0),
        ("yes.", ["yes"], 0.0),
        ("", ["yes"], 0.0),
        ("y es", ["yes"], 0.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert one("exact_match", prediction, *references) == expected


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        ("{}", True),
        ('  {"a": [1, {"b": null}]}\n', True),
        ('{"a": 1', False),
        ('{"a": 1} and more', False),
        ('```json\n{"a": 1}\n```', False),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ("[1]", False),
        ("1", False),
        ('"{}"', False),
        ("null", False),
        ("", False),
        ('{"a": NaN}', False),
        ('{"a": -Infinity}', False),
        ("[" * 5000, False),
        ('{"a": ' + "1" * 5000 + "}", False),
    ],
)
def test_json_valid(text: str, valid: bool) -> None:
    assert (parse_object(text) is not None) is valid
    assert one("json_valid", text, "{}") == float(valid)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 0}', '{"a": false}', False),
        ('{"a": [true]}', '{"a": [1]}', False),
        ('{"a": true}', '{"a": true}', True),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": null}', "{}", False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": [1]}', '{"a": [1, 1]}', False),
        ('{"a": {"x": 1, "y": [{}]}}', '{"a": {"y": [{}], "x": 1}}', True),
        ('{"a": {}}', '{"a": []}', False),
        ('{"a": {}}', "{}", False),
        ('{"a.b": 1}', '{"a": {"b": 1}}', False),
        ('{"a": [1]}', '{"a": {"0": 1}}', False),
        ('{"a[0]": 1}', '{"a": [1]}', False),
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', False),
        ('{"a": -0.0}', '{"a": 0}', True),
        ('{"a": "\\u00e9"}', '{"a": "é"}', True),
        ("{}", "{}", True),
    ],
)
def test_json_exact_match_is_equality_of_values_and_kinds(a: str, b: str, equal: bool) -> None:
    assert one("json_exact_match", a, b) == float(equal)
    assert one("json_exact_match", b, a) == float(equal)
    assert (one("json_argument_f1", a, b) == 1.0) is equal


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0.5),  # 1 hit of 2 and 2
        ('{"a": 1}', '{"a": 1, "b": 3}', 2 / 3),  # 1 hit of 1 and 2
        ('{"a": 1, "b": 3, "c": 4}', '{"a": 1}', 0.5),  # 1 hit of 3 and 1
        ('{"n": "f", "arguments": {"x": 1, "y": [1, 2]}}', '{"n": "f", "arguments": {"x": 1, "y": [1, 3]}}', 0.75),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": "None"}', '{"a": null}', 0.0),
        ('{"b": 1}', '{"a": 1}', 0.0),
        ("{}", "{}", 1.0),
        ("{}", '{"a": 1}', 0.0),
        ("no JSON", '{"a": 1}', 0.0),
        ("[1]", "{}", 0.0),
    ],
)
def test_json_argument_f1(prediction: str, reference: str, expected: float) -> None:
    assert one("json_argument_f1", prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": ' + "1" * 400 + "}",
        '{"a": ' + "[" * 900 + "]" * 900 + "}",
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a": 1e999}',
    ],
    ids=["a number beyond float", "deep arrays", "deep objects", "overflow"],
)
def test_a_rambling_answer_is_scored_and_does_not_stop_the_run(answer: str) -> None:
    assert one("json_exact_match", answer, '{"a": 1}') == 0.0
    assert one("json_argument_f1", answer, '{"a": 1}') == 0.0


def test_json_metrics_take_the_best_reference() -> None:
    assert one("json_exact_match", '{"a": 1}', '{"a": 2}', '{"a": 1}') == 1.0
    assert one("json_argument_f1", '{"a": 1, "b": 1}', '{"c": 2}', '{"a": 1, "b": 2}') == 0.5


# --- undefined inputs are refused ---


@pytest.mark.parametrize(
    ("name", "references", "reason"),
    [
        ("bleu", [["one two three four five"], [" "]], "empty"),
        ("bleu", [["one two three four five", ""]], "empty"),
        ("bleu", [["yes"], ["one two three"]], "4 words"),
        ("rouge1", [["hello"], ["你好，世界"]], "a-z"),
        ("rougeL", [["hello"], [""]], "a-z"),
        ("rougeLsum", [["Привет"]] * 2, "a-z"),
        ("json_exact_match", [['{"a": 1}'], ["[1]"]], "JSON"),
        ("json_argument_f1", [['{"a": 1}'], ["yes"]], "JSON"),
    ],
)
def test_undefined_is_refused_and_not_zero(name: str, references: list[list[str]], reason: str) -> None:
    # From the references alone: this can be said before a model is trained.
    with pytest.raises(RecipeError, match=reason) as caught:
        metric_names(Evaluate(metrics=[name]), "chat-completion", references)
    assert (caught.value.field, caught.value.value) == ("evaluate.metrics", name)


@pytest.mark.parametrize("references", [[["one two three"], ["你好"]], [["42"], ["17"]]])
def test_a_default_that_is_undefined_is_refused_too(references: list[list[str]]) -> None:
    with pytest.raises(RecipeError, match="'bleu': it is undefined on the test rows"):
        metric_names(Evaluate(), "text-generation", references)


@pytest.mark.parametrize("reference", ["Hello, world!", "a b c d", "3.5 % of it"])
def test_bleu_counts_words_as_its_own_tokenizer_does(reference: str) -> None:
    assert metric_names(Evaluate(metrics=["bleu"]), "text-generation", [["yes"], [reference]]) == ["bleu"]
    assert one("bleu", reference, reference) == pytest.approx(100.0)


@pytest.mark.parametrize("name", ["perplexity", "loss"])
def test_likelihoods_do_not_come_from_texts(name: str) -> None:
    with pytest.raises(IngotError, match="do not come from written answers"):
        METRICS[name].compute(["a"], [["a"]])


def test_a_prediction_may_be_anything() -> None:
    for name in OF_TASK["chat-completion"]:
        for prediction in ("", "你好", "\x00", "{", "[]", '{"a": {"b": [[]]}}', "\n\n", "😀", "$", "-", "#### "):
            score = one(name, prediction, '{"a": "one two three four five"}')
            assert 0.0 <= score <= (100.0 if name in ("bleu", "chrf", "chrf++", "ter") else 1.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(number: float) -> None:
    with pytest.raises(IngotError, match="perplexity"):
        finite(number, "perplexity")


# --- names ---


@pytest.mark.parametrize(
    ("task", "references", "expected"),
    [
        ("chat-completion", [["yes"], ['{"a": 1}']], ["exact_match"]),
        ("chat-completion", [["{}"], ['{"a": 1}']], ["json_exact_match", "json_argument_f1", "json_valid"]),
        ("chat-completion", [["{}", "no"]], ["exact_match"]),
        ("text-generation", [["a reference of five words"]], ["bleu", "rougeL"]),
        ("text-classification", [["yes"]], ["accuracy", "f1_macro"]),
        ("language-modeling", [], ["perplexity"]),
    ],
)
def test_defaults_of_a_task(task: Any, references: list[list[str]], expected: list[str]) -> None:
    assert metric_names(Evaluate(), task, references) == expected


@pytest.mark.parametrize(
    ("task", "name", "hint"),
    [
        ("text-generation", "rogueL", "did you mean 'rougeL'"),
        ("chat-completion", "json_exact", "did you mean 'json_exact_match'"),
        ("text-classification", "bleu", "accuracy"),
        ("chat-completion", "perplexity", "exact_match"),
        ("language-modeling", "accuracy", "perplexity"),
    ],
)
def test_unknown_or_unfitting_names_are_recipe_errors(task: Any, name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint) as caught:
        metric_names(Evaluate(metrics=[name]), task, [["yes"]])
    assert (caught.value.field, caught.value.value) == ("evaluate.metrics", name)


def test_every_metric_belongs_to_a_task_under_its_own_name() -> None:
    assert {name for names in OF_TASK.values() for name in names} | set(JUDGED) == set(METRICS)
    assert all(name == metric.name and metric.doc for name, metric in METRICS.items())
    likelihoods = {"perplexity", "loss", "word_perplexity", "byte_perplexity", "bits_per_byte", "log_loss", "brier"}
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {*likelihoods, "ece", "ter"}
    signed = {"preference_margin", "norm_macro_recall", "matthews_correlation"}
    unbounded = {"bleu", "chrf", "chrf++", "ter", *likelihoods, *signed}
    assert {name for name, metric in METRICS.items() if not metric.unit_interval} == unbounded


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "bleu", "chrf", "rougeL", "f1_macro", "f1_weighted"])
def test_stored_numbers_alone_give_the_value_back(name: str) -> None:
    predictions, references = PREDICTIONS * 5, REFERENCES * 5
    computed = METRICS[name].compute(predictions, references)
    stored = statistic_of(name, np.asarray(computed.rows.tolist()), computed.details)
    assert stored.value() == computed.value()
    assert stored.per_row() == computed.per_row()
    assert stored.details == computed.details
    assert interval(stored, 100, 0.9) == interval(computed, 100, 0.9)


def test_numbers_of_an_unknown_metric_are_refused() -> None:
    with pytest.raises(IngotError, match="did you mean 'f1_macro'"):
        statistic_of("f1_macros", np.ones((2, 2)))


# --- aliases ---


@pytest.mark.parametrize(
    ("task", "name", "ours"),
    [
        ("text-classification", "f1_score_macro", "f1_macro"),
        ("text-classification", "precision_score_micro", "precision_micro"),
        ("text-classification", "recall_score_binary", "recall_binary"),
        ("text-classification", "AUC_weighted", "AUC_weighted"),
        ("text-classification", "auc_weighted", "AUC_weighted"),
        ("text-classification", "average_precision_score_macro", "average_precision_score_macro"),
        ("text-classification", "mcc", "matthews_correlation"),
        ("text-classification", "Accuracy", "accuracy"),
        ("multi-label-classification", "accuracy", "subset_accuracy"),
        ("multi-label-classification", "f1_score_weighted", "f1_weighted"),
        ("token-classification", "accuracy", "token_accuracy"),
        ("token-classification", "f1_score_micro", "entity_f1"),
        ("token-classification", "f1_score_macro", "entity_f1_macro"),
        ("token-classification", "precision_score_weighted", "entity_precision_weighted"),
        ("token-classification", "recall", "entity_recall"),
        ("question-answering", "exact_match", "squad_exact_match"),
        ("question-answering", "f1_score", "squad_f1"),
        ("chat-completion", "exact_match", "exact_match"),
        ("chat-completion", "f1", "squad_f1"),
        ("text-generation", "rougelsum", "rougeLsum"),
        ("translation", "sacrebleu", "bleu"),
        ("translation", "BLEU_4", "bleu_4"),
        ("fill-mask", "perplexities", "perplexity"),
        ("multiple-choice", "accuracy", "acc"),
        ("multiple-choice", "brier_score", "brier"),
        ("perplexity", "bits_per_byte", "bits_per_byte"),
    ],
)
def test_an_alias_is_resolved_once(task: Any, name: str, ours: str) -> None:
    assert canonical(name, task) == ours
    assert ours in OF_TASK[task]


def test_two_names_of_one_metric_are_measured_once() -> None:
    section = Evaluate(metrics=["f1_score_macro", "accuracy", "f1_macro"])
    assert metric_names(section, "text-classification", [["a"], ["b"]]) == ["f1_macro", "accuracy"]


def test_a_name_nearly_an_alias_is_answered_with_it() -> None:
    with pytest.raises(RecipeError, match="did you mean 'f1_score_macro'"):
        canonical("f1_score_marco", "text-classification")
    with pytest.raises(RecipeError, match="multiple-choice has acc, acc_norm") as caught:
        canonical("bleu", "multiple-choice", "task.metrics")
    assert caught.value.field == "task.metrics"
    with pytest.raises(IngotError, match="no metrics of 'translations': did you mean 'translation'"):
        canonical("bleu", "translations")


def test_every_alias_means_a_metric_and_every_kind_has_defaults() -> None:
    assert set(ALIASES.values()) <= set(METRICS)
    assert not set(ALIASES) & set(METRICS)
    for task, aliases in ALIASES_OF_TASK.items():
        assert set(aliases.values()) <= set(OF_TASK[task])
    assert {*DEFAULTS, "chat-completion"} == set(OF_TASK)
    for task, names in DEFAULTS.items():
        assert set(names) <= set(OF_TASK[task])
