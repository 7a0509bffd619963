"""Tags that make entities, and the best stretch of a context."""

import random

import pytest
import torch
from seqeval.metrics.sequence_labeling import get_entities

from ingot.model.pointing import best_spans, entities_of


@pytest.mark.parametrize("marks", ["BI", "BIES"])
def test_entities_are_those_of_the_measured_scores(marks: str) -> None:
    draw = random.Random(3)
    labels = ["O", *(f"{mark}-{kind}" for mark in marks for kind in ("person", "city"))]
    for _ in range(300):
        tags = [draw.choice(labels) for _ in range(draw.randrange(1, 9))]
        spans = [(3 * place, 3 * place + 2) for place in range(len(tags))]
        found = entities_of(tags, [0.5] * len(tags), spans, labels)
        wanted = [(kind, 3 * first, 3 * last + 2) for kind, first, last in get_entities(tags)]
        assert [(it.type, it.start, it.end) for it in found] == wanted, tags


def test_scores_are_means_over_words() -> None:
    [found] = entities_of(["O", "B-city", "I-city"], [1.0, 0.5, 0.75], [(0, 2), (3, 6), (7, 11)], ["O", "B-city"])
    assert found == ("city", 3, 11, 0.625)


def test_without_marks_every_word_with_a_tag_is_one() -> None:
    found = entities_of(["NOUN", "O", "NOUN", "NOUN"], [0.5] * 4, [(0, 1), (2, 3), (4, 5), (6, 7)], ["NOUN", "O"])
    assert [(it.type, it.start) for it in found] == [("NOUN", 0), ("NOUN", 4), ("NOUN", 6)]


def logits(first: list[float], last: list[float]) -> torch.Tensor:
    return torch.tensor([first, last]).T.unsqueeze(0)


def chosen(first: list[float], last: list[float], context: list[int], longest: int, row: int = 6) -> tuple[int, int]:
    row_BT = torch.arange(6).unsqueeze(0) < row
    context_BT = torch.tensor([[place in context for place in range(6)]])
    score, begin, end = best_spans(logits(first, last), row_BT, context_BT, longest)
    assert score.item() < 0 or not context
    return int(begin), int(end)


def test_the_likeliest_stretch() -> None:
    assert chosen([0, 0, 9, 0, 0, 0], [0, 0, 0, 9, 0, 0], [1, 2, 3, 4], 3) == (2, 3)
    # The last token never comes before the first, nor further behind than the limit lets it.
    assert chosen([0, 0, 0, 9, 5, 0], [0, 0, 9, 0, 4, 0], [1, 2, 3, 4], 3) == (3, 4)
    assert chosen([0, 9, 0, 0, 0, 0], [0, 0, 0, 3, 9, 0], [1, 2, 3, 4], 3) == (1, 3)
    assert chosen([0, 9, 0, 0, 0, 0], [0, 0, 0, 3, 9, 0], [1, 2, 3, 4], 4) == (1, 4)
    # Neither the question nor padding answers.
    assert chosen([9, 0, 1, 0, 0, 9], [9, 0, 2, 0, 0, 9], [1, 2, 3, 4], 3) == (2, 2)


def test_padding_takes_no_share() -> None:
    row_BT, context_BT = (
        torch.tensor([[True] * 4 + [False] * 2]),
        torch.tensor([[False, True, True, True, False, False]]),
    )
    even = logits([0, 0, 0, 0, 50, 50], [0, 0, 0, 0, 50, 50])
    score, _, _ = best_spans(even, row_BT, context_BT, 3)
    assert score.item() == pytest.approx(2 * torch.tensor(0.25).log().item(), abs=1e-5)


def test_a_window_without_context_has_no_answer() -> None:
    nothing = torch.zeros(1, 4, 2)
    score, _, _ = best_spans(nothing, torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool), 3)
    assert score.item() == -torch.inf
