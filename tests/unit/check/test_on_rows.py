"""Labels, tags, answers and cut rows: what is learned in another's place is named, and what is right is not."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import ingot.data.labels as labels
import ingot.data.spans as spans
import ingot.model.inputs as inputs
from ingot.check.verdict import Status

NAMES = ["Beyoncé Knowles", "São Paulo", "1924-25", "Zürich's", "“quoted” text"]
WORDS = "city centre fox U.S. naïve don't \u200b ﬁne Zürich ﾊﾝ two 7".split(" ")


def questions(count=40):
    rows = []
    for n in range(count):
        name = NAMES[n % len(NAMES)]
        context = f"{'the fox of the city ' * (n % 9)}and {name} in the centre {n}"
        answer = name[: -1 if n % 3 == 0 else None]  # ends inside a word, now and then
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"question": f"who is it {n}?", "context": context, "answers": answers})
    return rows


def sentences(count=40):
    words = [[WORDS[(n * step) % len(WORDS)] for step in range(1, 3 + n % 9)] for n in range(count)]
    return [{"tokens": it, "tags": ["B-X" if word[0].isupper() else "O" for word in it]} for it in words]


@pytest.fixture(scope="module")
def uncased():
    """WordPiece as BERT has it: case and accents are folded, and some characters have no token."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    core.train_from_iterator([row["context"] for row in questions()] + [" ".join(WORDS)[:30]], trainer)
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pair
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


ASKED = {"objective": {"task": "question-answering"}, "data": {"max_tokens": 40, "overlap_tokens": 8}}
TAGGED = {"objective": {"task": "token-classification"}}


def test_answers_and_tags_in_folded_tokens_are_theirs(on_rows, failed, uncased):
    asked = on_rows(questions(), uncased, **ASKED)
    assert failed(asked) == []
    assert asked["right-labels"].status is Status.passed
    assert failed(on_rows(sentences(), uncased, **TAGGED)) == []


@pytest.mark.parametrize("by", [-1, 1])
def test_an_answer_that_is_off_by_one(on_rows, failed, uncased, monkeypatch, by):
    original = spans._answer

    def answer(row, window):
        first, last = original(row, window)
        return (first + by, last + by) if last else (first, last)

    monkeypatch.setattr(spans, "_answer", answer)
    assert failed(on_rows(questions(), uncased, **ASKED)) == ["right-labels"]


def test_tags_beside_their_words(on_rows, failed, uncased, monkeypatch):
    original = inputs._places
    moved = lambda *args: [None if place is None else place + 1 for place in original(*args)]  # noqa: E731
    monkeypatch.setattr(inputs, "_places", moved)
    assert failed(on_rows(sentences(), uncased, **TAGGED)) == ["right-labels"]


def test_two_classes_that_are_swapped(on_rows, failed, monkeypatch):
    original = labels.labeled

    def swapped(*args):
        return [(replace(row, labels=[{0: 1, 1: 0}.get(row.labels[0], 2)]), cut) for row, cut in original(*args)]

    rows = [{"text": f"text {n}", "label": "abc"[n % 3]} for n in range(12)]
    section = {"objective": {"task": "text-classification"}}
    assert failed(on_rows(rows, **section)) == []
    monkeypatch.setattr(labels, "labeled", swapped)
    rows[0]["text"] += " again"  # another key in the cache
    verdicts = on_rows(rows, **section)
    assert failed(verdicts) == ["right-labels"]
    assert "8 of 12" in verdicts["right-labels"].because


def test_rows_that_are_all_cut_have_no_end_to_judge(on_rows, failed):
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 3} for _ in range(3)]
    verdicts = on_rows(rows, objective={"task": "language-modeling"}, data={"max_tokens": 8})
    assert failed(verdicts) == []
    assert verdicts["stop-token"].status is Status.not_applicable
