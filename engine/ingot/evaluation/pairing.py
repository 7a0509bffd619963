"""Rows of two evaluations that ask the same, their clusters and slices; what is not comparable is refused."""

# N rows that both evaluations have

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ingot.errors import FieldError
from ingot.evaluation.judge_metrics import JUDGED
from ingot.evaluation.result import Evaluation
from ingot.evaluation.samples import Sample
from ingot.evaluation.statistic import Array
from ingot.evaluation.statistics import cluster_numbers
from ingot.registry import nearest

FROM_ROWS = ("documents", "rows")  # of `asked`: what follows from the rows, which are compared one by one
SCORES = "scores"  # of `asked`: how each metric reads answers, of which only metrics that both have must agree
BUILT_IN = LABEL, LENGTH = "label", "length"  # slices that need no column: the right class, quarters by prompts' length
ALL_SLICES = ("all",)
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
Kept = Literal["same", "common"]
"""Which rows are compared. same: all, and both must have the same. common: those that both have."""


class NotComparable(FieldError):
    """Two evaluations that asked different things: the message names what, and both values."""


class Facts(NamedTuple):
    """What pairing needs of a row."""

    id: str
    document: str
    group: str | None
    slices: Mapping[str, str]
    label: str | None
    length: int


@dataclass(frozen=True)
class Pairs:
    """Rows that ask the same: their places in the first and in the second evaluation, [N] int each.

    `left_out`: rows of the first and of the second that the other has not. `clusters` [N] int: 0 to C - 1, None where
    rows are independent. `slices`: field -> value -> places [M] int among the N. `fields`: all that could be cut by.
    """

    first: Array
    second: Array
    left_out: tuple[int, int] = (0, 0)
    clusters: Array | None = None
    slices: dict[str, dict[str, Array]] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)


def pair(a: Evaluation, b: Evaluation, wanted: Sequence[str], kept: Kept = "same") -> Pairs:
    """Pair rows by what they ask and expect, not by where they stand; equal questions are paired in order.

    `wanted`: fields by which rows are cut, ALL_SLICES for every one; what no row has is passed over.

    Raises NotComparable where rows differ (with `kept` common, where none is shared), and where the two give a row
    another group or slice.
    """
    ours, theirs = (_facts(it) for it in (a, b))
    order = _order([it.document for it in ours], [it.document for it in theirs])
    first = [place for place, other in enumerate(order) if other is not None]
    second = [other for other in order if other is not None]
    left_out = len(ours) - len(first), len(theirs) - len(second)
    if not first or (kept == "same" and any(left_out)):
        raise _other_rows(a, b, left_out, next((ours[i].id for i, it in enumerate(order) if it is None), None), kept)
    rows = [_merged(a, b, ours[i], theirs[j]) for i, j in zip(first, second, strict=True)]
    names = dict.fromkeys([*(name for it in rows for name in it.slices), *BUILT_IN])
    fields = {name: values for name in names if (values := _values(name, rows)) is not None}
    asked = fields if tuple(wanted) == ALL_SLICES else {name: fields[name] for name in wanted if name in fields}
    slices = {name: _parts(values) for name, values in asked.items()}
    return Pairs(np.asarray(first), np.asarray(second), left_out, _clusters(a, b, rows), slices, list(fields))


def slice_name(name: str, value: str) -> str:
    """What a slice is called: `language = de`."""
    return f"{name} = {value}"


def built_in_slices(evaluation: Evaluation, name: str) -> dict[str, list[int]]:
    """Value -> places of a field that is not stored but known of every row."""
    values = _values(name, _facts(evaluation))
    return {value: places.tolist() for value, places in _parts(values or []).items()}


def require_same_question(a: Evaluation, b: Evaluation) -> None:
    """Raise NotComparable where the two were asked otherwise; rows are not looked at."""
    for key in sorted({*a.asked, *b.asked} - {*FROM_ROWS, SCORES}):
        ours, theirs = a.asked.get(key), b.asked.get(key)
        if ours != theirs:
            fix = f"{b.name} was asked with {theirs!r}; evaluate both the same way to compare them"
            raise NotComparable(f"{a.task}: {key}", ours, fix, where=a.name)


def _require_same_judge(a: Evaluation, b: Evaluation, metrics: Sequence[str]) -> None:
    for metric in (it for it in metrics if it in JUDGED):
        for key in ("judges", "rubric", "scale"):
            ours, theirs = (it.scores[metric].details.get(key) for it in (a, b))
            if ours != theirs:
                fix = f"{b.name} was judged with {theirs!r}; have both judged by the same"
                raise NotComparable(f"{a.task}: {metric}: {key}", ours, fix, where=a.name)


def common_metrics(a: Evaluation, b: Evaluation) -> list[str]:
    """Metrics that both have. Raises NotComparable when there is none, or when one was not read from answers alike."""
    common = [metric for metric in a.statistics if metric in b.statistics]
    if not common:
        fix = f"{b.name} has {', '.join(b.statistics)}; score both by the same metrics (no answer is asked for again)"
        raise NotComparable(f"{a.task}: metrics", ", ".join(a.statistics), fix, where=a.name)
    _require_same_judge(a, b, common)
    for metric in common:
        ours, theirs = (it.asked.get(SCORES, {}).get(metric, {}) for it in (a, b))
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                fix = f"{b.name} was scored with {theirs.get(name)!r}; evaluate both by the same task file"
                fix += " (no answer is asked for again)"
                raise NotComparable(f"{a.task}: {metric}: {name}", ours.get(name), fix, where=a.name)
    return common


def unknown_slice(name: str, known: Sequence[str]) -> FieldError:
    """A field of slices that no row has."""
    fix = f"no row has it: {nearest(name, known)}; others are columns that evaluate.slices, or slices of a task file,"
    return FieldError("--slice", name, f"{fix} names when models are measured")


def _facts(evaluation: Evaluation) -> list[Facts]:
    classes = evaluation.kind == "text-classification"

    def of(row: Sample) -> Facts:
        label = row.references[0] if classes and row.references else None
        return Facts(row.id, row.document, row.group, row.slices, label, len(row.prompt))

    return [of(row) for row in evaluation.samples]


def _order(ours: Sequence[str], theirs: Sequence[str]) -> list[int | None]:
    """For each of our documents, where it stands among theirs; equal ones are taken in order."""
    places: dict[str, list[int]] = {}
    for number, document in enumerate(theirs):
        places.setdefault(document, []).append(number)
    waiting: dict[str, Iterator[int]] = {document: iter(found) for document, found in places.items()}
    return [next(waiting.get(document, iter(())), None) for document in ours]


def _other_rows(
    a: Evaluation, b: Evaluation, left_out: tuple[int, int], missing: str | None, kept: Kept
) -> NotComparable:
    first = f", the first is {missing}" if missing else ""
    fix = f"{left_out[0]} rows of {a.name} are not among those of {b.name}{first}, which has {left_out[1]} others; "
    fix += "evaluate both on the same rows" + (
        "" if kept == "common" else ", or compare those that both have: --rows common"
    )
    return NotComparable(f"{a.task}: rows", len(a.samples), fix, where=a.name)


def _merged(a: Evaluation, b: Evaluation, ours: Facts, theirs: Facts) -> Facts:
    """What is known of a row from either side: groups and slices may have been named for one of them only."""
    marks = [("group", ours.group, theirs.group)]
    marks += [(f"slices.{name}", value, theirs.slices.get(name)) for name, value in ours.slices.items()]
    for name, mine, other in marks:
        if mine is not None and other is not None and mine != other:
            fix = f"{b.name} has {other!r} for the same question ({theirs.id}); evaluate both again with the same rows"
            raise NotComparable(f"{a.task}: {name} of {ours.id}", mine, fix, where=a.name)
    return ours._replace(group=ours.group or theirs.group, slices={**theirs.slices, **ours.slices})


def _clusters(a: Evaluation, b: Evaluation, rows: Sequence[Facts]) -> Array | None:
    """The cluster of every row; None where rows are independent."""
    found = cluster_numbers([it.group for it in rows])
    if found is not None and not found.any():
        fix = f"all rows of {a.name} and {b.name} are of one group, so nothing independent is there to resample"
        raise NotComparable(f"{a.task}: group", rows[0].group, fix, where=a.name)
    return found


def _values(name: str, rows: Sequence[Facts]) -> list[str | None] | None:
    """Each row's value of a field; None where no row has one."""
    found: list[str | None]
    if any(name in it.slices for it in rows):
        found = [it.slices.get(name) for it in rows]
    elif name == LABEL:
        found = [it.label for it in rows]
    elif name == LENGTH:
        found = list(_quarters([it.length for it in rows]))
    else:
        return None
    return found if any(value is not None for value in found) else None


def _quarters(lengths: Sequence[int]) -> Iterator[str]:
    """Which quarter of the rows each is in; rows of equal length are in one."""
    edges = np.quantile(lengths, [0.25, 0.5, 0.75])
    yield from (QUARTERS[int(place)] for place in np.searchsorted(edges, lengths, side="left"))


def _parts(values: Sequence[str | None]) -> dict[str, Array]:
    places: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        if value is not None:
            places.setdefault(value, []).append(place)
    names = [*(name for name in QUARTERS if name in places), *sorted(places, key=lambda name: -len(places[name]))]
    return {name: np.asarray(places[name]) for name in names}
