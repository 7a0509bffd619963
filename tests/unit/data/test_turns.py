import json
import re
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from ingot.data.conversation import Conversation, Message
from ingot.data.template import encode, encode_all, prompt_ids
from ingot.errors import DataError, ModelError
from ingot.recipe import Data, Objective

ALL = Objective(task="chat-completion")
LAST = Objective(task="chat-completion", train_on="last-assistant")
DATA = Data(train="f")
CALL = {"type": "function", "function": {"name": "book", "arguments": {"people": 2}}}
TOOL = {"type": "function", "function": {"name": "book", "parameters": {}}}


def chat(*turns: tuple[str, str], **options) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), where="f:1", **options)


CHATS = {
    "one turn": chat(("user", "Hello!"), ("assistant", "How can I help you?")),
    "system": chat(("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi\n\n there \n")),
    "many turns": chat(
        ("user", "Hello!"), ("assistant", "Hi"), ("user", "table for two"), ("assistant", "Done."), ("user", "bye")
    ),
    "two in a row": chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    "rare characters": chat(("user", "é 😀"), ("assistant", "été 😀😀"), ("user", "日本"), ("assistant", "語😀")),
    "blanks around": chat(("user", " a "), ("assistant", "\n\n b \n"), ("user", "c"), ("assistant", "  d")),
    "spaces around": chat(("user", " a "), ("assistant", " b "), ("user", "c "), ("assistant", "  d  "), ("user", "e")),
    "space at the end": chat(("user", "a"), ("assistant", "b "), ("user", "c")),
    "role words": chat(
        ("user", "assistant\nassistant"), ("assistant", "user\nassistant\n"), ("user", "x"), ("assistant", "y")
    ),
    "tools": Conversation(
        (
            Message("user", "a table"),
            Message("assistant", "", (CALL,)),
            Message("tool", "ok"),
            Message("assistant", "Done."),
        ),
        (TOOL,),
        "f:1",
    ),
}


def turns_of(row, tokenizer) -> list[str]:
    """Text of every stretch of learned tokens."""
    stretches: list[list[int]] = []
    for index, (token, on) in enumerate(zip(row.ids, row.trainable, strict=True)):
        if on and (index == 0 or not row.trainable[index - 1]):
            stretches.append([])
        if on:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def content(message: Message) -> str:
    return message.content + "".join(json.dumps(call["function"]) for call in message.tool_calls)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_the_assistants_turns_with_their_stop_token_are_learned_and_nothing_else(
    kind, name, tiny_tokenizer, plain_tokenizer
):
    tokenizer = tiny_tokenizer if kind == "marked" else plain_tokenizer
    answers = [message for message in CHATS[name].messages if message.role == "assistant"]
    wanted = [content(message) + "<|im_end|>" for message in answers]
    assert turns_of(encode(CHATS[name], tokenizer, DATA, ALL, ()), tokenizer) == wanted
    assert turns_of(encode(CHATS[name], tokenizer, DATA, LAST, ()), tokenizer) == wanted[-1:]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("objective", [ALL, LAST])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_marks_and_prefixes_give_the_same_mask(name, objective, trim_offsets, make_tokenizer, plain_template):
    marked = encode(CHATS[name], make_tokenizer(trim_offsets=trim_offsets), DATA, objective, ())
    plain = encode(CHATS[name], make_tokenizer(plain_template, trim_offsets=trim_offsets), DATA, objective, ())
    assert marked == plain


@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_special_tokens_are_encoded_once(kind, make_tokenizer, marked_template, plain_template):
    template = marked_template if kind == "marked" else plain_template
    tokenizer = make_tokenizer(template, adds_bos=True)  # the template writes a BOS, and so would the tokenizer
    for row in (
        encode(CHATS["system"], tokenizer, DATA, ALL, ()).ids,
        prompt_ids(CHATS["system"], tokenizer, DATA, ALL),
    ):
        assert row.count(tokenizer.bos_token_id) == 1
        assert row[0] == tokenizer.bos_token_id
        assert row.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


@pytest.mark.parametrize("name", CHATS)
def test_the_prompt_is_what_stands_before_the_last_answer(name, tiny_tokenizer):
    row = encode(CHATS[name], tiny_tokenizer, DATA, LAST, ())
    assert prompt_ids(CHATS[name], tiny_tokenizer, DATA, LAST) == row.ids[: row.trainable.index(True)]


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("{{ message.content }}", "<|im_end|>\n"),
        ("{{ message.content }}<|im_end|>\n", ""),
        ("{{ message.content }}\n", "<|im_end|>\n"),
    ],
    ids=["marks end before the stop token", "marks end after it", "a line break between"],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", ["many turns", "rare characters", "spaces around", "space at the end"])
def test_marks_that_miss_the_stop_token_are_made_to_end_with_it(inside, outside, trim_offsets, name, make_tokenizer):
    template = (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% generation %}" + inside.replace("\n", "{{ '\\n' }}")
        + "{% endgeneration %}" + outside.replace("\n", "{{ '\\n' }}")
        + "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    gap = "\n" if inside.endswith("}}\n") and "im_end" in outside else ""
    wanted = [f"{message.content}{gap}<|im_end|>" for message in CHATS[name].messages if message.role == "assistant"]
    assert turns_of(encode(CHATS[name], tokenizer, DATA, ALL, ()), tokenizer) == wanted


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_space_that_ends_the_prompt_is_not_learned(trim_offsets, make_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer = make_tokenizer(
        template + "{% if add_generation_prompt %}assistant: {% endif %}", trim_offsets=trim_offsets
    )
    row = encode(chat(("user", "a"), ("assistant", "😀")), tokenizer, DATA, ALL, ())
    assert turns_of(row, tokenizer) == ["😀</s>"]


def test_no_template(make_tokenizer):
    tokenizer = make_tokenizer(None)
    with pytest.raises(ModelError, match="text-generation") as caught:
        encode(CHATS["one turn"], tokenizer, DATA, ALL, ())
    assert caught.value.field == "model.chat_template"
    with pytest.raises(ModelError, match="no chat template"):
        prompt_ids(CHATS["one turn"], tokenizer, DATA, ALL)


# Earlier answers are shortened once another turn follows, as templates of reasoning models do.
SHORTENING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}{{ message.content[-1:] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_whose_turns_change_is_refused_unless_the_last_alone_is_learned(make_tokenizer):
    tokenizer = make_tokenizer(SHORTENING)
    conversation = chat(("user", "a"), ("assistant", "long"), ("user", "b"), ("assistant", "done"))
    with pytest.raises(ModelError, match="turn 1 is not rendered the same") as caught:
        encode(conversation, tokenizer, DATA, ALL, ())
    assert "last-assistant" in str(caught.value)
    assert caught.value.where == "f:1"
    assert turns_of(encode(conversation, tokenizer, DATA, LAST, ()), tokenizer) == ["done<|im_end|>"]


@pytest.mark.parametrize("kind", ["marked", "plain"])
@pytest.mark.parametrize("objective", [ALL, LAST])
def test_a_turn_that_is_switched_off_is_not_learned(kind, objective, tiny_tokenizer, plain_tokenizer):
    tokenizer = tiny_tokenizer if kind == "marked" else plain_tokenizer
    for name in ("many turns", "two in a row", "tools"):
        turns = CHATS[name].messages
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        for off in answers:
            kept = [index for index in (answers if objective == ALL else answers[-1:]) if index != off]
            switched = tuple(replace(turn, learned=index != off) for index, turn in enumerate(turns))
            row = encode(replace(CHATS[name], messages=switched), tokenizer, DATA, objective, ())
            assert row.ids == encode(CHATS[name], tokenizer, DATA, ALL, ()).ids
            assert turns_of(row, tokenizer) == [content(turns[index]) + "<|im_end|>" for index in kept]


@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_a_template_that_leaves_out_calls_is_refused(kind, make_tokenizer, marked_template, plain_template):
    template = marked_template if kind == "marked" else plain_template
    tokenizer = make_tokenizer(re.sub(r"{% for call.*?{% endfor %}", "", template, count=1))
    with pytest.raises(ModelError, match="does not write the assistant's call of 'book'"):
        encode(CHATS["tools"], tokenizer, DATA, ALL, ())
    # A turn that is not learned may lose its call.
    encode(CHATS["tools"], tokenizer, DATA, LAST, ())


def test_a_template_that_reads_parts_is_refused(make_tokenizer, plain_template):
    parts = "{% for part in message.content %}{{ part.text }}{% endfor %}"
    tokenizer = make_tokenizer(plain_template.replace("{{ message.content }}", parts))
    with pytest.raises(ModelError, match="does not write what turns say"):
        encode(CHATS["one turn"], tokenizer, DATA, ALL, ())


def test_a_template_whose_prompt_is_not_how_turns_begin_is_refused(make_tokenizer, plain_template):
    tokenizer = make_tokenizer(plain_template.replace("<|im_start|>assistant\n", "<|im_start|>bot\n"))
    with pytest.raises(ModelError, match="cannot be proved"):
        encode(CHATS["one turn"], tokenizer, DATA, ALL, ())


@pytest.mark.parametrize("marks", [True, False])
def test_a_template_without_a_stop_token_is_refused(marks, make_tokenizer):
    block = "{% generation %}{{ m.content }}{% endgeneration %}" if marks else "{{ m.content }}"
    template = "{% for m in messages %}{{ m.role }}: " + block + "\n{% endfor %}assistant: "
    with pytest.raises(ModelError, match="never learn to stop"):
        encode(CHATS["one turn"], make_tokenizer(template), DATA, ALL, ())


def test_a_template_that_ends_the_conversation_and_not_the_turn_is_refused(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{{ eos_token }}"
    )
    tokenizer = make_tokenizer(template)
    assert turns_of(encode(CHATS["one turn"], tokenizer, DATA, ALL, ()), tokenizer) == ["How can I help you?</s>"]
    with pytest.raises(ModelError, match="not ended by '</s>'"):
        encode(CHATS["many turns"], tokenizer, DATA, ALL, ())


def test_marks_that_cover_nothing_leave_it_to_the_proof_by_prefixes(make_tokenizer, marked_template):
    tokenizer = make_tokenizer(marked_template.replace("message.role == 'assistant'", "message.role == 'model'"))
    assert turns_of(encode(CHATS["one turn"], tokenizer, DATA, ALL, ()), tokenizer) == ["How can I help you?<|im_end|>"]
    unprovable = make_tokenizer(SHORTENING + "{% generation %}{% endgeneration %}")
    with pytest.raises(ModelError, match="cannot be proved"):
        encode(CHATS["many turns"], unprovable, DATA, ALL, ())


@pytest.mark.parametrize("kind", ["marked", "plain"])
def test_a_conversation_that_the_template_refuses_is_named(kind, make_tokenizer, marked_template, plain_template):
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer = make_tokenizer(check + (marked_template if kind == "marked" else plain_template))
    with pytest.raises(DataError, match="no system turn") as caught:
        encode_all([CHATS["one turn"], CHATS["system"]], tokenizer, DATA, ALL, ())
    assert caught.value.where == "f:1"
    assert "system, user, assistant" in str(caught.value)


def test_truncation_that_takes_every_answer_drops_the_chat(tiny_tokenizer):
    long = chat(("user", "word " * 50), ("assistant", "yes"))
    kept, report = encode_all(
        [CHATS["one turn"], long], tiny_tokenizer, DATA.model_copy(update={"max_tokens": 40}), ALL, ()
    )
    assert len(kept) == 1
    assert (report.count, report.where) == (1, ["f:1"])


def test_batches_give_what_single_rows_give(tiny_tokenizer):
    rows = list(CHATS.values()) * 3
    kept, _ = encode_all(rows, tiny_tokenizer, DATA, ALL, ())
    assert kept == [encode(row, tiny_tokenizer, DATA, ALL, ()) for row in rows]


@pytest.mark.parametrize("name", sorted(set(CHATS) - {"tools"}))  # its template has no tool turns
@pytest.mark.parametrize("objective", [ALL, LAST])
def test_the_embedded_model_marks_what_prefixes_prove(name, objective, repo_root):
    nano = AutoTokenizer.from_pretrained(repo_root / "engine" / "ingot" / "catalog" / "nano")
    marked = encode(CHATS[name], nano, DATA, objective, ())
    stop = nano.decode(marked.ids[max(index for index, on in enumerate(marked.trainable) if on)])
    assert all(turn.count(stop) == 1 and turn.endswith(stop) for turn in turns_of(marked, nano))
    n_answers = sum(message.role == "assistant" for message in CHATS[name].messages)
    assert len(turns_of(marked, nano)) == (n_answers if objective == ALL else 1)
    nano.chat_template, n_marks = re.subn(r"{%-?\s*(end)?generation\s*-?%}", "{{- '' -}}", nano.chat_template)
    assert n_marks == 2
    assert encode(CHATS[name], nano, DATA, objective, ()) == marked
