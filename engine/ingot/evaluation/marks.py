"""What a row belongs to: its cluster and its slices, read from columns that the task itself does not use."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ingot.data.example import Example
from ingot.data.sources import Row
from ingot.data.splits import Scan, examples_of_rows
from ingot.errors import DataError
from ingot.recipe import Recipe
from ingot.registry import nearest


class Marked(NamedTuple):
    """A row that is measured; `group` and `slices` as `Item` has them."""

    example: Example
    group: str | None = None
    slices: Mapping[str, str] = {}


def marked(row: Row, example: Example, recipe: Recipe) -> Marked:
    """`example` with what `evaluate.cluster_by` and `evaluate.slices` name. Raises DataError where it is not there."""
    section, names = recipe.evaluate, recipe.data.columns
    values = dict(row.values) | {name: row.values[column] for name, column in names.items() if column in row.values}
    group = None
    if section.cluster_by is not None:
        group = column_text("evaluate.cluster_by", section.cluster_by, values, row.where)
    slices = {name: column_text("evaluate.slices", name, values, row.where) for name in section.slices}
    return Marked(example, group, slices)


def column_text(field: str, name: str, values: Mapping[str, Any], where: str) -> str:
    """The text or number in a column that `field` names. Raises DataError where there is none."""
    if name not in values:
        raise no_column(field, name, values, where)
    if values[name] is None or isinstance(values[name], list | dict):
        raise DataError(field, name, f"must hold a text or number, and is {values[name]!r}", where=where)
    return str(values[name])


def no_column(field: str, name: str, values: Mapping[str, Any], where: str) -> DataError:
    """A row, of these `values`, has no column that `field` names."""
    names = sorted(values)
    close = nearest(name, names)
    there = "" if close.startswith("use one of") else f" (there are {', '.join(names)})"
    return DataError(field, name, f"the row has no such column; {close}{there}", where=where)


def test_windows(found: Scan, recipe: Recipe, home: Path, chosen: set[int] | None, size: int) -> Iterator[list[Marked]]:
    """The test rows, or those at `chosen` places, `size` at a time."""
    test = ((row, example) for part, _, row, example in examples_of_rows(found, recipe, home) if part == "test")
    wanted = (marked(*both, recipe) for place, both in enumerate(test) if chosen is None or place in chosen)
    while window := list(islice(wanted, size)):
        yield window
