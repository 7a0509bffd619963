"""Pairs of answers to the same prompt, of which one is preferred."""

from dataclasses import dataclass, field, replace
from typing import Any

from ingot.data.conversation import Conversation, PromptCompletion, conversation, prompt_of
from ingot.data.fields import Unusable, parsed, text_of, value_of
from ingot.data.sources import Row
from ingot.recipe import Data


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, both of the same kind."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion
    where: str = field(default="", compare=False)


def preference(row: Row, data: Data, *, chat: bool | None) -> Preference:
    """The columns `chosen` and `rejected`, and `prompt` (or what `data.prompt_template` names).

    Answers are texts or lists of turns; without a prompt, lists are whole conversations. `chat`: texts become turns of
    a conversation (True) or are continuations (False); None: as they are.
    """
    answers = {name: _answer(value_of(row, data, name), name) for name in ("chosen", "rejected")}
    lists = [isinstance(answer, list) for answer in answers.values()]
    if lists[0] != lists[1]:
        raise Unusable("chosen and rejected must both be text, or both lists of turns")
    if answers["chosen"] == answers["rejected"]:
        raise Unusable("chosen and rejected are the same")
    if lists[0] and chat is False:
        raise Unusable("chosen and rejected are turns of a chat; use objective.task: chat-completion")
    sides: dict[str, Conversation | PromptCompletion] = {}
    for name, answer in answers.items():
        if lists[0] or chat:
            sides[name] = _chat(row, data, answer, name)
        else:
            sides[name] = PromptCompletion(prompt_of(row, data), answer, row.where)
    return Preference(sides["chosen"], sides["rejected"], row.where)


def _answer(value: Any, name: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # turns in a text cell (CSV)
        return parsed(value, name)
    return value if isinstance(value, list) else text_of(value, name)


def _chat(row: Row, data: Data, answer: Any, name: str) -> Conversation:
    asked = row.values.get(data.columns.get("prompt", "prompt")) or []
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    turns += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    column = data.columns.get("messages", "messages")
    chat = conversation(Row({**row.values, column: turns}, row.where), data)
    if chat.messages[-1].role != "assistant":
        raise Unusable(f"{name} does not end with the assistant's turn")
    return replace(chat, where=row.where)
