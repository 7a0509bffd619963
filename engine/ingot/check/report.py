"""The gate's report as plain values, as JSON and as two files in a folder."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import page
from .verdict import Evidence, Report, Shown, Status, Verdict

JSON_NAME, HTML_NAME = "check.json", "check.html"


def as_dict(report: Report) -> dict[str, Any]:
    """Plain values for JSON. `passed` and `failed` (names) are there for scripts; `from_dict` draws them anew."""
    ends = {"passed": report.passed, "failed": [verdict.name for verdict in report.failures]}
    plain: dict[str, Any] = _plain(asdict(report))
    return {"recipe": plain.pop("recipe"), "recipe_hash": plain.pop("recipe_hash"), **ends, **plain}


def from_dict(values: Mapping[str, Any]) -> Report:
    """The report that `as_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    evidence = values["evidence"]
    return Report(
        recipe=values["recipe"],
        recipe_hash=values["recipe_hash"],
        verdicts=[Verdict(**{**verdict, "status": Status(verdict["status"])}) for verdict in values["verdicts"]],
        evidence=Evidence(**{**evidence, "rows": [Shown(**row) for row in evidence["rows"]]}),
        sampled=list(values["sampled"]),
        versions=dict(values["versions"]),
        seconds=values["seconds"],
    )


def as_json(report: Report, indent: int | None = None) -> str:
    """One JSON text; numbers that JSON has no word for (NaN, infinities) are strings in it."""
    return json.dumps(as_dict(report), indent=indent, ensure_ascii=False, allow_nan=False)


def save(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `check.json` and `check.html` to `folder`, each in one step; return their paths."""
    return _write(folder / JSON_NAME, as_json(report, indent=1) + "\n"), save_page(report, folder / HTML_NAME)


def save_page(report: Report, path: Path) -> Path:
    """Write the page alone, in one step; return `path`."""
    return _write(path, page.render(report))


def _plain(value: Any) -> Any:
    """`value` of JSON's types. Facts come from many hands: numbers of numpy and torch become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)  # an enum's value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    # Rows may hold half a surrogate pair, which UTF-8 cannot.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)
    return path
