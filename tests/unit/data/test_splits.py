import itertools
import json
import random
from collections import Counter

import pytest

from ingot.data.conversation import Document
from ingot.data.labeled import Labeled
from ingot.data.splits import load_splits, report_from
from ingot.errors import DataError
from ingot.recipe import Recipe


def recipe(task: str = "text-classification", seed: int = 0, **data) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"source": "x"},
            "data": {"train": "train.jsonl", **data},
            "objective": {"task": task},
            "train": {"seed": seed},
        }
    )


def write(folder, name: str, rows: list) -> None:
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def labeled(n: int, labels: str = "aab") -> list[dict]:
    """Sorted by label, as files often are: the last rows are all of one class."""
    return sorted(
        ({"text": f"text {number}", "label": labels[number % len(labels)]} for number in range(n)),
        key=lambda row: row["label"],
    )


def texts(rows) -> set[str]:
    return {row.text for row in rows}


def test_what_is_missing_is_drawn_from_train(tmp_path):
    write(tmp_path, "train.jsonl", labeled(300))
    splits = load_splits(recipe(validation_share=0.1, test_share=0.2), tmp_path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [210, 30, 60]
    everything = texts(splits.train) | texts(splits.validation) | texts(splits.test)
    assert everything == {f"text {n}" for n in range(300)}
    assert splits.labels == ("a", "b")
    assert splits.report.as_dict() == {
        "counts": {"train": 210, "validation": 30, "test": 60},
        "origins": {"train": "given", "validation": "drawn from train", "test": "drawn from train"},
        "bad_rows": {"train": []},
        "shared_with_train": {"validation": 0, "test": 0},
    }


def test_the_draw_is_stratified_and_shuffled(tmp_path):
    write(tmp_path, "train.jsonl", labeled(300))
    splits = load_splits(recipe(validation_share=0.1, test_share=0.2), tmp_path)
    for part, wanted in ((splits.test, {"a": 40, "b": 20}), (splits.validation, {"a": 20, "b": 10})):
        assert Counter(row.label for row in part) == wanted
    # A positional cut would take neighbours; 60 rows drawn from 300 have far more than one gap.
    lines = sorted(int(row.where.rsplit(":", 1)[1]) for row in splits.test)
    assert sum(b - a > 1 for a, b in itertools.pairwise(lines)) > 20


def test_the_test_rows_depend_on_split_seed_only(tmp_path):
    rows = labeled(200)
    write(tmp_path, "train.jsonl", rows)
    first = load_splits(recipe(), tmp_path)
    assert texts(load_splits(recipe(seed=7), tmp_path).test) == texts(first.test)
    assert texts(load_splits(recipe(validation_share=0.3), tmp_path).test) == texts(first.test)
    assert texts(load_splits(recipe(split_seed=1), tmp_path).test) != texts(first.test)
    random.Random(0).shuffle(rows)
    write(tmp_path, "train.jsonl", rows)
    assert texts(load_splits(recipe(), tmp_path).test) == texts(first.test)


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_the_same_input_stay_on_one_side(tmp_path, seed):
    rows = [{"prompt": f"Question {n // 4}" + " " * (n % 2), "completion": f"answer {n}"} for n in range(200)]
    rows += [{"prompt": f"QUESTION  {n}", "completion": "again"} for n in range(50)]
    write(tmp_path, "train.jsonl", rows)
    splits = load_splits(recipe("text-generation", split_seed=seed, validation_share=0.2, test_share=0.2), tmp_path)
    sides = [
        {" ".join(row.prompt.lower().split()) for row in part}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert all(sides)
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(sides, 2))
    assert len(splits.test) == 50


def test_chats_with_the_same_questions_stay_on_one_side(tmp_path):
    def chat(question: int, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": f"q{question}"}, {"role": "assistant", "content": answer}]}

    write(tmp_path, "train.jsonl", [chat(n % 20, f"a{n}") for n in range(60)])
    splits = load_splits(recipe("chat-completion", test_share=0.3), tmp_path)
    sides = [{row.messages[0].content for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(sides, 2))


def test_no_label_loses_its_last_training_row(tmp_path):
    rows = [*labeled(60, "ab"), {"text": "only one", "label": "rare"}, {"text": "text 0", "label": "twin"}]
    write(tmp_path, "train.jsonl", rows)
    for seed in range(10):
        splits = load_splits(recipe(split_seed=seed, validation_share=0.2, test_share=0.4), tmp_path)
        assert splits.labels == ("a", "b", "rare", "twin")


@pytest.mark.parametrize("task", ["text-classification", "language-modeling"])
def test_a_small_share_still_draws_a_row_and_none_draws_nothing(tmp_path, task):
    write(tmp_path, "train.jsonl", labeled(8))
    splits = load_splits(recipe(task, validation_share=0.01, test_share=0.01), tmp_path)
    assert (len(splits.validation), len(splits.test), len(splits.train)) == (1, 1, 6)
    splits = load_splits(recipe(task, validation_share=0.0, test_share=0.0), tmp_path)
    assert (len(splits.validation), len(splits.test), len(splits.train)) == (0, 0, 8)


def test_too_few_rows_to_draw_from(tmp_path):
    write(tmp_path, "train.jsonl", [{"text": "same"}] * 20)
    with pytest.raises(DataError, match="too few distinct inputs") as caught:
        load_splits(recipe("language-modeling"), tmp_path)
    assert caught.value.field == "data.test_share"


def test_a_group_larger_than_the_share_is_drawn_whole(tmp_path):
    write(tmp_path, "train.jsonl", [{"text": f"t{n // 10}"} for n in range(30)])
    splits = load_splits(recipe("language-modeling", test_share=0.1, validation_share=0.0), tmp_path)
    assert len(splits.test) == 10
    assert len(texts(splits.test)) == 1
    assert not texts(splits.test) & texts(splits.train)


def test_given_parts_are_taken_as_they_are_and_overlap_is_told(tmp_path):
    write(tmp_path, "train.jsonl", [{"text": f"t{n}"} for n in range(10)])
    write(tmp_path, "test.jsonl", [{"text": "T3 "}, {"text": "new"}])
    splits = load_splits(recipe("language-modeling", test="test.jsonl", validation_share=0.0), tmp_path)
    assert splits.test == [Document("T3 "), Document("new")]
    assert len(splits.train) == 10
    assert splits.report.shared_with_train == {"validation": 0, "test": 1}
    assert splits.report.origins["test"] == "given"


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_label_that_training_never_saw(tmp_path, part):
    write(tmp_path, "train.jsonl", labeled(30, ["refund", "card"]))
    write(tmp_path, "other.jsonl", [{"text": "x", "label": "card"}, {"text": "y", "label": "refunds"}])
    with pytest.raises(DataError, match="did you mean 'refund'") as caught:
        load_splits(recipe(**{part: "other.jsonl"}), tmp_path)
    assert caught.value.where == "other.jsonl:2"
    assert caught.value.value == "refunds"
    assert part in caught.value.field


BAD = ["{", {"text": "", "label": "a"}, {"text": "x", "label": None}, [1], {"text": 3.5, "label": 1.5}, {"label": "a"}]


def test_bad_rows_stop_the_run_and_are_listed(tmp_path):
    write(tmp_path, "train.jsonl", labeled(30) + BAD)
    with pytest.raises(DataError) as caught:
        load_splits(recipe(), tmp_path)
    message = str(caught.value)
    assert caught.value.field == "data.max_bad_rows"
    assert "6 rows cannot be used" in message
    assert "data.max_bad_rows: 6" in message
    for line, why in (
        (31, "not JSON"),
        (32, "text is empty"),
        (33, "label must be"),
        (34, "a list"),
        (35, "label must"),
    ):
        assert f"train.jsonl:{line}: " in message
        assert why in message
    assert "train.jsonl:36" not in message
    assert "and 1 more" in message


def test_bad_rows_that_are_tolerated_are_reported(tmp_path):
    write(tmp_path, "train.jsonl", labeled(30) + BAD[:3])
    write(tmp_path, "test.jsonl", [*labeled(3), BAD[0]])
    with pytest.raises(DataError, match="4 rows"):
        load_splits(recipe(test="test.jsonl", max_bad_rows=3), tmp_path)
    report = load_splits(recipe(test="test.jsonl", max_bad_rows=4), tmp_path).report
    assert [row.where for row in report.bad_rows["train"]] == ["train.jsonl:31", "train.jsonl:32", "train.jsonl:33"]
    assert report.as_dict()["bad_rows"]["test"][0]["where"] == "test.jsonl:4"


def test_a_column_that_no_row_has_is_a_mistake_of_the_recipe(tmp_path):
    write(tmp_path, "train.jsonl", [{"meaning": "a", "reference": "b"}] * 3)
    with pytest.raises(DataError) as caught:
        load_splits(recipe("text-generation", columns={"prompt": "meanings", "completion": "reference"}), tmp_path)
    assert (caught.value.field, caught.value.value) == ("data.columns.prompt", "meanings")
    assert "did you mean 'meaning'?" in str(caught.value)
    assert "meaning, reference" in str(caught.value)
    with pytest.raises(DataError) as caught:
        load_splits(recipe("text-generation"), tmp_path)
    assert (caught.value.field, caught.value.value) == ("data.columns.prompt", "prompt")
    assert "meaning, reference" in str(caught.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_data(tmp_path, part):
    write(tmp_path, "train.jsonl", labeled(30))
    write(tmp_path, "empty.jsonl", [])
    with pytest.raises(DataError, match="holds no usable row") as caught:
        load_splits(recipe(**{part: "empty.jsonl"}), tmp_path)
    assert caught.value.field == f"data.{part}.uri"


def test_max_train_rows_draws_from_all_labels_and_leaves_the_test_alone(tmp_path):
    write(tmp_path, "train.jsonl", labeled(300, "aaaaaaaaab"))
    full = load_splits(recipe(), tmp_path)
    small = load_splits(recipe(max_train_rows=20), tmp_path)
    assert texts(small.test) == texts(full.test)
    assert len(small.train) == 20
    assert texts(small.train) < texts(full.train)
    assert small.labels == ("a", "b")
    assert load_splits(recipe(max_train_rows=20), tmp_path).train == small.train


def test_banking77_as_it_is(shared_dir):
    options = {"train": "banking77/train.csv", "test": "banking77/test.csv", "columns": {"label": "category"}}
    splits = load_splits(recipe(**options), shared_dir / "data")
    assert len(splits.labels) == 77
    assert splits.report.counts == {"train": 9503, "validation": 500, "test": 3080}
    drawn = Counter(row.label for row in splits.validation)
    kept = Counter(row.label for row in splits.train)
    assert all(abs(drawn[label] - (drawn[label] + kept[label]) * 500 / 10_003) <= 1 for label in kept)
    assert isinstance(splits.train[0], Labeled)


def test_e2e_keeps_the_references_of_an_input_together(shared_dir):
    options = {"train": "e2e/devset.csv", "columns": {"prompt": "mr", "completion": "ref"}}
    splits = load_splits(recipe("text-generation", **options), shared_dir / "data")
    assert not {row.prompt for row in splits.test} & {row.prompt for row in splits.train}
    assert len(splits.test) == 467


def test_dialogsum_as_it_is(shared_dir):
    columns = {"prompt": "dialogue", "completion": "summary"}
    options = {"train": "dialogsum/dev.jsonl", "columns": columns, "prompt_template": "{prompt}\n\nSummary:"}
    splits = load_splits(recipe("text-generation", **options), shared_dir / "data")
    assert sum(splits.report.counts.values()) == 500
    assert splits.train[0].prompt.endswith("\n\nSummary:")


# --- mixtures --------------------------------------------------------------------------------------------------


def test_a_mixture_is_read_source_by_source_and_drawn_from_each(tmp_path):
    write(tmp_path, "a.jsonl", labeled(200))
    write(tmp_path, "b.jsonl", [{"text": f"b {n}", "label": "bbbc"[n % 4]} for n in range(100)])
    mixture = [{"uri": "a.jsonl", "weight": 5}, "b.jsonl"]
    splits = load_splits(recipe(train=mixture, test_share=0.2, validation_share=0.1), tmp_path)
    assert splits.labels == ("a", "b", "c")
    names = [row.where.split(":")[0] for row in splits.train]
    assert names == sorted(names)
    assert splits.report.sources == {"train[0]": names.count("a.jsonl"), "train[1]": names.count("b.jsonl")}
    # In proportion to each label of each source, whatever the weights: what is measured is not what is learned most.
    for part, share in ((splits.test, 0.2), (splits.validation, 0.1)):
        drawn = Counter((row.where[0], row.label) for row in part)
        for (source, label), size in {("a", "a"): 134, ("a", "b"): 66, ("b", "b"): 75, ("b", "c"): 25}.items():
            assert abs(drawn[source, label] - share * size) <= 1
    assert splits.report.as_dict()["sources"] == splits.report.sources
    weighed = [{"uri": "a.jsonl", "weight": 1}, {"uri": "b.jsonl", "weight": 9}]
    again = load_splits(recipe(train=weighed, test_share=0.2, validation_share=0.1), tmp_path)
    assert (again.train, again.test) == (splits.train, splits.test)


def test_an_input_of_two_sources_stays_on_one_side(tmp_path):
    for name in "ab":
        write(tmp_path, f"{name}.jsonl", [{"prompt": f"question {n}", "completion": name} for n in range(60)])
    splits = load_splits(recipe("text-generation", train=["a.jsonl", "b.jsonl"], test_share=0.3), tmp_path)
    sides = [{row.prompt for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert all(sides)
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(sides, 2))


@pytest.mark.parametrize("wrong", ["gone.jsonl", "empty.jsonl", "columns.jsonl"])
def test_what_is_wrong_with_one_source_names_it(tmp_path, wrong):
    write(tmp_path, "a.jsonl", labeled(30))
    write(tmp_path, "empty.jsonl", [])
    write(tmp_path, "columns.jsonl", [{"txt": "a", "label": "b"}])
    with pytest.raises(DataError) as caught:
        load_splits(recipe(train=["a.jsonl", wrong]), tmp_path)
    assert "data.train[1].uri" in str(caught.value)


def test_bad_rows_of_a_mixture_name_their_source(tmp_path):
    write(tmp_path, "a.jsonl", [*labeled(30), "{"])
    write(tmp_path, "b.jsonl", [*labeled(30), "[", "{"])
    with pytest.raises(DataError) as caught:
        load_splits(recipe(train=["a.jsonl", "b.jsonl"], max_bad_rows=2), tmp_path)
    assert "\n  data.train[0]: a.jsonl:31: not JSON" in str(caught.value)
    assert "\n  data.train[1]: b.jsonl:32: not JSON" in str(caught.value)
    report = load_splits(recipe(train=["a.jsonl", "b.jsonl"], max_bad_rows=3), tmp_path).report
    assert {name: len(rows) for name, rows in report.bad_rows.items()} == {"train[0]": 1, "train[1]": 2}


def test_max_train_rows_leaves_no_source_out(tmp_path):
    write(tmp_path, "a.jsonl", [{"text": f"a {n}"} for n in range(500)])
    write(tmp_path, "b.jsonl", [{"text": f"b {n}"} for n in range(10)])
    options = {"train": ["a.jsonl", "b.jsonl"], "validation_share": 0.0, "test_share": 0.0}
    report = load_splits(recipe("language-modeling", max_train_rows=2, **options), tmp_path).report
    assert report.sources == {"train[0]": 1, "train[1]": 1}
    with pytest.raises(DataError, match=r"leaves no row of data\.train\[[01]\]") as caught:
        load_splits(recipe("language-modeling", max_train_rows=1, **options), tmp_path)
    assert caught.value.field == "data.max_train_rows"


def test_a_streamed_part_is_not_read(tmp_path):
    write(tmp_path, "other.jsonl", [{"text": f"t{n}"} for n in range(5)])
    streamed = {"train": "endless.jsonl", "streaming": True, "validation_share": 0.0, "test": "other.jsonl"}
    splits = load_splits(recipe("language-modeling", **streamed), tmp_path)
    assert (len(splits.train), len(splits.test)) == (0, 5)
    assert splits.report.counts == {"test": 5}
    assert splits.report.origins["train"] == "streamed"


def test_only_the_parts_that_are_asked_for_are_held(tmp_path):
    write(tmp_path, "train.jsonl", labeled(100))
    whole, part = load_splits(recipe(), tmp_path), load_splits(recipe(), tmp_path, ("test",))
    assert part.test == whole.test
    assert (part.train, part.validation) == ([], [])
    assert (part.labels, part.report) == (whole.labels, whole.report)


def test_a_report_comes_back_from_json(tmp_path):
    write(tmp_path, "a.jsonl", [*labeled(30), "{"])
    report = load_splits(recipe(train=["a.jsonl", "a.jsonl"], max_bad_rows=2), tmp_path).report
    assert report_from(json.loads(json.dumps(report.as_dict()))) == report
