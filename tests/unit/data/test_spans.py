"""Questions and contexts in windows, and where in them the answer stands."""

from itertools import pairwise
from typing import Any

import pytest

from ingot.data.labeled import Asked
from ingot.data.spans import collate_asked
from ingot.data.template import encode, encode_all
from ingot.model.inputs import windows_of
from ingot.recipe import Data, Objective

POINT = Objective(task="question-answering")
CONTEXT = "The quick brown fox jumps over the lazy dog. Paris is the capital of France."
QUESTION = "What is the capital of France?"


def asked(answer: str | None = "Paris", context: str = CONTEXT, question: str = QUESTION) -> Asked:
    answers = () if answer is None else ((answer, context.rindex(answer)),)
    return Asked(question, context, answers, "f:1")


def rows_of(tokenizer: Any, row: Asked, data: Data) -> list[Any]:
    return encode_all([row], tokenizer, data, POINT, ())[0]


@pytest.mark.parametrize("answer", ["Paris", "The", "France.", ".", "quick brown fox", "dog. Paris is"])
@pytest.mark.parametrize("trim", [False, True], ids=["blank in the token", "blank trimmed"])
def test_an_answer_is_the_tokens_that_hold_it(answer: str, trim: bool, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(trim_offsets=trim)
    [row] = rows_of(tokenizer, asked(answer), Data(train="f"))
    first, last = row.labels
    assert tokenizer.decode(row.ids[first : last + 1]).strip() == answer
    assert row.n_targets == 2
    assert [place for place, on in enumerate(row.trainable) if on] == list(range(first, last + 1))


def test_the_question_is_not_searched(tiny_tokenizer: Any) -> None:
    [row] = rows_of(tiny_tokenizer, asked("capital of France"), Data(train="f"))
    question = tiny_tokenizer(QUESTION)["input_ids"]
    assert row.labels[0] >= len(question)


def test_no_answer_is_the_first_token(tiny_tokenizer: Any) -> None:
    [row] = rows_of(tiny_tokenizer, asked(None), Data(train="f"))
    assert row.labels == [0, 0]
    assert row.n_targets == 2


def test_a_long_context_lies_in_windows_that_overlap(tiny_tokenizer: Any) -> None:
    question = len(tiny_tokenizer(QUESTION)["input_ids"])
    data = Data(train="f", max_tokens=question + 8, overlap_tokens=3)
    [windows] = windows_of([(QUESTION, CONTEXT)], tiny_tokenizer, question + 8, 3)
    assert len(windows) > 2
    assert all(len(window.ids) <= data.max_tokens for window in windows)
    parts = [window.ids[question:] for window in windows]
    assert all(one[-3:] == other[:3] for one, other in pairwise(parts))
    assert parts[0] + [token for part in parts[1:] for token in part[3:]] == tiny_tokenizer(CONTEXT)["input_ids"]
    rows = rows_of(tiny_tokenizer, asked(), data)
    holding = [row for row in rows if row.labels != [0, 0]]
    assert 1 <= len(holding) < len(rows)
    for row in holding:
        assert tiny_tokenizer.decode(row.ids[row.labels[0] : row.labels[1] + 1]).strip() == "Paris"


def test_half_an_answer_is_none(tiny_tokenizer: Any) -> None:
    question = len(tiny_tokenizer(QUESTION)["input_ids"])
    data = Data(train="f", max_tokens=question + 8, overlap_tokens=3)
    whole = asked("fox jumps over the lazy dog. Paris is the capital")
    assert all(row.labels == [0, 0] for row in rows_of(tiny_tokenizer, whole, data))


def test_a_question_that_fills_the_window(tiny_tokenizer: Any) -> None:
    words = len(tiny_tokenizer(QUESTION)["input_ids"])
    rows, report = encode_all([asked()], tiny_tokenizer, Data(train="f", max_tokens=words), POINT, ())
    assert (rows, report.count, report.truncated) == ([], 1, 1)
    # Less room than the overlap: neighbours share half of it, and every token is in some window.
    [windows] = windows_of([(QUESTION, CONTEXT)], tiny_tokenizer, words + 4, 64)
    seen = {span for window in windows for span in window.spans if span is not None}
    assert len(seen) == len(tiny_tokenizer(CONTEXT)["input_ids"])


def test_segments_go_with_the_tokens(tiny_tokenizer: Any) -> None:
    from tokenizers import processors

    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's
    long, short = asked(), asked("Paris", "In Paris")
    rows = [encode(row, tiny_tokenizer, Data(train="f"), POINT, ()) for row in (long, short)]
    batch = collate_asked(rows, 0)
    assert batch.types_BT is not None
    for number, row in enumerate(rows):
        types = tiny_tokenizer(QUESTION, (long, short)[number].context)["token_type_ids"]
        assert row.parts == (types.count(0), types.count(1))
        padding = batch.ids_BT.shape[1] - len(types)
        assert batch.types_BT[number].tolist() == types + [0] * padding
    assert batch.row_labels is not None
    assert batch.row_labels.shape == (2, 2)


def test_cls_is_where_nothing_stands(make_tokenizer: Any) -> None:
    """Some tokenizers write CLS at the end."""
    from tokenizers import processors

    tokenizer = make_tokenizer(cls_token="<|im_end|>")
    cls = tokenizer.cls_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", pair="$A </s> $B <|im_end|>", special_tokens=[("<|im_end|>", cls), ("</s>", 2)]
    )
    [row] = rows_of(tokenizer, asked(None), Data(train="f"))
    assert row.labels == [len(row.ids) - 1] * 2
