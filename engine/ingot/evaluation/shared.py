"""A task whose rows several ranks answer together, each its share: for a model that is on all of them anyway."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ingot.errors import IngotError
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.task import Compute, Subject, Task

Gather = Callable[[Any], list[Any]]
"""This rank's value -> those of all ranks, in their order."""


class Shared:
    """`task`, of which this rank belongs to group `group` of `groups`; ranks of one group answer the same rows.

    `gather` is called once for every portion, by all ranks. Where one cannot answer, all raise its IngotError.
    """

    def __init__(self, task: Task, group: int, groups: int, gather: Gather) -> None:
        self._task, self._group, self._groups, self._gather = task, group, groups, gather
        self.name, self.kind = task.name, task.kind

    def asked(self) -> dict[str, Any]:
        """As the task says."""
        return self._task.asked()

    def scoring(self) -> dict[str, Any]:
        """As the task says."""
        return self._task.scoring()

    def windows(self) -> Iterator[list[Item]]:
        """All rows, on every rank."""
        return self._task.windows()

    def size(self, item: Item) -> int:
        """As the task says."""
        return self._task.size(item)

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """As the task says."""
        return self._task.texts()

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[Output]:
        """Every `groups`-th row here, the others by other ranks: of rows sorted by length all get some of each."""
        own: IngotError | None = None
        mine: list[Output] = []
        try:
            mine = self._task.answer(subject, items[self._group :: self._groups])
        except IngotError as error:  # said to all: a rank that left would leave the others waiting
            own = error
        found: list[Output] = [{} for _ in items]
        for group, outputs, problem in self._gather((self._group, mine, None if own is None else str(own))):
            if own is not None:
                raise own
            if problem is not None:
                raise IngotError(problem)
            found[group :: self._groups] = outputs
        return found

    def predictions(self, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[str]:
        """As the task says."""
        return self._task.predictions(items, outputs)

    def metrics(self, items: Sequence[Item]) -> list[str]:
        """As the task says."""
        return self._task.metrics(items)

    def compute(self, items: Sequence[Item], outputs: Sequence[Output]) -> Compute:
        """As the task says."""
        return self._task.compute(items, outputs)
