"""Hidden tokens: an exact number, only of words, mixed as in BERT, and a function of seed and row alone."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from ingot.data.conversation import Document
from ingot.data.encoded import IGNORE, Encoded
from ingot.data.loader import Drawn, muted
from ingot.data.masking import collate_masked, hide
from ingot.data.template import encode, encode_all
from ingot.errors import ModelError
from ingot.recipe import Data, Objective

GAPS = Objective(task="fill-mask", mask_share=0.2)
DATA = Data(train="f", max_tokens=64)
MASK = 3
DRAWN = Drawn(MASK, 1000, "0 0")
ROW = Encoded([1, *range(100, 150), 2], [False, *[True] * 50, False], None, "f:1", terms=10)


@pytest.fixture
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(adds_bos=True, mask_token="<|im_start|>")


def test_an_exact_share_of_the_words_is_learned(tokenizer: Any) -> None:
    row = encode(Document("The quick brown <|im_start|> fox jumps over", "f:1"), tokenizer, DATA, GAPS, ())
    named = [token for token, on in zip(row.ids, row.trainable, strict=True) if not on]
    assert named == [tokenizer.bos_token_id, tokenizer.mask_token_id]  # special ones are no words
    assert row.n_targets == row.terms == max(1, round(0.2 * sum(row.trainable)))
    assert row.labels is None


def test_a_short_row_learns_one_token_and_a_row_of_specials_is_dropped(tokenizer: Any) -> None:
    rows = [Document("a", "f:1"), Document("<|im_start|>", "f:2")]
    found, report = encode_all(rows, tokenizer, DATA, GAPS, ())
    assert [row.terms for row in found] == [1]
    assert report.where == ["f:2"]


def test_a_long_row_is_cut(tokenizer: Any) -> None:
    _, report = encode_all([Document("fox " * 100, "f:1")], tokenizer, DATA, GAPS, ())
    assert report.truncated == 1
    assert len(encode(Document("fox " * 100, "f:1"), tokenizer, DATA, GAPS, ()).ids) == 64


def test_a_tokenizer_without_a_mask_token_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.source = .*has no mask token"):
        encode(Document("a fox", "f:1"), tiny_tokenizer, DATA, GAPS, ())


def test_labels_are_what_stood_there_and_nothing_else_changes() -> None:
    ids, labels = hide(ROW, DRAWN)
    hidden = [place for place, label in enumerate(labels) if label != IGNORE]
    assert len(hidden) == 10
    assert all(ROW.trainable[place] and labels[place] == ROW.ids[place] for place in hidden)
    assert [token for place, token in enumerate(ids) if place not in hidden] == [
        token for place, token in enumerate(ROW.ids) if place not in hidden
    ]


def test_the_mixture_is_bert_s() -> None:
    kinds = Counter[str]()
    for number in range(400):
        ids, labels = hide(replace(ROW, where=f"f:{number}"), DRAWN)
        for token, label in zip(ids, labels, strict=True):
            if label != IGNORE:
                kinds["mask" if token == MASK else "kept" if token == label else "random"] += 1
    assert kinds.total() == 4000
    # 80, 10 and 10 % of 4,000; five standard deviations are 126 and 95.
    assert abs(kinds["mask"] - 3200) < 126
    assert abs(kinds["random"] - 400) < 95
    assert abs(kinds["kept"] - 400) < 95


def test_a_draw_depends_on_seed_and_row_alone() -> None:
    other = replace(ROW, where="f:2")
    together = collate_masked([other, ROW], 0, drawn=DRAWN)
    ids, labels = hide(ROW, DRAWN)
    assert (together.ids_BT[1].tolist(), together.labels_BT[1].tolist()) == (ids, labels)
    assert hide(ROW, replace(DRAWN, seed="0 1")) != (ids, labels)  # the next epoch
    assert hide(other, DRAWN) != (ids, labels)
    assert together.n_targets == 20


def test_lines_and_muted_rows() -> None:
    flat = collate_masked([ROW, muted(ROW)], 0, flat=True, multiple=8, drawn=DRAWN)
    assert flat.n_targets == 10
    assert flat.ids_BT.shape == (1, 104)
    assert flat.ids_BT[0, 52:].tolist() == ROW.ids
