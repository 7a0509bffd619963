"""Training, validation and test rows. What is missing is drawn from the training rows with `data.split_seed`.

A drawn part is a shuffled sample (a file is often sorted by class or date, so its end is no sample of it), in
proportion to the labels, and rows with the same input stay together: a question that stands on both sides would
measure memory.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingot.data.conversation import (
    Conversation,
    Document,
    Example,
    Labeled,
    PromptCompletion,
    required_columns,
    to_example,
)
from ingot.data.sources import BadRow, Row, read_rows
from ingot.errors import DataError
from ingot.recipe import Data, Objective, Recipe, Source
from ingot.registry import nearest

LISTED_BAD_ROWS = 5


@dataclass(frozen=True)
class DataReport:
    """What was read: rows per part, where each part is from, the bad rows, and inputs shared with training."""

    counts: dict[str, int]
    origins: dict[str, str]
    """`given`, or `drawn from train`."""
    bad_rows: dict[str, list[BadRow]]
    """Part that was read -> its unusable rows."""
    shared_with_train: dict[str, int] = field(default_factory=dict)
    """validation, test -> rows whose input also stands in train. 0 for a drawn part."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "counts": dict(self.counts),
            "origins": dict(self.origins),
            "bad_rows": {
                part: [{"where": bad.where, "reason": bad.reason} for bad in rows]
                for part, rows in self.bad_rows.items()
            },
            "shared_with_train": dict(self.shared_with_train),
        }


@dataclass(frozen=True)
class Splits:
    """The rows of a run. `labels`: sorted class names of train, empty unless the task is classification."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    report: DataReport


def load_splits(recipe: Recipe, folder: Path) -> Splits:
    """Read and draw all three parts; relative paths start at `folder`.

    Raises `DataError` for unreadable or empty data, a missing column, more than `data.max_bad_rows` bad rows, and a
    label that training never saw.
    """
    data = recipe.data
    parts: dict[str, list[Example]] = {}
    bad: dict[str, list[BadRow]] = {}
    for name, source in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if source is not None:
            parts[name], bad[name] = _read(source, folder, f"data.{name}", data, recipe.objective)
    _check_bad_rows(bad, data.max_bad_rows)
    for name, rows in parts.items():
        if not rows:
            raise DataError(f"data.{name}.uri", getattr(data, name).uri, "holds no usable row; name a file with rows")

    origins = {name: "given" if name in parts else "drawn from train" for name in ("train", "validation", "test")}
    train = parts["train"]
    # Test first, so that changing validation_share leaves the test rows as they are.
    for name, share in (("test", data.test_share), ("validation", data.validation_share)):
        if name not in parts:
            wanted = max(1, round(share * len(parts["train"]))) if share > 0 else 0
            parts[name], train = _draw(train, wanted, f"{data.split_seed} {name}")
            if share > 0 and not parts[name]:
                fix = (
                    f"{len(parts['train'])} rows hold too few distinct inputs to draw from; add rows or set data.{name}"
                )
                raise DataError(f"data.{name}_share", share, fix)
    if data.max_train_rows is not None:
        train = _sample(train, data.max_train_rows, data.split_seed)

    labels = tuple(sorted({row.label for row in train if isinstance(row, Labeled)}))
    _check_labels(parts, labels, data)
    seen = {_input_of(row) for row in train}
    shared = {name: sum(_input_of(row) in seen for row in parts[name]) for name in ("validation", "test")}
    counts = {"train": len(train), "validation": len(parts["validation"]), "test": len(parts["test"])}
    return Splits(train, parts["validation"], parts["test"], labels, DataReport(counts, origins, bad, shared))


# --- reading ---------------------------------------------------------------------------------------------------


def _read(
    source: Source, folder: Path, field_name: str, data: Data, objective: Objective
) -> tuple[list[Example], list[BadRow]]:
    examples: list[Example] = []
    bad: list[BadRow] = []
    absent = dict(required_columns(data, objective.task))
    last: Row | None = None
    for row in read_rows(source, folder, field_name):
        result: Example | BadRow = row if isinstance(row, BadRow) else to_example(row, data, objective)
        if isinstance(row, Row):
            last = row
            if absent:
                absent = {name: column for name, column in absent.items() if column not in row.values}
        if isinstance(result, BadRow):
            bad.append(result)
        else:
            examples.append(result)
    if absent and last is not None:  # no row has the column: a mistake of the recipe, not of the rows
        name, column = next(iter(absent.items()))
        present = [str(key) for key in last.values]
        hint = nearest(column, present)
        listed = "" if hint.startswith("use one of") else f"; the columns are: {', '.join(present)}"
        fix = f"{field_name}.uri = {source.uri!r} has no such column; {hint}{listed}"
        raise DataError(name, column, fix, where=last.where)
    return examples, bad


def _check_bad_rows(bad: dict[str, list[BadRow]], tolerated: int) -> None:
    rows = [row for part in bad.values() for row in part]
    if len(rows) <= tolerated:
        return
    listed = "".join(f"\n  {row.where}: {row.reason}" for row in rows[:LISTED_BAD_ROWS])
    more = f"\n  and {len(rows) - LISTED_BAD_ROWS} more" if len(rows) > LISTED_BAD_ROWS else ""
    fix = f"{len(rows)} rows cannot be used; mend them, or set data.max_bad_rows: {len(rows)} to go on without them:"
    raise DataError("data.max_bad_rows", tolerated, f"{fix}{listed}{more}", where=rows[0].where)


def _check_labels(parts: dict[str, list[Example]], labels: Sequence[str], data: Data) -> None:
    known = set(labels)
    for name in ("validation", "test"):
        for row in parts[name]:
            if isinstance(row, Labeled) and row.label not in known:
                fix = f"training never saw this label ({nearest(row.label, labels)}); mend it or add such rows to train"
                if data.max_train_rows is not None:
                    fix += f" (data.max_train_rows = {data.max_train_rows} leaves rows out)"
                raise DataError(f"data.{name}: label", row.label, fix, where=row.where)


# --- drawing ---------------------------------------------------------------------------------------------------


def _input_of(row: Example) -> str:
    """What the model is given, in a form in which repeats are equal: case and blanks do not make a new question."""
    if isinstance(row, Conversation):
        given: Iterable[str] = (f"{turn.role}: {turn.content}" for turn in row.messages if turn.role != "assistant")
        text = "\n".join(given)
    elif isinstance(row, PromptCompletion):
        text = row.prompt
    elif isinstance(row, Document | Labeled):
        text = row.text
    return " ".join(text.casefold().split())


def _label_of(row: Example) -> str:
    return row.label if isinstance(row, Labeled) else ""


def _draw(rows: list[Example], wanted: int, seed: str) -> tuple[list[Example], list[Example]]:
    """Draw about `wanted` rows, whole groups of equal input, in proportion to labels: (drawn, rest), in file order.

    No label loses its last row, so the rest is never empty and knows every label.
    """
    if wanted == 0:
        return [], list(rows)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[_input_of(row)].append(index)
    order = sorted(groups)  # not the file's order: the same rows in another order make the same split
    random.Random(seed).shuffle(order)
    left = Counter(map(_label_of, rows))
    quotas = _quotas(left, wanted)
    drawn: set[int] = set()

    def take(key: str, room: int) -> None:
        members = groups[key]
        lost = Counter(_label_of(rows[index]) for index in members)
        if len(members) <= room and members[0] not in drawn and all(left[label] > lost[label] for label in lost):
            drawn.update(members)
            left.subtract(lost)
            quotas.subtract(lost)

    for key in order:
        take(key, room=quotas[_label_of(rows[groups[key][0]])])
    for key in order:  # what the quotas left over: labels of a single row, groups larger than their quota
        take(key, room=wanted - len(drawn))
    for key in sorted(order, key=lambda key: len(groups[key])):  # every group is larger than `wanted`
        if not drawn:
            take(key, room=len(rows))
    chosen = [row for index, row in enumerate(rows) if index in drawn]
    return chosen, [row for index, row in enumerate(rows) if index not in drawn]


def _quotas(sizes: Counter[str], wanted: int) -> Counter[str]:
    """Share `wanted` rows among labels by size: whole parts first, then the largest remainders."""
    total = sizes.total()
    exact = {label: wanted * size / total for label, size in sizes.items()}
    quotas = Counter({label: int(value) for label, value in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (quotas[label] - exact[label], label))
    quotas.update(by_remainder[: wanted - quotas.total()])
    return quotas


def _sample(rows: list[Example], wanted: int, seed: int) -> list[Example]:
    """`wanted` rows in file order, one of every label before a second of any."""
    order = list(range(len(rows)))
    random.Random(f"{seed} train").shuffle(order)
    seen: set[str] = set()
    first: list[int] = []
    others: list[int] = []
    for index in order:
        (others if (label := _label_of(rows[index])) in seen else first).append(index)
        seen.add(label)
    return [rows[index] for index in sorted([*first, *others][:wanted])]
