"""Entities counted by row: their sums are seqeval's scores of the whole."""

import random

import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score

from ingot.evaluation.entities import (
    entities_undefined,
    entity_counts,
    f1_of,
    precision_of,
    recall_of,
    share_of,
    tag_counts,
)

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
