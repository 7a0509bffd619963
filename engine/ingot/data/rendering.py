"""Conversations as text: what the tokenizer's own chat template writes, and what is said when it refuses."""

import json
from typing import Any

from ingot.data.conversation import Conversation
from ingot.errors import DataError, ModelError

Tokenizer = Any  # transformers' fast tokenizer; that package is imported in model/ only
FIELD = "model.chat_template"
OWN = "(the tokenizer's)"


def require_template(tokenizer: Tokenizer) -> None:
    """Raise `ModelError` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        fix = "the tokenizer has no chat template; set model.chat_template to a file, or use task text-generation"
        raise ModelError(FIELD, None, fix)


def render(
    chat: Conversation, tokenizer: Tokenizer, end: int, *, prompt: bool = False, thinking: bool | None = None
) -> str:
    """Text of the first `end` turns; `prompt` adds what opens the assistant's next turn.

    `thinking` asks for a turn with or without thoughts, as templates of reasoning models know it (`enable_thinking`).
    """
    messages = [message.as_dict() for message in chat.messages[:end]]
    settings: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    settings |= {"tools": list(chat.tools) or None, "tokenize": False, "add_generation_prompt": prompt}
    try:
        return str(tokenizer.apply_chat_template(messages, **settings))
    except Exception as error:  # templates raise jinja2 errors, and whatever their expressions raise
        if not any(message.tool_calls for message in chat.messages[:end]):
            raise refused(error, chat) from error
        try:  # DeepSeek's templates join strings, so they want the arguments of calls as JSON text
            return str(tokenizer.apply_chat_template([_with_text(message) for message in messages], **settings))
        except Exception:
            raise refused(error, chat) from error


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with the arguments of its calls as JSON text."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    texts = [{**it, "arguments": json.dumps(it["arguments"], ensure_ascii=False)} for it in functions]
    calls = [{**call, "function": text} for call, text in zip(message.get("tool_calls", ()), texts, strict=True)]
    return {**message, "tool_calls": calls} if calls else message


def refused(error: Exception, chat: Conversation) -> DataError:
    """The template does not take this conversation."""
    roles = ", ".join(message.role for message in chat.messages)
    fix = f"the chat template refuses this conversation ({roles}): {error}; mend the row or set {FIELD}"
    return DataError("messages", f"{len(chat.messages)} turns", fix, where=chat.where)


def unproved(chat: Conversation, index: int) -> ModelError:
    """Nothing shows where the assistant's turn `index` begins and ends."""
    fix = (
        f"turn {index} is not rendered the same inside the whole conversation, so it cannot be proved which tokens are "
        "the assistant's; put {% generation %} marks around them in the template, or, where only the last turn stays "
        "as it is, set objective.train_on: last-assistant"
    )
    return ModelError(FIELD, OWN, fix, where=chat.where)
