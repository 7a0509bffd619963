"""Which tokens of a chat are the assistant's: ids and mask from the tokenizer's own template, turn by turn.

Three ways lead to the mask. A template with `{% generation %}` marks says it itself. For any other template the turns
are rendered one after the other: what `messages[:i+1]` adds to the generation prompt of `messages[:i]` is what the
model has to write, provided that each rendering is a prefix of the whole one. A turn that is rendered otherwise inside
the whole is looked for by what stands around it (outline.py). Where that cannot be shown either, the template is
refused: a guessed mask trains on the wrong tokens without any sign.

The turn ends with its stop token (end-of-turn marker or eos), which is learned. Blanks after it are not. Turns that a
row switches off (`Message.learned`) are read only.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ingot.data.conversation import Conversation, Message
from ingot.data.outline import Outlines, find_turn
from ingot.data.rendering import FIELD, OWN, Tokenizer, refused, render, require_template, unproved
from ingot.errors import ModelError
from ingot.model.inputs import special_ids
from ingot.recipe import Objective

Masked = tuple[list[int], list[bool]]  # ids and, for each, whether the model learns to write it
Span = tuple[int, int]  # half open, of tokens or of characters

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = Conversation((Message("user", "zquestion"), Message("assistant", "zanswer")), where="(probe)")


@dataclass(frozen=True)
class _Template:
    """What has to be known of a tokenizer and its template once, not once a row."""

    tokenizer: Tokenizer
    train_on: str
    specials: frozenset[int]
    stop_id: int
    header: str
    """What the generation prompt adds after a user's turn."""
    outlines: Outlines


def encode_chats(chats: Sequence[Conversation], tokenizer: Tokenizer, objective: Objective) -> list[Masked]:
    """Encode whole conversations, special tokens exactly as the template writes them, none added.

    Raises `ModelError` when the template is missing, cannot be proved right, drops calls or ends no turn with a
    special token; `DataError` when the template refuses a conversation.
    """
    template = _learn(tokenizer, objective.train_on)
    for chat in chats:
        _require_calls(chat, template)
    results: list[Masked | None] = []
    for tools, group in groupby(chats, key=lambda chat: chat.tools):
        same_tools = list(group)
        marked = _GENERATION_MARK.search(tokenizer.get_chat_template(tools=list(tools) or None)) is not None
        results += _by_marks(same_tools, template) if marked else [None] * len(same_tools)
    rest = [index for index, result in enumerate(results) if result is None]
    for index, masked in zip(rest, _by_renderings([chats[index] for index in rest], template), strict=True):
        results[index] = masked
    return [result for result in results if result is not None]


def _learn(tokenizer: Tokenizer, train_on: str) -> _Template:
    require_template(tokenizer)
    specials = special_ids(tokenizer)
    texts = tuple(sorted(tokenizer.convert_ids_to_tokens(sorted(specials))))
    text = render(_PROBE, tokenizer, 2)
    if any(message.content not in text for message in _PROBE.messages):
        fix = "the chat template does not write what turns say; it may want lists of parts: set one for texts"
        raise ModelError(FIELD, text[-40:], fix)
    asked, told = render(_PROBE, tokenizer, 1, prompt=True), render(_PROBE, tokenizer, 1)
    header = asked.removeprefix(told) if asked.startswith(told) else ""
    return _Template(tokenizer, train_on, specials, _stop_id(text, tokenizer, specials), header, Outlines(texts))


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
        raise refused(error, chats[0]) from error
    columns = (encoded["input_ids"], encoded["assistant_masks"], encoded["offset_mapping"])
    results: list[Masked | None] = []
    for chat, ids, marks, offsets in zip(chats, *columns, strict=True):
        runs = _runs(marks, offsets)
        n_turns = sum(message.role == "assistant" for message in chat.messages)
        # Where the first or last marked character has no token of its own (a space trimmed from the offsets),
        # transformers leaves out this turn and all later ones, or marks all up to the end, the user's turns too.
        if len(runs) < n_turns or any(_runs_over(ids[start:end], template) for start, end in runs):
            results.append(None)
            continue
        wanted = _wanted(runs, offsets, chat, template)
        results.append(_closed(ids, wanted, template, chat))
    return results


def _wanted(runs: list[Span], offsets: Sequence[Span], chat: Conversation, template: _Template) -> list[Span]:
    """Those of the marked `runs` that are to be learned."""
    turns = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
    learned = _learned_turns(chat, template)
    if learned == turns:
        return runs
    if len(runs) == len(turns):
        return [run for run, index in zip(runs, turns, strict=True) if index in learned]
    whole = render(chat, template.tokenizer, len(chat.messages))
    spans = [_tokens(_turn(chat, template, index, whole), offsets) for index in learned]
    return [run for run in runs if any(start <= run[0] < end for start, end in spans)]


def _by_renderings(chats: Sequence[Conversation], template: _Template) -> list[Masked]:
    """Masks from rendering turn by turn; `ModelError` where a turn is not proved."""
    if not chats:
        return []
    tokenizer = template.tokenizer
    texts, spans = [], []
    for chat in chats:
        whole = render(chat, tokenizer, len(chat.messages))
        texts.append(whole)
        spans.append([_turn(chat, template, index, whole) for index in _learned_turns(chat, template)])
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    columns = (encoded["input_ids"], encoded["offset_mapping"])
    results = []
    for chat, turns, ids, offsets in zip(chats, spans, *columns, strict=True):
        results.append(_closed(ids, [_tokens(turn, offsets) for turn in turns], template, chat))
    return results


def _learned_turns(chat: Conversation, template: _Template) -> list[int]:
    turns = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
    if template.train_on == "last-assistant":
        turns = turns[-1:]
    return [index for index in turns if chat.messages[index].learned]


def _turn(chat: Conversation, template: _Template, index: int, whole: str) -> Span:
    """Characters of `whole` that the assistant writes in turn `index`, its end-of-turn marker included."""
    tokenizer = template.tokenizer
    span = _turn_of_prefixes(chat, template, index, whole)
    span = span or find_turn(chat, tokenizer, index, whole, template.outlines)
    if span is None:
        raise unproved(chat, index)
    return span


def _turn_of_prefixes(chat: Conversation, template: _Template, index: int, whole: str) -> Span | None:
    """The turn's characters where the renderings before and after it are prefixes of `whole`."""
    before = render(chat, template.tokenizer, index, prompt=True)
    if not whole.startswith(before):
        return None
    after = whole if index + 1 == len(chat.messages) else render(chat, template.tokenizer, index + 1)
    if not (after.startswith(before) and whole.startswith(after)):
        return None
    start, header = len(before), template.header
    # Gemma 4 and its kin ask without a header after a tool's reply, but write one into the conversation.
    if header and after.startswith(header, start) and not before.endswith(header):
        start += len(header)
    return start, len(after)


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


def _tokens(span: Span, offsets: Sequence[Span]) -> Span:
    return first_token(offsets, span[0]), first_token(offsets, span[1])


def _stop_id(text: str, tokenizer: Tokenizer, specials: frozenset[int]) -> int:
    """The special token that ends `text`, a question and its answer; `ModelError` when there is none."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    while ids and _is_blank(ids[-1], tokenizer):
        ids.pop()
    if not ids or ids[-1] not in specials:
        fix = (
            "the chat template does not end the assistant's turn with a special token, so the model would never learn "
            "to stop; write eos_token (or an end-of-turn token that the tokenizer holds as special) after the content"
        )
        raise ModelError(FIELD, text[-40:], fix)
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
                raise ModelError(FIELD, OWN, fix, where=chat.where)
        trainable[start : last + 1] = [True] * (last + 1 - start)
    return ids, trainable


def _require_calls(chat: Conversation, template: _Template) -> None:
    """Raise `ModelError` where the template leaves out a call of a turn that is learned."""
    turns = list(chat.messages)
    names: dict[str, str] = {}
    for index in _learned_turns(chat, template):
        calls = []
        for call in turns[index].tool_calls:
            name = f"zqCall{len(names)}qz"
            names[name] = call["function"]["name"]
            calls.append({**call, "function": {**call["function"], "name": name}})
        turns[index] = replace(turns[index], tool_calls=tuple(calls))
    if not names:
        return
    text = render(replace(chat, messages=tuple(turns)), template.tokenizer, len(turns))
    for marker, name in names.items():
        if marker not in text:
            fix = (
                f"the chat template does not write the assistant's call of {name!r}, so the model would not learn to "
                f"call; set {FIELD} to one that writes tool_calls, or write the calls into the content"
            )
            raise ModelError(FIELD, OWN, fix, where=chat.where)
