"""Proofs on rows: what is learned, where it stops, and whether the template is the one that will be packaged.

Each looks at what comes out of the batch, not at what the encoder meant, and asks the example itself what is right.
"""

import shutil
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from ingot.data.conversation import Conversation, Document, PromptCompletion, SourceTarget
from ingot.data.encoded import IGNORE, Encoded, prefix_of
from ingot.data.example import Example
from ingot.data.labeled import Asked, Labeled, MultiLabeled, Tagged
from ingot.data.preference import Preference
from ingot.data.template import encode_all, prompt_ids
from ingot.data.turns import render
from ingot.model import export
from ingot.model.generate import end_ids
from ingot.model.load import load_tokenizer
from ingot.model.source import model_folder
from ingot.recipe import Model

from .subject import Piece, Subject
from .verdict import Status, Verdict

CUT_SHARE = 0.01  # more truncated answers than this are a mistake of data.max_tokens, fewer are outliers
EMPTY_SHARE = 0.01
LISTED = 3
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
    limit = subject.recipe.data.max_tokens
    facts = {"truncated": dropped.truncated, "rows": dropped.total, "share": share}
    because = f"{dropped.truncated:,} of {dropped.total:,} rows are cut at data.max_tokens = {limit} ({share:.1%})"
    if isinstance(subject.first, Document) or not _answers(subject.first):
        return Verdict(
            name, Status.not_applicable, f"{because}; rows have no answer that could lose its end", "", facts
        )
    if share > CUT_SHARE:
        fix = "raise data.max_tokens (and train.tokens_per_microbatch), or shorten the rows"
        return Verdict(name, Status.failed, f"{because}: their answers have no end", fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)


def prompt_mask(subject: Subject) -> Verdict:
    """What the user says is read and not learned; what the model says is learned from its first token on."""
    name = "prompt-mask"
    if not subject.writes or isinstance(subject.first, Document):
        return Verdict(name, Status.not_applicable, "rows have no prompt beside the text that is learned")
    wrong, seen, cut = [], 0, 0
    for piece in subject.pieces:
        example = _side(subject, piece)
        if len(piece.ids) >= subject.recipe.data.max_tokens:
            cut += 1
            continue
        seen += 1
        if reason := _misplaced(example, piece, subject):
            wrong.append(f"{subject.rows[piece.row].where}: {reason}")
    facts = {"rows": seen, "wrong": len(wrong), "first": wrong[:LISTED], "cut": cut}
    if wrong:
        return Verdict(
            name, Status.failed, f"{len(wrong):,} of {seen:,} rows; the first is {wrong[0]}", FIX_MASK, facts
        )
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
    wrong = []
    for piece in subject.pieces:
        leading = next((n for n, token in enumerate(piece.ids) if token != bos), len(piece.ids))
        count = leading if also_eos else piece.ids.count(bos)
        if leading != 1 or count != 1:
            wrong.append(f"{subject.rows[piece.row].where} has {count}, {leading} of them at its beginning")
    facts = {"rows": len(subject.pieces), "wrong": len(wrong), "first": wrong[:LISTED]}
    token = tokenizer.convert_ids_to_tokens(bos)
    if wrong:
        fix = f"write {token} once: in the chat template or in the rows, not in both"
        return Verdict(name, Status.failed, f"{len(wrong):,} rows do not have one {token}: {wrong[0]}", fix, facts)
    return Verdict(name, Status.passed, f"{len(subject.pieces):,} rows begin with one {token}", facts=facts)


def stop_token(subject: Subject) -> Verdict:
    """Every answer ends with a token that generation stops at, and that token is learned."""
    name = "stop-token"
    if not (subject.writes or isinstance(subject.first, SourceTarget)):
        return Verdict(name, Status.not_applicable, "no text is written")
    ends, tokenizer = end_ids(None, subject.tokenizer), subject.tokenizer
    wrong, seen = [], 0
    for piece in subject.pieces:
        if len(piece.ids) >= subject.recipe.data.max_tokens:
            continue
        seen += 1
        last = _last_learned(piece)
        if last is None or piece.ids[last] not in ends:
            shown = "nothing" if last is None else repr(tokenizer.decode([piece.ids[last]]))
            wrong.append(f"{subject.rows[piece.row].where} ends with {shown}")
    tokens = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
    facts = {"rows": seen, "wrong": len(wrong), "first": wrong[:LISTED], "stop_tokens": sorted(ends)}
    if wrong:
        fix = f"end every answer with {tokens} and let it be learned: mask padding by position, not by id"
        because = f"{len(wrong):,} of {seen:,} rows do not learn to stop ({tokens}): {wrong[0]}"
        return Verdict(name, Status.failed, because, fix, facts)
    return Verdict(name, Status.passed, f"the last learned token of {seen:,} rows is {tokens}", facts=facts)


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


def _side(subject: Subject, piece: Piece) -> Example:
    example = subject.examples[subject.rows[piece.row].where]
    return (example.chosen, example.rejected)[piece.side] if isinstance(example, Preference) else example


def _last_learned(piece: Piece) -> int | None:
    return max((n for n, learned in enumerate(piece.learned) if learned), default=None)


def _misplaced(example: Example, piece: Piece, subject: Subject) -> str | None:
    """What is wrong with the mask of a row, or None."""
    asked = prompt_ids(example, subject.tokenizer, subject.recipe.data, subject.recipe.objective)
    start = len(asked)
    if piece.ids[:start] == asked:
        if start < len(piece.ids) and not piece.learned[start]:
            return f"its answer's first token ({subject.tokenizer.decode([piece.ids[start]])!r}) is not learned"
        if start and piece.learned[start - 1]:
            return f"the token before its answer ({subject.tokenizer.decode([piece.ids[start - 1]])!r}) is learned"
    said = {learned: " ".join(_texts(piece, subject, learned=learned)) for learned in (True, False)}
    for text in _read_only(example):
        if _plain(text) not in _plain(said[False]):
            return f"{text[:60]!r} is learned, and it is the prompt's"
    for text in _to_learn(example, subject):
        if _plain(text) not in _plain(said[True]):
            return f"{text[:60]!r} is the model's, and not all of it is learned"
    return None


def _texts(piece: Piece, subject: Subject, *, learned: bool) -> Iterator[str]:
    start = 0
    for kind, group in groupby(piece.learned):
        end = start + len(list(group))
        if kind is learned:
            yield subject.tokenizer.decode(piece.ids[start:end], skip_special_tokens=False)
        start = end


def _plain(text: str) -> str:
    """Without blanks, which tokenizers move and templates trim."""
    return "".join(text.split())


def _read_only(example: Example) -> list[str]:
    if isinstance(example, Conversation):
        return [turn.content for turn in example.messages if turn.role in ("user", "system") and turn.content.strip()]
    return [example.prompt] if isinstance(example, PromptCompletion) else []


def _to_learn(example: Example, subject: Subject) -> list[str]:
    if isinstance(example, Conversation):
        turns = [turn for turn in example.messages if turn.role == "assistant"]
        turns = turns[-1:] if subject.recipe.objective.train_on == "last-assistant" else turns
        # Templates drop the thoughts of earlier turns.
        said = [turn.content.rpartition("</think>")[2] for turn in turns if turn.learned]
        return [text for text in said if text.strip()]
    return [example.completion] if isinstance(example, PromptCompletion) else []


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
        learned = [labels[number] for number in row.labels if number != IGNORE]
        wanted = list(example.tags[: len(learned)])
        return None if learned and learned == wanted else f"{learned[:8]!r}, not {wanted[:8]!r}"
    if isinstance(example, Asked) and row.labels[1] > 0:
        first, last = row.labels
        answer = subject.tokenizer.decode(row.ids[first : last + 1])
        same = {_plain(answer).casefold(), _plain(example.answers[0][0]).casefold()}
        return None if len(same) == 1 else f"{answer!r}, not {example.answers[0][0]!r}"
    return None
