"""A step's rows to this rank's batches, padded one below the other or end to end in one line.

B rows of a microbatch, T tokens of its longest row (padded) or of all its rows (end to end: B is 1)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ingot.data.encoded import IGNORE as IGNORE
from ingot.data.encoded import Encoded
from ingot.data.packing import best_fit
from ingot.data.plan import Packs, Portion


@dataclass(frozen=True)
class Batch:
    """One forward pass on one rank.

    `ids_BT` and `labels_BT` are int64. Labels are NOT shifted: `labels[t] == ids[t]` where token t is a target, IGNORE
    elsewhere, and always at the first token of a sequence, which nothing stands before (token-classification and
    fill-mask: the class, or the hidden token, at t itself). `n_targets`: terms of the loss.

    Padded: `attention_BT` int64, 1 where a token is; `positions_BT` and `row_lengths` None. End to end: `attention_BT`
    None; `positions_BT` int64 starts again with every sequence; `row_lengths` in tokens.

    `row_labels` int64: a class for every row [B] (end to end: as many as rows), 0 or 1 for every class [B, C], or first
    and last token of the answer [B, 2]; IGNORE where there is none. `targets_BU` int64: what a decoder writes, IGNORE
    behind its end. `reference_P2` float32: log-probabilities of both answers of every pair under the starting model.
    `types_BT` int64: 0 for the tokens of a first segment, 1 for those of a second, where the model is told them apart.
    """

    ids_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    n_targets: int
    attention_BT: Tensor | None = None  # noqa: N815
    positions_BT: Tensor | None = None  # noqa: N815
    row_lengths: tuple[int, ...] | None = None
    row_labels: Tensor | None = None
    targets_BU: Tensor | None = None  # noqa: N815
    reference_P2: Tensor | None = None  # noqa: N815
    types_BT: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Drawn:
    """What fill-mask needs to hide tokens: the mask token, how many tokens there are, and a seed of this step."""

    mask_id: int
    vocabulary: int
    seed: str


class Collate(Protocol):
    """Rows to a batch: padded on the right with `pad_id` to the longest, or end to end (`flat`), see `collate`."""

    def __call__(
        self, rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
    ) -> Batch: ...


def batches_of(
    portion: Portion, rank: int, world: int, tokens_per_microbatch: int, *, flat: bool, even: bool
) -> list[list[Encoded]]:
    """The rows of `rank`'s microbatches of a step, of `world` ranks that each get other rows.

    A rank without any gets one muted row, so that it takes part in what ranks do together. `even`: every rank gets as
    many microbatches as the busiest.
    """
    indices = portion.indices
    lengths = dict(zip(indices, portion.rows.lengths[indices].tolist(), strict=True))
    shares = [microbatches(portion.packs, lengths, other, world, tokens_per_microbatch, flat) for other in range(world)]
    wanted = max(map(len, shares)) if even else 1
    batches = [[portion.rows[index] for index in part] for part in shares[rank]]
    if len(batches) < wanted:
        shortest = portion.rows[min(indices, key=lambda index: (lengths[index], index))]
        batches += [[muted(shortest)] for _ in range(wanted - len(batches))]
    return batches


def microbatches(
    packs: Packs,
    lengths: Sequence[int] | Mapping[int, int],
    rank: int,
    world: int,
    tokens_per_microbatch: int,
    flat: bool,
) -> list[list[int]]:
    """The share of `rank` in a step as microbatches of at most `tokens_per_microbatch` tokens: rows x longest when
    padded, their sum when laid end to end (`flat`).

    Packs go to the rank with the fewest tokens, longest first, so ranks differ by less than one pack. Ranks may get
    unequal numbers of microbatches, or none. A pack longer than the budget is a microbatch by itself.
    """
    sizes = [int(sum(lengths[row] for row in pack)) for pack in packs]
    loads = [0] * world
    mine: list[int] = []
    for number in sorted(range(len(packs)), key=lambda number: (-sizes[number], packs[number])):
        lightest = min(range(world), key=loads.__getitem__)
        loads[lightest] += sizes[number]
        if lightest == rank:
            mine.append(number)
    if flat:
        bins = best_fit([sizes[number] for number in mine], tokens_per_microbatch)
        return [[row for i in found for row in packs[mine[i]]] for found in bins]
    batches: list[list[int]] = []
    for number in mine:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_microbatch:
            batches.append([])
        batches[-1] += packs[number]
    return batches


def collate(
    rows: Sequence[Encoded], pad_id: int, *, flat: bool = False, multiple: int = 1, drawn: Drawn | None = None
) -> Batch:
    """Rows of one sequence each to a batch: padded on the right with `pad_id` to the longest, or end to end (`flat`).

    Padding is told by position: `pad_id` may be eos. `multiple`: a line's tokens are filled up to a multiple of this by
    one more row of `pad_id`, for ranks that share a line.
    """
    labels = [list(row.labels) for row in rows if row.labels is not None]
    row_labels = torch.tensor(labels, dtype=torch.long) if labels else None
    if row_labels is not None and row_labels.shape[1] == 1:
        row_labels = row_labels.squeeze(1)
    parts = [ids_and_labels(row) for row in rows]
    batch = line(parts, pad_id, multiple) if flat else padded(parts, pad_id)
    if row_labels is None:
        return batch
    return replace(batch, row_labels=row_labels, n_targets=int((row_labels != IGNORE).sum()))


def padded(parts: Sequence[tuple[Tensor, Tensor]], pad_id: int) -> Batch:
    """Sequences of (ids [T], labels [T]), one below the other."""
    shape = (len(parts), max(len(ids_T) for ids_T, _ in parts))
    ids_BT = torch.full(shape, pad_id, dtype=torch.long)
    attention_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE, dtype=torch.long)
    for number, (ids_T, labels_T) in enumerate(parts):
        ids_BT[number, : len(ids_T)], labels_BT[number, : len(ids_T)] = ids_T, labels_T
        attention_BT[number, : len(ids_T)] = 1
    return Batch(ids_BT, labels_BT, int((labels_BT != IGNORE).sum()), attention_BT=attention_BT)


def line(parts: Sequence[tuple[Tensor, Tensor]], pad_id: int, multiple: int) -> Batch:
    """Sequences of (ids [T], labels [T]), end to end."""
    lengths = [len(ids_T) for ids_T, _ in parts]
    missing = -sum(lengths) % multiple
    if missing:
        parts = [*parts, (torch.full((missing,), pad_id), torch.full((missing,), IGNORE))]
        lengths.append(missing)
    labels_BT = torch.cat([labels for _, labels in parts]).unsqueeze(0)
    return Batch(
        torch.cat([ids for ids, _ in parts]).unsqueeze(0),
        labels_BT,
        int((labels_BT != IGNORE).sum()),
        positions_BT=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        row_lengths=tuple(lengths),
    )


def ids_and_labels(row: Encoded) -> tuple[Tensor, Tensor]:
    ids_T = torch.as_tensor(row.ids, dtype=torch.long)
    labels_T = ids_T.masked_fill(~torch.as_tensor(row.trainable, dtype=torch.bool), IGNORE)
    labels_T[0] = IGNORE  # nothing stands before it; end to end, another row's last token does
    return ids_T, labels_T


def muted(row: Encoded) -> Encoded:
    return replace(
        row,
        trainable=[False] * len(row.ids),
        labels=None if row.labels is None else [IGNORE] * len(row.labels),
        terms=None if row.terms is None else 0,
    )
