"""Which rows meet in which optimizer step: a pure function of lengths, seed and epoch, never of the ranks.

So the same rows meet in the same step on one rank and on eight, and a resumed run goes on with the very row it left.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ingot.data.packing import best_fit
from ingot.data.rows import EncodedRows
from ingot.recipe import Data, Train

WINDOW_STEPS = 50  # group_by_length sorts within this many steps: enough for even lengths, few enough to stay random
PACK_WINDOW_ROWS = 16_384  # packed: rows that are packed together; more fills packs no better and mixes lengths less

Packs = list[list[int]]


@dataclass(frozen=True)
class Cursor:
    """A place in the data: `position` rows (packed: packs) of the order of `epoch` have been learned.

    Streaming counts windows in `epoch`.
    """

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Portion:
    """What one optimizer step learns from, on all ranks: packs of indices into `rows` (a row alone is a pack of one).

    `cursor` is the place behind it.
    """

    rows: EncodedRows
    packs: Packs
    cursor: Cursor

    @property
    def indices(self) -> list[int]:
        """All its rows."""
        return [index for pack in self.packs for index in pack]

    @property
    def n_tokens(self) -> int:
        """Tokens, padding not counted."""
        return int(self.rows.lengths[self.indices].sum())

    @property
    def n_targets(self) -> int:
        """The divisor of the step's loss."""
        return int(self.rows.targets[self.indices].sum())


class Feed(Protocol):
    """A source of portions. `steps`: how many there are in all."""

    steps: int

    def start(self, cursor: Cursor) -> Iterator[Portion]:
        """Portions from `cursor` on."""
        ...


class PlannedFeed:
    """Portions of rows that are all at hand. `sources`: numbers of rows and weights of a mixture's parts."""

    def __init__(
        self, rows: EncodedRows, data: Data, train: Train, sources: Sequence[tuple[int, float]] | None = None
    ) -> None:
        self.rows, self._data, self._train = rows, data, train
        self._sources = sources or [(len(rows), 1.0)]
        self._lengths: list[int] = rows.lengths.tolist()
        self.steps_of_epochs = self._count()
        self.steps = sum(self.steps_of_epochs)

    def epoch(self, epoch: int) -> list[Packs]:
        """Every optimizer step of a whole epoch."""
        return plan_epoch(self._lengths, self._data, self._train, epoch, self._sources)

    def start(self, cursor: Cursor) -> Iterator[Portion]:
        """Portions from `cursor` on, to the end of the run."""
        for epoch in range(cursor.epoch, len(self.steps_of_epochs)):
            position = 0
            for packs in self.epoch(epoch)[: self.steps_of_epochs[epoch]]:
                position += len(packs)
                if epoch > cursor.epoch or position > cursor.position:
                    yield Portion(self.rows, packs, Cursor(epoch, position))

    def _count(self) -> list[int]:
        """Steps of each epoch: the last one may be cut by `epochs` or `max_steps`."""
        train, counts = self._train, []
        remaining = train.epochs
        while remaining > 1e-9 if train.max_steps is None else sum(counts) < train.max_steps:
            n_steps = len(self.epoch(len(counts)))
            share = 1.0 if train.max_steps is not None else min(1.0, remaining)
            counts.append(max(1, round(share * n_steps)))
            remaining -= 1.0
        if train.max_steps is not None:
            counts[-1] -= sum(counts) - train.max_steps
        return counts


def plan_epoch(
    lengths: Sequence[int], data: Data, train: Train, epoch: int, sources: Sequence[tuple[int, float]] | None = None
) -> list[Packs]:
    """Packs of every optimizer step of `epoch`: each row once, in an order drawn from (`train.seed`, `epoch`).

    A step takes packs until the next would exceed `train.tokens_per_step` tokens (padding not counted); a pack that is
    longer by itself is a step by itself. With several `sources` (numbers of rows, weights) see `mixed_order`.
    """
    draw = random.Random(f"{train.seed} {epoch}")
    order = mixed_order(sources or [(len(lengths), 1.0)], train.seed, epoch, draw)
    if data.batches == "packed":
        packs = _packs(order, lengths, data.pack_tokens or data.max_tokens, draw)
    elif train.group_by_length:
        packs = [[row] for row in _grouped(order, lengths, train.tokens_per_step)]
    else:
        packs = [[row] for row in order]
    steps = _filled(packs, [sum(lengths[row] for row in pack) for pack in packs], train.tokens_per_step)
    if train.group_by_length and data.batches != "packed":
        draw.shuffle(steps)
    return steps


def mixed_order(sources: Sequence[tuple[int, float]], seed: int, epoch: int, draw: random.Random) -> list[int]:
    """Row indices of an epoch. One source: all its rows, shuffled by `draw`.

    Several: as many rows as there are in all, shared by weight. Each source goes through its rows in shuffled rounds
    that run on over the epochs, so that none is seen n+1 times before every one was seen n times.
    """
    if len(sources) == 1:
        order = list(range(sources[0][0]))
        draw.shuffle(order)
        return order
    total, weights = sum(size for size, _ in sources), sum(weight for _, weight in sources)
    order, start = [], 0
    for number, (size, weight) in enumerate(sources):
        wanted = max(1, round(total * weight / weights))
        order += [start + row for row in _round_robin(size, epoch * wanted, wanted, f"{seed} {number}")]
        start += size
    draw.shuffle(order)
    return order


def _round_robin(size: int, first: int, wanted: int, seed: str) -> list[int]:
    """Elements `first` to `first + wanted` of the endless row of shuffled rounds of range(size)."""
    found: list[int] = []
    while len(found) < wanted:
        number, offset = divmod(first + len(found), size)
        rows = list(range(size))
        random.Random(f"{seed} round {number}").shuffle(rows)
        found += rows[offset : offset + wanted - len(found)]
    return found


def _grouped(order: Sequence[int], lengths: Sequence[int], tokens_per_step: int) -> list[int]:
    """`order` with rows of similar length near each other."""
    grouped: list[int] = []
    windows = _filled([[row] for row in order], [lengths[row] for row in order], WINDOW_STEPS * tokens_per_step)
    for number, window in enumerate(windows):
        rows = [row for [row] in window]
        # Up and down in turn, so that the step on the seam of two windows is even too.
        grouped += sorted(rows, key=lambda row: lengths[row], reverse=number % 2 == 1)
    return grouped


def _packs(order: Sequence[int], lengths: Sequence[int], capacity: int, draw: random.Random) -> Packs:
    packs: Packs = []
    for start in range(0, len(order), PACK_WINDOW_ROWS):
        window = order[start : start + PACK_WINDOW_ROWS]
        packs += [[window[i] for i in found] for found in best_fit([lengths[row] for row in window], capacity)]
    draw.shuffle(packs)  # best-fit leaves them sorted by length
    return packs


def _filled(packs: Packs, sizes: Sequence[int], tokens: int) -> list[Packs]:
    """Cut `packs` into stretches of at most `tokens` tokens each, at least one pack each."""
    stretches: list[Packs] = []
    used = 0
    for pack, size in zip(packs, sizes, strict=True):
        if not stretches or used + size > tokens:
            stretches.append([])
            used = 0
        stretches[-1].append(pack)
        used += size
    return stretches
