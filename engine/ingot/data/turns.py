"""Which tokens of a chat are the assistant's: ids and mask from the tokenizer's own template, turn by turn.

Two ways lead to the mask. A template with `{% generation %}` marks says it itself. For any other template the turns
are rendered one after the other: what `messages[:i+1]` adds to the generation prompt of `messages[:i]` is what the
model has to write, provided that each rendering is a prefix of the whole one. Where that cannot be shown, the
template is refused: a guessed mask trains on the wrong tokens without any sign.

The turn ends with its stop token (end-of-turn marker or eos), which is learned. Blanks after it are not.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ingot.data.conversation import Conversation, Message
from ingot.errors import DataError, ModelError
from ingot.recipe import Objective

Tokenizer = Any  # transformers' fast tokenizer; that package is imported in model/ only
Masked = tuple[list[int], list[bool]]  # ids and, for each, whether the model learns to write it
Span = tuple[int, int]  # half open, of tokens or of characters

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = Conversation((Message("user", "a"), Message("assistant", "b")), where="(probe)")
_FIELD = "model.chat_template"
_OWN = "(the tokenizer's)"


@dataclass(frozen=True)
class _Template:
    """What has to be known of a tokenizer and its template once, not once a row."""

    tokenizer: Tokenizer
    train_on: str
    specials: frozenset[int]
    stop_id: int


def encode_chats(chats: Sequence[Conversation], tokenizer: Tokenizer, objective: Objective) -> list[Masked]:
    """Encode whole conversations, special tokens exactly as the template writes them, none added.

    Raises `ModelError` when the template is missing, cannot be proved right, or ends no turn with a special token;
    `DataError` when the template refuses a conversation.
    """
    require_template(tokenizer)
    specials = special_ids(tokenizer)
    template = _Template(tokenizer, objective.train_on, specials, _stop_id(tokenizer, specials))
    results: list[Masked | None] = []
    for tools, group in groupby(chats, key=lambda chat: chat.tools):
        same_tools = list(group)
        marked = _GENERATION_MARK.search(tokenizer.get_chat_template(tools=list(tools) or None)) is not None
        results += _by_marks(same_tools, template) if marked else [None] * len(same_tools)
    rest = [index for index, result in enumerate(results) if result is None]
    for index, masked in zip(rest, _by_prefixes([chats[index] for index in rest], template), strict=True):
        results[index] = masked
    return [result for result in results if result is not None]


def require_template(tokenizer: Tokenizer) -> None:
    """Raise `ModelError` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        fix = "the tokenizer has no chat template; set model.chat_template to a file, or use task text-generation"
        raise ModelError(_FIELD, None, fix)


def render(chat: Conversation, tokenizer: Tokenizer, end: int, *, prompt: bool = False) -> str:
    """Text of the first `end` turns; `prompt` adds what opens the assistant's next turn."""
    messages = [message.as_dict() for message in chat.messages[:end]]
    tools = list(chat.tools) or None
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise jinja2 errors, and whatever their expressions raise
        raise _refused(error, chat) from error


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all tokens that the tokenizer holds as special."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def first_token(offsets: Sequence[Span], character: int) -> int:
    """Index of the first token that starts at or after `character`: one that spans it belongs to what is before.

    A byte-level tokenizer may trim spaces from its offsets: a token of spaces alone then is the empty span at its own
    end, so one at `character` stands before it.
    """
    index = bisect_left(offsets, character, key=lambda span: span[0])
    while index < len(offsets) and offsets[index][1] == character:
        index += 1
    return index


# --- the two ways ----------------------------------------------------------------------------------------------


def _by_marks(chats: Sequence[Conversation], template: _Template) -> list[Masked | None]:
    """Masks from the template's own marks; None where transformers' mask does not follow them."""
    tokenizer = template.tokenizer
    conversations = [[message.as_dict() for message in chat.messages] for chat in chats]
    try:
        encoded = tokenizer.apply_chat_template(
            conversations,
            tools=list(chats[0].tools) or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except Exception as error:
        for chat in chats:  # names the row that is refused
            render(chat, tokenizer, len(chat.messages))
        raise _refused(error, chats[0]) from error
    columns = (encoded["input_ids"], encoded["assistant_masks"], encoded["offset_mapping"])
    results: list[Masked | None] = []
    for chat, ids, marks, offsets in zip(chats, *columns, strict=True):
        runs = _runs(marks, offsets)
        n_turns = sum(message.role == "assistant" for message in chat.messages)
        # Where the first or last marked character has no token of its own (a space trimmed from the offsets),
        # transformers leaves out this turn and all later ones, or marks all up to the end, the user's turns too.
        is_broken = len(runs) < n_turns or any(_runs_over(ids[start:end], template) for start, end in runs)
        if not is_broken and template.train_on == "last-assistant":
            start = first_token(offsets, _last_turn_start(chat, tokenizer))
            runs = [run for run in runs if run[0] >= start]
        if is_broken or not runs:
            results.append(None)
            continue
        results.append(_closed(ids, runs, template, chat))
    return results


def _by_prefixes(chats: Sequence[Conversation], template: _Template) -> list[Masked]:
    """Masks from rendering turn by turn; `ModelError` where a rendering is not a prefix of the next."""
    if not chats:
        return []
    tokenizer = template.tokenizer
    texts, spans = [], []
    for chat in chats:
        whole = render(chat, tokenizer, len(chat.messages))
        texts.append(whole)
        spans.append([_turn(chat, tokenizer, index, whole) for index in _learned_turns(chat, template)])
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    columns = (encoded["input_ids"], encoded["offset_mapping"])
    results = []
    for chat, turns, ids, offsets in zip(chats, spans, *columns, strict=True):
        runs = [(first_token(offsets, start), first_token(offsets, end)) for start, end in turns]
        results.append(_closed(ids, runs, template, chat))
    return results


def _learned_turns(chat: Conversation, template: _Template) -> list[int]:
    if template.train_on == "last-assistant":
        return [chat.last_assistant]
    return [index for index, message in enumerate(chat.messages) if message.role == "assistant"]


def _turn(chat: Conversation, tokenizer: Tokenizer, index: int, whole: str) -> Span:
    """Characters of `whole` that the assistant writes in turn `index`, its end-of-turn marker included."""
    before = render(chat, tokenizer, index, prompt=True)
    after = whole if index + 1 == len(chat.messages) else render(chat, tokenizer, index + 1)
    if not (after.startswith(before) and whole.startswith(after)):
        raise _unproved(chat, index)
    return len(before), len(after)


def _last_turn_start(chat: Conversation, tokenizer: Tokenizer) -> int:
    before = render(chat, tokenizer, chat.last_assistant, prompt=True)
    if not render(chat, tokenizer, len(chat.messages)).startswith(before):
        raise _unproved(chat, chat.last_assistant)
    return len(before)


# --- tokens ----------------------------------------------------------------------------------------------------


def _runs(marks: Sequence[int], offsets: Sequence[Span]) -> list[Span]:
    """Stretches of marked tokens, each to the end of its last character (a rare one is several tokens)."""
    runs, start = [], 0
    for marked, group in groupby(marks):
        end = start + len(list(group))
        if marked:
            last = end
            while last < len(offsets) and offsets[last] == offsets[end - 1]:
                last += 1
            runs.append((start, last))
        start = end
    return runs


def _is_blank(token_id: int, tokenizer: Tokenizer) -> bool:
    return not tokenizer.decode([token_id]).strip()


def _stop_id(tokenizer: Tokenizer, specials: frozenset[int]) -> int:
    """The special token that the template puts at the end of the assistant's turn; `ModelError` when there is none."""
    text = render(_PROBE, tokenizer, 2)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    while ids and _is_blank(ids[-1], tokenizer):
        ids.pop()
    if not ids or ids[-1] not in specials:
        fix = (
            "the chat template does not end the assistant's turn with a special token, so the model would never learn "
            "to stop; write eos_token (or an end-of-turn token that the tokenizer holds as special) after the content"
        )
        raise ModelError(_FIELD, text[-40:], fix)
    return int(ids[-1])


def _runs_over(ids: Sequence[int], template: _Template) -> bool:
    """Whether something other than blanks follows a stop token inside one run."""
    if template.stop_id not in ids:
        return False
    rest = ids[ids.index(template.stop_id) + 1 :]
    return any(not _is_blank(token, template.tokenizer) for token in rest)


def _closed(ids: list[int], runs: list[Span], template: _Template, chat: Conversation) -> Masked:
    """Mask of `runs`, each made to end with its stop token, whether its marks end before it or after."""
    trainable = [False] * len(ids)
    for start, end in runs:
        last = end - 1
        while last > start and _is_blank(ids[last], template.tokenizer):
            last -= 1
        if ids[last] not in template.specials:
            last = end
            while last < len(ids) and _is_blank(ids[last], template.tokenizer):
                last += 1
            if last == len(ids) or ids[last] != template.stop_id:
                token = template.tokenizer.convert_ids_to_tokens(template.stop_id)
                fix = f"a turn of the assistant is not ended by {token!r} here, so the model would not learn to stop"
                raise ModelError(_FIELD, _OWN, fix, where=chat.where)
        trainable[start : last + 1] = [True] * (last + 1 - start)
    return ids, trainable


# --- errors ----------------------------------------------------------------------------------------------------


def _refused(error: Exception, chat: Conversation) -> DataError:
    roles = ", ".join(message.role for message in chat.messages)
    fix = f"the chat template refuses this conversation ({roles}): {error}; mend the row or set {_FIELD}"
    return DataError("messages", f"{len(chat.messages)} turns", fix, where=chat.where)


def _unproved(chat: Conversation, index: int) -> ModelError:
    fix = (
        f"turn {index} is not rendered the same inside the whole conversation, so it cannot be proved which tokens are "
        "the assistant's; put {% generation %} marks around them in the template, or, where only the last turn stays "
        "as it is, set objective.train_on: last-assistant"
    )
    return ModelError(_FIELD, _OWN, fix, where=chat.where)
