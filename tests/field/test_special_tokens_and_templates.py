"""Masks and special tokens that are wrong without a word.

Liquid4All/liquid-finetune#37 (no generation marks: nothing is learned); unsloth#1262, #1290, #2900, #3041, trl#1191
(markers searched in ids are not found); trl#1623, unsloth#416, torchtune#949 (pad = eos: the model never stops);
unsloth#2648, NeMo/RL#855 (two BOS, then none); LlamaFactory#8720, #9228, #2509, unsloth#1832 (another template is
shipped).
"""

import pytest
from transformers import AutoTokenizer

from ingot.data.conversation import Conversation, Message, PromptCompletion
from ingot.data.loader import IGNORE, collate
from ingot.data.template import encode, prompt_ids
from ingot.recipe import Data, Objective

CHAT = Objective(task="chat-completion")
TEXT = Objective(task="text-generation")
DATA = Data(train="f")
TALK = Conversation(
    (
        Message("user", "Hello!"),
        Message("assistant", "How can I help you?"),
        Message("user", "assistant\n<|im_start|> please"),  # looks like a marker
        Message("assistant", "Done."),
    ),
    where="f:1",
)


def learned(row, tokenizer):
    return tokenizer.decode([token for token, on in zip(row.ids, row.trainable, strict=True) if on])


def test_a_template_without_marks_learns_the_same_tokens_as_one_with(tiny_tokenizer, plain_tokenizer):
    marked, plain = (encode(TALK, tokenizer, DATA, CHAT, ()) for tokenizer in (tiny_tokenizer, plain_tokenizer))
    assert plain.trainable == marked.trainable
    assert learned(plain, plain_tokenizer) == "How can I help you?<|im_end|>Done.<|im_end|>"


def test_text_that_looks_like_a_marker_moves_no_mask(plain_tokenizer):
    row = encode(TALK, plain_tokenizer, DATA, CHAT, ())
    assert learned(row, plain_tokenizer).count("<|im_end|>") == 2


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "padding-free"])
def test_stop_token_is_learned_where_padding_has_its_id(make_tokenizer, flat):
    tokenizer = make_tokenizer(pad_token="<|im_end|>", eos_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short = Conversation((Message("user", "a"), Message("assistant", "b")), where="f:2")
    rows = [encode(talk, tokenizer, DATA, CHAT, ()) for talk in (TALK, short)]
    batch = collate(rows, tokenizer.pad_token_id, flat=flat)
    assert int((batch.labels_BT == tokenizer.eos_token_id).sum()) == 3  # one behind each answer
    n_padding = 0 if flat else batch.ids_BT.numel() - sum(len(row.ids) for row in rows)
    assert int((batch.labels_BT == IGNORE).sum()) >= n_padding


@pytest.mark.parametrize("adds_bos", [False, True], ids=["template alone", "template and tokenizer"])
def test_one_bos(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    row = encode(TALK, tokenizer, DATA, CHAT, ())
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert prompt_ids(TALK, tokenizer, DATA, CHAT).count(tokenizer.bos_token_id) == 1
    text = encode(PromptCompletion("Hello", " you", "f:1"), tokenizer, DATA, TEXT, ())
    assert text.ids.count(tokenizer.bos_token_id) == adds_bos


def test_the_template_that_is_shipped_is_the_one_that_was_trained(make_tokenizer, plain_template, tmp_path):
    tokenizer = make_tokenizer(plain_template.replace("<|im_start|>", "<|im_start|>>"))
    trained = encode(TALK, tokenizer, DATA, CHAT, ())
    tokenizer.save_pretrained(tmp_path)
    shipped = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(TALK, shipped, DATA, CHAT, ()).ids == trained.ids
    asked = shipped.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, tokenize=False
    )
    assert (
        trained.ids[: len(shipped(asked, add_special_tokens=False)["input_ids"])]
        == (shipped(asked, add_special_tokens=False)["input_ids"])
    )
