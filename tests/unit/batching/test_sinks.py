"""Part files hold what was answered, in each format, whole or not at all."""

import csv
import hashlib
import json
import math
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ingot.batching.sinks import kind_of, merged, rows_in, write_part

HALF = "\ud83d"
MIXED = {"v": "float", "parts": "json", "mixed": "json"}
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "said": 'é "quoted", 语\r\nnext 🙂', "score": 1, "parts": [{"start": 0}], "yes": True, "none": None},
    {"id": "b", "said": "", "score": 0.5, "parts": [], "yes": False, "none": None},
]


def test_jsonl_holds_the_records_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.jsonl"
    records = [*RECORDS, {"id": HALF, "said": f"half {HALF}"}]
    digest = write_part(path, records, {})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records
    assert "é" in path.read_text(encoding="utf-8")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows_in(path) == 3


def test_csv_holds_texts_with_lists_as_json(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.csv"
    write_part(path, [*RECORDS, {"id": HALF}], {})
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["said"] == RECORDS[0]["said"]
    assert json.loads(rows[0]["parts"]) == [{"start": 0}]
    assert [row["yes"] for row in rows] == ["true", "false", ""]
    assert rows[2]["id"] == "\ufffd"
    assert rows_in(path) == 3


def test_parquet_has_the_types_of_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    write_part(path, [*RECORDS, {"id": HALF}], {"none": "int"})
    table = pq.read_table(path)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types == {
        "id": "string",
        "said": "string",
        "score": "double",
        "parts": "string",
        "yes": "bool",
        "none": "int64",
    }
    rows = table.to_pylist()
    assert [row["said"] for row in rows] == [RECORDS[0]["said"], "", None]
    assert [row["score"] for row in rows] == [1.0, 0.5, None]
    assert json.loads(rows[0]["parts"]) == [{"start": 0}]
    assert rows_in(path) == 3


def test_columns_of_several_kinds_become_json() -> None:
    assert [kind_of(value) for value in ("a", True, 1, 1.5, [], {}, None, 2**63)] == [
        *("text", "bool", "int", "float", "json", "json", None, "json")
    ]
    assert merged(None, "int") == merged("int", None) == "int"
    assert merged("int", "float") == "float"
    assert merged("text", "int") == merged("bool", "int") == "json"


def test_long_integers_among_floats_are_floats(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    write_part(path, [{"n": 2**53 + 1}, {"n": 0.5}, {"n": None}], {"n": "float"})
    assert pq.read_table(path)["n"].to_pylist() == [float(2**53), 0.5, None]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_is_no_json_is_written_as_its_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part-00000.{suffix}"
    values = {"day": date(2026, 3, 1), "price": Decimal("1.50"), "raw": b"ab", "days": [date(2026, 3, 1)], "n": 2**63}
    write_part(path, [values], dict.fromkeys(values, "json"))
    if suffix == "csv":
        with path.open(encoding="utf-8", newline="") as file:
            [found] = csv.DictReader(file)
    else:
        [found] = pq.read_table(path).to_pylist()
    wanted = {"day": "2026-03-01", "price": "1.50", "raw": "b'ab'", "days": '["2026-03-01"]', "n": str(2**63)}
    assert found == wanted


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_half_a_character_in_a_list_or_an_object_is_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part-00000.{suffix}"
    write_part(path, [{"turns": [{"said": HALF}], "about": {HALF: 1}}], {"turns": "json", "about": "json"})
    if suffix == "csv":
        with path.open(encoding="utf-8", newline="") as file:
            [found] = csv.DictReader(file)
    else:
        [found] = pq.read_table(path).to_pylist()
    assert found == {"turns": '[{"said": "\ufffd"}]', "about": '{"\ufffd": 1}'}


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    records = [{"n": math.nan, "parts": [{"n": math.inf}, -math.inf, 0.1], "said": f"NaN é {HALF}", "day": None}]
    write_part(tmp_path / "part-00000.jsonl", records, {})
    text = (tmp_path / "part-00000.jsonl").read_text(encoding="utf-8")
    assert text.startswith('{"n": null, "parts": [{"n": null}, null, 0.1], "said": "NaN é ')
    assert json.loads(text)["said"] == f"NaN é {HALF}"
    write_part(tmp_path / "part-00000.parquet", [{"v": math.nan, "parts": [math.nan], "mixed": math.nan}], MIXED)
    assert str(pq.read_table(tmp_path / "part-00000.parquet").to_pylist()) == str(
        [{"v": math.nan, "parts": "[null]", "mixed": "null"}]
    )


def test_long_cells_are_counted(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # what a process begins with, which reading an input raises
    write_part(tmp_path / "part-00000.csv", [{"said": "x" * 200_000}] * 3, {})
    assert rows_in(tmp_path / "part-00000.csv") == 3


def test_mixed_ids_are_texts_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    write_part(path, [{"id": 1}, {"id": "a.csv:3"}], {"id": "json"})
    assert pq.read_table(path)["id"].to_pylist() == ["1", "a.csv:3"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_part_that_fails_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part-00000.{suffix}"
    write_part(path, [{"id": 1}], {})
    before = path.read_bytes()

    class Bad(dict[str, Any]):
        def items(self) -> Any:
            raise OSError(28, "No space left on device")

        def get(self, *_: Any) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_part(path, [{"id": 1}, Bad(id=2)], {})
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
