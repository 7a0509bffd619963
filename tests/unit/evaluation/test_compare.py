"""Two models on the same rows: what changed is found, chance is not, and what was asked otherwise is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import Questions, Scripted, evaluated, right

from ingot.errors import DataError, FieldError
from ingot.evaluation.compare import (
    ALL_SLICES,
    Comparison,
    NotComparable,
    compare,
    compare_all,
    load_comparison,
    save_comparisons,
)
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.result import Evaluation, load_evaluations
from ingot.evaluation.samples import Item
from ingot.evaluation.statistics import detectable_difference, holm, interval


def answering(share: int) -> Scripted:
    """Right on all but every `share`-th row."""

    def answer(prompt: str) -> str:
        number = int(prompt.split()[1])
        return right(number) if number % share else "neither"

    return Scripted(answer)


def measured(
    folder: Path, subject: Scripted, rows: int = 60, group: Any = None, slices: Any = None, **task: Any
) -> dict[str, Evaluation]:
    questions = Questions(rows, **{"metrics": ("exact_match", "chrf"), **task})
    questions.group, questions.slices = group or questions.group, slices or questions.slices
    evaluated(questions, subject, folder, name=folder.name)
    return load_evaluations(folder)  # as another process would


def compared(a: dict[str, Evaluation], b: dict[str, Evaluation], **settings: Any) -> Comparison:
    return compare(a, b, samples=300, confidence=0.95, **settings)


def test_a_better_model_is_found(tmp_path: Path) -> None:
    found = compared(measured(tmp_path / "base", answering(2)), measured(tmp_path / "tuned", answering(6)))
    exact = found.of("questions")["exact_match"]
    assert found.names == ("base", "tuned")
    assert exact.paired.difference == pytest.approx(20 / 60)
    assert (exact.won, exact.lost, exact.paired.n) == (20, 0, 60)
    assert exact.p_value == exact.paired.mcnemar_p == pytest.approx(2 * 0.5**20)
    assert exact.paired.low > 0.2
    assert list(found.of("questions")) == ["exact_match", "chrf"]
    assert found.of("questions")["chrf"].won is None  # of a whole corpus: rows have no score


def test_the_same_answers_are_no_difference(tmp_path: Path) -> None:
    found = compared(measured(tmp_path / "a", answering(3)), measured(tmp_path / "b", answering(3)))
    exact = found.of("questions")["exact_match"]
    assert (exact.paired.difference, exact.p_value, exact.p_adjusted) == (0.0, 1.0, 1.0)


def test_p_values_are_adjusted_for_all_tasks(tmp_path: Path) -> None:
    found = compared(measured(tmp_path / "base", answering(2)), measured(tmp_path / "tuned", answering(6)))
    assert [it.p_adjusted for it in found.differences] == holm([it.p_value for it in found.differences])
    assert found.differences[0].p_adjusted == 2 * found.differences[0].p_value


def test_rows_are_paired_by_what_they_ask(tmp_path: Path) -> None:
    """The same rows in another order, at other places: the same difference."""
    base, tuned = measured(tmp_path / "base", answering(2)), answering(6)
    backwards = Questions(60, metrics=("exact_match", "chrf"))
    forwards = backwards.windows

    def turned() -> Any:
        for window in forwards():
            yield [Item(f"other:{n}", it.prompt, it.references) for n, it in enumerate(window[::-1])]

    backwards.windows = turned  # type: ignore[method-assign]
    evaluated(backwards, tuned, tmp_path / "turned", name="turned")
    found = compared(base, load_evaluations(tmp_path / "turned")).of("questions")["exact_match"]
    straight = compared(base, measured(tmp_path / "tuned", answering(6))).of("questions")["exact_match"]
    assert (found.paired, found.won, found.lost) == (straight.paired, straight.won, straight.lost)


@pytest.mark.parametrize(("rows", "missing"), [(61, 0), (59, 1)])
def test_other_rows_are_refused(tmp_path: Path, rows: int, missing: int) -> None:
    base = measured(tmp_path / "base", answering(2))
    with pytest.raises(NotComparable, match=rf"questions: rows = 60: {missing} rows of base are not among those of"):
        compared(base, measured(tmp_path / "other", answering(2), rows=rows))


def test_another_way_of_asking_is_refused_by_its_name(tmp_path: Path) -> None:
    base, task = measured(tmp_path / "base", answering(2)), Questions(60)
    task.version = 2
    evaluated(task, answering(2), tmp_path / "other", name="other")
    with pytest.raises(NotComparable, match=r"base: questions: version = 1: other was asked with 2"):
        compared(base, load_evaluations(tmp_path / "other"))


def test_models_of_other_tasks_are_refused(tmp_path: Path) -> None:
    task = Questions(60)
    task.name = "others"
    evaluated(task, answering(2), tmp_path / "other", name="other")
    with pytest.raises(NotComparable, match=r"tasks = \['questions'\]: the other one has \['others'\]"):
        compared(measured(tmp_path / "base", answering(2)), load_evaluations(tmp_path / "other"))


def test_a_comparison_comes_back_from_its_file(tmp_path: Path) -> None:
    found = compared(measured(tmp_path / "base", answering(2)), measured(tmp_path / "tuned", answering(6)))
    save_comparisons([found], tmp_path)
    assert load_comparison(tmp_path) == found
    assert "pairs" not in (tmp_path / "comparison.json").read_text()
    assert load_comparison(tmp_path / "base") is None
    plain = json.loads(json.dumps(found.by_metric("questions")))
    assert set(plain["exact_match"]) == {"difference", "low", "high", "p_value", "mcnemar_p", "n", "standard_error"}


def test_whole_groups_are_resampled_where_rows_have_one(tmp_path: Path) -> None:
    fives = {"group": lambda number: f"passage {number // 5}", "rows": 60}
    base = measured(tmp_path / "base", answering(2), **fives)
    tuned = measured(tmp_path / "tuned", answering(6))  # groups that one side has are enough
    exact = compared(base, tuned).of("questions")["exact_match"]
    assert (exact.clusters, exact.paired.mcnemar_p, exact.paired.n) == (12, None, 60)
    assert exact.p_value == exact.paired.p_value
    alone = compared(measured(tmp_path / "alone", answering(2)), tuned).of("questions")["exact_match"]
    assert (alone.clusters, alone.paired.difference) == (None, exact.paired.difference)
    assert alone.paired.mcnemar_p is not None
    other = measured(tmp_path / "other", answering(6), group=lambda number: f"passage {number // 6}")
    with pytest.raises(
        NotComparable, match=r"questions: group of q:5 = 'passage 1': other has 'passage 0' for the same"
    ):
        compared(base, other)


def test_the_interval_of_a_score_is_of_whole_groups_too(tmp_path: Path) -> None:
    base = measured(tmp_path / "base", answering(2), group=lambda number: f"passage {number // 5}")["questions"]
    score, cluster_N = base.scores["exact_match"], np.arange(60) // 5
    assert (score.low, score.high) == interval(base.statistics["exact_match"], 100, 0.95, cluster_N=cluster_N)
    assert (score.low, score.high) != interval(base.statistics["exact_match"], 100, 0.95)


def test_one_group_alone_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    subject = answering(2)
    with pytest.raises(DataError, match=r"group = 'all': all 60 rows of questions are of this group"):
        measured(tmp_path / "one", subject, group=lambda number: "all")
    assert subject.asked == []


def language(number: int) -> dict[str, str]:
    return {"language": "de" if number % 3 else "en", "source": "rare" if number < 19 else "usual"}


def test_slices_are_compared_for_themselves(tmp_path: Path) -> None:
    base = measured(tmp_path / "base", answering(2), slices=language)
    tuned = measured(tmp_path / "tuned", answering(6), slices=language)
    found = compared(base, tuned, slices=("language", "source"))
    assert list(dict.fromkeys(it.slice for it in found.differences)) == [
        *(None, "language = de", "language = en", "source = usual")
    ]
    assert found.small == {"questions": {"source = rare": 19}}
    german = found.of("questions", "language = de")["exact_match"]
    rows = [place for place in range(60) if place % 3]
    scores = [side["questions"].samples for side in (base, tuned)]
    means = [sum(side[place].numbers["exact_match"][0] for place in rows) / 40 for side in scores]
    assert (german.paired.n, german.paired.difference) == (40, pytest.approx(means[1] - means[0]))
    assert (german.won, german.lost) == (20, 0)
    assert found.of("questions", "language = en")["exact_match"].paired.difference == 0.0
    own = [it for it in found.differences if it.slice]
    assert [it.p_adjusted for it in own] == holm([it.p_value for it in own])
    whole = [it for it in found.differences if not it.slice]
    assert [it.p_adjusted for it in whole] == holm([it.p_value for it in whole])
    assert whole == compared(base, tuned).differences  # they are no dearer for it
    with pytest.raises(FieldError, match=r"--slice = 'langauge': no row has it: did you mean 'language'"):
        compared(base, tuned, slices=("langauge",))
    with pytest.raises(FieldError, match=r"--slice = 'label': no row has it"):  # texts are no classes
        compared(base, tuned, slices=("label",))
    plain = measured(tmp_path / "plain", answering(6))  # a slice that one side has is enough
    assert [it.slice for it in compared(plain, base, slices=("language",)).differences] == [
        *(None, None, "language = de", "language = de", "language = en", "language = en")
    ]
    other = measured(tmp_path / "moved", answering(6), slices=lambda number: {"language": "fr"})
    with pytest.raises(NotComparable, match=r"slices\.language of q:0 = 'en': moved has 'fr' for the same question"):
        compared(base, other)


def test_every_set_can_be_cut_by_length(tmp_path: Path) -> None:
    found = compared(
        measured(tmp_path / "a", answering(2), 100), measured(tmp_path / "b", answering(6), 100), slices=ALL_SLICES
    )
    parts = {it.slice: it.paired.n for it in found.differences if it.slice}
    assert list(parts) == [f"length = {name}" for name in ("shortest quarter", "second quarter", "third quarter")]
    small = found.small["questions"]
    assert list(small) == ["length = longest quarter"]  # rows of equal length are in one quarter
    assert sum(parts.values()) + sum(small.values()) == 100


def test_of_one_class_only_means_of_rows_are_compared(tmp_path: Path) -> None:
    task = Questions(90, metrics=("accuracy", "f1_macro"))
    task.kind = "text-classification"
    task.compute = lambda items, outputs: {  # type: ignore[method-assign]
        name: partial(METRICS[name].compute, task.predictions(items, outputs), [it.references for it in items])
        for name in ("accuracy", "f1_macro")
    }
    for name, share in (("a", 2), ("b", 6)):
        evaluated(task, answering(share), tmp_path / name, name=name)
    found = compared(*(load_evaluations(tmp_path / name) for name in ("a", "b")), slices=("label", "length"))
    parts = [(it.slice, it.metric) for it in found.differences if it.slice]
    assert [it for it in parts if it[0].startswith("label")] == [
        ("label = yes", "accuracy"),
        ("label = no", "accuracy"),
    ]
    assert ("length = shortest quarter", "f1_macro") in parts


def test_rows_that_both_have_are_compared_on_request(tmp_path: Path) -> None:
    base, tuned = measured(tmp_path / "base", answering(2), 60), measured(tmp_path / "tuned", answering(6), 48)
    found = compared(base, tuned, rows="common")
    assert found.left_out == {"questions": (12, 0)}
    short = compared(measured(tmp_path / "short", answering(2), 48), tuned)
    assert found.differences == short.differences
    assert short.left_out == {}
    assert Comparison.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    task = Questions(60)
    task._item = lambda n: Item(f"x:{n}", f"another {n}", [right(n)])  # type: ignore[method-assign]
    evaluated(task, answering(2), tmp_path / "others", name="others")
    with pytest.raises(NotComparable, match=r"60 rows of base are not among those of others, the first is q:0"):
        compared(base, load_evaluations(tmp_path / "others"), rows="common")


def test_p_values_are_adjusted_over_all_models(tmp_path: Path) -> None:
    base, *others = (measured(tmp_path / name, answering(share)) for name, share in (("a", 2), ("b", 3), ("c", 7)))
    found = compare_all(base, others, samples=300, confidence=0.95)
    assert [it.names for it in found] == [("a", "b"), ("a", "c")]
    together = [it for comparison in found for it in comparison.differences]
    assert [it.p_adjusted for it in together] == holm([it.p_value for it in together])
    surest = min(together, key=lambda it: it.p_value)
    assert surest.p_adjusted == 4 * surest.p_value  # two metrics of two models


def test_as_many_tests_draw_enough_to_show_anything(tmp_path: Path) -> None:
    """Of 100 resamples no p-value is below 0.02, which six tests multiply."""
    base, tuned = (
        measured(tmp_path / name, answering(share), metrics=["chrf"]) for name, share in (("a", 2), ("b", 7))
    )
    found = compare_all(base, [tuned] * 6, samples=100, confidence=0.95)
    assert all(it.differences[0].verdict(0.05) == 1 for it in found)


def test_what_is_read_from_answers_otherwise_is_refused(tmp_path: Path) -> None:
    sides = []
    for name, scoring in (("a", {"exact_match": {"ignore_case": True}}), ("b", {}), ("c", {"chrf": {"order": 2}})):
        task = Questions(60, metrics=("exact_match", "chrf"))
        task.scoring = lambda scoring=scoring: scoring  # type: ignore[method-assign, misc]
        evaluated(task, answering(2), tmp_path / name, name=name)
        sides.append(load_evaluations(tmp_path / name))
    with pytest.raises(NotComparable, match=r"a: questions: exact_match: ignore_case = True: b was scored with None"):
        compared(*sides[:2])
    with pytest.raises(NotComparable, match=r"b: questions: chrf: order = None: c was scored with 2"):
        compared(*sides[1:])
    only = measured(tmp_path / "only", answering(2), metrics=["chrf"])
    assert list(compared(sides[0], only).of("questions")) == ["chrf"]  # of what both have, all is read alike
    with pytest.raises(NotComparable, match=r"questions: metrics = 'chrf': rest has exact_match"):
        compared(only, measured(tmp_path / "rest", answering(2), metrics=["exact_match"]))


def test_how_answers_are_scored_asks_nothing_again(tmp_path: Path) -> None:
    measured(tmp_path / "a", answering(2))
    task, subject = Questions(60), answering(2)
    task.scoring = lambda: {"exact_match": {"ignore_case": True}}  # type: ignore[method-assign]
    found = evaluated(task, subject, tmp_path / "a", name="a")
    assert (subject.asked, found.asked["scores"]) == ([], {"exact_match": {"ignore_case": True}})


def test_the_smallest_difference_that_shows_is_told(tmp_path: Path) -> None:
    found = compared(measured(tmp_path / "base", answering(2)), measured(tmp_path / "tuned", answering(6)))
    exact, chrf = found.differences
    assert exact.detectable == pytest.approx(detectable_difference(60, 20 / 60), rel=1e-6)
    assert chrf.paired.standard_error is not None
    assert chrf.detectable == pytest.approx(2.8016 * chrf.paired.standard_error, rel=1e-4)
    strict = compared(
        measured(tmp_path / "base", answering(2)), measured(tmp_path / "tuned", answering(6)), alpha=0.001
    )
    assert strict.alpha == 0.001
    assert strict.differences[0].detectable > exact.detectable
    same = compared(measured(tmp_path / "base", answering(2)), measured(tmp_path / "again", answering(2)))
    assert same.of("questions")["chrf"].detectable is None  # nothing changed: nothing is known of how much could


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
