"""Values of a row, read and checked on the way into an example; what is wrong is an `Unusable`."""

import json
from typing import Any

from ingot.data.sources import NOT_JSON, Row, has_broken_characters, why_not_json
from ingot.recipe import Data


class Unusable(Exception):
    """Internal: the reason why a row is bad."""


def value_of(row: Row, data: Data, name: str) -> Any:
    column = data.columns.get(name, name)
    if column not in row.values:
        raise Unusable(f"no column {column!r}; there are: {', '.join(map(str, row.values)) or 'none'}")
    return row.values[column]


def checked(text: str, name: str) -> str:
    if has_broken_characters(text):
        raise Unusable(f"{name} holds characters that are not Unicode (half a surrogate pair)")
    return text


def text_of(value: Any, name: str) -> str:
    """A non-empty text. Numbers are written out and lists of words (CoNLL) are joined with spaces."""
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise Unusable(f"{name} must be text, this is {'empty' if value is None else type(value).__name__}")
    if not value.strip():
        raise Unusable(f"{name} is empty")
    return checked(value, name)


def parsed(value: Any, name: str) -> Any:
    """`value`, or what it says when it is JSON in a text cell (CSV, Parquet)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except NOT_JSON as error:
        raise Unusable(f"{name} is not JSON: {why_not_json(error)}") from error
