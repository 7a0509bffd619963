"""Rows of an evaluation survive the file, whatever a model wrote, and are read without being held."""

from pathlib import Path

import pytest

from ingot.errors import IngotError
from ingot.evaluation.samples import ROWS_PER_GROUP, Item, Sample, Samples, write_samples


def sample(number: int, prediction: str = "yes") -> Sample:
    return Sample(
        id=f"test.jsonl:{number}",
        document=f"{number:016x}",
        prompt=f"question {number}",
        references=["yes", "ja"],
        output={"text": prediction, "finish": "stop"},
        prediction=prediction,
        numbers={"exact_match": [1.0, 1.0], "bleu": [3.0, 4.0, 0.5]},
        group="passage 1",
        slices={"language": "de"},
        n_prompt_tokens=12,
        n_output_tokens=None,
        seconds=0.25,
    )


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(2 * ROWS_PER_GROUP + 7)]
    write_samples(tmp_path / "test.parquet", iter(rows), {"task": "test", "asked": {"n": 1}})
    found = Samples(tmp_path / "test.parquet")
    assert found.about == {"task": "test", "asked": {"n": 1}}
    assert len(found) == len(rows)
    assert list(found) == rows
    assert (found[0], found[ROWS_PER_GROUP], found[-1]) == (rows[0], rows[ROWS_PER_GROUP], rows[-1])
    assert found[998:1003] == rows[998:1003]
    assert found.numbers("bleu").shape == (len(rows), 3)
    with pytest.raises(IndexError):
        found[len(rows)]


def test_half_a_character_is_stored_as_a_replacement(tmp_path: Path) -> None:
    write_samples(tmp_path / "test.parquet", [sample(1, "caf\ud83d")], {})
    [found] = Samples(tmp_path / "test.parquet")
    assert found.prediction == "caf\ufffd"
    assert found.output["text"] == "caf\ud83d"  # as it was, so that it is scored as it was


def test_what_holds_no_samples_is_named(tmp_path: Path) -> None:
    with pytest.raises(IngotError, match=r"absent\.parquet holds no samples"):
        Samples(tmp_path / "absent.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then the power failed")
    with pytest.raises(IngotError, match=r"torn\.parquet holds no samples .* evaluate again"):
        Samples(tmp_path / "torn.parquet")


def test_a_failed_write_leaves_nothing_new(tmp_path: Path) -> None:
    write_samples(tmp_path / "test.parquet", [sample(1)], {})

    def failing():  # type: ignore[no-untyped-def]
        yield sample(2)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_samples(tmp_path / "test.parquet", failing(), {})
    assert [row.id for row in Samples(tmp_path / "test.parquet")] == ["test.jsonl:1"]
    assert [path.name for path in tmp_path.iterdir()] == ["test.parquet"]


def test_a_digest_is_of_what_is_asked_not_of_where_it_stands() -> None:
    one = Item("a:1", "q", ["x"])
    assert one.digest() == Item("b:9", "q", ["x"], request=[1, 2]).digest()
    assert one.digest() != Item("a:1", "q", ["x", "y"]).digest()
    assert one.digest() != Item("a:1", "qx", [""]).digest()
