"""The best stretch of a context, and SQuAD's comparison of answers."""

import pytest
import torch

from ingot.evaluation.answers import best_spans, exact, plain, word_f1


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f1"),
    [
        ("The Eiffel Tower!", ["Eiffel tower"], 1.0, 1.0),
        ("a tower", ["Eiffel tower"], 0.0, 2 / 3),
        ("tower tower", ["tower"], 0.0, 2 / 3),
        ("Paris", ["London", "in Paris", "paris."], 1.0, 1.0),
        ("Rome", ["London", "in Paris"], 0.0, 0.0),
        ("", [""], 1.0, 1.0),  # no answer, and none said
        ("Rome", [""], 0.0, 0.0),
        ("", ["Rome"], 0.0, 0.0),
        ("the", ["an"], 1.0, 1.0),  # nothing but articles: equal, as SQuAD has it
    ],
)
def test_squad(prediction: str, references: list[str], em: float, f1: float) -> None:
    assert exact(prediction, references) == em
    assert word_f1(prediction, references) == pytest.approx(f1)


def test_articles_are_words_of_their_own() -> None:
    assert plain("  The  theatre, an anthem and A-level ") == "theatre anthem and alevel"


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
