"""fill-mask: texts -> rows of which some tokens are hidden anew in every epoch (Devlin et al. 2019, section 3.1).

B rows, T tokens.
"""

import random
from collections.abc import Sequence

import torch

from ingot.data.conversation import Document
from ingot.data.encoded import IGNORE, Encoded
from ingot.data.loader import Batch, Drawn, line, padded
from ingot.data.turns import Tokenizer
from ingot.errors import ModelError
from ingot.recipe import Data, Objective

# Of the hidden tokens so many become the mask token, and so many a random one; the rest stays, to be told all the same.
MASKED, RANDOM = 0.8, 0.1


def maskable(
    rows: Sequence[Document], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The text with its special tokens; `trainable` are the others, and `terms` how many of them a draw hides.

    Raises ModelError where the tokenizer has no mask token.
    """
    mask_of(tokenizer)
    specials = set(tokenizer.all_special_ids)
    texts = [row.text for row in rows]
    found = tokenizer(texts, return_special_tokens_mask=True)
    results = []
    for row, ids, special in zip(rows, found["input_ids"], found["special_tokens_mask"], strict=True):
        was_cut = len(ids) > data.max_tokens
        if was_cut:
            options = {"truncation": True, "max_length": data.max_tokens, "return_special_tokens_mask": True}
            short = tokenizer(row.text, **options)
            ids, special = short["input_ids"], short["special_tokens_mask"]
        # A text may name special tokens itself, and these are no words either.
        trainable = [not flag and token not in specials for token, flag in zip(ids, special, strict=True)]
        terms = _hidden(sum(trainable), objective)
        results.append((Encoded(list(ids), trainable, None, row.where, terms=terms), was_cut))
    return results


def mask_of(tokenizer: Tokenizer) -> int:
    """The mask token. Raises ModelError where there is none."""
    if tokenizer.mask_token_id is None:
        fix = "this tokenizer has no mask token, so its model was not made to fill gaps; choose an encoder such as BERT"
        raise ModelError("model.source", tokenizer.name_or_path, fix)
    return int(tokenizer.mask_token_id)


def _hidden(candidates: int, objective: Objective) -> int:
    """How many of a row's candidates are hidden: an exact share, so the loss's divisor is known before the draw."""
    return max(1, round(objective.mask_share * candidates)) if candidates else 0


def collate_masked(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """`row.terms` tokens of each row are hidden: `labels_BT` holds them where they stand, IGNORE elsewhere."""
    assert drawn is not None
    parts = []
    for row in rows:
        ids, labels = hide(row, drawn)
        parts.append((torch.tensor(ids), torch.tensor(labels)))
    return line(parts, pad_id, multiple) if flat else padded(parts, pad_id)


def hide(row: Encoded, drawn: Drawn) -> tuple[list[int], list[int]]:
    """(ids with gaps, the hidden tokens where they stood and IGNORE elsewhere).

    A function of the draw's seed and the row alone: neither ranks, nor microbatches, nor a resumed run change it.
    """
    draw = random.Random(f"{drawn.seed} {row.where} {row.ids}")
    candidates = [place for place, on in enumerate(row.trainable) if on]
    ids, labels = list(row.ids), [IGNORE] * len(row.ids)
    for place in draw.sample(candidates, min(row.terms or 0, len(candidates))):
        labels[place] = ids[place]
        lot = draw.random()
        if lot < MASKED:
            ids[place] = drawn.mask_id
        elif lot < MASKED + RANDOM:
            ids[place] = draw.randrange(drawn.vocabulary)
    return ids, labels
