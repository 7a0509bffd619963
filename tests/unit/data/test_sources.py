import csv
import gzip
import json
import time
from pathlib import Path

import pytest

from ingot.data.sources import BadRow, Row, read_rows
from ingot.errors import DataError
from ingot.recipe import Source


def rows_of(folder: Path, uri: str, **options: str) -> list[Row | BadRow]:
    return list(read_rows(Source(uri=uri, **options), folder))


def values(folder: Path, uri: str, **options: str) -> list[dict]:
    rows = rows_of(folder, uri, **options)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows]


WANTED = [{"text": "café, one", "label": "a"}, {"text": "two\nlines", "label": "b"}]


def write_wanted(path: Path) -> None:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    opener = gzip.open if path.suffix == ".gz" else open
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(WANTED), path)
        return
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in WANTED)
        elif kind == "json":
            json.dump(WANTED, stream)
        else:
            writer = csv.DictWriter(stream, WANTED[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(WANTED)


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz", "r.csv", "r.csv.gz", "r.tsv", "r.tsv.gz", "r.parquet"]
)
def test_every_table_format_gives_the_same_rows(tmp_path, name):
    write_wanted(tmp_path / name)
    assert values(tmp_path, name) == WANTED


def test_json_under_the_key_data(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"data": WANTED}))
    assert values(tmp_path, "r.json") == WANTED


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ('{"a": 1}\n{"a": 2}\n', "format: jsonl"),
        ('{"rows": []}', "list of objects"),
        ("[1,", "not JSON"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        (f"[{'1' * 5_000}]", "not JSON: an integer has too many digits"),
    ],
)
def test_a_json_file_that_is_none(tmp_path, text, fix):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=fix):
        rows_of(tmp_path, "r.json")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbftext\nhi\n")
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert values(tmp_path, "r.csv") == values(tmp_path, "r.jsonl") == [{"text": "hi"}]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("r.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n', 2),
        ("r.csv", b"text\na\ncaf\xe9\nb\n", 3),
        ("r.txt", b"a\ncaf\xe9\nb\n", 2),
    ],
)
def test_bytes_that_are_not_utf8_spoil_their_own_row_only(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    first, bad, last = rows_of(tmp_path, name)
    assert bad == BadRow(f"{name}:{line}", "not UTF-8")
    assert [first.values["text"], last.values["text"]] == ["a", "b"]


def test_bad_jsonl_rows_say_where_and_why(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n\n{"a": \n[1]\nnull\n{"a": 2}\n')
    rows = rows_of(tmp_path, "r.jsonl")
    assert [row.where for row in rows] == ["r.jsonl:1", "r.jsonl:3", "r.jsonl:4", "r.jsonl:5", "r.jsonl:6"]
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, BadRow, Row]
    assert "not JSON" in rows[1].reason
    assert "list" in rows[2].reason


@pytest.mark.parametrize(
    ("value", "why"),
    [("1" * 5_000, "an integer has too many digits"), ("[" * 100_000 + "]" * 100_000, "nested too deeply")],
)
def test_json_that_python_does_not_read_spoils_its_own_row_only(tmp_path, value, why):
    (tmp_path / "r.jsonl").write_text(f'{{"a": 1}}\n{{"a": {value}}}\n{{"a": 2}}\n')
    first, bad, last = rows_of(tmp_path, "r.jsonl")
    assert bad == BadRow("r.jsonl:2", f"not JSON: {why}")
    assert [first.values, last.values] == [{"a": 1}, {"a": 2}]


def test_csv_lines_are_counted_through_quoted_line_breaks(tmp_path):
    (tmp_path / "r.csv").write_text('text,label\n"two\nlines",a\nshort\nlast,b\n')
    first, bad, last = rows_of(tmp_path, "r.csv")
    assert (first.where, bad.where, last.where) == ("r.csv:2", "r.csv:4", "r.csv:5")
    assert bad.reason == "1 cells under 2 columns"


def test_csv_cells_may_be_long(tmp_path):
    (tmp_path / "r.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(values(tmp_path, "r.csv")[0]["text"]) == 300_000


def test_csv_that_names_a_column_twice(tmp_path):
    (tmp_path / "r.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="'text' twice"):
        rows_of(tmp_path, "r.csv")


def test_plain_text_has_a_row_a_line(tmp_path):
    # U+2028 is a line break to str.splitlines, not to a file.
    (tmp_path / "r.txt").write_text("one\n\ntw\u2028o\r\nthree", encoding="utf-8", newline="")
    rows = rows_of(tmp_path, "r.txt")
    assert [row.values["text"] for row in rows] == ["one", "tw\u2028o", "three"]
    assert [row.where for row in rows] == ["r.txt:1", "r.txt:3", "r.txt:4"]


def test_conll_sentences_are_parted_by_blank_lines(tmp_path):
    (tmp_path / "r.conll").write_text("New\tB-loc\nYork\tI-loc\n\n\t\n!\tO\n\nbroken\n\nlast\tO")
    rows = rows_of(tmp_path, "r.conll")
    assert rows[0] == Row({"tokens": ["New", "York"], "tags": ["B-loc", "I-loc"]}, "r.conll:1")
    assert rows[1] == Row({"tokens": ["!"], "tags": ["O"]}, "r.conll:5")
    assert isinstance(rows[2], BadRow)
    assert rows[2].where == "r.conll:7"
    assert rows[3].values == {"tokens": ["last"], "tags": ["O"]}


def test_text_pairs(tmp_path):
    with gzip.open(tmp_path / "en.gz", "wt") as left, gzip.open(tmp_path / "de.gz", "wt") as right:
        left.write("a dog\na cat\n")
        right.write("ein Hund\neine Katze\n")
    assert values(tmp_path, "en.gz", pair="de.gz") == [
        {"source": "a dog", "target": "ein Hund"},
        {"source": "a cat", "target": "eine Katze"},
    ]


@pytest.mark.parametrize(("n_left", "n_right"), [(3, 5), (5, 3), (0, 1)])
def test_text_pairs_out_of_step_are_an_error_with_both_counts(tmp_path, n_left, n_right):
    (tmp_path / "a.txt").write_text("x\n" * n_left)
    (tmp_path / "b.txt").write_text("y\n" * n_right)
    with pytest.raises(DataError, match=rf"b.txt has {n_right} lines and a.txt has {n_left}"):
        rows_of(tmp_path, "a.txt", pair="b.txt")


def test_folders_and_globs_are_read_in_order_of_names(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("b", "a", "c"):
        (parts / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (parts / "README.md").write_text("not data")
    assert [row["text"] for row in values(tmp_path, "parts")] == ["a", "b", "c"]
    assert [row["text"] for row in values(tmp_path, "parts/[ac].jsonl")] == ["a", "c"]
    assert rows_of(tmp_path, "parts")[0].where == "parts/a.jsonl:1"
    with pytest.raises(DataError, match="no file matches"):
        rows_of(tmp_path, "parts/*.csv")


def test_a_missing_file_names_field_value_and_nearest_file(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'") as caught:
        list(read_rows(Source(uri="trian.jsonl"), tmp_path, "data.train"))
    assert (caught.value.field, caught.value.value) == ("data.train.uri", "trian.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        rows_of(tmp_path, "nowhere/x.jsonl")


def test_an_unknown_extension_asks_for_the_format(tmp_path):
    (tmp_path / "rows.dat").write_text('{"text": "a"}\n')
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, "rows.dat")
    assert caught.value.field == "data.train.format"
    assert values(tmp_path, "rows.dat", format="jsonl") == [{"text": "a"}]


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_text("plain text, long enough to hold a header")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, name)
    assert caught.value.field == "data.train.uri"


def test_half_a_gzip_file_is_an_error_not_a_short_data_set(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(5000)))
    (tmp_path / "r.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        rows_of(tmp_path, "r.jsonl.gz")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert values(tmp_path, "one") == [{"text": "a"}, {"text": "b"}]
    assert values(tmp_path, "two", split="test") == [{"text": "b"}]
    with pytest.raises(DataError, match="train, test"):
        rows_of(tmp_path, "two")
    with pytest.raises(DataError, match="did you mean 'test'"):
        rows_of(tmp_path, "two", split="tset")


@pytest.mark.parametrize(("is_offline", "reason"), [(True, "OfflineModeIsEnabled"), (False, "hub cannot be reached")])
def test_a_hub_data_set_without_a_network_fails_at_once(tmp_path, monkeypatch, is_offline, reason):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    if not is_offline:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("would retry for half a minute"))
    start = time.monotonic()
    with pytest.raises(DataError, match=reason) as caught:
        rows_of(tmp_path, "hf://datasets/some/set")
    assert time.monotonic() - start < 10
    assert "'some/set'" in str(caught.value)
    assert "save_to_disk" in str(caught.value)


def test_a_hub_data_set_is_read_by_config_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "a"}])})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or rows)
    assert rows_of(tmp_path, "hf://datasets/some/set", config="c") == [Row({"text": "a"}, "some/set/test#0")]
    assert asked == [("some/set", "c")]


def test_generated_sets_come_from_the_generator(tmp_path, monkeypatch):
    synthetic = pytest.importorskip("ingot.data.synthetic")
    asked = []
    monkeypatch.setattr(synthetic, "generate", lambda name, split: asked.append((name, split)) or iter([{"a": 1}]))
    assert rows_of(tmp_path, "ingot://tool-calls", split="test") == [Row({"a": 1}, "ingot://tool-calls#0")]
    assert rows_of(tmp_path, "tool-calls", format="generated")
    assert asked == [("tool-calls", "test"), ("tool-calls", None)]


@pytest.mark.parametrize(
    ("uri", "options", "n_rows", "columns"),
    [
        ("banking77/train.csv", {}, 10_003, {"text", "category"}),
        ("banking77/test.csv", {}, 3_080, {"text", "category"}),
        ("e2e/devset.csv", {}, 4_672, {"mr", "ref"}),
        ("gsm8k/train.jsonl", {}, 7_473, {"question", "answer"}),
        ("wnut17/train.conll", {}, 3_394, {"tokens", "tags"}),
        ("wnut17/test.conll", {}, 1_287, {"tokens", "tags"}),
        ("multi30k/val.en.gz", {"pair": "multi30k/val.de.gz"}, 1_014, {"source", "target"}),
    ],
)
def test_real_files_give_the_rows_their_authors_count(shared_dir, uri, options, n_rows, columns):
    rows = values(shared_dir / "data", uri, **options)
    assert len(rows) == n_rows
    assert set(rows[0]) == columns
