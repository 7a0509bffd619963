import pytest

from ingot.data.conversation import Conversation, Message
from ingot.data.rendering import render
from ingot.errors import DataError

CALL = {"type": "function", "function": {"name": "book", "arguments": {"für": 2}}}
CHAT = Conversation((Message("user", "a"), Message("assistant", "", (CALL,))), where="f:1")


def test_templates_that_join_strings_get_arguments_as_json(make_tokenizer):
    written = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ 'call ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert render(CHAT, make_tokenizer(written), 2) == 'call {"für": 2}'
    assert CALL["function"]["arguments"] == {"für": 2}


def test_the_first_reason_is_given_where_that_does_not_help(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}")
    with pytest.raises(DataError, match="no user"):
        render(CHAT, tokenizer, 2)


def test_thinking_is_asked_for_where_it_is_set(make_tokenizer):
    tokenizer = make_tokenizer("{{ enable_thinking is defined }} {{ enable_thinking }}")
    assert render(CHAT, tokenizer, 2) == "False "
    assert render(CHAT, tokenizer, 2, thinking=False) == "True False"
