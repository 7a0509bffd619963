"""A model of this machine answers rows as `Runtime.answer` does, and lines of batch files as the endpoint does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingot.batching.answering import Patience, require_alive
from ingot.batching.local import CountingRuntime, Requests, Rows, forms_of, kinds_of
from ingot.batching.rows import Entry, Failure, Outcome, request_id
from ingot.errors import FieldError

TEXTS = [f"Hello{', what is this' * (number % 4)}? {number}" for number in range(9)]


@pytest.fixture
def runtime(model_folder: Path) -> CountingRuntime:
    return CountingRuntime.load(model_folder, "cpu")  # type: ignore[return-value]


def rows(*texts: str) -> list[Entry]:
    return [Entry(place, place, f"a:{place}", {"input_string": text}) for place, text in enumerate(texts)]


def test_rows_are_answered_as_by_the_runtime_whatever_the_bucket(runtime: CountingRuntime) -> None:
    answerer = Rows(runtime, {"max_tokens": 5}, Patience(0))
    entries = rows(*TEXTS)
    whole = answerer.answer(entries)
    assert whole == runtime.answer([{"input_string": text} for text in TEXTS], {"max_tokens": 5})
    for size in (1, 2, 4):
        parts = [answerer.answer(entries[start : start + size]) for start in range(0, 9, size)]
        assert [one for part in parts for one in part] == whole
    assert answerer.answer([]) == []


def test_tokens_are_counted_and_counted_once(runtime: CountingRuntime) -> None:
    answerer = Rows(runtime, {"max_tokens": 3}, Patience(0))
    answerer.answer(rows(*TEXTS[:4]))
    found = answerer.tokens()
    wanted = sum(len(runtime.chat_ids([{"role": "user", "content": text}])) for text in TEXTS[:4])
    assert found["input"] == wanted
    assert 4 <= found["output"] <= 12
    assert answerer.tokens() == {}


def test_rows_of_a_wrong_form_do_not_cut_the_batch(runtime: CountingRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = runtime.answer
    monkeypatch.setattr(runtime, "answer", lambda rows, params: asked.append(len(rows)) or answer(rows, params))
    entries = rows(*TEXTS)
    entries[3] = Entry(3, 3, "a:3", {"input_string": 5})
    entries[5] = Entry(5, 5, "a:5", {"messages": '[{"role": "nobody"}]'})
    found = Rows(runtime, {"max_tokens": 2}, Patience(0)).answer(entries)
    assert asked == [7]
    assert [place for place, one in enumerate(found) if isinstance(one, Failure)] == [3, 5]
    assert found[5].field == "messages"  # type: ignore[union-attr]


def test_rows_with_half_a_character_are_at_fault_and_not_the_model(runtime: CountingRuntime) -> None:
    found = Rows(runtime, {}, Patience(0)).answer(rows("half \ud83d", "\ude42 half"))
    assert [(one.field, one.unexpected) for one in found] == [("input_string", False)] * 2  # type: ignore[union-attr]
    require_alive(found)


def test_a_prompt_that_is_too_long_is_one_row_less(runtime: CountingRuntime) -> None:
    entries = rows(*TEXTS[:3], "long " * 400, TEXTS[3])
    found = Rows(runtime, {"max_tokens": 2}, Patience(0)).answer(entries)
    assert [isinstance(one, Failure) for one in found] == [False, False, False, True, False]
    assert "the model reaches 256" in found[3].message  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"max_token": 4}, "--param = 'max_token=4'.*did you mean max_tokens"),
        ({"max_tokens": "four"}, "--param = 'max_tokens=four'"),
        ({"temperature": -1}, "--param = 'temperature=-1'"),
    ],
)
def test_parameters_are_held_against_the_model(runtime: CountingRuntime, params: dict[str, Any], told: str) -> None:
    with pytest.raises(FieldError, match=told):
        Rows(runtime, params, Patience(0)).check()
    Rows(runtime, {"max_tokens": 4, "stop": ["x"]}, Patience(0)).check()


def test_columns_of_a_task_have_every_name() -> None:
    assert forms_of("text-classification") == (("text",), ("input_string",))
    assert ("question", "context") in forms_of("question-answering")
    assert ("messages",) in forms_of("chat-completion")
    assert kinds_of("question-answering") == {"answer": "text", "score": "float", "start": "int", "end": "int"}


# --- lines of batch files -----------------------------------------------------------------------------------------


@pytest.fixture
def requests(runtime: CountingRuntime) -> Iterator[Requests]:
    answerer = Requests(runtime, "support", Patience(0))
    yield answerer
    answerer.close()


def line(place: int, url: str = "/v1/chat/completions", **body: Any) -> Entry:
    body = {"model": "support", "messages": [{"role": "user", "content": f"Hello {place}"}], "max_tokens": 3} | body
    return Entry(place, f"c{place}", f"a:{place}", {"url": url, "body": body})


def test_lines_are_answered_in_the_form_of_openai(requests: Requests, runtime: CountingRuntime) -> None:
    entries = [line(place) for place in range(3)]
    found = requests.answer(entries)
    for entry, one in zip(entries, found, strict=True):
        assert isinstance(one, dict)
        assert set(one) == {"id", "custom_id", "response", "error"}
        assert (one["custom_id"], one["error"], one["id"]) == (entry.id, None, request_id(entry))
        assert one["response"]["status_code"] == 200
        body = one["response"]["body"]
        wanted = runtime.chat(entry.columns["body"]["messages"], max_new_tokens=3)
        assert body["choices"][0]["message"]["content"] == wanted.text
        assert body["usage"]["completion_tokens"] == len(wanted.ids)
    assert requests.tokens()["output"] == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in found)  # type: ignore[index]


def test_lines_that_are_refused_name_the_field(requests: Requests) -> None:
    found: list[Outcome] = requests.answer(
        [
            line(0, temperature=-1),
            line(1, model="other"),
            line(2),
            line(3, url="/v1/nothing"),
            line(4, max_tokens=1000),
            line(5, unknown_field=1),
        ]
    )
    failures = {place: one for place, one in enumerate(found) if isinstance(one, Failure)}
    assert sorted(failures) == [0, 1, 3, 4, 5]
    assert failures[0].field == "temperature"
    assert (failures[1].field, failures[1].response["status_code"]) == ("model", 404)  # type: ignore[index]
    assert failures[5].field == "unknown_field"
    assert not any(one.unexpected for one in failures.values())
    assert "Hello" not in str(failures)
