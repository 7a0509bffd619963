"""Pairs of answers to the same prompt, of which one is preferred."""

from dataclasses import dataclass, field, replace
from typing import Any

from ingot.data.conversation import Conversation, Document, PromptCompletion, conversation, prompt_columns, prompt_of
from ingot.data.fields import Unusable, parsed, text_of, value_of
from ingot.data.sources import Row
from ingot.recipe import Data

Answer = Conversation | PromptCompletion | Document


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, both of the same kind; documents where there is no prompt."""

    chosen: Answer
    rejected: Answer
    where: str = field(default="", compare=False)


def preference(row: Row, data: Data, *, chat: bool | None) -> Preference:
    """The columns `chosen` and `rejected`, and `prompt` (or what `data.prompt_template` names).

    Answers are texts or lists of turns; without a prompt, lists are whole conversations. Turns that both sides begin
    with are the prompt and are not learned. `chat`: texts become turns of a conversation (True) or are continuations
    (False); None: as they are, and texts without a prompt are whole.
    """
    chosen, rejected = (_answer(value_of(row, data, name), name) for name in ("chosen", "rejected"))
    turns = isinstance(chosen, list)
    if turns != isinstance(rejected, list):
        raise Unusable("chosen and rejected must both be text, or both lists of turns")
    if chosen == rejected:
        raise Unusable("chosen and rejected are the same")
    if turns and chat is False:
        raise Unusable("chosen and rejected are turns of a chat; use objective.task: chat-completion")
    if turns or chat:
        sides = _chat(row, data, chosen, "chosen"), _chat(row, data, rejected, "rejected")
        return Preference(*_answering(*sides), row.where)
    if chat is None and not any(data.columns.get(name, name) in row.values for name in prompt_columns(data)):
        return Preference(Document(chosen, row.where), Document(rejected, row.where), row.where)
    prompt = prompt_of(row, data)
    return Preference(
        PromptCompletion(prompt, chosen, row.where), PromptCompletion(prompt, rejected, row.where), row.where
    )


def _answer(value: Any, name: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # turns in a text cell (CSV)
        try:
            return parsed(value, name)
        except Unusable:  # a text that only looks like it
            return text_of(value, name)
    return value if isinstance(value, list) else text_of(value, name)


def _chat(row: Row, data: Data, answer: Any, name: str) -> Conversation:
    """The conversation that ends with `answer`."""
    asked = row.values.get(data.columns.get("prompt", "prompt")) or []
    if isinstance(asked, str) and asked.lstrip().startswith("[{"):
        asked = parsed(asked, "prompt")
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    turns += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    column = data.columns.get("messages", "messages")
    chat = conversation(Row({**row.values, column: turns}, row.where), data)
    if chat.messages[-1].role != "assistant":
        raise Unusable(f"{name} does not end with the assistant's turn")
    return replace(chat, where=row.where)


def _answering(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, Conversation]:
    """Both with the turns that they share at the beginning switched off: these are what is asked."""
    shared = 0
    for one, other in zip(chosen.messages[:-1], rejected.messages[:-1], strict=False):
        if one != other:
            break
        shared += 1
    if not shared:
        raise Unusable("chosen and rejected answer different prompts")
    asked = tuple(replace(turn, learned=turn.role != "assistant") for turn in chosen.messages[:shared])
    sides = [replace(side, messages=(*asked, *side.messages[shared:])) for side in (chosen, rejected)]
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        if not any(turn.learned for turn in side.messages if turn.role == "assistant"):
            raise Unusable(f"every turn of the assistant that is only in {name} is switched off: nothing to compare")
    return sides[0], sides[1]
