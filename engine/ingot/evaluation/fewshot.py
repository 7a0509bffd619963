"""The rows of a task file, and which of them stand as examples before a question."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from ingot.data.sources import BadRow, Row, read_rows
from ingot.errors import DataError
from ingot.evaluation.definition import Definition, Fewshot, Part

Examples = Callable[[Row], list[Row]]
"""The row that is asked -> the examples before it. Called once a row, in the order of the rows."""


def readable(part: Part, home: Path, field: str) -> Iterator[Row]:
    """The rows of a part in order, as they are asked for. Raises DataError for one that cannot be read."""
    end = None if part.take is None else part.skip + part.take
    for row in islice(read_rows(part, home, field), part.skip, end):
        if isinstance(row, BadRow):
            raise DataError(f"{field}.uri", part.uri, f"{row.reason}; mend or remove the row", where=row.where)
        yield row


def examples_of(definition: Definition, home: Path) -> Examples:
    """What picks the examples, from its start. Raises DataError, now or for a row, when there are too few."""
    section = definition.fewshot
    if section is None:
        return lambda row: []
    rows = readable(section.data or definition.data, home, "fewshot.data" if section.data else "data")
    if section.pick == "first":
        return _first(section, rows)
    pool = list(islice(rows, section.among))
    if section.pick == "seeded":
        return lambda row: _draw(section, pool, Random(f"{section.seed}:{_content(row)}"), row)
    one = Random(section.seed)
    return lambda row: _draw(section, pool, one, row)


def _first(section: Fewshot, rows: Iterator[Row]) -> Examples:
    held: list[Row] = []  # no more than are needed: the source may be larger than the memory

    def pick(row: Row) -> list[Row]:
        found: list[Row] = []
        place = 0
        while len(found) < section.count:
            if place == len(held):
                held.extend(islice(rows, 1))
            if place == len(held):
                raise _too_few(section, len(found), row)
            if not (section.leave_out_asked and held[place].values == row.values):
                found.append(held[place])
            place += 1
        return found

    return pick


def _draw(section: Fewshot, pool: list[Row], random: Random, row: Row) -> list[Row]:
    """`count` of `pool`, drawn as lm-evaluation-harness's sampler draws: one more where the asked row may be among."""
    spare = 1 if section.leave_out_asked else 0
    if len(pool) < section.count:
        raise _too_few(section, len(pool), row)
    drawn = random.sample(pool, min(section.count + spare, len(pool)))
    if not section.leave_out_asked:
        return drawn
    found = [one for one in drawn if one.values != row.values][: section.count]
    if len(found) < section.count:
        others = [one for one in pool if one.values != row.values]
        if len(others) < section.count:
            raise _too_few(section, len(others), row)
        found = random.sample(others, section.count)
    return found


def _too_few(section: Fewshot, there: int, row: Row) -> DataError:
    others = " beside the asked one" if section.leave_out_asked else ""
    fix = f"there are only {there} rows{others} to take examples from; lower it, or name more rows"
    return DataError("fewshot.count", section.count, fix, where=row.where)


def _content(row: Row) -> str:
    return json.dumps(row.values, sort_keys=True, default=str)
