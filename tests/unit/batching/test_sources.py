"""Files, folders and globs: how many rows, and the rows from any place on."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingot.batching.rows import Reading
from ingot.batching.sources import Content, Cursor, Input, is_batch_file
from ingot.data.sources import Row
from ingot.errors import DataError, FieldError

TEXT = Reading((("text",),))


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"text": f"é{number}"}, ensure_ascii=False) + "\n" for number in numbers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven rows in five files of four formats; one is empty."""
    home = tmp_path / "rows"
    home.mkdir()
    (home / "a.jsonl").write_text(lines(0, 1), encoding="utf-8")
    (home / "b.csv").write_text('text\n"é2"\n', encoding="utf-8")
    (home / "c.jsonl").write_text("")
    (home / "d.jsonl.gz").write_bytes(gzip.compress(lines(3, 4, 5).encode()))
    pq.write_table(pa.table({"text": ["é6"]}), home / "e.parquet")
    (home / "notes.md").write_text("no rows")
    return home


def counted(source: Input) -> Content:
    return source.count(TEXT)


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path) -> None:
    source = Input(str(folder))
    content = counted(source)
    assert [(one.name, one.rows) for one in content.files] == [
        ("a.jsonl", 2),
        ("b.csv", 1),
        ("c.jsonl", 0),
        ("d.jsonl.gz", 3),
        ("e.parquet", 1),
    ]
    rows = Cursor(source, content).take(0, 7)
    assert [row.values["text"] for row in rows if isinstance(row, Row)] == [f"é{number}" for number in range(7)]
    assert [row.where for row in rows][2:4] == ["b.csv:2", "d.jsonl.gz:1"]
    assert content.kinds == {"id": "text"}


def test_rows_with_the_id_of_an_earlier_one_are_counted(tmp_path: Path) -> None:
    called = [{"id": 1}, {"id": "1"}, {}, {}, {"id": "a"}, {"id": 1}, {"id": "a"}, {"id": 1}]
    for name, some in {"a": called[:5], "b": called[5:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "x"} | row) + "\n" for row in some))
    content = counted(Input(str(tmp_path)))
    assert (content.repeated, content.first_repeated) == (3, "b.jsonl:1")
    assert counted(Input(str(tmp_path), limit=5)).repeated == 0


@pytest.mark.parametrize("steps", [[0, 2, 4, 6], [4, 0, 2], [5, 5, 1], [6, 3, 4]])
def test_rows_are_taken_from_any_place(folder: Path, steps: list[int]) -> None:
    source = Input(str(folder))
    cursor = Cursor(source, counted(source))
    for start in steps:
        rows = cursor.take(start, min(2, 7 - start))
        assert [row.values["text"] for row in rows if isinstance(row, Row)] == [
            f"é{number}" for number in range(start, min(start + 2, 7))
        ]


def test_globs_and_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = counted(Input(f"{folder}/*.jsonl*", limit=4))
    assert (content.rows, [one.rows for one in content.files]) == (4, [2, 0, 3])
    monkeypatch.chdir(folder.parent)
    assert [one.name for one in counted(Input("rows/?.csv")).files] == ["b.csv"]
    assert counted(Input("rows/c.jsonl")).rows == 0


def test_files_that_became_shorter_are_told(folder: Path) -> None:
    source = Input(str(folder / "a.jsonl"))
    cursor = Cursor(source, counted(source))
    (folder / "a.jsonl").write_text(lines(0))
    with pytest.raises(DataError, match="fewer rows than when it was counted"):
        cursor.take(0, 2)


def test_what_cannot_be_read_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for uri, told in {
        str(tmp_path / "empty"): "the folder holds no data file",
        str(folder / "f.jsonl"): "did you mean",
        f"{folder}/*.nothing": "no file matches",
        str(folder / "notes.md"): "no known extension",
    }.items():
        with pytest.raises(DataError, match=told):
            Input(uri)
    (folder / "whole.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be read row by row"):
        Input(str(folder))


def test_files_of_the_output_are_no_input(folder: Path) -> None:
    pattern, before = f"{folder}/**/*", Input(f"{folder}/**/*.jsonl").paths
    for path in folder.iterdir():
        if path not in before:
            path.unlink()
    out = folder / "out"
    out.mkdir()
    (out / "part-00000.jsonl").write_text(lines(1))
    (out / "manifest.json").write_text("{}")
    assert Input(pattern, output=out).paths == before
    (folder / "link").symlink_to(out)
    assert Input(pattern, output=folder / "link").paths == before
    with pytest.raises(FieldError, match=r"OUTPUT = .* holds all files that INPUT matches"):
        Input(str(out / "part-00000.jsonl"), output=out)


def test_a_file_of_other_columns_is_told_before_anything(folder: Path) -> None:
    (folder / "d.csv").write_text("body\nx\n")
    with pytest.raises(DataError, match=r"d.csv:2: column = 'text'.*--map text=COLUMN"):
        counted(Input(str(folder)))


def test_a_batch_file_is_known_by_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}}\n')
    assert is_batch_file(Input(str(path)))
    path.write_text('{"custom_id": "a", "text": "b"}\n')
    assert not is_batch_file(Input(str(path)))


def test_kinds_are_decided_over_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": null, "id": 1}\n{"text": "a", "n": 1}\n{"text": "a", "n": 0.5}\n')
    content = Input(str(path)).count(Reading((("text",),), keep={"size": "n"}))
    assert content.kinds == {"id": "json", "size": "float"}
