"""Pairs to ids and batches: what is learned of each side, what is cut, what is dropped."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from ingot.data import inspect
from ingot.data.encoded import IGNORE
from ingot.data.example import to_example
from ingot.data.loader import muted
from ingot.data.pairs import answers_of, pairs
from ingot.data.sources import Row
from ingot.data.table import RowWriter
from ingot.data.template import encode_all, prompt_ids
from ingot.recipe_io import parse_recipe

CHAT = {"prompt": "What is the capital of France?", "chosen": "Paris is.", "rejected": "Thank you very much, goodbye."}
TEXT = {"prompt": "the capital of France is", "chosen": "Paris", "rejected": "the brown fox"}


def encoded(rows, tokenizer, task="chat-completion", max_tokens=64):
    objective = {"task": task} | ({} if task == "reward" else {"method": "dpo"})
    data = {"train": "t", "max_tokens": max_tokens}
    recipe = parse_recipe({"name": "pairs", "model": {"source": "m"}, "data": data, "objective": objective})
    examples = [to_example(Row(row, f"row:{n}"), recipe.data, recipe.objective) for n, row in enumerate(rows)]
    return *encode_all(examples, tokenizer, recipe.data, recipe.objective, ()), examples, recipe


def learned(row, tokenizer):
    return [
        tokenizer.decode([token for token, flag in zip(side.ids, side.trainable, strict=True) if flag])
        for side in answers_of(row)
    ]


def test_each_side_is_prompt_and_answer(tiny_tokenizer):
    [row], _, [example], recipe = encoded([CHAT], tiny_tokenizer)
    asked = prompt_ids(example, tiny_tokenizer, recipe.data, recipe.objective)
    for side in answers_of(row):
        assert side.ids[: len(asked)] == asked
        assert side.trainable == [place >= len(asked) for place in range(len(side.ids) - 1)] + [False]  # the line break
    assert learned(row, tiny_tokenizer) == ["Paris is.<|im_end|>", "Thank you very much, goodbye.<|im_end|>"]
    assert row.parts == tuple(len(side.ids) for side in answers_of(row))
    assert row.n_targets == sum(answers_of(row)[0].trainable)


def test_a_continuation_ends_with_eos(make_tokenizer):
    tokenizer = make_tokenizer(None, adds_bos=True)
    [row], *_ = encoded([TEXT], tokenizer, "text-generation")
    assert learned(row, tokenizer) == [" Paris</s>", " the brown fox</s>"]
    assert all(side.ids[0] == tokenizer.bos_token_id for side in answers_of(row))


def test_the_end_is_cut_and_what_teaches_nothing_is_dropped(tiny_tokenizer):
    [whole], *_ = encoded([CHAT], tiny_tokenizer)
    chosen, rejected = answers_of(whole)
    n_prompt = chosen.trainable.index(True)
    [row], report, *_ = encoded([CHAT], tiny_tokenizer, max_tokens=len(chosen.ids))
    assert answers_of(row)[0].ids == chosen.ids
    assert answers_of(row)[1].ids == rejected.ids[: len(chosen.ids)]
    assert report.truncated == 1
    rows, report, *_ = encoded([CHAT], tiny_tokenizer, max_tokens=n_prompt)
    assert (rows, report.count, report.where) == ([], 1, ["row:0"])
    # Two answers that differ behind the cut only.
    same = {**CHAT, "chosen": "Paris is the capital of France", "rejected": "Paris is the capital of the world"}
    rows, report, *_ = encoded([same, CHAT], tiny_tokenizer, max_tokens=n_prompt + 4)
    assert [row.where for row in rows] == ["row:1"]


def test_rows_of_a_reward_model_may_be_of_several_kinds(tiny_tokenizer):
    turns = {"prompt": [{"role": "user", "content": "hello"}], "chosen": [{"role": "assistant", "content": "good"}],
             "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    whole = {"chosen": "the fox jumps", "rejected": "the dog"}
    rows, *_ = encoded([TEXT, turns, whole], tiny_tokenizer, "reward")
    assert [row.where for row in rows] == ["row:0", "row:1", "row:2"]
    assert learned(rows[0], tiny_tokenizer)[0] == " Paris</s>"
    assert learned(rows[1], tiny_tokenizer)[0] == "good<|im_end|>"
    # Its first token has nothing before it.
    assert rows[2].trainable[0] is False
    assert tiny_tokenizer.decode(answers_of(rows[2])[0].ids) == "the fox jumps</s>"


def test_an_encoder_is_told_prompt_and_answer_apart():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "capital", "of", "France", "is", "Paris", "brown", "fox"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    [row, whole], *_ = encoded([TEXT, {"chosen": "the fox", "rejected": "the"}], tokenizer, "reward")
    assert tokenizer.decode(answers_of(row)[0].ids) == "[CLS] the capital of France is [SEP] Paris [SEP]"
    assert learned(row, tokenizer) == ["Paris", "the brown fox"]
    assert learned(whole, tokenizer) == ["the fox", "the"]


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "end to end"])
def test_a_batch_holds_both_answers_of_a_pair_side_by_side(tiny_tokenizer, flat):
    rows, *_ = encoded([CHAT, {**CHAT, "chosen": "Hello!"}], tiny_tokenizer)
    rows = [replace(row, reference=(-1.0 - n, -2.0)) for n, row in enumerate(rows)]
    batch = pairs(rows, 0, flat=flat)
    sides = [side for row in rows for side in answers_of(row)]
    if flat:
        assert batch.row_lengths == tuple(len(side.ids) for side in sides)
        ids, labels = (tensor[0].split(batch.row_lengths) for tensor in (batch.ids_BT, batch.labels_BT))
    else:
        ids, labels = list(batch.ids_BT), list(batch.labels_BT)
        assert batch.attention_BT.sum(1).tolist() == [len(side.ids) for side in sides]
    for side, found, wanted in zip(sides, ids, labels, strict=True):
        assert found[: len(side.ids)].tolist() == side.ids
        kept = wanted[: len(side.ids)].tolist()
        assert [label != IGNORE for label in kept] == side.trainable
    assert batch.n_targets == sum(row.n_targets for row in rows)
    torch.testing.assert_close(batch.reference_P2, torch.tensor([[-1.0, -2.0], [-2.0, -2.0]]))
    assert pairs([replace(row, reference=()) for row in rows], 0, flat=flat).reference_P2 is None


def test_a_muted_pair_has_no_target(tiny_tokenizer):
    [row], *_ = encoded([CHAT], tiny_tokenizer)
    batch = pairs([muted(row)], 0)
    assert batch.n_targets == 0
    assert (batch.labels_BT == IGNORE).all()


def test_pairs_keep_their_parts_in_tables(tiny_tokenizer):
    [row], *_ = encoded([CHAT], tiny_tokenizer)
    writer = RowWriter()
    writer.add([row])
    assert writer.rows()[0] == row
    assert writer.rows().targets.tolist() == [row.n_targets]


def test_people_see_where_the_second_answer_begins(tiny_tokenizer):
    rows, *_ = encoded([CHAT], tiny_tokenizer)
    console = Console(record=True, width=100)
    inspect.render(rows, tiny_tokenizer, console)
    above, below = console.export_text().split("- - -")
    assert "Paris is." in above
    assert "goodbye." not in above
    assert "What is the capital of France?" in below
    assert inspect.as_dict(rows, tiny_tokenizer)["rows"][0]["parts"] == list(rows[0].parts)
