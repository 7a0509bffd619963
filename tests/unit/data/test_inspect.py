import io
import json

import pytest
from rich.console import Console

from ingot.data.conversation import Conversation, Message, PromptCompletion
from ingot.data.encoded import Encoded
from ingot.data.inspect import STYLES, as_dict, render, segments
from ingot.data.labeled import Labeled
from ingot.data.template import encode
from ingot.recipe import Data, Objective

DATA = Data(train="f")
CHAT = Conversation(
    (Message("user", "Wo ist 😀?\nHello!"), Message("assistant", "[bold]é[/bold] 😀")), where="chats.jsonl:3"
)


@pytest.fixture
def chat_row(tiny_tokenizer):
    return encode(CHAT, tiny_tokenizer, DATA, Objective(), ())


def shown(rows, tokenizer, **options) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    render(rows, tokenizer, console)
    return console.file.getvalue()


def test_segments_add_up_to_the_row(chat_row, tiny_tokenizer):
    parts = segments(chat_row, tiny_tokenizer)
    assert "".join(part.text for part in parts) == tiny_tokenizer.decode(chat_row.ids)
    assert [part.text for part in parts if part.trainable] == ["[bold]é[/bold] 😀", "<|im_end|>"]
    assert [part.text for part in parts if part.special] == [
        "<s><|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_spaces_survive_a_sentencepiece_decoder(shared_dir):
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k")
    row = encode(PromptCompletion("Once upon", "a time"), stories, DATA, Objective(task="text-generation"), ())
    parts = segments(row, stories)
    assert "".join(part.text for part in parts) == stories.decode(row.ids)
    assert [part.text for part in parts if part.trainable] == [" a time", "</s>"]


def test_a_panel_shows_text_special_tokens_place_and_counts(chat_row, tiny_tokenizer):
    out = shown([chat_row], tiny_tokenizer)
    learned = sum(chat_row.trainable)
    for wanted in (
        "chats.jsonl:3",
        "[bold]é[/bold] 😀<|im_end|>",
        "<s><|im_start|>user↵",
        "Hello!<|im_end|>↵",
        f"{len(chat_row.ids)} tokens, {learned} learned",
        "read only",
    ):
        assert wanted in out
    assert f"{len(chat_row.ids)}" in out.splitlines()[-3]


def test_learned_tokens_are_green_and_the_rest_is_not(chat_row, tiny_tokenizer):
    out = shown([chat_row], tiny_tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m[bold]é[/bold] 😀" in out
    assert "\x1b[1;7;32m<|im_end|>" in out
    assert "\x1b[2mHello!" in out
    assert len(set(STYLES.values())) == 4


def test_classes_are_shown_with_their_index(tiny_tokenizer):
    row = encode(Labeled("Hello!", "b", "f:1"), tiny_tokenizer, DATA, Objective(task="text-classification"), ("a", "b"))
    out = shown([row], tiny_tokenizer)
    assert "class 1" in out
    assert "labels seen" in out


def test_what_is_hidden_anew_is_told_from_a_pair_of_answers(tiny_tokenizer):
    gaps, pair = (Encoded([5, 6, 7, 8], [False, True, False, True], None, "f:1", parts, 1) for parts in ((), (2, 2)))
    assert "4 tokens, 1 of 2 hidden" in shown([gaps], tiny_tokenizer)
    assert "4 tokens, 2 learned (50 %)" in shown([pair], tiny_tokenizer)


def test_plain_values_for_json(chat_row, tiny_tokenizer):
    values = json.loads(json.dumps(as_dict([chat_row, chat_row], tiny_tokenizer)))
    assert values["tokens"] == 2 * len(chat_row.ids)
    assert values["trainable"] == 2 * sum(chat_row.trainable)
    assert values["rows"][0]["where"] == "chats.jsonl:3"
    assert values["rows"][0]["segments"][-2] == {"text": "<|im_end|>", "trainable": True, "special": True}


def test_nothing_to_show(tiny_tokenizer):
    assert "0 %" in shown([], tiny_tokenizer)
    assert as_dict([], tiny_tokenizer) == {"rows": [], "tokens": 0, "trainable": 0}
