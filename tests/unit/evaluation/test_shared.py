"""Rows that groups of ranks answer at the same time: each its share, all of them on every rank."""

import contextlib
from typing import Any

import pytest

from ingot.errors import DataError, IngotError
from ingot.evaluation.samples import Item
from ingot.evaluation.shared import Shared

ITEMS = [Item(str(n), "", [""], n) for n in range(7)]


class Squares:
    """Answers a number by its square; the given one cannot be answered."""

    name, kind = "squares", "text-generation"

    def __init__(self, fails: int | None = None) -> None:
        self.fails, self.asked = fails, []

    def answer(self, subject: Any, items: Any) -> list[dict[str, Any]]:
        self.asked += [item.request for item in items]
        if self.fails in self.asked:
            raise DataError("row", self.fails, "cannot be squared")
        return [{"text": item.request**2} for item in items]


def sent(groups: list[int], n: int, fails: int | None = None) -> tuple[list[Any], list[list[int]]]:
    """What the ranks of `groups` send, and what each was asked."""
    values, asked = [], []
    for group in groups:
        task: Any = Squares(fails)

        def note(value: Any) -> list[Any]:
            values.append(value)
            return [value]

        with contextlib.suppress(DataError):
            Shared(task, group, n, note).answer(None, ITEMS)  # type: ignore[arg-type]
        asked.append(task.asked)
    return values, asked


@pytest.mark.parametrize("groups", [[0], [0, 1, 2], [0, 0, 1, 1]], ids=["alone", "three", "two of two ranks"])
def test_every_rank_gets_all_answers_in_order(groups: list[int]) -> None:
    n = max(groups) + 1
    values, asked = sent(groups, n)
    assert sorted({row for rows in asked for row in rows}) == list(range(7))
    assert [rows == list(range(7))[group::n] for rows, group in zip(asked, groups, strict=True)] == [True] * len(groups)
    for group in groups:
        task: Any = Squares()
        found = Shared(task, group, n, lambda _: values).answer(None, ITEMS)  # type: ignore[arg-type]
        assert [it["text"] for it in found] == [n**2 for n in range(7)]


def test_a_rank_that_cannot_answer_is_heard_by_all() -> None:
    values, _ = sent([0, 1], 2, fails=3)
    for group, kind in ((0, IngotError), (1, DataError)):
        task: Any = Squares(3)
        with pytest.raises(kind, match="row = 3: cannot be squared"):
            Shared(task, group, 2, lambda _: values).answer(None, ITEMS)  # type: ignore[arg-type]
