"""A task file asks what it says, of anything that answers, and stops at the first row that it cannot ask."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ingot.errors import DataError, FieldError, IngotError, RecipeError
from ingot.evaluation.compare import NotComparable, compare
from ingot.evaluation.definition import Definition, Part
from ingot.evaluation.extraction import extracted
from ingot.evaluation.metrics import statistic_of
from ingot.evaluation.prompted import DefinedTask, describe
from ingot.evaluation.result import load_evaluation
from ingot.evaluation.runner import evaluate_task
from ingot.evaluation.task import Answer, Likelihood, Prompt
from ingot.recipe import Evaluate

ROWS = [
    {"id": "a", "question": "1 + 1?", "answer": "2", "options": ["1", "two"], "right": 1, "topic": "sum", "page": 3},
    {"id": "b", "question": "2 + 2?", "answer": "4", "options": ["four", "5"], "right": 0, "topic": "sum", "page": 3},
    {"id": "c", "question": "2 - 2?", "answer": "0", "options": ["no", "0"], "right": 1, "topic": "less", "page": 4},
]
SUMS: dict[str, Any] = {
    "task": "sums",
    "version": 3,
    "kind": "text-generation",
    "data": "rows.jsonl",
    "prompt": "Q: {{question}}\nA:",
    "target": "answer",
}
CHOICE = {**SUMS, "kind": "multiple-choice", "choices": "options", "answer": "right"}
del CHOICE["target"]
CHAT = {**SUMS, "kind": "chat-completion", "prompt": "turns"}
TEXTS = {"task": "texts", "version": 1, "kind": "perplexity", "data": "rows.jsonl", "target": "question"}


class Scripted:
    """Answers from the words of what is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Answer]:
        self.asked.append((list(prompts), max_new_tokens, list(stop)))
        return [Answer(f" It is {number}, or 4. ", "stop", 7, 5) for number, _ in enumerate(prompts)]

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        self.asked.append(list(questions))
        return [[Likelihood(-float(len(it)), len(it) < 3, len(it)) for it in choices] for _, choices in questions]

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        self.asked.append(list(texts))
        return [(-2.0 * len(text.encode()), 3) for text in texts]


def task(folder: Path, values: dict[str, Any], rows: Sequence[dict[str, Any]] = ROWS, **more: Any) -> DefinedTask:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return DefinedTask(Definition.model_validate_json(json.dumps(values), strict=True), folder, **more)


def items(made: DefinedTask) -> list[Any]:
    return [item for window in made.windows() for item in window]


def test_answers_are_written_and_scored_again_without_asking(tmp_path: Path) -> None:
    settings = {"stop": ["\n"], "max_new_tokens": 9, "group": "page", "slices": ["topic"], "id": "id"}
    made, subject = task(tmp_path, SUMS | settings), Scripted()
    rows = items(made)
    assert [row.prompt for row in rows] == ["Q: 1 + 1?\nA:", "Q: 2 + 2?\nA:", "Q: 2 - 2?\nA:"]
    assert [(row.id, row.group, row.slices) for row in rows] == [
        ("a", "3", {"topic": "sum"}),
        ("b", "3", {"topic": "sum"}),
        ("c", "4", {"topic": "less"}),
    ]
    outputs = made.answer(subject, rows)
    assert subject.asked == [([row.prompt for row in rows], 9, ["\n"])]
    assert outputs[0] == {"text": " It is 0, or 4. ", "finish": "stop", "n_prompt_tokens": 7, "n_output_tokens": 5}
    assert list(made.predictions(rows, outputs)) == ["It is 0, or 4.", "It is 1, or 4.", "It is 2, or 4."]
    assert made.metrics(rows) == ["exact_match"]
    assert made.compute(rows, outputs)["exact_match"]().value() == 0.0
    filters = [{"name": "first", "regex": r"\d"}, {"name": "last", "regex": r"(x)|(\d)", "which": "last"}]
    again = task(tmp_path, SUMS | settings | {"extract": filters})
    assert again.asked() == made.asked()  # so that what was answered is used again
    assert again.metrics(rows) == ["exact_match@first", "exact_match@last"]
    compute = again.compute(items(again), outputs)
    assert compute["exact_match@first"]().per_row() == [0.0, 0.0, 0.0]
    assert compute["exact_match@last"]().per_row() == [0.0, 1.0, 0.0]
    assert list(again.predictions(rows, outputs)) == ["0", "1", "2"]


def test_scores_of_several_extracts_are_kept_and_read_back(tmp_path: Path) -> None:
    filters = [{"name": "first", "regex": r"\d"}, {"name": "last", "regex": r"\d", "which": "last"}]
    section, subject = Evaluate(bootstrap_samples=100), Scripted()

    def evaluated(*extracts: Any) -> Any:
        made = task(tmp_path, SUMS | {"extract": extracts})
        model = {"fingerprint": "f"}
        return evaluate_task(made, lambda: subject, tmp_path / "out", name="x", model=model, section=section)

    found = evaluated(*filters)
    assert {name: score.value for name, score in found.scores.items()} == {
        "exact_match@first": 0.0,
        "exact_match@last": pytest.approx(1 / 3),
    }
    again = load_evaluation(tmp_path / "out", "sums")
    assert again.statistics["exact_match@last"].value() == pytest.approx(1 / 3)
    assert again.scores == found.scores
    asked = len(subject.asked)
    assert evaluated(filters[1]).scores["exact_match"].value == pytest.approx(1 / 3)
    assert len(subject.asked) == asked  # another pattern asks nothing
    one = load_evaluation(tmp_path / "out", "sums")
    evaluated(filters[1] | {"regex": "[0-9]"})
    assert len(subject.asked) == asked
    other = load_evaluation(tmp_path / "out", "sums")
    read = r"x: sums: exact_match: extract = \{.*'regex': '\\\\d'.*x was scored with \{.*'regex': '\[0-9\]'"
    with pytest.raises(NotComparable, match=read):
        compare({"sums": one}, {"sums": other}, samples=100, confidence=0.95)
    with pytest.raises(IngotError, match="no metric 'exact_mach@first'"):
        statistic_of("exact_mach@first", found.statistics["exact_match@first"].rows)


def test_how_metrics_read_answers_is_told(tmp_path: Path) -> None:
    assert task(tmp_path, SUMS).scoring() == {}
    first = {"name": "first", "regex": r"\d"}
    metrics = [{"name": "exact_match", "options": {"ignore_case": True}}]
    made = task(tmp_path, SUMS | {"extract": [first, first | {"name": "second"}], "metrics": metrics})
    assert list(made.scoring()) == ["exact_match@first", "exact_match@second"]
    reading = made.scoring()["exact_match@first"]
    assert reading["ignore_case"] is True
    assert (reading["extract"]["regex"], reading["extract"]["which"]) == (r"\d", "first")


def test_what_is_asked_tells_tasks_apart(tmp_path: Path) -> None:
    first = task(tmp_path, SUMS).asked()
    assert first["version"] == 3
    for other in ({"stop": ["x"]}, {"max_new_tokens": 5}, {"prompt": "{{question}}"}, {"version": 4}):
        assert task(tmp_path, SUMS | other).asked() != first
    assert task(tmp_path, SUMS | {"data": {"uri": "rows.jsonl"}, "metrics": ["bleu"]}).asked() == first


def test_choices_are_scored_behind_the_question(tmp_path: Path) -> None:
    made, subject = task(tmp_path, CHOICE | {"metrics": ["acc", "acc_norm", "acc_bytes"]}), Scripted()
    rows = items(made)
    assert rows[0].prompt == "Q: 1 + 1?\nA:\n( ) 1\n( ) two"
    assert [row.references for row in rows] == [["two"], ["four"], ["0"]]
    outputs = made.answer(subject, rows)
    assert subject.asked == [[("Q: 1 + 1?\nA:", [" 1", " two"]), ("Q: 2 + 2?\nA:", [" four", " 5"]),
                              ("Q: 2 - 2?\nA:", [" no", " 0"])]]  # fmt: skip
    assert outputs[0]["logprobs"] == [-2.0, -4.0]
    assert (outputs[0]["greedy"], outputs[0]["tokens"]) == ([True, False], [2, 4])
    assert list(made.predictions(rows, outputs)) == ["1", "5", "0"]
    compute = made.compute(rows, outputs)
    assert compute["acc"]().per_row() == [0.0, 0.0, 1.0]
    assert compute["acc_norm"]().per_row() == [1.0, 1.0, 0.0]  # -2/1 < -4/3, -5/4 > -2/1, -3/2 > -2/1


def test_choices_are_scored_without_the_question_where_a_metric_wants_it(tmp_path: Path) -> None:
    made, subject = task(tmp_path, CHOICE | {"metrics": ["acc", "acc_mutual_info"]}), Scripted()
    rows = items(made)
    outputs = made.answer(subject, rows)
    assert subject.asked[1][0] == ("", [" 1", " two"])
    assert made.asked() != task(tmp_path, CHOICE).asked()  # other answers than those kept are needed
    outputs = [output | {"logprobs": [-4.0, -5.0], "unconditional": [-2.0, -4.0]} for output in outputs]
    compute = made.compute(rows, outputs)
    assert compute["acc"]().per_row() == [0.0, 1.0, 0.0]
    assert compute["acc_mutual_info"]().per_row() == [1.0, 0.0, 1.0]


def test_lengths_are_characters_and_bytes(tmp_path: Path) -> None:
    row = {"question": "?", "options": ["été", "abcd"], "right": 0}
    made = task(tmp_path, CHOICE | {"metrics": ["acc_norm", "acc_bytes"]}, [row])
    rows = items(made)
    output = made.answer(Scripted(), rows)[0] | {"logprobs": [-3.5, -4.0]}
    assert (output["characters"], output["bytes"]) == ([3, 4], [5, 4])
    compute = made.compute(rows, [output])
    assert compute["acc_norm"]().value() == 0.0  # -3.5/3 < -4/4
    assert compute["acc_bytes"]().value() == 1.0  # -3.5/5 > -4/4


def test_whole_texts_are_rolled(tmp_path: Path) -> None:
    made, subject = task(tmp_path, TEXTS), Scripted()
    rows = items(made)
    outputs = made.answer(subject, rows)
    assert subject.asked == [["1 + 1?", "2 + 2?", "2 - 2?"]]
    compute = {name: one().value() for name, one in made.compute(rows, outputs).items()}
    assert {name: value for name, value in compute.items() if name in made.metrics(rows)} == {
        "word_perplexity": pytest.approx(math.exp(2.0 * 6 / 3)),
        "byte_perplexity": pytest.approx(math.exp(2.0)),
        "bits_per_byte": pytest.approx(2.0 / math.log(2)),
    }
    assert list(made.predictions(rows, outputs)) == ["", "", ""]


def test_a_chat_gets_turns(tmp_path: Path) -> None:
    values = {**SUMS, "kind": "chat-completion", "chat": {"system": "Be brief on {{topic}}."}, "prompt": "question"}
    made, subject = task(tmp_path, values | {"fewshot": {"count": 1}}), Scripted()
    rows = items(made)
    made.answer(subject, rows)
    assert subject.asked[0][0][0] == [
        {"role": "system", "content": "Be brief on sum."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "1 + 1?"},
    ]
    assert rows[0].prompt.startswith("[system]\nBe brief on sum.\n\n[user]\n2 + 2?")
    turns = [{"role": "user", "content": "hello"}]
    made = task(tmp_path, values | {"prompt": "turns", "chat": None}, [{"turns": turns, "answer": "hi"}])
    assert items(made)[0].request.prompt == turns
    chosen = task(tmp_path, CHOICE | {"chat": {}})
    rows = items(chosen)
    chosen.answer(subject, rows)
    assert subject.asked[-1][0] == ([{"role": "user", "content": "Q: 1 + 1?\nA:"}], ["1", "two"])  # no blank in a chat


def test_examples_never_hold_the_asked_row(tmp_path: Path) -> None:
    fewshot = {"count": 2, "separator": "\n--\n"}
    made = task(tmp_path, SUMS | {"fewshot": fewshot, "header": "Sums of {{topic}}.\n"})
    assert items(made)[1].prompt == ("Sums of sum.\nQ: 1 + 1?\nA: 2\n--\nQ: 2 - 2?\nA: 0\n--\nQ: 2 + 2?\nA:")
    many = [{"question": f"{n}?", "answer": str(n)} for n in range(30)]
    drawn = task(tmp_path, SUMS | {"fewshot": fewshot | {"pick": "seeded", "seed": 1}}, many)
    first = [row.prompt for row in items(drawn)]
    assert first == [row.prompt for row in items(drawn)]
    assert all(prompt.count(prompt.rpartition("Q:")[2]) == 1 for prompt in first)
    assert len({prompt.rpartition("\n--\n")[0] for prompt in first}) > 20
    part = task(tmp_path, SUMS | {"fewshot": fewshot | {"pick": "seeded", "seed": 1}}, many, max_rows=4)
    assert len(items(part)) == 4
    assert {row.prompt for row in items(part)} < set(first)  # a question's examples are its own
    assert [row.id for row in items(part)] == [row.id for row in items(part)]


def test_a_part_of_the_rows_is_asked(tmp_path: Path) -> None:
    made = task(tmp_path, SUMS | {"data": {"uri": "rows.jsonl", "skip": 1, "take": 1}})
    assert [(row.id, row.prompt) for row in items(made)] == [("rows.jsonl:2", "Q: 2 + 2?\nA:")]


def test_a_row_has_the_same_name_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(tmp_path, SUMS).definition.model_copy(update={"data": Part(uri="../rows.jsonl")})
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    for home in (tmp_path / "tasks", Path("tasks")):
        assert items(DefinedTask(made, home))[1].id == "../rows.jsonl:2"


def test_a_list_is_several_right_answers(tmp_path: Path) -> None:
    row = {"question": "?", "answer": ["4", 5], "text": "[1, 2]"}
    for target, right in (("answer", ["4", "5"]), ("{{answer}}", ["4", "5"]), ("text", ["[1, 2]"])):
        assert items(task(tmp_path, SUMS | {"target": target}, [row]))[0].references == right
    made = task(tmp_path, CHOICE | {"answer": [0, 2], "choices": ["a", "b", "c"]}, [row])
    assert (items(made)[0].request.answers, items(made)[0].references) == ((0, 2), ["a", "c"])
    named = SUMS | {"target": None, "choices": ["no", "yes"], "answer": "{{1}}"}
    assert items(task(tmp_path, named, [row]))[0].references == ["yes"]


@pytest.mark.parametrize(
    ("answer", "how", "place"),
    [(1, "auto", 1), ("B", "auto", 1), ("b", "auto", 1), ("(b)", "auto", 1), ("1", "auto", 1), ("yes", "auto", 1),
     ("1", "index", 1), ("B", "letter", 1), ("yes", "text", 1), (1, "text", 1), ("yes", "index-or-text", 1)],
)  # fmt: skip
def test_answers_are_places_letters_or_texts(tmp_path: Path, answer: Any, how: str, place: int) -> None:
    values = CHOICE | {"choices": ["no", "yes", "both"], "answer": "right", "answer_as": how}
    made = task(tmp_path, values, [{"question": "?", "right": answer}])
    assert items(made)[0].request.answers == (place,)


@pytest.mark.parametrize(
    ("answer", "how", "said"),
    [
        (3, "auto", "3 is none of the 3 choices"),
        (-1, "auto", "none of the 3 choices"),
        ("maybe", "auto", "0 to 2, A to C, or ['1', '2', 'B']"),
        ("D", "auto", "none of the 3 choices"),
        ("1", "auto", "two ways (index gives '2', text gives '1'); set answer_as"),
        ("B", "auto", "two ways (letter gives '2', text gives 'B')"),
        ("B", "index", "none of the 3 choices as index"),
        ([], "auto", "empty list"),
        (True, "auto", "none of the 3 choices"),
        (None, "auto", "column 'right' is null"),
    ],
)
def test_an_answer_that_is_no_choice_is_told(tmp_path: Path, answer: Any, how: str, said: str) -> None:
    made = task(tmp_path, CHOICE | {"choices": ["1", "2", "B"], "answer_as": how}, [{"question": "?", "right": answer}])
    with pytest.raises(DataError) as caught:
        items(made)
    assert (caught.value.field, caught.value.where) == ("answer", "rows.jsonl:1")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "row", "field", "said"),
    [
        (SUMS, {"question": "?"}, "target", "no such column; use one of: question"),
        (SUMS, {"qestion": "?", "answer": "x"}, "prompt", "did you mean 'qestion'? (there are answer, qestion)"),
        (SUMS, {"question": "?", "answer": " "}, "target", "is empty"),
        (SUMS, {"question": "?", "answer": []}, "target", "is an empty list"),
        (SUMS, {"question": "?", "answer": ["x", ""]}, "target", "is empty"),
        (SUMS, {"question": None, "answer": "x"}, "prompt", "writes a null"),
        (SUMS, {"question": "?", "answer": None}, "target", "column 'answer' is null"),
        (SUMS | {"prompt": "question"}, {"question": ["?"], "answer": "x"}, "prompt", "must be text, and is a list"),
        (SUMS | {"prompt": "{{question.b}}"}, {"question": {"a": 1}, "answer": "x"}, "prompt", "has no attribute 'b'"),
        (SUMS | {"prompt": "{{question / 2}}"}, {"question": "?", "answer": "x"}, "prompt", "TypeError"),
        (SUMS | {"prompt": "{{question.__class__.mro()}}"}, ROWS[0], "prompt", "not allowed"),
        (SUMS | {"columns": {"question": "q"}}, ROWS[0], "columns.question", "no such column"),
        (SUMS | {"slices": ["lang"]}, ROWS[0], "slices", "no such column"),
        (SUMS | {"group": "options"}, ROWS[0], "group", "text or number"),
        (CHAT, {"turns": [], "answer": "x"}, "prompt", "must be turns"),
        (CHAT, {"turns": ["hello"], "answer": "x"}, "prompt", "must be turns"),
        (CHAT, {"turns": [{"role": "assistant", "content": "x"}], "answer": "x"}, "prompt", "take it out"),
        (CHOICE, {"question": "?", "options": ["x"], "right": 0}, "choices", "two at least"),
        (CHOICE, {"question": "?", "options": ["x", ""], "right": 0}, "choices", "not empty"),
        (CHOICE, {"question": "?", "options": "x, y", "right": 0}, "choices", "must give a list"),
    ],
)
def test_a_row_that_cannot_be_asked_is_told(
    tmp_path: Path, values: dict[str, Any], row: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        items(task(tmp_path, values, [row]))
    assert (caught.value.field, caught.value.where) == (field, "rows.jsonl:1")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        (SUMS | {"prompt": "{{question"}, "prompt", "is no Jinja template"),
        (SUMS | {"metrics": ["acc"]}, "metrics", "text-generation has exact_match"),
        (CHOICE | {"metrics": ["bleu"]}, "metrics", "multiple-choice has acc"),
        (SUMS | {"metrics": [{"name": "bleu", "options": {"smooth": 1}}]}, "metrics.bleu", "unknown option"),
        (SUMS | {"metrics": [{"name": "bleu", "options": {"smooth": 1}}]}, "metrics.bleu", "tokenizer"),
        (SUMS | {"metrics": ["bleu", "sacrebleu"]}, "metrics", "named twice"),
        (SUMS | {"metrics": ["bleu", "bleu"]}, "metrics", "named twice"),
        ({"task": "t", "version": 1, "kind": "text-classification", "data": "x"}, "kind", "as_recipe"),
        (SUMS | {"fewshot": {"count": 3}}, "fewshot.count", "only 2 rows"),
        (SUMS | {"fewshot": {"count": 3, "pick": "seeded"}}, "fewshot.count", "only 2 rows"),
        (SUMS | {"data": "missing.jsonl"}, "data.uri", "no such file"),
        (SUMS | {"id": "topic"}, "id", "'sum' names two rows"),
    ],
)
def test_a_task_that_cannot_be_asked_is_told(tmp_path: Path, values: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(FieldError) as caught:
        items(task(tmp_path, values))
    assert caught.value.field == field
    assert said in str(caught.value)


def test_a_metric_that_is_undefined_is_told_before_asking(tmp_path: Path) -> None:
    made = task(tmp_path, SUMS | {"metrics": ["bleu"]})
    with pytest.raises(RecipeError, match="undefined on the rows of sums"):
        made.metrics(items(made))


def test_a_torn_file_is_told_with_its_line(tmp_path: Path) -> None:
    made = task(tmp_path, SUMS)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{half", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: data\.uri = .*not JSON"):
        items(made)


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    made = task(tmp_path, SUMS, [{"question": str(n), "answer": "x"} for n in range(2_500)])
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("torn")
    windows = made.windows()
    assert [len(next(windows)), len(next(windows))] == [1_000, 1_000]
    with pytest.raises(DataError):
        next(windows)


def test_people_see_what_a_model_sees(tmp_path: Path) -> None:
    text = describe(task(tmp_path, CHOICE).definition, tmp_path, 1)
    assert text == (
        "sums, version 3: multiple-choice\n--- rows.jsonl:1\nQ: 1 + 1?\nA:\n( ) 1\n( ) two\n--- right: 'two'"
    )


def test_an_extract_changes_before_and_after(tmp_path: Path) -> None:
    how = {"name": "x", "before": ["lower"], "regex": "answer: (.*)", "after": ["strip", "upper"], "fallback": "none"}
    made = task(tmp_path, SUMS | {"extract": [how]}).definition.extract[0]
    assert extracted("ANSWER: b c \n", made) == "B C"
    assert extracted("b", made) == "NONE"
    bare = task(tmp_path, SUMS | {"extract": [{"name": "x", "regex": "<(.*)>", "after": []}]}).definition.extract[0]
    assert extracted(" < b > ", bare) == "b"


@pytest.mark.parametrize(
    ("values", "asked", "answers"),
    [
        (SUMS, "1 + 1?", ["2"]),  # without the template's own words
        ({**SUMS, "prompt": "question", "fewshot": {"count": 1}, "header": "Add."}, "1 + 1?", ["2"]),
        ({**SUMS, "prompt": "{{question}} of {{topic}}"}, "1 + 1?\nsum", ["2"]),
        ({**SUMS, "prompt": "{{question}} {{options[0]}}"}, "1 + 1? 1", ["2"]),  # it looks into a list
        (CHOICE, "1 + 1?", ["two"]),
        (TEXTS, "1 + 1?", []),
    ],
)
def test_what_training_should_not_have_seen_is_the_row_itself(
    tmp_path: Path, values: dict[str, Any], asked: str, answers: list[str]
) -> None:
    made = task(tmp_path, values)
    texts = list(made.texts())
    assert texts[0] == (asked, answers)
    assert len(texts) == len(ROWS)
    few = task(tmp_path, values, max_rows=2)
    assert [text for text in texts if text in list(few.texts())] == list(few.texts())
    assert len(list(few.texts())) == len(items(few)) == 2


def test_turns_of_a_chat_are_looked_for_without_the_system(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    made = task(tmp_path, CHAT, [{"turns": turns, "answer": "4"}])
    assert list(made.texts()) == [("user\nassistant\nuser", ["4"])]
