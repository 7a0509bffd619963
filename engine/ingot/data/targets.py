"""A text and what a decoder writes about it: summaries, translations.

B rows, S tokens of the longest source, U of the longest target.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ingot.data.conversation import SourceTarget
from ingot.data.encoded import Encoded, eos_of
from ingot.data.loader import IGNORE, Batch, Drawn, padded
from ingot.data.turns import Tokenizer
from ingot.model.inputs import source_ids
from ingot.recipe import Data, Objective


def source_targets(
    examples: Sequence[SourceTarget], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Ids of the source, then those of the target, each as the tokenizer dresses it and cut to its own limit.

    A target always ends with eos, or the model would not learn to stop; one that is cut goes on, and so has none.
    Raises ModelError for a tokenizer without eos.
    """
    eos = eos_of(tokenizer)
    sources = source_ids([row.source for row in examples], tokenizer, data.max_tokens)
    written = tokenizer(text_target=[row.target for row in examples])["input_ids"]
    found = []
    for row, (source, was_cut), ids in zip(examples, sources, written, strict=True):
        whole = list(ids) if eos in ids[-2:] else [*ids, eos]  # mBART closes with eos and a language
        target = whole[: data.max_target_tokens]
        parts = (len(source), len(target))
        # Without a source there is nothing to learn from: the row counts as dropped.
        trainable = [False] * len(source) + [bool(source)] * len(target)
        encoded = Encoded([*source, *target], trainable, None, row.where, parts)
        found.append((encoded, was_cut or len(target) < len(whole)))
    return found


def collate_targets(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """Sources to `ids_BT` and `attention_BT`, targets to `targets_BU`, both padded on the right to their longest.

    Never end to end (model/lines.py says why): `flat` and `multiple` do not matter. A muted row's targets are IGNORE.
    """
    sources, targets = [], []
    for row in rows:
        n_source, _ = row.parts
        ids_T = torch.as_tensor(row.ids, dtype=torch.long)
        trainable_T = torch.as_tensor(row.trainable, dtype=torch.bool)
        sources.append((ids_T[:n_source], torch.full((n_source,), IGNORE)))
        targets.append(ids_T.masked_fill(~trainable_T, IGNORE)[n_source:])
    targets_BU = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE)
    batch = padded(sources, pad_id)
    return replace(batch, targets_BU=targets_BU, n_targets=int((targets_BU != IGNORE).sum()))
