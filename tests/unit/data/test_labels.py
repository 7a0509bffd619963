"""Classes, label sets and tags as ids and labels: the right token carries the right number."""

from typing import Any

import pytest

from ingot.data.encoded import IGNORE
from ingot.data.labeled import Labeled, MultiLabeled, Tagged
from ingot.data.labels import collate_tagged
from ingot.data.template import encode, encode_all
from ingot.errors import DataError
from ingot.model.inputs import first_tokens, spans_of
from ingot.recipe import Data, Objective

ONE, SEVERAL, TAGS = (
    Objective(task=task) for task in ("text-classification", "multi-label-classification", "token-classification")
)
DATA = Data(train="f")
NAMES = ("B-place", "I-place", "O")


def sentence(*words: str, tags: tuple[str, ...] | None = None) -> Tagged:
    return Tagged(words, tags or ("O",) * len(words), "f:1")


def tokens_at(tokenizer: Any, ids: list[int], places: list[int | None]) -> list[str | None]:
    return [None if place is None else tokenizer.decode([ids[place]]).strip() for place in places]


def test_a_class_is_its_place_among_the_names(tiny_tokenizer: Any) -> None:
    row = encode(Labeled("hello", "no", "f:1"), tiny_tokenizer, DATA, ONE, ("maybe", "no"))
    assert (row.labels, row.n_targets) == ([1], 1)


def test_every_class_of_a_label_set_is_a_target(tiny_tokenizer: Any) -> None:
    names = ("a", "b", "c")
    rows = [MultiLabeled("hello", ("a", "c"), "f:1"), MultiLabeled("hello", (), "f:2")]
    found, _ = encode_all(rows, tiny_tokenizer, DATA, SEVERAL, names)
    assert [row.labels for row in found] == [[1, 0, 1], [0, 0, 0]]
    assert [row.n_targets for row in found] == [3, 3]


@pytest.mark.parametrize(
    ("row", "objective"),
    [
        (Labeled("x", "mybe", "f:7"), ONE),
        (MultiLabeled("x", ("mybe", "no"), "f:7"), SEVERAL),
        (Tagged(("x",), ("mybe",), "f:7"), TAGS),
    ],
    ids=["class", "set", "tags"],
)
def test_a_label_that_training_never_saw_is_named(row: Any, objective: Objective, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"f:7: label = 'mybe': .*did you mean 'maybe'"):
        encode(row, tiny_tokenizer, DATA, objective, ("maybe", "no"))


def test_sets_without_any_label_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no training row has a label"):
        encode(MultiLabeled("hello", (), "f:1"), tiny_tokenizer, DATA, SEVERAL, ())


@pytest.mark.parametrize("trim", [False, True], ids=["blank in the token", "blank trimmed"])
def test_the_first_token_of_a_word_carries_its_tag(trim: bool, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(trim_offsets=trim)
    words, tags = ("Hello", "New York", "unbelievable", "x"), ("O", "B-place", "I-place", "O")
    row = encode(sentence(*words, tags=tags), tokenizer, DATA, TAGS, NAMES)
    assert row.ids == tokenizer(" ".join(words))["input_ids"]  # what a user's text gives
    assert row.labels is not None
    places = [place for place, label in enumerate(row.labels) if label != IGNORE]
    assert [row.labels[place] for place in places] == [2, 0, 1, 2]
    assert row.trainable == [label != IGNORE for label in row.labels]
    assert row.n_targets == 4
    pieces = [tokenizer.decode(row.ids[a:b]).strip() for a, b in zip(places, [*places[1:], len(row.ids)], strict=True)]
    assert pieces == list(words)


def test_words_that_are_cut_off_or_vanish_have_no_place() -> None:
    tokenizer = bert_tokenizer()
    rows = [sentence("one", "\u200b\ufeff"[:1], "two"), sentence("one", "two", "three", "four")]
    (ids, places, cut), (_, short, was_cut) = first_tokens(
        [row.text for row in rows], [spans_of(row.words) for row in rows], tokenizer, 4
    )
    assert tokens_at(tokenizer, ids, places) == ["one", None, "two"]
    assert not cut
    assert short == [1, 2, None, None]
    assert was_cut
    row = encode(rows[1], tokenizer, Data(train="f", max_tokens=4), TAGS, NAMES)
    assert row.ids[-1] == tokenizer.sep_token_id
    assert row.labels == [IGNORE, 2, 2, IGNORE]


def test_a_row_without_a_word_left_is_dropped_and_counted() -> None:
    rows = [sentence("\u200b"), sentence("one")]
    found, report = encode_all(rows, bert_tokenizer(), DATA, TAGS, NAMES)
    assert [len(found), report.count, report.where] == [1, 1, ["f:1"]]


def test_batches_of_tags_do_not_shift_them(tiny_tokenizer: Any) -> None:
    rows = [
        encode(sentence(*words), tiny_tokenizer, DATA, TAGS, NAMES)
        for words in (("Hello", "capital", "of"), ("France",))
    ]
    padded, flat = collate_tagged(rows, 0), collate_tagged(rows, 0, flat=True, multiple=16)
    for number, row in enumerate(rows):
        assert padded.labels_BT[number, : len(row.ids)].tolist() == row.labels
    assert flat.labels_BT[0, : len(rows[0].ids)].tolist() == rows[0].labels
    assert flat.labels_BT.shape[1] % 16 == 0
    assert padded.n_targets == flat.n_targets == 4


def bert_tokenizer() -> Any:
    """Words as BERT cuts them: control characters vanish."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four"]
    core = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials, mask_token="[MASK]")
