"""Lazy tables: a name in a recipe -> "module:attribute", imported only when asked for."""

import difflib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from ingot.errors import RecipeError


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest of `known`, or the sorted list of them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(known)}"


def resolve(table: Mapping[str, str], field: str, name: str) -> Any:
    """Import and return what `table` holds under `name`; an unknown name is a `RecipeError` about `field`."""
    if name not in table:
        raise RecipeError(field, name, nearest(name, table))
    return pkgutil.resolve_name(table[name])
