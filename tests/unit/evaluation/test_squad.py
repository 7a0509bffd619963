"""SQuAD's comparison of answers."""

import pytest

from ingot.evaluation.squad import exact, plain, word_f1


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
