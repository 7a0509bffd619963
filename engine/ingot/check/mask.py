"""Whether a row's mask is right, found from the other side: not where the encoder put it, but what the template asks
with, what stands in the learned stretches, and what they end with.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ingot.data.conversation import Conversation, Message, PromptCompletion
from ingot.data.example import Example
from ingot.data.preference import Preference
from ingot.data.template import prompt_ids
from ingot.data.turns import Tokenizer, render
from ingot.errors import DataError
from ingot.model.inputs import ids_of
from ingot.model.source import model_folder

from .subject import Piece, Subject

INNER_PIECES = 200  # rows of which every turn's beginning is looked up, not only the last one's: a rendering each
_PROBE = Conversation((Message("user", "zquestion"), Message("assistant", "zanswer")), where="(probe)")
_NO_LETTER = re.compile(r"[\W_]+")
_MARK = re.compile(r"\{%-?\s*endgeneration\b")
Stretch = tuple[int, int]  # half open, of tokens


@dataclass(frozen=True)
class Beginning:
    """Where an answer begins: after `at` tokens, and whether it is to be learned."""

    at: int
    learned: bool


def example_of(subject: Subject, piece: Piece) -> Example:
    """What `piece` was made from; of two answers its own."""
    example = subject.examples[subject.rows[piece.row].where]
    return (example.chosen, example.rejected)[piece.side] if isinstance(example, Preference) else example


def stretches(piece: Piece, *, learned: bool = True) -> list[Stretch]:
    """Runs of tokens that are learned, or of those that are only read."""
    found, start = [], 0
    for kind, group in groupby(piece.learned):
        end = start + len(list(group))
        if kind is learned:
            found.append((start, end))
        start = end
    return found


def stops(subject: Subject, ids: frozenset[int]) -> frozenset[int]:
    """`ids` and those that the model's own files name, if they are tokens: generation reads these too."""
    folder, found = model_folder(subject.recipe.model, subject.home, weights=False), set(ids)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            found.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(number for number in found if subject.tokenizer.convert_ids_to_tokens(number) is not None)


def misplaced(pieces: Sequence[Piece], subject: Subject) -> Iterator[tuple[Piece, str]]:
    """Pieces whose mask is wrong, each with what is wrong. None of them may be cut."""
    examples = [example_of(subject, piece) for piece in pieces]
    begun = _beginnings(pieces, examples, subject)
    for number, (piece, example) in enumerate(zip(pieces, examples, strict=True)):
        wrong = next((reason for it in begun[number] if (reason := _begins_wrong(piece, example, it, subject))), None)
        wrong = wrong or _text_misplaced(example, piece, subject)
        if wrong:
            yield piece, wrong


# --- where answers begin ---------------------------------------------------------------------------------------


def _beginnings(pieces: Sequence[Piece], examples: Sequence[Example], subject: Subject) -> list[list[Beginning]]:
    """For each piece the beginnings that can be told: those of which the prompt is, token for token, how it begins."""
    found: list[list[Beginning]] = [[] for _ in pieces]
    asked: list[tuple[int, int, str]] = []
    for number, example in enumerate(examples):
        if isinstance(example, Conversation):
            turns = [n for n, turn in enumerate(example.messages) if turn.role == "assistant"]
            for turn in turns if number < INNER_PIECES else turns[-1:]:
                text = _prompt(example, turn, subject.tokenizer)
                asked += [(number, turn, text)] if text is not None else []
        else:
            start = prompt_ids(example, subject.tokenizer, subject.recipe.data, subject.recipe.objective)
            if pieces[number].ids[: len(start)] == start:
                found[number].append(Beginning(len(start), learned=True))
    if asked:
        header = _header(subject.tokenizer)
        encoded = subject.tokenizer([text for *_, text in asked], add_special_tokens=False)["input_ids"]
        for (number, turn, _), start in zip(asked, encoded, strict=True):
            ids, chat = pieces[number].ids, examples[number]
            if ids[: len(start)] == start:
                at = len(start)
                # Gemma 4 asks without a header after a tool's reply, and writes one into the conversation.
                if header and ids[at : at + len(header)] == header and start[-len(header) :] != header:
                    at += len(header)
                found[number].append(Beginning(at, turn in _to_be_learned(chat, subject)))
    return found


def _prompt(chat: Conversation, turn: int, tokenizer: Tokenizer) -> str | None:
    try:
        return render(chat, tokenizer, turn, prompt=True)
    except DataError:  # a template may refuse the first turns alone
        return None


def _header(tokenizer: Tokenizer) -> list[int]:
    """What the generation prompt adds after a user's turn."""
    asked, told = render(_PROBE, tokenizer, 1, prompt=True), render(_PROBE, tokenizer, 1)
    return ids_of(tokenizer, asked.removeprefix(told)) if asked.startswith(told) else []


def _begins_wrong(piece: Piece, example: Example, begins: Beginning, subject: Subject) -> str | None:
    at, shown = begins.at, lambda place: repr(subject.tokenizer.decode([piece.ids[place]]))
    if at >= len(piece.ids):
        return None
    if piece.learned[at] != begins.learned:
        if begins.learned:
            return f"its answer's first token ({shown(at)}) is not learned"
        return f"a turn that is not to be learned is ({shown(at)})"
    if begins.learned and at and piece.learned[at - 1] and not _marked(piece, example, at - 1, subject.tokenizer):
        return f"the token before its answer ({shown(at - 1)}) is learned"
    return None


def _marked(piece: Piece, example: Example, place: int, tokenizer: Tokenizer) -> bool:
    """Whether the template's own marks take in the token at `place`: some take in what the model is asked with."""
    if not isinstance(example, Conversation):
        return False
    tools = list(example.tools) or None
    if not _MARK.search(tokenizer.get_chat_template(tools=tools)):
        return False
    messages = [turn.as_dict() for turn in example.messages]
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    return list(encoded["input_ids"]) == piece.ids and bool(encoded["assistant_masks"][place])


# --- what is said ----------------------------------------------------------------------------------------------


def _text_misplaced(example: Example, piece: Piece, subject: Subject) -> str | None:
    tokenizer = subject.tokenizer
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in piece.ids:
        return None  # a character without a token is not written again
    said = {kind: "\0".join(_texts(piece, tokenizer, learned=kind)) for kind in (True, False)}
    reads = _read_only(example)
    for text in reads:
        wanted = sum(plain(other) == plain(text) for other in reads)
        if said[False].count(plain(text)) < wanted:
            return f"{text[:60]!r} is learned, and it is the prompt's"
    at = 0
    for text in _to_learn(example, subject):
        found = said[True].find(plain(text), at)
        if found < 0:
            return f"{text[:60]!r} is the model's, and not all of it is learned"
        at = found + len(plain(text))
    return None


def _texts(piece: Piece, tokenizer: Tokenizer, *, learned: bool) -> Iterator[str]:
    for start, end in stretches(piece, learned=learned):
        yield plain(tokenizer.decode(piece.ids[start:end], clean_up_tokenization_spaces=False))


def plain(text: str) -> str:
    """Letters and digits only: templates trim and escape what is around them."""
    return _NO_LETTER.sub("", folded(text))


def folded(text: str) -> str:
    """`text` in one form and without blanks: tokenizers move these, and fold case, accents and width."""
    if not text.isascii():
        parted = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in parted if not unicodedata.combining(character))
    return "".join(text.casefold().split())


def _read_only(example: Example) -> list[str]:
    if isinstance(example, Conversation):
        texts = [turn.content for turn in example.messages if turn.role in ("user", "system")]
    else:
        texts = [example.prompt] if isinstance(example, PromptCompletion) else []
    return [text for text in texts if plain(text)]


def _to_be_learned(example: Example, subject: Subject) -> list[int]:
    assert isinstance(example, Conversation)
    turns = [number for number, turn in enumerate(example.messages) if turn.role == "assistant"]
    turns = turns[-1:] if subject.recipe.objective.train_on == "last-assistant" else turns
    return [number for number in turns if example.messages[number].learned]


def _to_learn(example: Example, subject: Subject) -> list[str]:
    if isinstance(example, PromptCompletion):
        return [example.completion]
    if not isinstance(example, Conversation):
        return []
    texts = []
    for number in _to_be_learned(example, subject):
        turn = example.messages[number]
        if turn.tool_calls:  # what is said beside a call is dropped by some templates, and is thought by others
            calls: list[Mapping[str, Any]] = [call["function"] for call in turn.tool_calls]
            texts += [call["name"] for call in calls]
        else:  # templates drop the thoughts of earlier turns
            texts.append(turn.content.rpartition("</think>")[2])
    return [text for text in texts if plain(text)]
