"""Entities counted by row: their sums are seqeval's scores of the whole."""

import random

import numpy as np
import pytest
import seqeval.scheme
from seqeval.metrics import f1_score, precision_score, recall_score

from ingot.errors import IngotError
from ingot.evaluation.entities import (
    entities_of,
    entities_undefined,
    entity_counts,
    f1_of,
    precision_of,
    recall_of,
    share_of,
    statistics_of_tags,
    tag_counts,
)
from ingot.evaluation.metrics import OF_TASK, statistic_of

TAGS = ("O", "O", "B-place", "I-place", "B-person", "I-person")


def random_tags(n: int, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of predicted and of right tags, broken entities (I- after O) among them."""
    draw = random.Random(seed)
    right = [[draw.choice(TAGS) for _ in range(draw.randint(1, 12))] for _ in range(n)]
    return [[tag if draw.random() < 0.7 else draw.choice(TAGS) for tag in row] for row in right], right


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_rows_are_seqeval_s_whole(seed: int) -> None:
    predicted, right = random_tags(40, seed)
    sums = entity_counts(predicted, right).sum(0)
    assert f1_of(sums) == pytest.approx(f1_score(right, predicted))
    assert precision_of(sums) == pytest.approx(precision_score(right, predicted))
    assert recall_of(sums) == pytest.approx(recall_score(right, predicted))


def test_an_entity_counts_with_its_words_and_type() -> None:
    right = [["B-place", "I-place", "O", "B-person"]]
    assert entity_counts([["B-place", "I-place", "O", "B-place"]], right).tolist() == [[1, 2, 2]]
    assert entity_counts([["B-place", "O", "O", "O"]], right).tolist() == [[0, 1, 2]]
    assert entity_counts([["O"] * 4], right).tolist() == [[0, 0, 2]]


def test_nothing_found_is_a_score_of_zero() -> None:
    sums = np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert f1_of(sums).tolist() == precision_of(sums).tolist() == recall_of(sums).tolist() == [0.0, 0.0]


def test_tags_are_weighted_by_words() -> None:
    counts = tag_counts([["O"], ["O", "B-x", "O"]], [["O"], ["O", "O", "O"]])
    assert share_of(counts.sum(0)) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        ([["O B-place I-place"], ["O"]], None),
        ([["S-x E-x U-x L-x"]], None),
        ([["NOUN VERB"]], "the tag 'NOUN' neither begins nor continues an entity"),
        ([["O O"]], "no row has an entity"),
    ],
)
def test_other_tags_are_no_entities(references: list[list[str]], reason: str | None) -> None:
    found = entities_undefined(references)
    assert found is None if reason is None else found is not None and found.startswith(reason)


# --- by type, strict ---

SCORES = {"f1": f1_score, "precision": precision_score, "recall": recall_score}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("average", ["macro", "weighted", ""])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_of_tags_is_seqeval_s(score: str, average: str, seed: int) -> None:
    predicted, right = random_tags(40, seed)
    name = f"entity_{score}" + (f"_{average}" if average else "")
    for mode, scheme in (("lenient", None), ("strict", "IOB2")):
        compute = statistics_of_tags(predicted, right, mode, scheme)
        assert set(compute) == set(OF_TASK["token-classification"])
        own = {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)} if scheme else {}
        expected = SCORES[score](right, predicted, average=average or "micro", zero_division=0, **own)
        computed = compute[name]()
        assert computed.value() == pytest.approx(expected, abs=1e-12)
        assert statistic_of(name, computed.rows, computed.details).value() == computed.value()
        rows = np.random.default_rng(seed).integers(0, 40, 40)
        drawn = [[side[row] for row in rows] for side in (right, predicted)]
        expected = SCORES[score](*drawn, average=average or "micro", zero_division=0, **own)
        assert float(computed.value_of(computed.rows[rows].sum(0))) == pytest.approx(expected, abs=1e-12)


def test_entities_are_type_first_word_and_last_word() -> None:
    tags = ["B-place", "I-place", "O", "B-person", "B-person"]
    expected = {("place", 0, 1), ("person", 3, 3), ("person", 4, 4)}
    assert entities_of(tags) == entities_of(tags, "strict", "IOB2") == expected


def test_lenient_and_strict_may_be_far_apart_so_the_details_tell() -> None:
    predicted, right = [["I-place", "I-place"]], [["B-place", "I-place"]]
    lenient = statistics_of_tags(predicted, right)["entity_f1"]()
    strict = statistics_of_tags(predicted, right, "strict")["entity_f1"]()
    assert (lenient.value(), strict.value()) == (1.0, 0.0)
    assert (lenient.details["mode"], lenient.details["scheme"]) == ("lenient", "conlleval")
    assert (strict.details["mode"], strict.details["scheme"]) == ("strict", "IOB2")
    assert strict.details["seqeval"]


def test_schemes_that_do_not_fit() -> None:
    with pytest.raises(IngotError, match="the scheme 'IOB3' is unknown: did you mean 'IOB"):
        statistics_of_tags([["O"]], [["O"]], "strict", "IOB3")
    with pytest.raises(IngotError, match="a tag is none of IOB2"):
        statistics_of_tags([["S-x"]], [["B-x"]], "strict", "IOB2")["entity_f1"]()
    with pytest.raises(IngotError, match="the tags fit no scheme"):
        statistics_of_tags([["NOUN"]], [["NOUN"]], "strict")
