"""Metrics of written answers against sacrebleu, rouge_score, lm-evaluation-harness and written-out definitions."""

import random
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import yaml
from rouge_score.rouge_scorer import RougeScorer

from ingot.errors import IngotError, RecipeError
from ingot.evaluation.metrics import METRICS, metric_names, statistic_of, statistics_of_texts
from ingot.evaluation.solutions import flexible_number, pass_at_k, strict_number
from ingot.evaluation.text_metrics import tokenizer_of
from ingot.recipe import Evaluate

WORDS = [
    "the",
    "a",
    "Eagle",
    "is",
    "cheap,",
    "river",
    "(near)",
    "18",
    "1,000",
    "$29.00",
    "-5",
    "Ärger",
    "😀",
    "don't",
    ".",
]


def texts(n: int, seed: int, at_least: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(at_least, 9))) for _ in range(n)]


def pairs(n: int, seed: int, references: int = 1) -> tuple[list[str], list[list[str]]]:
    """Predictions, some empty and some right, and references."""
    found, wanted = texts(n, seed), [texts(references, 1000 * seed + row, 1) for row in range(n)]
    return [
        refs[0] if row % 5 == 0 else text for row, (text, refs) in enumerate(zip(found, wanted, strict=True))
    ], wanted


def value(name: str, predictions: list[str], references: list[list[str]], **options: Any) -> float:
    return METRICS[name].compute(predictions, references, **options).value()


# --- sacrebleu and rouge_score ---


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("bleu", sacrebleu.corpus_bleu, {}),
        ("chrf", sacrebleu.corpus_chrf, {}),
        ("chrf++", sacrebleu.corpus_chrf, {"word_order": 2}),
        ("ter", sacrebleu.corpus_ter, {}),
    ],
)
def test_corpus_metrics_are_sacrebleu_s(name: str, function: Any, options: dict[str, Any], references: int) -> None:
    for seed in range(3):
        predictions, wanted = pairs(40, seed, references)
        expected = function(predictions, [list(stream) for stream in zip(*wanted, strict=True)], **options).score
        computed = METRICS[name].compute(predictions, wanted)
        assert computed.value() == pytest.approx(expected, abs=1e-9)
        assert 5 < computed.value() < 120
        assert statistic_of(name, computed.rows, computed.details).value() == computed.value()
        rows = np.random.default_rng(seed).integers(0, 40, 40)
        drawn = [predictions[row] for row in rows]
        expected = function(drawn, [list(s) for s in zip(*(wanted[row] for row in rows), strict=True)], **options).score
        assert float(computed.value_of(computed.rows[rows].sum(0))) == pytest.approx(expected, abs=1e-9)


def test_chrf_of_references_shorter_than_an_n_gram() -> None:
    predictions, wanted = ["a long answer", "ab"], [["ab"], ["a longer reference"]]
    for name, order in (("chrf", 0), ("chrf++", 2)):
        expected = sacrebleu.corpus_chrf(predictions, [[refs[0] for refs in wanted]], word_order=order).score
        assert value(name, predictions, wanted) == pytest.approx(expected, abs=1e-9)


def test_chrf_plus_plus_takes_one_sign_off_a_word() -> None:
    for prediction in ("near.", "(near", "(near)", "near", "near!)", "-"):
        expected = sacrebleu.sentence_chrf(prediction, ["by (near) near. -"], word_order=2).score
        assert value("chrf++", [prediction], [["by (near) near. -"]]) == pytest.approx(expected, abs=1e-9)
    assert value("chrf++", ["near."], [["near!"]]) > value("chrf++", ["near."], [["neat."]])


def test_ter_tells_its_signature() -> None:
    assert "nrefs:1|case:lc|tok:tercom" in METRICS["ter"].compute(["a"], [["a b"]]).details["signature"]


def test_bleu_reads_chinese_with_its_own_tokenizer() -> None:
    prediction, reference = "我爱北京天安门广场", "我爱北京的天安门广场"
    expected = sacrebleu.corpus_bleu([prediction], [[reference]], tokenize="zh").score
    computed = METRICS["bleu"].compute([prediction], [[reference]], language="zh-CN")
    assert computed.value() == pytest.approx(expected, abs=1e-9)
    assert computed.value() > 10
    assert "tok:zh" in computed.details["signature"]
    with pytest.raises(RecipeError, match="no reference has 4 words"):
        metric_names(Evaluate(metrics=["bleu"]), "translation", [[reference]])
    options = {"bleu": {"language": "zh"}}
    section = Evaluate(metrics=["bleu"], metric_options=options)
    assert metric_names(section, "translation", [[reference]]) == ["bleu"]


@pytest.mark.parametrize(
    ("language", "tokenizer", "expected"),
    [(None, None, "13a"), ("de", None, "13a"), ("zh_TW", None, "zh"), ("TH", None, "char"), ("zh", "char", "char")],
)
def test_the_language_chooses_the_tokenizer(language: str | None, tokenizer: str | None, expected: str) -> None:
    assert tokenizer_of(language, tokenizer) == expected


def test_a_tokenizer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IngotError, match="'13b' is unknown: did you mean '13a'"):
        tokenizer_of(None, "13b")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    section = Evaluate(metrics=["bleu"], metric_options={"bleu": {"language": "ja"}})
    with pytest.raises(RecipeError, match=r"not installed: pip install 'sacrebleu\[ja\]', or use 'char'"):
        metric_names(section, "translation", [["猫が好きです"]])


def test_rouge_can_stem() -> None:
    predictions, wanted = ["running houses quickly"], [["run house quickly"]]
    expected = RougeScorer(["rouge1"], use_stemmer=True).score(wanted[0][0], predictions[0])["rouge1"].fmeasure
    computed = METRICS["rouge1"].compute(predictions, wanted, stemmer=True)
    assert (computed.value(), computed.details) == (pytest.approx(expected), {"stemmer": True})
    assert computed.value() > value("rouge1", predictions, wanted)


@pytest.mark.parametrize("text", ["Привет, мир 5", "你好，世界 ok", "東京 2020"])
def test_rouge_refuses_other_scripts_even_with_a_number(text: str) -> None:
    with pytest.raises(RecipeError, match="of the letters are others"):
        metric_names(Evaluate(metrics=["rougeL"]), "summarization", [[text]])
    assert metric_names(Evaluate(metrics=["rougeL"]), "summarization", [["Größe und Maß, 5 %"]]) == ["rougeL"]


# --- bleu_1 to bleu_4, as the definition is written ---


def bleu_by_hand(predictions: list[str], references: list[list[str]], n: int, smooth: bool) -> float:
    """Papineni's BLEU with the shortest reference, from words that stand between blanks."""
    length = sum(len(p.split()) for p in predictions)
    reference_length = sum(min(len(r.split()) for r in refs) for refs in references)
    product = 1.0
    for order in range(1, n + 1):
        right = total = 0
        for prediction, refs in zip(predictions, references, strict=True):
            grams = ngrams(prediction.split(), order)
            total += sum(grams.values())
            right += sum(min(c, max(ngrams(r.split(), order)[g] for r in refs)) for g, c in grams.items())
        product *= (right + smooth) / (total + smooth)
    penalty = 1.0 if length > reference_length else np.exp(1 - reference_length / length)
    return float(penalty * product ** (1 / n))


def ngrams(words: list[str], n: int) -> "Counter[tuple[str, ...]]":
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_n_is_its_definition(n: int, smooth: bool) -> None:
    for seed in range(3):
        predictions, wanted = pairs(25, seed, references=2)
        computed = METRICS[f"bleu_{n}"].compute(predictions, wanted, tokenizer="none", smoothing=smooth)
        assert computed.value() == pytest.approx(bleu_by_hand(predictions, wanted, n, smooth), abs=1e-12)
        assert 0 < computed.value() < 1
        assert statistic_of(f"bleu_{n}", computed.rows, computed.details).value() == computed.value()
        rows = np.random.default_rng(seed).integers(0, 25, 25)
        expected = bleu_by_hand([predictions[r] for r in rows], [wanted[r] for r in rows], n, smooth)
        assert float(computed.value_of(computed.rows[rows].sum(0))) == pytest.approx(expected, abs=1e-12)


def test_bleu_4_is_sacrebleu_s_where_both_agree() -> None:
    # One reference each and every order matched: neither smoothing nor the choice of length plays a part.
    predictions, wanted = ["The Eagle is a cheap, cheap pub."], [["The Eagle is a cheap, good pub by the river."]]
    expected = sacrebleu.corpus_bleu(predictions, [[wanted[0][0]]]).score
    assert value("bleu_4", predictions, wanted) == pytest.approx(expected / 100, abs=1e-12)
    assert value("bleu_4", [""], wanted) == 0.0


def test_bleu_n_asks_for_n_words_only() -> None:
    assert metric_names(Evaluate(metrics=["bleu_1"]), "text-generation", [["yes"]]) == ["bleu_1"]
    with pytest.raises(RecipeError, match="no reference has 2 words"):
        metric_names(Evaluate(metrics=["bleu_2"]), "text-generation", [["yes"]])
    for name in ("bleu_1", "chrf", "chrf++", "ter"):
        with pytest.raises(RecipeError, match="a reference is empty"):
            metric_names(Evaluate(metrics=[name]), "text-generation", [["yes"], [""]])


# --- exact match, SQuAD ---

OPTIONS = [
    {},
    {"ignore_case": True},
    {"ignore_punctuation": True},
    {"ignore_numbers": True},
    {"regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]},
    {"ignore_case": True, "ignore_punctuation": True, "ignore_numbers": True, "regexes_to_ignore": ["the "]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_exact_match_is_the_harness_s(options: dict[str, Any]) -> None:
    theirs = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    cases = [
        "",
        "The Eagle",
        "the eagle",
        "the eagle.",
        "$29.00",
        "29.00",
        "29",
        "1,000",
        "1000.",
        "a #### 5",
        "5",
        "😀",
    ]
    cases += [" the eagle", "THE 1 eagle!", "\n", "Straße", "STRASSE"]
    for reference in cases:
        expected = [float(theirs([prediction], [reference], **options)["exact_match"]) for prediction in cases]
        ours = METRICS["exact_match"].compute(cases, [[reference]] * len(cases), blanks_matter=True, **options)
        assert ours.per_row() == expected


def test_exact_match_strips_blanks_unless_they_matter() -> None:
    assert value("exact_match", [" yes\n"], [["yes"]]) == 1.0
    assert value("exact_match", [" yes\n"], [["yes"]], blanks_matter=True) == 0.0
    assert value("exact_match", ["Yes!"], [["no", "yes"]], ignore_case=True, ignore_punctuation=True) == 1.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ignore_numbers": True}, "nothing is left of the reference '42'"),
        ({"regexes_to_ignore": ["("]}, "no regular expression"),
    ],
)
def test_exact_match_of_what_is_ignored_is_refused(options: dict[str, Any], reason: str) -> None:
    section = Evaluate(metrics=["exact_match"], metric_options={"exact_match": options})
    with pytest.raises(RecipeError, match=reason):
        metric_names(section, "chat-completion", [["yes"], ["42"]])


@pytest.mark.parametrize(
    ("metric", "option", "hint"),
    [("exact_match", "ignore_punctuations", "did you mean 'ignore_punctuation'"), ("chrf", "beta", "chrf has none")],
)
def test_an_unknown_option_is_refused(metric: str, option: str, hint: str) -> None:
    section = Evaluate(metrics=[metric], metric_options={metric: {option: True}})
    with pytest.raises(RecipeError, match=hint) as caught:
        metric_names(section, "chat-completion", [["yes"]])
    assert (caught.value.field, caught.value.value) == (f"evaluate.metric_options.{metric}", option)


def test_an_option_of_another_type_is_refused() -> None:
    section = Evaluate(metrics=["bleu"], metric_options={"bleu": {"language": 7}})
    with pytest.raises(RecipeError, match=r"evaluate.metric_options.bleu.language = 7: .*a text"):
        metric_names(section, "translation", [["a b c d e"]])


def test_options_of_a_metric_that_is_not_measured_are_refused() -> None:
    section = Evaluate(metrics=["exact_match"], metric_options={"json_valid": {}})
    with pytest.raises(RecipeError, match="'json_valid': it is not measured"):
        metric_names(section, "chat-completion", [["yes"]])


def squad_by_hand(prediction: str, reference: str) -> tuple[float, float]:
    """SQuAD's exact match and F1, written from its paper: lower, punctuation, articles, blanks, in this order."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    found, wanted = words(prediction), words(reference)
    if not found or not wanted:
        return float(found == wanted), float(found == wanted)
    same = sum(min(found.count(word), wanted.count(word)) for word in set(found))
    if same == 0:
        return float(found == wanted), 0.0
    precision, recall = same / len(found), same / len(wanted)
    return float(found == wanted), 2 * precision * recall / (precision + recall)


def test_squad_is_its_definition() -> None:
    predictions, wanted = pairs(60, 4, references=3)
    wanted[7], predictions[8], wanted[8] = [""], "", [""]
    by_hand = [[squad_by_hand(p, r) for r in refs] for p, refs in zip(predictions, wanted, strict=True)]
    exact = METRICS["squad_exact_match"].compute(predictions, wanted)
    overlap = METRICS["squad_f1"].compute(predictions, wanted)
    assert exact.per_row() == [max(e for e, _ in row) for row in by_hand]
    assert overlap.per_row() == pytest.approx([max(f for _, f in row) for row in by_hand])
    assert 0 < exact.value() < overlap.value() < 1


def test_squad_of_the_standard_cases() -> None:
    assert value("squad_f1", ["the the Eagle"], [["Eagle, Eagle"]]) == pytest.approx(2 / 3)  # bags, not sets
    assert value("squad_exact_match", ["The U.S.A."], [["usa"]]) == 1.0
    assert value("squad_exact_match", ["theatre"], [["atre"]]) == 0.0
    assert value("squad_f1", [""], [[""]]) == 1.0
    assert value("squad_f1", ["something"], [[""]]) == 0.0


def test_squad_of_rows_with_and_without_an_answer() -> None:
    predictions, wanted = ["Paris", "", "in Rome", "x", ""], [["paris"], ["Oslo"], ["Rome"], [""], ["", "the"]]
    assert value("squad_exact_match_has_answer", predictions, wanted) == pytest.approx(1 / 3)
    assert value("squad_f1_has_answer", predictions, wanted) == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert value("squad_exact_match_no_answer", predictions, wanted) == value("squad_f1_no_answer", predictions, wanted)
    assert value("squad_f1_no_answer", predictions, wanted) == 0.5
    section = Evaluate(metrics=["HasAns_exact", "NoAns_f1"])
    found = metric_names(section, "question-answering", wanted)
    assert found == ["squad_exact_match_has_answer", "squad_f1_no_answer"]
    with pytest.raises(RecipeError, match="no row has no answer"):
        metric_names(section, "question-answering", wanted[:3])


# --- GSM8K ---

SOLUTIONS = [
    "",
    "#### 18",
    "She sells 9 eggs.\n#### 18",
    "#### 18\n#### 20",
    "so #### 1,000 and then #### 5",
    "The answer is $29.00.",
    "The answer is 29.",
    "It is 18.",
    "-5 degrees",
    "#### -5",
    "#### - 5",
    r"\[ \boxed{18} \]",
    "18 eggs, 5 chickens",
    "1,000",
    "$1,000.",
    "####18",
    "#### $18",
    "#### 18.0",
    "....",
    "$",
    "😀 18 😀",
    "#### .",
    "3 + 4 = 7 ...",
    "eighteen",
    "2023-05-18",
]


@pytest.mark.parametrize(
    ("name", "filter_name"), [("gsm8k_strict", "strict-match"), ("gsm8k_flexible", "flexible-extract")]
)
def test_gsm8k_is_the_harness_s(name: str, filter_name: str) -> None:
    tasks = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
    task = yaml.safe_load((tasks / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    steps = next(found["filter"] for found in task["filter_list"] if found["name"] == filter_name)
    settings = {key: value for key, value in steps[0].items() if key != "function"}
    regex = pytest.importorskip("lm_eval.filters.extraction").RegexFilter(**settings)
    theirs = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    (metric,) = task["metric_list"]
    compared = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    draw = random.Random(0)
    parts = ["#### ", "18", "-5", "1,000", "$29.00", ".", "\n", "eggs ", "29", ",", "$", " "]
    solutions = SOLUTIONS + ["".join(draw.choices(parts, k=draw.randint(1, 7))) for _ in range(300)]
    extracted = [found for (found,) in regex.apply([[text] for text in solutions], [])]
    scores = []
    for reference in ("Nine eggs.\n#### 18", "#### 1,000", "#### -5", "29", "$29.00", "#### 29.00"):
        expected = [float(theirs([found], [reference], **compared)["exact_match"]) for found in extracted]
        assert METRICS[name].compute(solutions, [[reference]] * len(solutions)).per_row() == expected
        scores.append(sum(expected))
    assert min(scores[:4]) > 0


def test_strict_takes_the_first_number_and_flexible_the_last() -> None:
    assert strict_number("#### 18\n#### 20") == "18"
    assert flexible_number("#### 18\n#### 20") == "20"
    assert strict_number("The answer is 18") is None
    assert flexible_number("none") is None
    assert flexible_number(r"\boxed{18}") == "18"


@pytest.mark.parametrize("reference", ["eighteen", "#### ", "", "18 eggs", "#### 18 #### x"])
def test_a_reference_without_a_number_is_refused(reference: str) -> None:
    for name in ("gsm8k_strict", "gsm8k_flexible"):
        with pytest.raises(RecipeError, match="does not end in a number"):
            metric_names(Evaluate(metrics=[name]), "text-generation", [["#### 5"], [reference]])
    assert metric_names(Evaluate(metrics=["gsm8k_strict"]), "text-generation", [["x\n#### 1,000"], ["$5.50"], ["-3"]])


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # 3 of the 10 pairs are both wrong
    assert pass_at_k(4, 0, 2) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0
    for n, right, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(n, right, k)


# --- tool calls ---

WEATHER = '{"name": "weather", "arguments": {"city": "Bern", "days": 2}}'
CLOCK = '{"name": "clock", "arguments": {}}'


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (WEATHER, WEATHER, 1.0),
        ('{"arguments": {"days": 2.0, "city": "Bern"}, "name": "weather"}', WEATHER, 1.0),
        (f"[{WEATHER}]", WEATHER, 1.0),
        (f"[{CLOCK}, {WEATHER}]", f"[{WEATHER}, {CLOCK}]", 1.0),
        (f"[{WEATHER}, {WEATHER}]", WEATHER, 0.0),
        (f"[{WEATHER}]", f"[{WEATHER}, {CLOCK}]", 0.0),
        ('{"name": "weather", "arguments": {"city": "Bern", "days": 3}}', WEATHER, 0.0),
        ('{"name": "weather", "arguments": {"city": "Bern", "days": true}}', WEATHER, 0.0),
        ('{"name": "Weather", "arguments": {"city": "Bern", "days": 2}}', WEATHER, 0.0),
        (
            '{"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function", "function": '
            '{"name": "weather", "arguments": "{\\"days\\": 2, \\"city\\": \\"Bern\\"}"}}]}',
            WEATHER,
            1.0,
        ),
        ('{"name": "clock"}', CLOCK, 1.0),
        ('{"name": "clock", "arguments": ""}', CLOCK, 1.0),
        ('{"name": "clock", "arguments": null}', CLOCK, 1.0),
        ('{"name": "clock", "arguments": "now"}', CLOCK, 0.0),
        ('{"name": "clock", "arguments": [1]}', CLOCK, 0.0),
        ('{"name": 5}', CLOCK, 0.0),
        ('{"function": "clock"}', CLOCK, 0.0),
        ("[[]]", CLOCK, 0.0),
        ("clock()", CLOCK, 0.0),
        ("", CLOCK, 0.0),
        ("[" * 100_000, CLOCK, 0.0),
        ("[]", "[]", 1.0),
        ('{"content": "hi", "tool_calls": null}', "[]", 1.0),
        (CLOCK, "[]", 0.0),
    ],
)
def test_tool_call_match(prediction: str, reference: str, expected: float) -> None:
    assert value("tool_call_match", [prediction], [[reference]]) == expected


def test_a_reference_that_calls_no_tool_is_refused() -> None:
    with pytest.raises(RecipeError, match="is no tool call"):
        metric_names(Evaluate(metrics=["tool_call_match"]), "chat-completion", [[CLOCK], ['{"city": "Bern"}']])


# --- all of them ---


def test_statistics_of_texts_hold_every_metric_and_their_options() -> None:
    compute = statistics_of_texts(
        ["Yes."], [["yes"]], {"exact_match": {"ignore_case": True, "ignore_punctuation": True}}
    )
    assert compute["exact_match"]().value() == 1.0
    assert compute["squad_f1"]().value() == 1.0
    assert statistics_of_texts(["Yes."], [["yes"]])["exact_match"]().value() == 0.0
    assert set(compute) == {name for name, metric in METRICS.items() if name in compute and metric.doc}


def test_a_row_without_a_reference_is_refused() -> None:
    with pytest.raises(RecipeError, match="row 1 has no reference"):
        metric_names(Evaluate(metrics=["exact_match"]), "chat-completion", [["yes"], []])
