"""Proofs on rows: what is learned, where it stops, and whether the template is the one that will be packaged.

Each looks at what comes out of the batch, not at what the encoder meant, and asks the example itself what is right.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from ingot.data.conversation import Conversation, Document, PromptCompletion, SourceTarget
from ingot.data.encoded import IGNORE, Encoded
from ingot.data.example import Example
from ingot.data.labeled import Asked, Labeled, MultiLabeled, Tagged
from ingot.data.preference import Preference
from ingot.data.template import encode_all
from ingot.data.turns import Tokenizer, render
from ingot.model import export
from ingot.model.generate import end_ids
from ingot.model.inputs import ids_of, prefix_of, special_ids
from ingot.model.load import load_tokenizer
from ingot.model.source import model_folder
from ingot.recipe import Model

from . import mask
from .subject import Piece, Subject
from .verdict import Status, Verdict

CUT_SHARE = 0.01  # more truncated answers than this are a mistake of data.max_tokens, fewer are outliers
EMPTY_SHARE = 0.01
WRITTEN_SHARE = 0.01  # rows whose own text may hold a BOS
LISTED = 3
NOTHING = -1  # no token
FIX_MASK = "look at the rows (ingot inspect); set model.chat_template to a template that shows where answers begin"


def trainable_tokens(subject: Subject) -> Verdict:
    """Every row teaches something; how much, after truncation."""
    name = "trainable-tokens"
    rows, dropped = subject.rows, subject.prepared.facts.dropped
    counts = np.array([row.n_targets for row in rows])
    low, p5, middle = int(counts.min()), float(np.percentile(counts, 5)), float(np.median(counts))
    zero = float((counts == 0).mean())
    lost = dropped.count / dropped.total if dropped.total else 0.0
    unit = "targets" if rows[0].labels is not None else "trainable tokens"
    because = f"{unit} per row: minimum {low}, 5th percentile {p5:g}, median {middle:g}; {zero:.1%} of rows have none"
    if dropped.count:
        because += f"; {dropped.count:,} of {dropped.total:,} rows lost all of them to data.max_tokens and are left out"
    facts = {"minimum": low, "p5": p5, "median": middle, "share_zero": zero, "share_dropped": lost}
    if zero or lost > EMPTY_SHARE:
        limit = subject.recipe.data.max_tokens
        fix = f"raise data.max_tokens = {limit}: rows lose their answers to it" if lost else FIX_MASK
        return Verdict(name, Status.failed, because, fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)


def whole_answers(subject: Subject) -> Verdict:
    """Answers are not cut: a model that learns cut ones learns not to stop."""
    name, dropped = "whole-answers", subject.prepared.facts.dropped
    share = dropped.truncated / dropped.total if dropped.total else 0.0
    data = subject.recipe.data
    limit = f"data.max_tokens = {data.max_tokens}"
    if isinstance(subject.first, SourceTarget):
        limit += f" or data.max_target_tokens = {data.max_target_tokens}"
    facts = {"truncated": dropped.truncated, "rows": dropped.total, "share": share}
    because = f"{dropped.truncated:,} of {dropped.total:,} rows are cut at {limit} ({share:.1%})"
    if isinstance(subject.first, Document) or not _answers(subject.first):
        return Verdict(
            name, Status.not_applicable, f"{because}; rows have no answer that could lose its end", "", facts
        )
    if share > CUT_SHARE:
        fix = "raise data.max_tokens (and train.tokens_per_microbatch), or shorten the rows"
        if isinstance(subject.first, SourceTarget):
            fix = "raise data.max_tokens or data.max_target_tokens, whichever it is, or shorten the rows"
        return Verdict(name, Status.failed, f"{because}: their answers have no end", fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)


def prompt_mask(subject: Subject) -> Verdict:
    """What the user says is read and not learned; what the model says is learned from its first token on."""
    name = "prompt-mask"
    if not subject.writes or isinstance(subject.first, Document):
        return Verdict(name, Status.not_applicable, "rows have no prompt beside the text that is learned")
    whole = _whole(subject)
    if not whole:
        return Verdict(name, Status.not_applicable, "every sampled row is cut at data.max_tokens")
    wrong = [f"{subject.rows[piece.row].where}: {reason}" for piece, reason in mask.misplaced(whole, subject)]
    seen, cut = len(whole), len(subject.pieces) - len(whole)
    facts = {"rows": seen, "wrong": len(wrong), "first": wrong[:LISTED], "cut": cut}
    if wrong:
        because = f"{len(wrong):,} of {seen:,} rows; the first is {wrong[0]}"
        return Verdict(name, Status.failed, because, FIX_MASK, facts)
    because = f"in {seen:,} rows every prompt is only read and every answer is learned from its first token"
    return Verdict(name, Status.passed, because, facts=facts)


def one_bos(subject: Subject) -> Verdict:
    """Exactly one BOS, at the beginning, where the tokenizer writes one."""
    name, tokenizer = "one-bos", subject.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or not subject.writes:
        return Verdict(name, Status.not_applicable, "the tokenizer has no BOS" if bos is None else "no text is written")
    expected = bos in prefix_of(tokenizer) or any(piece.ids[:1] == [bos] for piece in subject.pieces)
    if not expected:
        return Verdict(name, Status.not_applicable, "neither the tokenizer nor the template writes a BOS")
    also_eos = bos == tokenizer.eos_token_id
    wrong, inside = [], 0
    for piece in subject.pieces:
        leading = next((n for n, token in enumerate(piece.ids) if token != bos), len(piece.ids))
        count = leading if also_eos else piece.ids.count(bos)
        if leading != 1 or count != 1:
            wrong.append(f"{subject.rows[piece.row].where} has {count}, {leading} of them at its beginning")
            inside += leading == 1
    facts = {"rows": len(subject.pieces), "wrong": len(wrong), "first": wrong[:LISTED], "inside": inside}
    token = tokenizer.convert_ids_to_tokens(bos)
    if len(wrong) == inside <= WRITTEN_SHARE * len(subject.pieces):  # a text that speaks of it: "<s>" is HTML, too
        found = f", and {inside:,} rows hold another one in their text: {wrong[0]}" if inside else ""
        return Verdict(name, Status.passed, f"{len(subject.pieces):,} rows begin with one {token}{found}", facts=facts)
    fix = f"write {token} once: in the chat template or in the rows, not in both"
    return Verdict(name, Status.failed, f"{len(wrong):,} rows do not have one {token}: {wrong[0]}", fix, facts)


def stop_token(subject: Subject) -> Verdict:
    """Every answer ends with a token that generation stops at, and that token is learned.

    The turns before the last one may end with another special token, as some templates write it.
    """
    name = "stop-token"
    if not (subject.writes or isinstance(subject.first, SourceTarget)):
        return Verdict(name, Status.not_applicable, "no text is written")
    whole, tokenizer = _whole(subject), subject.tokenizer
    if not whole:
        return Verdict(name, Status.not_applicable, "every sampled row is cut, so none has an end")
    ends, inner = mask.stops(subject, end_ids(None, tokenizer)), set[int]()
    specials = ends | special_ids(tokenizer)
    wrong = []
    for piece in whole:
        lasts = [piece.ids[end - 1] for _, end in mask.stretches(piece)]
        stray = [last for last in lasts[:-1] if last not in specials]
        if not lasts or lasts[-1] not in (specials if _goes_on(subject, piece) else ends):
            stray += lasts[-1:] or [NOTHING]
        inner |= set(lasts) - ends
        if stray:
            shown = "nothing" if stray[0] == NOTHING else repr(tokenizer.decode([stray[0]]))
            wrong.append(f"{subject.rows[piece.row].where} ends with {shown}")
    tokens = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
    facts = {"rows": len(whole), "wrong": len(wrong), "first": wrong[:LISTED], "stop_tokens": sorted(ends)}
    if wrong:
        fix = f"end every answer with {tokens} and let it be learned: mask padding by position, not by id"
        because = f"{len(wrong):,} of {len(whole):,} rows do not learn to stop ({tokens}): {wrong[0]}"
        return Verdict(name, Status.failed, because, fix, facts)
    because = f"the last learned token of {len(whole):,} rows is {tokens}"
    if inner:
        others = ", ".join(tokenizer.convert_ids_to_tokens(sorted(inner)))
        because += f"; turns before the last one end with {others}, where generation does not stop"
    return Verdict(name, Status.passed, because, facts={**facts, "inner": sorted(inner)})


def same_template(subject: Subject) -> Verdict:
    """The tokenizer that is packaged encodes the sampled rows as they are trained on."""
    name, recipe = "same-template", subject.recipe
    examples, before = list(subject.examples.values())[:200], subject.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        export.save_tokenizer(before, Path(folder))
        shutil.copy(model_folder(recipe.model, subject.home, weights=False) / "config.json", folder)
        after = load_tokenizer(Model(source=folder), Path(folder))
    labels = subject.prepared.facts.labels
    old, new = (encode_all(examples, it, recipe.data, recipe.objective, labels)[0] for it in (before, after))
    same = [a.ids == b.ids for a, b in zip(old, new, strict=False)]
    wrong = len(same) - sum(same) + abs(len(old) - len(new))
    if any(isinstance(example, Conversation) for example in examples):
        asked = [example for example in examples if isinstance(example, Conversation)]
        wrong += sum(
            render(chat, before, chat.last_assistant, prompt=True)
            != render(chat, after, chat.last_assistant, prompt=True)
            for chat in asked
        )
    facts = {
        "rows": len(examples),
        "wrong": wrong,
        "chat_template": recipe.model.chat_template or "the tokenizer's own",
    }
    if wrong or (before.chat_template or None) != (after.chat_template or None):
        because = f"{wrong} of {len(examples)} rows look different to the tokenizer that would be packaged"
        fix = "set model.chat_template, so that training and the package have the same one"
        return Verdict(name, Status.failed, because, fix, facts)
    because = f"saved and read back, the tokenizer encodes {len(examples)} rows and their prompts as before"
    return Verdict(name, Status.passed, because, facts=facts)


def right_labels(subject: Subject) -> Verdict:
    """The numbers that are learned stand for the names that the rows hold."""
    name, labels = "right-labels", subject.prepared.facts.labels
    if subject.rows[0].labels is None:
        return Verdict(name, Status.not_applicable, "tokens are learned, not labels")
    wrong = []
    for row in subject.rows:
        said = _named(row, subject.examples[row.where], labels, subject)
        if said is not None:
            wrong.append(f"{row.where}: {said}")
    facts = {"rows": len(subject.rows), "wrong": len(wrong), "first": wrong[:LISTED], "labels": len(labels)}
    if wrong:
        because = f"{len(wrong):,} of {len(subject.rows):,} rows learn another label than theirs: {wrong[0]}"
        return Verdict(name, Status.failed, because, "clear the cache (ingot cache --clear) and report this", facts)
    return Verdict(name, Status.passed, f"{len(subject.rows):,} rows learn the labels that they hold", facts=facts)


# --- looking at a row ------------------------------------------------------------------------------------------


def _answers(example: Example) -> bool:
    return isinstance(example, Conversation | PromptCompletion | SourceTarget | Preference)


def _whole(subject: Subject) -> list[Piece]:
    """The pieces that are not cut: their ends can be judged."""
    data = subject.recipe.data
    limit = data.max_target_tokens if isinstance(subject.first, SourceTarget) else data.max_tokens
    return [piece for piece in subject.pieces if len(piece.ids) < limit]


def _goes_on(subject: Subject, piece: Piece) -> bool:
    """Whether turns follow the last one that is learned."""
    example = mask.example_of(subject, piece)
    if not isinstance(example, Conversation):
        return False
    return not (example.messages[-1].role == "assistant" and example.messages[-1].learned)


def _named(row: Encoded, example: Example, labels: tuple[str, ...], subject: Subject) -> str | None:
    """Which label is learned in place of the example's, or None when it is the example's."""
    assert row.labels is not None
    if isinstance(example, Labeled):
        learned: object = labels[row.labels[0]]
        return None if learned == example.label else f"{learned!r}, not {example.label!r}"
    if isinstance(example, MultiLabeled):
        learned = [label for label, is_on in zip(labels, row.labels, strict=True) if is_on]
        return None if learned == list(example.labels) else f"{learned!r}, not {list(example.labels)!r}"
    if isinstance(example, Tagged):
        return _mistagged(row, example, labels, subject.tokenizer)
    return _mispointed(row, example, subject.tokenizer) if isinstance(example, Asked) else None


def _mistagged(row: Encoded, example: Tagged, labels: tuple[str, ...], tokenizer: Tokenizer) -> str | None:
    """Whether the tags are another sequence, or stand beside the words that they belong to."""
    assert row.labels is not None
    places = [place for place, number in enumerate(row.labels) if number != IGNORE]
    learned = [labels[row.labels[place]] for place in places]
    pairs = list(zip(example.words, example.tags, strict=True))
    if len(places) < len(pairs):  # control characters are words without a token
        pairs = [pair for pair in pairs if ids_of(tokenizer, pair[0])]
    wanted = [tag for _, tag in pairs[: len(learned)]]
    if not learned or learned != wanted:
        return f"{learned[:8]!r}, not {wanted[:8]!r}"
    for (word, tag), start, end in zip(pairs, places, [*places[1:], len(row.ids)], strict=False):
        said = mask.plain(tokenizer.decode(row.ids[start:end], skip_special_tokens=True))
        whole = mask.plain(word)
        is_cut = end == len(row.ids) and bool(said) and whole.startswith(said)  # data.max_tokens fell within the word
        if tokenizer.unk_token_id not in row.ids[start:end] and not said.startswith(whole) and not is_cut:
            return f"{tag!r} at {said!r}, not at {word!r}"
    return None


def _mispointed(row: Encoded, example: Asked, tokenizer: Tokenizer) -> str | None:
    """Whether the learned tokens are others than the fewest that hold the answer."""
    assert row.labels is not None
    first, last = row.labels
    if last <= 0 or not example.answers or tokenizer.unk_token_id in row.ids[first : last + 1]:
        return None
    answer, parts = mask.folded(example.answers[0][0]), ((first, last + 1), (first + 1, last + 1), (first, last))
    said = [mask.folded(tokenizer.decode(row.ids[start:end])) for start, end in parts]
    fits = answer in said[0] and (first == last or not any(answer and answer in less for less in said[1:]))
    return None if fits else f"{said[0]!r}, not {example.answers[0][0]!r}"
