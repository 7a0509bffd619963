"""Sources and targets as tokenizers of three families dress them, their cuts, and the batch of both."""

import pytest
import torch
from transformers import MBartTokenizer, NllbTokenizer, T5Tokenizer

from ingot.data.conversation import SourceTarget
from ingot.data.inspect import segments
from ingot.data.loader import IGNORE, muted
from ingot.data.targets import collate_targets, source_targets
from ingot.data.template import encode_all
from ingot.errors import ModelError
from ingot.model.inputs import first_of_target, source_ids
from ingot.recipe import Data, Objective

WORDS = "the a man dog runs sees big red".split()
PIECES = [("▁" + word, -1.0) for word in WORDS] + [("▁", -5.0)]
EXAMPLES = [SourceTarget("the big dog", "dog runs", "row:1"), SourceTarget("a man", "the red man sees", "row:2")]


@pytest.fixture(scope="module")
def t5():
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES], extra_ids=2)


@pytest.fixture(scope="module")
def mbart():
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES]
    return MBartTokenizer(vocab=vocab, src_lang="de_DE", tgt_lang="en_XX")


def encoded(tokenizer, examples=EXAMPLES, **data):
    return encode_all(examples, tokenizer, Data(train="rows", **data), Objective(task="translation"), ())


def shown(tokenizer, row):
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    return tokens[: row.parts[0]], tokens[row.parts[0] :]


def test_source_and_target_end_as_the_tokenizer_ends_them(t5):
    rows, report = encoded(t5)
    assert shown(t5, rows[0]) == (["▁the", "▁big", "▁dog", "</s>"], ["▁dog", "▁runs", "</s>"])
    assert rows[0].trainable == [False] * 4 + [True] * 3
    assert [row.n_targets for row in rows] == [3, 5]
    assert (report.truncated, report.count) == (0, 0)
    assert [(part.text, part.trainable) for part in segments(rows[1], t5) if not part.special] == [
        ("a man", False),
        (" the red man sees", True),
    ]


def test_the_targets_language_is_not_the_sources(mbart):
    [row, _], _ = encoded(mbart)
    assert shown(mbart, row)[0][-2:] == ["</s>", "de_DE"]
    assert shown(mbart, row)[1] == ["▁dog", "▁runs", "</s>", "en_XX"]


def test_a_tokenizer_that_ends_nothing_gets_an_end_behind_targets(tiny_tokenizer):
    rows, _ = encoded(tiny_tokenizer)
    assert all(row.ids[-1] == tiny_tokenizer.eos_token_id for row in rows)
    assert all(tiny_tokenizer.eos_token_id not in row.ids[:-1] for row in rows)


def test_a_long_source_keeps_its_end_and_a_long_target_loses_it(t5, mbart):
    rows, report = encoded(t5, max_tokens=3, max_target_tokens=4)
    assert shown(t5, rows[0])[0] == ["▁the", "▁big", "</s>"]
    assert shown(t5, rows[1])[1] == ["▁the", "▁red", "▁man", "▁sees"]
    assert report.truncated == 2
    [(ids, was_cut)] = source_ids(["the big dog runs"], mbart, 3)
    assert mbart.convert_ids_to_tokens(ids) == ["▁the", "</s>", "de_DE"]
    assert was_cut
    assert source_ids(["a man"], t5, 3) == [(t5("a man")["input_ids"], False)]
    assert source_ids([], t5, 3) == []


def test_no_end_token_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="no eos token"):
        encoded(make_tokenizer(eos_token=None))


def test_a_source_without_tokens_is_dropped(tiny_tokenizer):
    [(row, _)] = source_targets(
        [SourceTarget("", "dog", "row:1")], tiny_tokenizer, Data(train="rows"), Objective(task="translation"), ()
    )
    assert row.parts[0] == 0
    assert row.n_targets == 0


def test_batch_of_sources_and_targets(t5):
    rows, _ = encoded(t5)
    batch = collate_targets(rows, 0)
    assert batch.ids_BT.tolist() == [rows[0].ids[:4], [*rows[1].ids[:3], 0]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.targets_BU.tolist() == [[*rows[0].ids[4:], IGNORE, IGNORE], rows[1].ids[3:]]
    assert bool((batch.labels_BT == IGNORE).all())
    assert batch.n_targets == sum(row.n_targets for row in rows) == 8


def test_a_muted_row_has_no_target(t5):
    [row, _], _ = encoded(t5)
    batch = collate_targets([muted(row)], 0)
    assert batch.n_targets == 0
    assert torch.equal(batch.targets_BU, torch.full((1, 3), IGNORE))
    assert batch.ids_BT.tolist() == [row.ids[:4]]


def test_what_targets_begin_with(t5, mbart):
    assert first_of_target(t5) is None
    assert first_of_target(mbart) is None
    nllb = NllbTokenizer(vocab=None, src_lang="deu_Latn", tgt_lang="eng_Latn")
    assert first_of_target(nllb) == nllb.convert_tokens_to_ids("eng_Latn")
