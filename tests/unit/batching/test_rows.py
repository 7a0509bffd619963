"""What of a row the model reads, what the output keeps, and how wrong columns are told."""

from typing import Any

import pytest

from ingot.batching.rows import Reading, is_request
from ingot.data.sources import BadRow, Row
from ingot.errors import DataError, FieldError

CHAT = (("messages",), ("input_string",))
PAIR = (("question", "context"),)
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}


def entry(reading: Reading, **values: Any) -> Any:
    return reading.entry(Row(values, "rows.csv:2"), 7)


def test_ids_are_the_rows_own_or_say_where_it_stands() -> None:
    reading = Reading(CHAT)
    assert entry(reading, input_string="a", id=3, custom_id="c").id == "c"
    assert entry(reading, input_string="a", id=0).id == 0
    assert entry(reading, input_string="a", id=None).id == "rows.csv:2"
    named = Reading(CHAT, id_column="key")
    assert entry(named, input_string="a", id=3, key="k").id == "k"
    assert entry(named, input_string="a", key=None).id == "rows.csv:2"
    assert entry(named, input_string="a").problem.field == "key"


def test_a_model_gets_its_columns_and_nothing_else() -> None:
    assert entry(Reading(CHAT), input_string="a", other=1).columns == {"input_string": "a"}
    assert entry(Reading(CHAT), input_string="a", messages=[{}]).columns == {"messages": [{}]}
    mapped = Reading(PAIR, mapping={"question": "q"})
    assert entry(mapped, q="why", question="no", context="c").columns == {"question": "why", "context": "c"}
    chosen = Reading(CHAT, mapping={"input_string": "text"})
    assert entry(chosen, text="a", messages=[{}]).columns == {"input_string": "a"}


def test_columns_are_kept_under_their_own_name_or_a_new_one() -> None:
    reading = Reading(CHAT, keep={"label": "label", "gold": "answer"})
    assert entry(reading, input_string="a", label=None, answer=4).kept == {"label": None, "gold": 4}
    assert entry(reading, input_string="a", label="x").problem.message == "the row has no column 'answer'"


def test_a_row_without_a_value_is_a_failure_of_that_column() -> None:
    found = entry(Reading(PAIR, mapping={"context": "text"}), question="q", text=None)
    assert (found.problem.field, found.problem.message) == ("text", "the row has no value in column 'text'")
    bad = Reading(CHAT).entry(BadRow("rows.jsonl:4", "not UTF-8"), 3)
    assert (bad.id, bad.problem.message) == ("rows.jsonl:4", "not UTF-8")


@pytest.mark.parametrize(
    ("reading", "told"),
    [
        (Reading(CHAT), r"rows.csv:2: column = 'messages'.* but name, body. The model .* --map messages=COLUMN"),
        (Reading(PAIR, mapping={"question": "name"}), r"'context'.* reads question with context"),
        (Reading(CHAT, id_column="key", mapping={"messages": "body"}), r"'key'.*--id-column"),
        (Reading(CHAT, keep={"a": "gold"}, mapping={"messages": "body"}), r"'gold'.*--keep"),
    ],
)
def test_wrong_columns_are_told_with_file_and_row(reading: Reading, told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        reading.check_first(Row({"name": "secret", "body": "text"}, "rows.csv:2"))
    assert "secret" not in str(error.value)


def test_columns_of_two_kinds_are_chosen_by_the_user() -> None:
    row = Row({"messages": [], "input_string": "a"}, "rows.csv:2")
    with pytest.raises(DataError, match=r"could read messages or input_string: say which, --map messages=messages"):
        Reading(CHAT).check_first(row)
    Reading(CHAT, mapping={"input_string": "input_string"}).check_first(row)


def test_a_first_row_that_lacks_only_a_value_is_let_through() -> None:
    Reading(CHAT).check_first(Row({"messages": None}, "rows.csv:2"))
    wrong = [{"body": {"stream": True}}, {"url": "/secret"}, {"custom_id": 3}, {"extra": 1}]
    for change in wrong:
        Reading(requests=True).check_first(Row(REQUEST | change, "a:1"))


def test_a_mapping_is_to_columns_that_the_model_reads() -> None:
    with pytest.raises(FieldError, match=r"--map = 'text=body': the model reads messages, input_string"):
        Reading(CHAT, mapping={"text": "body"}).check_mapping()
    with pytest.raises(FieldError, match="do not go together"):
        Reading(CHAT, mapping={"messages": "a", "input_string": "b"}).check_mapping()
    Reading(PAIR, mapping={"context": "a"}).check_mapping()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"custom_id": 3}, "custom_id"),
        ({"method": "GET"}, "method"),
        ({"url": "http://host/v1/chat/completions"}, "url"),
        ({"url": "/../secret"}, "url"),
        ({"body": "text"}, "body"),
        ({"body": {"stream": True}}, "body"),
        ({"extra": 1}, "extra"),
    ],
)
def test_lines_of_a_batch_file_are_checked(change: dict[str, Any], field: str) -> None:
    reading = Reading(requests=True)
    assert is_request(Row(REQUEST, "a:1"))
    good = reading.entry(Row(REQUEST, "a:1"), 0)
    assert (good.id, good.columns, good.problem) == ("a", {"url": "/v1/embeddings", "body": {"input": "x"}}, None)
    found = reading.entry(Row(REQUEST | change, "a:1"), 0)
    assert found.problem is not None
    assert found.problem.field == field
