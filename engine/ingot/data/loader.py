"""Encoded rows to batches. A plan is a pure function of lengths, seed and epoch, never of the ranks.

So the same rows meet in the same step on one rank and on eight, and a resumed run goes on with the step it left.

    B rows of a microbatch, T tokens of its longest row
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ingot.data.template import Encoded

IGNORE = -100  # what torch's cross entropy leaves out
WINDOW_STEPS = 50  # group_by_length sorts within this many steps: enough for even lengths, few enough to stay random


@dataclass(frozen=True)
class Batch:
    """One forward pass on one rank, padded on the right.

    `ids_BT`, `attention_BT` (1 where a token is) and `labels_BT` are int64. Labels are NOT shifted: `labels[t] ==
    ids[t]` where token t is a target, IGNORE elsewhere. `class_labels_B` is int64, None unless classes are learned.
    `n_targets`: terms of the loss: labels at t >= 1 (nothing stands before t = 0 to predict it from), or rows for
    classification.
    """

    ids_BT: Tensor  # noqa: N815
    attention_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    class_labels_B: Tensor | None  # noqa: N815
    n_targets: int


def plan_epoch(
    lengths: Sequence[int], tokens_per_step: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Row indices of every optimizer step of `epoch`: each row once, in an order drawn from (`seed`, `epoch`).

    A step takes rows until the next would exceed `tokens_per_step` tokens (padding not counted); a row that is longer
    by itself is a step by itself.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if not group_by_length:
        return _filled(order, lengths, tokens_per_step)
    ordered: list[int] = []
    for number, window in enumerate(_filled(order, lengths, WINDOW_STEPS * tokens_per_step)):
        # Up and down in turn, so that the step on the seam of two windows is even too.
        ordered += sorted(window, key=lambda row: lengths[row], reverse=number % 2 == 1)
    steps = _filled(ordered, lengths, tokens_per_step)
    draw.shuffle(steps)
    return steps


def _filled(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut `order` into stretches of at most `tokens` tokens each, at least one row each."""
    stretches: list[list[int]] = []
    used = 0
    for row in order:
        if not stretches or used + lengths[row] > tokens:
            stretches.append([])
            used = 0
        stretches[-1].append(row)
        used += lengths[row]
    return stretches


def microbatches(
    step_rows: Sequence[int], lengths: Sequence[int], rank: int, world: int, tokens_per_microbatch: int
) -> list[list[int]]:
    """The share of `rank` in a step, longest rows first, as microbatches of rows x longest <= `tokens_per_microbatch`.

    Rows go to the rank with the fewest tokens, longest first, so ranks differ by less than one row. Ranks may get
    unequal numbers of microbatches, or none. A row longer than the budget is a microbatch by itself.
    """
    loads = [0] * world
    mine: list[int] = []
    for row in sorted(step_rows, key=lambda row: (-lengths[row], row)):
        lightest = min(range(world), key=loads.__getitem__)
        loads[lightest] += lengths[row]
        if lightest == rank:
            mine.append(row)
    batches: list[list[int]] = []
    for row in mine:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_microbatch:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right with `pad_id` to the longest. Padding is told by position: `pad_id` may be eos."""
    shape = (len(encoded), max(len(row.ids) for row in encoded))
    ids_BT = torch.full(shape, pad_id, dtype=torch.long)
    attention_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE, dtype=torch.long)
    for number, row in enumerate(encoded):
        ids_T = torch.tensor(row.ids, dtype=torch.long)
        n_tokens = len(row.ids)
        ids_BT[number, :n_tokens] = ids_T
        attention_BT[number, :n_tokens] = 1
        labels_BT[number, :n_tokens] = ids_T.masked_fill(~torch.tensor(row.trainable, dtype=torch.bool), IGNORE)
    classes = [row.label for row in encoded if row.label is not None]
    if classes:
        return Batch(ids_BT, attention_BT, labels_BT, torch.tensor(classes, dtype=torch.long), len(classes))
    return Batch(ids_BT, attention_BT, labels_BT, None, int((labels_BT[:, 1:] != IGNORE).sum()))
