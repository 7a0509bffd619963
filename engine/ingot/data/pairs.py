"""Pairs of answers -> ids, the chosen answer's row and behind it the rejected one's; and such rows -> a batch.

P pairs, 2P sequences: number 2i is the chosen answer of pair i with its prompt, 2i + 1 the rejected one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ingot.data.conversation import Conversation, Document, PromptCompletion
from ingot.data.encoded import Encoded
from ingot.data.loader import Batch, Drawn, ids_and_labels, line, padded
from ingot.data.preference import Answer, Preference
from ingot.data.template import masks
from ingot.data.turns import Masked, Tokenizer
from ingot.recipe import Data, Objective


def preferences(
    rows: Sequence[Preference], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Both answers, each behind the prompt and cut at its end to `data.max_tokens`; and whether one was cut.

    `terms` counts the chosen answer's tokens. It is 0, and nothing is trainable, where an answer lost all its tokens or
    the cut left two equal answers: such a pair teaches nothing.
    """
    longest = data.max_tokens
    sides = [_masked([getattr(row, name) for row in rows], tokenizer, objective) for name in ("chosen", "rejected")]
    results = []
    for row, *pair in zip(rows, *sides, strict=True):
        # What stands first is predicted from nothing.
        cut = [(ids[:longest], [False, *trainable[1:longest]]) for ids, trainable in pair]
        (chosen, learned), (rejected, avoided) = cut
        usable = any(learned) and any(avoided) and chosen != rejected
        trainable = [*learned, *avoided] if usable else [False] * (len(chosen) + len(rejected))
        parts, terms = (len(chosen), len(rejected)), sum(learned) if usable else 0
        was_cut = any(len(ids) > longest for ids, _ in pair)
        results.append((Encoded([*chosen, *rejected], trainable, None, row.where, parts, terms), was_cut))
    return results


def _masked(answers: Sequence[Answer], tokenizer: Tokenizer, objective: Objective) -> list[Masked]:
    """Ids and mask of answers of any kind, in order."""
    results: list[Any] = [None] * len(answers)
    for kind in (Conversation, PromptCompletion, Document):
        places = [place for place, answer in enumerate(answers) if isinstance(answer, kind)]
        found = [answers[place] for place in places]
        if found and kind is not Conversation and objective.task == "reward" and tokenizer.eos_token_id is None:
            encoded = [_text_pair(answer, tokenizer) for answer in found]
        else:
            encoded = masks(found, tokenizer, objective) if found else []
        for place, one in zip(places, encoded, strict=True):
            results[place] = one
    return results


def _text_pair(answer: Answer, tokenizer: Tokenizer) -> Masked:
    """For encoders, which end no text of their own accord: prompt and answer as the two texts that they know apart."""
    texts = (answer.prompt, answer.completion) if isinstance(answer, PromptCompletion) else (answer.text,)  # type: ignore[union-attr]
    encoded = tokenizer(*texts)
    last = len(texts) - 1
    return list(encoded["input_ids"]), [number == last for number in encoded.sequence_ids(0)]


def answers_of(row: Encoded) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected answer with their prompts, as rows of one sequence each."""
    end = row.parts[0]
    chosen = replace(row, ids=row.ids[:end], trainable=row.trainable[:end], parts=(), terms=None, reference=())
    rejected = replace(row, ids=row.ids[end:], trainable=row.trainable[end:], parts=(), terms=None, reference=())
    return chosen, rejected


def pairs(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """Rows of two answers to a batch of twice as many sequences: see `loader.Collate`."""
    parts = [ids_and_labels(answer) for row in rows for answer in answers_of(row)]
    batch = line(parts, pad_id, multiple) if flat else padded(parts, pad_id)
    reference = [row.reference for row in rows if row.reference]
    reference_P2 = torch.tensor(reference, dtype=torch.float32) if len(reference) == len(rows) else None
    return replace(batch, n_targets=sum(row.n_targets for row in rows), reference_P2=reference_P2)
