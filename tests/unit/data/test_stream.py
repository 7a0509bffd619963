"""Rows that are streamed: which rows meet in which step, what is read when, and what is wrong with a stream."""

import itertools
import json
import threading
import weakref
from collections import Counter, deque
from pathlib import Path

import pytest

from ingot.data import hub, stream
from ingot.data.plan import Cursor
from ingot.data.sources import read_rows
from ingot.data.stream import StreamFeed, check
from ingot.data.template import DroppedReport, Encoded
from ingot.errors import DataError, RecipeError
from ingot.recipe import Source
from ingot.recipe_io import parse_recipe


def recipe(task: str = "language-modeling", train: dict | None = None, sources="rows.jsonl", **data):
    return parse_recipe(
        {
            "name": "t",
            "model": {"source": "unused"},
            "data": {
                "train": sources,
                "streaming": True,
                "stream_window_rows": 20,
                "validation_share": 0,
                "test_share": 0,
                "max_tokens": 64,
                **data,
            },
            "objective": {"task": task},
            "train": {"max_steps": 5, "tokens_per_step": 64, "tokens_per_microbatch": 64, **(train or {})},
        }
    )


def write(path: Path, rows: list) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def texts(n: int, start: int = 0) -> list[dict]:
    return [{"text": f"{k} " + "word " * (k % 5)} for k in range(start, start + n)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write(tmp_path / "rows.jsonl", texts(50))
    return tmp_path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places of the rows that were tokenized. A row becomes as many tokens as it has words; one word is no target."""
    seen: list[str] = []

    def encode_all(examples, tokenizer, data, objective, labels):
        seen.extend(example.where for example in examples)
        rows = [(len(example.text.split()), example.where) for example in examples]
        kept = [Encoded([7] * n, [True] * n, None, where) for n, where in rows if n > 1]
        return kept, DroppedReport(len(rows), 0, len(rows) - len(kept))

    monkeypatch.setattr(stream, "encode_all", encode_all)
    return seen


def feed(home: Path, note=lambda text: None, **settings) -> StreamFeed:
    return StreamFeed(recipe(**settings), home, None, note=note)


def portions(found: StreamFeed, n: int, cursor: Cursor = Cursor()) -> list:  # noqa: B008
    """The first `n` steps: their rows' places in packs, and where they end."""
    steps = found.start(cursor)
    try:
        return [
            ([[portion.rows[row].where for row in pack] for pack in portion.packs], portion.cursor)
            for portion in itertools.islice(steps, n)
        ]
    finally:
        steps.close()


def by_window(steps: list) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for packs, cursor in steps:
        found.setdefault(cursor.epoch, []).extend(where for pack in packs for where in pack)
    return list(found.values())


def lines(*numbers: int) -> set[str]:
    """Places of the rows with these numbers that are learned: every fifth has a single token."""
    return {f"rows.jsonl:{k + 1}" for k in numbers if k % 5}


# --- order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_windows_go_through_the_source_over_and_over(home, encoded, batches):
    windows = by_window(portions(feed(home, batches=batches), 60))
    for start in (0, 3):
        one, two, three = windows[start : start + 3]
        assert sorted(one) == sorted(lines(*range(20)))
        assert sorted(two) == sorted(lines(*range(20, 40)))
        assert sorted(three) == sorted(lines(*range(40, 50)))  # the end of the pass ends the window
    assert windows[0] != windows[3]  # the same rows in another order
    assert windows[0] != sorted(windows[0], key=lambda where: int(where.split(":")[1]))
    assert portions(feed(home, train={"seed": 1}), 60) != portions(feed(home), 60)


def test_a_source_that_ends_with_a_window_has_no_empty_one(home, encoded):
    write(home / "rows.jsonl", texts(40))
    windows = by_window(portions(feed(home), 40))
    assert [len(set(window)) for window in windows[:-1]] == [16] * (len(windows) - 1)
    assert set(windows[2]) == lines(*range(20))


def test_steps_are_full_within_a_window(home, encoded):
    write(home / "rows.jsonl", [{"text": "word " * (2 + k * 7 % 30)} for k in range(400)])
    for options in ({}, {"batches": "packed"}, {"train": {"group_by_length": True}}):
        steps = portions(feed(home, stream_window_rows=200, **options), 40)
        used = [
            sum(2 + (int(where.split(":")[1]) - 1) * 7 % 30 for pack in packs for where in pack) for packs, _ in steps
        ]
        assert max(used) <= 64
        assert sum(used) / len(used) > (0.9 if options.get("batches") == "packed" else 0.7) * 64


@pytest.mark.parametrize(
    "options",
    [{}, {"batches": "packed", "max_tokens": 8}, {"sources": [{"uri": "rows.jsonl", "weight": 3}, "more.jsonl"]}],
    ids=["one", "packed", "mixture"],
)
def test_from_any_cursor_come_exactly_the_rest_and_nothing_before_is_tokenized(home, encoded, options):
    write(home / "more.jsonl", texts(7, start=1000))
    options = {**options, "train": {"tokens_per_step": 16}}
    whole = portions(feed(home, **options), 50)
    assert whole[-1][1].epoch > 6  # into a third pass
    for number in range(0, 40, 3):
        cursor = whole[number][1]
        resumed = feed(home, **options)
        encoded.clear()
        rest = portions(resumed, 8, cursor)
        assert rest == whole[number + 1 : number + 9]
        # The windows that were asked for and one ahead, never those before.
        assert len(encoded) <= 20 * (rest[-1][1].epoch - cursor.epoch + 2)
        if "sources" not in options:
            assert encoded[0] == f"rows.jsonl:{20 * (cursor.epoch % 3) + 1}"


def test_a_mixture_takes_its_rows_by_weight_in_every_window(home, encoded):
    write(home / "more.jsonl", [{"text": f"more {k}"} for k in range(7)])
    sources = [{"uri": "rows.jsonl", "weight": 3}, {"uri": "more.jsonl", "weight": 1}]
    windows = by_window(portions(feed(home, sources=sources), 60))[:-1]
    for number, window in enumerate(windows):
        assert sum(where.startswith("more") for where in window) == 5
        expected = lines(*((15 * number + k) % 50 for k in range(15)))
        assert {where for where in window if where.startswith("rows")} == expected
    seen = Counter(where for window in windows for where in window if where.startswith("more"))
    assert max(seen.values()) - min(seen.values()) <= 1  # the small source begins again and again, row by row
    assert len(windows[0]) > len(set(windows[0]) & set(windows[1]))


# --- what is read and held -------------------------------------------------------------------------------------


class Reads:
    """Counts the rows that are taken from the source."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0

        def counted(*args, **kwargs):
            for row in read_rows(*args, **kwargs):
                self.n += 1
                yield row

        monkeypatch.setattr(stream, "read_rows", counted)


def test_no_more_than_the_next_window_is_read_ahead(home, encoded, monkeypatch):
    write(home / "rows.jsonl", texts(5000))
    reads = Reads(monkeypatch)
    found = feed(home)
    assert reads.n == stream.HEAD_ROWS
    steps = found.start(Cursor())
    for _ in range(30):
        portion = next(steps)
        assert reads.n - stream.HEAD_ROWS <= 20 * (portion.cursor.epoch + 2)
    steps.close()


def test_the_next_window_is_encoded_while_this_one_is_learned(home, encoded):
    write(home / "rows.jsonl", texts(500))
    steps = feed(home, stream_window_rows=100).start(Cursor())
    deadline = threading.Event()
    while not any(where == "rows.jsonl:150" for where in encoded[stream.HEAD_ROWS :]):
        portion = next(steps)
        assert portion.cursor.epoch == 0, "the first window ended before the second was begun"
        deadline.wait(0.05)
    steps.close()


def test_two_windows_are_held_and_no_third(home, encoded, monkeypatch):
    write(home / "rows.jsonl", texts(2000))
    made: list[weakref.ref] = []
    real = stream.RowWriter.rows

    def rows(writer):
        found = real(writer)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(stream.RowWriter, "rows", rows)
    steps = feed(home, stream_window_rows=100, train={"tokens_per_step": 16}).start(Cursor())
    most, in_flight = 0, deque(maxlen=3)  # what train/prefetch.py may hold: two made ahead, one being learned
    for portion in itertools.islice(steps, 150):
        in_flight.append(portion)
        del portion
        threading.Event().wait(0.005)  # a step that takes its time: whoever reads ahead gets ahead
        most = max(most, sum(found() is not None for found in made))
    steps.close()
    assert len(made) > 5
    assert most <= 2


def test_closing_ends_the_thread_without_encoding_the_rest(home, encoded):
    write(home / "rows.jsonl", texts(30_000))
    steps = feed(home, stream_window_rows=10_000).start(Cursor())
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ingot-stream")]
    assert len(encoded) < 20_000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt", "parquet"])
def test_files_are_read_as_far_as_rows_are_asked_for(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist([{"text": f"row {n} " + "x" * 50} for n in range(100_000)])
        pq.write_table(table, path, row_group_size=1000, compression="none")
    else:
        write(path, [{"text": f"row {n}"} if kind == "jsonl" else f"row {n}" for n in range(100_000)])
        if kind in ("csv", "tsv"):
            path.write_text("text\n" + path.read_text())
    before = bytes_read()
    rows = read_rows(Source(uri=path.name), tmp_path, streaming=True)
    assert [row.values["text"][:5] for row in itertools.islice(rows, 3)] == ["row 0", "row 1", "row 2"]
    assert bytes_read() - before < 0.2 * path.stat().st_size
    rows.close()


def bytes_read() -> int:
    """What this process has read so far through calls to the system."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_hugging_face_sets_are_neither_downloaded_nor_copied_first(tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {n}"} for n in range(3000)]
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
        source = Source(uri="set")
        loaded, _ = hub.open_split(source, tmp_path, "data.train", streaming=True)
        assert loaded.cache_files  # mapped from where it lies
    else:
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", rows)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        source = Source(uri=f"{hub.HUB}{tmp_path / 'set'}", split="train")
        loaded, _ = hub.open_split(source, tmp_path, "data.train", streaming=True)
        assert isinstance(loaded, datasets.IterableDataset)
    found = read_rows(source, tmp_path, streaming=True)
    assert [row.values for row in itertools.islice(found, 3)] == rows[:3]


# --- what is wrong with it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "field", "fix"),
    [
        ({"train": {"max_steps": None}}, "train.max_steps", "set it"),
        ({"validation_share": 0.1}, "data.validation_share", "data.validation"),
        ({"test_share": 0.1}, "data.test_share", "data.test"),
        ({"max_train_rows": 5}, "data.max_train_rows", "remove it"),
        ({"task": "text-classification"}, "data.streaming", "every class"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_the_way_out(home, section, field, fix):
    with pytest.raises(RecipeError, match=fix) as caught:
        check(recipe(**section), home)
    assert caught.value.field == field
    assert "streaming" in str(caught.value)


def test_given_parts_need_no_share_of_zero(home):
    write(home / "other.jsonl", texts(3))
    check(recipe(validation="other.jsonl", validation_share=0.1, test="other.jsonl", test_share=0.1), home)


def test_a_file_that_is_read_as_a_whole_is_refused(home):
    (home / "rows.json").write_text("[]")
    with pytest.raises(DataError, match=r"write one object a line \(\.jsonl\)") as caught:
        check(recipe(sources=["rows.jsonl", "rows.json"]), home)
    assert caught.value.field == "data.train[1].uri"


@pytest.mark.parametrize(
    ("rows", "field", "fix"),
    [
        ([], "data.train.uri", "holds no usable row"),
        ([{"txt": "a"}] * 3, "data.columns.text", "did you mean 'txt'"),
        (["{", *texts(5)], "data.max_bad_rows", "not JSON"),
        ([{"text": "one"}] * 5, "data.max_tokens", "none of the first"),
    ],
)
def test_what_is_wrong_at_the_head_is_told_before_training(home, encoded, rows, field, fix):
    write(home / "rows.jsonl", rows)
    with pytest.raises(DataError, match=fix) as caught:
        feed(home)
    assert caught.value.field == field


def test_bad_rows_further_on_stop_the_stream_when_they_are_too_many(home, encoded):
    rows = texts(300)
    for n in (150, 180, 210):
        rows[n] = "{"
    write(home / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        portions(feed(home, max_bad_rows=2), 100)
    assert caught.value.field == "data.max_bad_rows"
    for line in (151, 181, 211):
        assert f"rows.jsonl:{line}: not JSON" in str(caught.value)


def test_tolerated_rows_are_counted_once_however_often_they_come(home, encoded):
    rows = texts(50)
    rows[30] = rows[31] = "{"
    write(home / "rows.jsonl", rows)
    notes: list[str] = []
    found = feed(home, max_bad_rows=2, note=notes.append)
    steps = portions(found, 60)
    assert steps[-1][1].epoch >= 6  # two passes and more
    assert found.counts.passes >= 2
    facts = found.facts()
    per_window = [(20, 0, 4), (20, 2, 4), (10, 0, 2)]  # rows, unusable, dropped (every fifth; 30 is one of them)
    expected = [per_window[n % 3] for n in range(facts["windows"])]
    assert facts["rows"] == sum(rows for rows, _, _ in expected)
    assert facts["unusable"] == sum(bad for _, bad, _ in expected)
    assert facts["rows"] - facts["unusable"] - facts["dropped"] == sum(
        rows - bad - dropped + (bad > 0) for rows, bad, dropped in expected
    )
    assert notes == [
        "data: first window: 16 of 20 rows learned (0 cut at 64 tokens, 0 unusable, 4 without a trainable token)"
    ]


def test_bad_rows_of_the_given_parts_count_too(home, encoded):
    from ingot.data.sources import BadRow

    rows = texts(150)
    rows[120] = "{"
    write(home / "rows.jsonl", rows)
    given = {"test": [BadRow("test.jsonl:3", "not JSON")]}
    with pytest.raises(DataError, match=r"2 rows cannot be used(.|\n)*test\.jsonl:3(.|\n)*rows\.jsonl:121"):
        portions(StreamFeed(recipe(max_bad_rows=1), home, None, given), 60)


def test_a_stream_of_which_only_the_head_can_be_learned_ends(home, encoded):
    write(home / "rows.jsonl", [{"text": "two words"}])
    found = feed(home)
    write(home / "rows.jsonl", [{"text": "one"}] * 30)
    with pytest.raises(DataError, match="no row of it can be learned from"):
        portions(found, 1)
