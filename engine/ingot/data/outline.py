"""Where an assistant's turn stands in a conversation whose turns are not prefixes of each other.

Templates of reasoning models drop the thoughts of earlier turns, put an empty block of thoughts into the last one, or
end a turn in one way inside a conversation and in another at its end. The rendering of the first turns is then no
prefix of the whole. What is around a turn can be shown all the same, by replacing texts with markers:

* All contents become markers. Between the markers of turn i - 1 and turn i stands the *lead*: the end of one turn and
  the header of the next. What of it is a prompt is shown by the same text in the rendering of messages[:i] with the
  generation prompt, the plain one or that for a turn with or without thoughts (`enable_thinking`). The rest of the
  lead, an empty block of thoughts for one, the model has to write.
* After the marker of turn i stands its *tail* up to the stop token, as the rendering of messages[:i + 1] shows it.
* In the conversation itself the text of turn i alone becomes a marker. Lead and tail must be around it as above, and
  what is before the turn's start and after its end must be, letter for letter, what the true rendering has there.

So start and end are those of a stretch outside which nothing depends on what the assistant says in this turn. Where a
step does not hold the turn is not proved, and it is refused: a guessed mask trains on the wrong tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ingot.data.conversation import Conversation, Message
from ingot.data.rendering import Tokenizer, render
from ingot.errors import DataError

Span = tuple[int, int]  # half open, of characters

_MARKER = "zqTurn"
_THOUGHTS_END = "</think>"
_Kind = Literal["content", "thoughts", "calls"]


@dataclass(frozen=True)
class Outline:
    """What a template writes around one turn of a conversation of some shape."""

    lead: str
    """Between the text of the turn before and this one's."""
    opening: int
    """How many characters at the end of `lead` the model writes itself."""
    tail: str
    """From the turn's text to its stop token and the blanks after it."""


@dataclass(frozen=True)
class Outlines:
    """Outlines that are known already: most rows of a file have the shape of some other row."""

    specials: tuple[str, ...]
    """The texts of the tokenizer's special tokens."""
    known: dict[str, Outline | None] = field(default_factory=dict)

    def of(self, shape: Conversation, tokenizer: Tokenizer, index: int) -> Outline | None:
        """The outline of turn `index` of a conversation of markers."""
        key = json.dumps([index, shape.tools, [message.as_dict() for message in shape.messages]], sort_keys=True)
        if key not in self.known:
            self.known[key] = _outline(shape, tokenizer, index, self.specials)
        return self.known[key]


def find_turn(chat: Conversation, tokenizer: Tokenizer, index: int, whole: str, outlines: Outlines) -> Span | None:
    """Characters of `whole`, the rendering of `chat`, that the assistant writes in turn `index`; None if not proved."""
    message = chat.messages[index]
    kinds: dict[_Kind, bool] = {
        "content": True,
        "thoughts": message.reasoning is None and _THOUGHTS_END in message.content,
        "calls": bool(message.tool_calls),
    }
    for kind in (kind for kind, applies in kinds.items() if applies):
        turns = [_marked(turn, at, kind) if at == index else _other(turn, at) for at, turn in enumerate(chat.messages)]
        shape = replace(chat, messages=tuple(turns))
        outline = outlines.of(shape, tokenizer, index)
        if outline is None:
            continue
        turns = [turns[at] if at == index else turn for at, turn in enumerate(chat.messages)]
        span = _place(replace(chat, messages=tuple(turns)), tokenizer, index, whole, outline)
        if span is not None:
            return span
    return None


# --- the shape -------------------------------------------------------------------------------------------------


def _outline(shape: Conversation, tokenizer: Tokenizer, index: int, specials: Sequence[str]) -> Outline | None:
    try:
        full = render(shape, tokenizer, len(shape.messages))
        ended = render(shape, tokenizer, index + 1)
    except DataError:  # a template may refuse some conversations, of no user's turn or with content beside calls
        return None
    lead = _between(full, _marker(index - 1), _marker(index))
    tail, rest = _after(ended, _marker(index)), _after(full, _marker(index))
    if lead is None or tail is None or rest is None:
        return None  # a text is not written, or written twice
    opening, closed = _opening(shape, tokenizer, index, lead), _end_of_turn(tail, rest, specials)
    return None if opening is None or closed is None else Outline(lead, opening, closed)


def _opening(shape: Conversation, tokenizer: Tokenizer, index: int, lead: str) -> int | None:
    """How much of the end of `lead` no prompt gives; None where none of the prompts fits.

    The prompt is the plain one, or that for a turn with or without thoughts. In history the turn may lack what the
    prompt ends with: Qwen3.5 asks with "<think>" and drops it from earlier turns.
    """
    is_header = False
    for thinking in (None, True, False):
        try:
            asked = _after(render(shape, tokenizer, index, prompt=True, thinking=thinking), _marker(index - 1))
        except DataError:
            continue
        if asked is not None and lead.startswith(asked):
            return len(lead) - len(asked)
        is_header |= asked is not None and thinking is None and asked.startswith(lead)
    return 0 if is_header else None


def _end_of_turn(tail: str, rest: str, specials: Sequence[str]) -> str | None:
    """The turn's own part of `tail`, where the turn ends the conversation; inside it, `rest` follows."""
    if rest.startswith(tail):
        return tail
    n_agreed = _common(tail, rest)
    # Where both go on with a special token they may agree on its first letters.
    firsts = [tail.rfind(name[0], 0, n_agreed) for name in specials if name]
    for cut in (n_agreed, max(firsts, default=-1)):
        if cut < 0:
            continue
        mine, other = _special_at(tail, cut, specials), _special_at(rest, cut, specials)
        if mine is None or other is None:
            continue
        before = tail[:cut].rstrip()
        if any(before.endswith(name) for name in specials):
            return tail[:cut]  # "<|end|>\n", then "<|endoftext|>" which ends the conversation
        header = rest[cut + len(other) :].partition(_MARKER)[0]
        if not tail[cut + len(mine) :].strip() and any(name in header for name in specials):
            return rest[: cut + len(other)]  # "<|return|>" at the end; inside "<|end|>", then the next turn's header
    return None


def _special_at(text: str, at: int, specials: Sequence[str]) -> str | None:
    return max((name for name in specials if name and text.startswith(name, at)), key=len, default=None)


# --- the conversation itself -----------------------------------------------------------------------------------


def _place(marked: Conversation, tokenizer: Tokenizer, index: int, whole: str, outline: Outline) -> Span | None:
    """`marked`: the conversation with markers in turn `index` alone."""
    try:
        text = render(marked, tokenizer, len(marked.messages))
    except DataError:
        return None
    marker = _marker(index)
    if text.count(marker) != 1:
        return None
    at = text.index(marker)
    start, end = at - outline.opening, at + len(marker) + len(outline.tail)
    n_after = len(text) - end
    holds = (
        text.endswith(outline.lead, 0, at)
        and text.startswith(outline.tail, at + len(marker))
        and whole.startswith(text[:start])
        and whole.endswith(text[end:])
        and start < len(whole) - n_after
    )
    return (start, len(whole) - n_after) if holds else None


# --- markers ---------------------------------------------------------------------------------------------------


def _marker(index: int) -> str:
    """Letters and digits only: templates strip blanks, escape signs and look for tags."""
    return f"{_MARKER}{index}qz"


def _marked(message: Message, index: int, kind: _Kind) -> Message:
    """`message` with markers for its texts.

    "thoughts": with thoughts in the content, for templates that move them. "calls": the marker is an argument of the
    first call and the content stays, for templates that write no content beside calls.
    """
    thought = f"zqThought{index}qz"
    thoughts = None if message.reasoning is None else thought
    if kind != "calls":
        before = f"<think>\n{thought}\n{_THOUGHTS_END}\n\n" if kind == "thoughts" else ""
        return replace(message, content=before + _marker(index), reasoning=thoughts)
    first = message.tool_calls[0]
    first = {**first, "function": {**first["function"], "arguments": {_marker(index): 0}}}
    return replace(message, tool_calls=(first, *message.tool_calls[1:]), reasoning=thoughts)


def _other(message: Message, index: int) -> Message:
    """A turn beside the one in question: calls without content stay so, for templates that take no content there."""
    marked = _marked(message, index, "content")
    return replace(marked, content="") if message.tool_calls and not message.content else marked


def _after(text: str, marker: str) -> str | None:
    return text.partition(marker)[2] if text.count(marker) == 1 else None


def _between(text: str, first: str, second: str) -> str | None:
    found = _after(text, first)
    return found.partition(second)[0] if found is not None and found.count(second) == 1 else None


def _common(first: str, second: str) -> int:
    """How many characters at their beginning are the same."""
    same = (index for index, (one, two) in enumerate(zip(first, second, strict=False)) if one != two)
    return next(same, min(len(first), len(second)))
