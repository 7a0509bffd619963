import pytest

from ingot.data.conversation import Conversation, Message
from ingot.data.outline import Outlines, find_turn
from ingot.data.rendering import render

SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CALL = {"type": "function", "function": {"name": "book", "arguments": {"people": 2}}}
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
FOOT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = Conversation(
    (Message("user", "a"), Message("assistant", "bc"), Message("user", "bc"), Message("assistant", "bc")), where="f:1"
)


def found(template: str, tokenizer, index: int, chat: Conversation = TALK) -> str | None:
    tokenizer.chat_template = template
    whole = render(chat, tokenizer, len(chat.messages))
    span = find_turn(chat, tokenizer, index, whole, Outlines(SPECIALS))
    return None if span is None else whole[slice(*span)]


def test_a_block_that_only_the_last_turn_has_is_the_models(tiny_tokenizer):
    block = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    template = HEAD + block + "{{ m.content }}<|im_end|>\n" + FOOT
    assert found(template, tiny_tokenizer, 1) == "bc<|im_end|>\n"
    assert found(template, tiny_tokenizer, 3) == "<think></think>bc<|im_end|>\n"


def test_a_prompt_may_end_with_what_history_drops(tiny_tokenizer):
    foot = FOOT.replace("assistant\n", "assistant\n<think>")
    template = HEAD + "{{ m.content }}<|im_end|>\n" + foot
    assert found(template, tiny_tokenizer, 1) == "bc<|im_end|>\n"
    switch = "{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}{{ '\n' }}{% endif %}"
    foot = foot.replace("<think>", "<think>" + switch)
    header = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    assert found(HEAD + header + "{{ m.content }}<|im_end|>\n" + foot, tiny_tokenizer, 3) == "bc<|im_end|>\n"


def test_a_header_that_is_no_prompt_is_refused(tiny_tokenizer):
    template = HEAD + "{{ m.content }}<|im_end|>\n" + FOOT.replace("assistant", "bot")
    assert found(template, tiny_tokenizer, 1) is None


def test_a_turn_may_end_otherwise_inside_and_a_conversation_may_have_an_end(tiny_tokenizer):
    inside = "{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|im_end|>{% endif %}"
    assert found(HEAD + inside + FOOT, tiny_tokenizer, 1) == "bc<|im_end|>"
    assert found(HEAD + inside + FOOT, tiny_tokenizer, 3) == "bc</s>"
    whole = HEAD + "{{ m.content }}<|im_end|>\n" + FOOT.replace("{% endif %}", "{% else %}</s>{% endif %}")
    assert found(whole, tiny_tokenizer, 1) == "bc<|im_end|>\n"


def test_the_next_header_is_no_stop_token(tiny_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
    template += (
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% else %}</s>{% endif %}"
    )
    assert found(template, tiny_tokenizer, 1) is None
    assert found(template, tiny_tokenizer, 3) == "bc</s>"


@pytest.mark.parametrize(
    "written",
    ["{{ m.content }}{{ m.content }}", "{{ m.content | length }}", "{{ messages[-2].content }}{{ m.content }}"],
    ids=["twice", "not at all", "another turn's inside"],
)
def test_texts_that_are_not_written_once_and_apart_are_refused(written, tiny_tokenizer):
    template = HEAD + "{% if m.role == 'assistant' %}" + written + "{% else %}{{ m.content }}{% endif %}"
    assert found(template + "<|im_end|>\n" + FOOT, tiny_tokenizer, 3) is None


def test_what_the_answer_changes_elsewhere_is_refused(tiny_tokenizer):
    note = "{% if 'bc' in messages[1:2] | map(attribute='content') | join %}<s>{% endif %}"
    assert found(note + HEAD + "{{ m.content }}<|im_end|>\n" + FOOT, tiny_tokenizer, 1) is None
    assert found(note + HEAD + "{{ m.content }}<|im_end|>\n" + FOOT, tiny_tokenizer, 3) == "bc<|im_end|>\n"


def test_calls_are_found_where_no_content_is_written_beside_them(tiny_tokenizer):
    written = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    chat = Conversation((Message("user", "a"), Message("assistant", "I do", (CALL,)), Message("tool", "ok")), where="f")
    text = found(HEAD + written + "<|im_end|>\n" + FOOT, tiny_tokenizer, 1, chat)
    assert text == '{"name": "book", "arguments": {"people": 2}}<|im_end|>\n'


def test_shapes_are_outlined_once(tiny_tokenizer):
    outlines = Outlines(SPECIALS)
    tiny_tokenizer.chat_template = HEAD + "{{ m.content }}<|im_end|>\n" + FOOT
    for answer in ("x", "y"):
        chat = Conversation((Message("user", answer), Message("assistant", answer)), where="f")
        span = find_turn(chat, tiny_tokenizer, 1, render(chat, tiny_tokenizer, 2), outlines)
        assert span is not None
    assert len(outlines.known) == 1


def test_a_reply_inside_the_turn_of_its_call_is_refused(tiny_tokenizer):
    chat = Conversation((Message("user", "a"), Message("assistant", "b", (CALL,)), Message("tool", "ok")), where="f")
    reply = "{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}{{ loop.nextitem.content }}{% endif %}"
    turn = "{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n" + reply + "{{ m.content }}<|im_end|>{% endif %}"
    assert found("{% for m in messages %}" + turn + FOOT, tiny_tokenizer, 1, chat) is None
    without = turn.replace(reply, "")
    assert found("{% for m in messages %}" + without + FOOT, tiny_tokenizer, 1, chat) == "b<|im_end|>"


NOTE = "{% if m.role == 'assistant' and messages[0].content == 'a' %}note{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        HEAD + NOTE + "{{ m.content }}<|im_end|>" + FOOT,
        HEAD + "{{ m.content }}" + NOTE + "<|im_end|>" + FOOT,
        HEAD
        + "{{ m.content }}<|im_end|>"
        + FOOT
        + "{% if 'bc' in messages[1:2] | map(attribute='content') | join %}<s>{% endif %}",
    ],
    ids=["before it", "behind it", "at the end"],
)
def test_what_texts_change_around_the_turn_is_refused(template, tiny_tokenizer):
    assert found(template, tiny_tokenizer, 1) is None
    assert found(template.replace("note", "").replace("<s>", ""), tiny_tokenizer, 1) == "bc<|im_end|>"
