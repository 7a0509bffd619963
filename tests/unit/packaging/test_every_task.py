"""Every task: what the package answers is what the runtime answers, and that is what evaluation measured."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import CASES, CONTEXT, FOX, LONGEST, TEXTS, folder_of, packaged

from ingot.data.labeled import Asked
from ingot.data.loader import Drawn
from ingot.data.masking import hide
from ingot.evaluation.measure import How, RecipeTask, encoded_rows
from ingot.evaluation.pointing import MASKED
from ingot.evaluation.preferences import PREFERENCES
from ingot.evaluation.subject import Local
from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.model.task_schemas import TASKS
from ingot.packaging.verify import _difference
from ingot.recipe_io import parse_recipe

SHORT = [Asked("Where?", word, (), f"f:{word}") for word in CONTEXT.split()]
FIRST = {
    "text-classification": lambda it: it["label"],
    "multi-label-classification": lambda it: json.dumps(it["labels"]),
    "token-classification": lambda it: " ".join(it["tags"]),
    "question-answering": lambda it: it["answer"],
}


@pytest.fixture
def folder(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    return lambda task: folder_of(task, make_tokenizer(mask_token="<|im_start|>"), tmp_path / task)


def _recipe(task: str) -> Any:
    return parse_recipe(
        {
            "name": "x",
            "model": {"source": "unused"},
            "data": {"train": "unused", "max_tokens": LONGEST, "overlap_tokens": 4},
            "objective": {"task": task, "mask_share": 0.1},
            "evaluate": {"bootstrap_samples": 100, "tokens_per_batch": 64, "max_new_tokens": 6},
        }
    )


def _same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list | dict):
        assert type(found) is type(wanted)
        assert len(found) == len(wanted)
        for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
            _same(found[key], wanted[key])
    else:
        assert found == (pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("task", CASES)
def test_the_package_answers_as_the_runtime(task: str, folder: Callable[[str], Path]) -> None:
    made = folder(task)
    out = packaged(made, made.parent / "package", task=task, example_input=CASES[task].rows[0])
    wanted = Runtime.load(made).answer(CASES[task].rows)
    import mlflow.pyfunc  # after packaging, which silences what this import warns of
    from mlflow.models import Model

    assert len({json.dumps(row) for row in wanted}) > 1
    signature = Model.load(str(out)).signature
    wanted_schema = {column.name: str(column.type) for column in _infer(wanted).inputs}
    found_schema = {column.name: str(column.type) for column in signature.outputs if column.name in wanted_schema}
    assert found_schema == wanted_schema
    model = mlflow.pyfunc.load_model(str(out))
    rows = [
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in CASES[task].rows
    ]
    _same(model.predict(rows).to_dict("records"), wanted)
    [example] = model.predict(model.input_example).to_dict("records")
    _same(example, Runtime.load(made).answer(CASES[task].rows[:1])[0])
    defaults = {param.name: param.default for param in signature.params or ()}
    assert set(defaults) == {param.name for param in TASKS[task].params}
    _same(model.predict(rows, params=defaults).to_dict("records"), wanted)
    with pytest.raises(Exception, match=r"waffles|schema|each row needs"):
        model.predict([{"waffles": "x"}])


def _infer(records: list[dict[str, Any]]) -> Any:
    """MLflow's own reading of what these records are."""
    import pandas as pd
    from mlflow.models import infer_signature

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that integers may be missing one day
        return infer_signature(pd.DataFrame(records))


@pytest.mark.parametrize("task", [task for task in CASES if task not in ("fill-mask", "reward", "embeddings")])
def test_the_runtime_answers_as_evaluation(task: str, folder: Callable[[str], Path]) -> None:
    runtime, case, recipe = Runtime.load(folder(task)), CASES[task], _recipe(task)
    asked = RecipeTask(recipe, lambda: iter([case.examples]), runtime.labels, runtime.tokenizer, None)
    [items] = asked.windows()
    outputs = asked.answer(Local(runtime.model, runtime.tokenizer, 64), items)
    answers = runtime.answer(case.rows)
    first = FIRST.get(task, lambda it: it["output_string"].strip())
    assert [first(it) for it in answers] == list(asked.predictions(items, outputs))
    if "probabilities" in outputs[0]:
        for output, row in zip(outputs, runtime.answer(case.rows, {"top_k": 3}), strict=True):
            found = {it["label"]: it["probability"] for it in row["probabilities"]}
            _same([found[label] for label in runtime.labels], output["probabilities"])
    if task == "question-answering":
        for output, row in zip(outputs, answers, strict=True):
            assert row["score"] == pytest.approx(math.exp(output["score"]), rel=1e-4)
        asked = RecipeTask(recipe, lambda: iter([SHORT]), (), runtime.tokenizer, None)
        [items] = asked.windows()
        outputs = asked.answer(Local(runtime.model, runtime.tokenizer, 64), items)
        rows = [{"question": row.question, "context": row.context} for row in SHORT]
        found = [row["answer"] for row in runtime.answer(rows, {"no_answer": "allow"})]
        assert found == list(asked.predictions(items, outputs))
        assert {""} < set(found)


def test_rewards_are_those_of_evaluation(folder: Callable[[str], Path]) -> None:
    runtime, case, recipe = Runtime.load(folder("reward")), CASES["reward"], _recipe("reward")
    asked = RecipeTask(recipe, lambda: iter([case.examples]), (), runtime.tokenizer, None)
    [items] = asked.windows()
    [wanted] = PREFERENCES.answer(Local(runtime.model, runtime.tokenizer, 64), items, How(recipe))
    chosen, rejected = runtime.answer(case.rows)
    assert [chosen["score"], rejected["score"]] == pytest.approx([wanted["chosen"], wanted["rejected"]], rel=1e-4)


def test_gaps_are_filled_by_the_probabilities_of_evaluation(folder: Callable[[str], Path]) -> None:
    runtime, recipe = Runtime.load(folder("fill-mask")), _recipe("fill-mask")
    tokenizer, examples = runtime.tokenizer, CASES["fill-mask"].examples
    [row] = encoded_rows(tokenizer, examples, (), recipe)
    ids, labels = hide(row, Drawn(tokenizer.mask_token_id, len(tokenizer), f"{recipe.data.split_seed} evaluation"))
    places = [place for place, label in enumerate(labels) if label >= 0]
    masked = [tokenizer.mask_token_id if place in places else token for place, token in enumerate(row.ids)]
    assert ids == masked, "the draw put another token into a gap: choose other words"
    asked = RecipeTask(recipe, lambda: iter([examples]), (), tokenizer, None)
    [items] = asked.windows()
    [wanted] = MASKED.answer(Local(runtime.model, tokenizer, 64), items, How(recipe))
    [answer] = runtime.answer([{"text": tokenizer.decode(masked)}], {"top_k": 1000})
    assert len(answer["tokens"]) == len(places)
    nll = 0.0
    for number, place in enumerate(places):
        shares = {it["token"]: it["probability"] for it in answer["candidates"] if it["mask"] == number}
        nll -= math.log(shares[tokenizer.decode([labels[place]]).strip()])
    assert nll == pytest.approx(wanted["nll"], rel=1e-3)


def test_embeddings_are_means_of_hidden_states(folder: Callable[[str], Path]) -> None:
    runtime = Runtime.load(folder("embeddings"))
    ids = runtime.tokenizer(FOX, return_tensors="pt")
    hidden_TD = runtime.model(input_ids=ids["input_ids"]).last_hidden_state[0].detach()
    rows = [{"text": FOX}, {"text": TEXTS[0]}]
    ways = {"mean": hidden_TD.mean(0), "first": hidden_TD[0], "last": hidden_TD[-1]}
    for way, vector_D in ways.items():
        [found, _] = runtime.answer(rows, {"pooling": way, "normalize": False})
        assert found["embedding"] == pytest.approx(vector_D.tolist(), abs=1e-4)
    unit = torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)
    assert runtime.answer(rows)[0]["embedding"] == pytest.approx(unit.tolist(), abs=1e-5)
    short = runtime.answer(rows, {"dimensions": 8})[0]["embedding"]
    assert short == pytest.approx((unit[:8] / unit[:8].norm()).tolist(), abs=1e-5)
    with pytest.raises(InputError, match="vectors have 32"):
        runtime.answer(rows, {"dimensions": 33})
    assert runtime.embed([FOX])[0].tolist() == pytest.approx(unit.tolist(), abs=1e-5)


def test_any_model_has_hidden_states(folder: Callable[[str], Path]) -> None:
    for task in ("text-generation", "summarization", "text-classification"):
        vectors_ND = Runtime.load(folder(task)).embed([FOX, "Paris"], "last")
        assert vectors_ND.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_labels_over_the_threshold(folder: Callable[[str], Path]) -> None:
    runtime, rows = Runtime.load(folder("multi-label-classification")), [{"text": FOX}]
    [all_of_them], [none] = (runtime.answer(rows, {"threshold": value}) for value in (0.0, 1.0))
    assert (all_of_them["labels"], none["labels"]) == (["late", "broken", "good"], [])
    shares = [it["probability"] for it in none["probabilities"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 3
    assert len(runtime.answer(rows, {"top_k": 2})[0]["probabilities"]) == 2


def test_words_as_a_list_and_as_a_text(folder: Callable[[str], Path]) -> None:
    runtime = Runtime.load(folder("token-classification"))
    [text] = runtime.answer([{"text": FOX}])
    assert runtime.answer([{"tokens": FOX.split()}]) == [text]
    for found in text["entities"]:
        assert FOX[found["start"] : found["end"]] == found["text"]
    apart = FOX.replace(" ", "  ")
    [wide] = runtime.answer([{"text": apart}])
    assert len(wide["tags"]) == len(text["tags"])
    assert all(apart[it["start"] : it["end"]] == it["text"] for it in wide["entities"])


def test_answers_are_stretches_of_the_context(folder: Callable[[str], Path]) -> None:
    runtime = Runtime.load(folder("question-answering"))
    row = {"question": "What?", "context": CONTEXT}
    [found] = runtime.answer([row], {"no_answer": "forbid"})
    assert found["answer"] == CONTEXT[found["start"] : found["end"]] != ""
    [short] = runtime.answer([row], {"no_answer": "forbid", "max_answer_tokens": 1})
    assert len(runtime.tokenizer(short["answer"])["input_ids"]) <= 2
    with pytest.raises(InputError, match="room for its context") as caught:
        runtime.answer([{"question": "What? " * 60, "context": CONTEXT}])
    assert caught.value.field == "question"


@pytest.mark.parametrize(
    ("task", "row", "params", "field"),
    [
        ("fill-mask", {"text": "no gap"}, {}, "text"),
        ("fill-mask", {"text": FOX * 6 + "<|im_start|>"}, {}, "text"),
        ("summarization", {"input_string": FOX}, {"temperature": 1.0}, "temperature"),
        ("translation", {"input_string": FOX}, {"max_tokens": 65}, "max_tokens"),
        ("text-classification", {"question": FOX}, {}, "question"),
        ("text-classification", {"text": ""}, {}, "text"),
    ],
)
def test_what_cannot_be_answered_names_the_field(
    task: str, row: dict[str, Any], params: dict[str, Any], field: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError) as caught:
        Runtime.load(folder(task)).answer([row], params)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"label": "good", "found": [{"end": 3, "score": 0.500001}]}, None),
        ({"label": "bad", "found": [{"end": 3, "score": 0.5}]}, "at label: from character 0 on"),
        ({"label": "good", "found": [{"end": 4, "score": 0.5}]}, "at found[0].end: expected 3, got 4"),
        ({"label": "good", "found": [{"end": 3, "score": 0.51}]}, "at found[0].score: expected 0.5, got 0.51"),
        ({"label": "good", "found": []}, "at found: expected"),
        ({"label": "good"}, "expected {'label'"),
    ],
)
def test_records_are_compared_by_their_parts(answer: dict[str, Any], told: str | None) -> None:
    found = _difference(answer, {"label": "good", "found": [{"end": 3, "score": 0.5}]})
    assert found is None if told is None else told in str(found)
