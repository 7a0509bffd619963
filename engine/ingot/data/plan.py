"""Which rows meet in which optimizer step: a pure function of lengths, seed and epoch, never of the ranks.

So the same rows meet in the same step on one rank and on eight, and a resumed run goes on with the very row it left.
"""

import copy
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ingot.data.packing import best_fit
from ingot.data.rows import EncodedRows
from ingot.recipe import Data, Train

WINDOW_STEPS = 50  # group_by_length sorts within this many steps: enough for even lengths, few enough to stay random
PACK_WINDOW_ROWS = 16_384  # packed: rows that are packed together; more fills packs no better and mixes lengths less

Packs = list[list[int]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """A place in the data: `position` rows (packed: packs) of the order of `epoch` have been learned.

    Streaming counts windows in `epoch`.
    """

    epoch: int = 0
    position: int = 0


class Divisor(NamedTuple):
    """What a step's summed loss is divided by, on every rank: the number of its terms (`Encoded.n_targets`), or of its
    rows where the objective compares whole rows.
    """

    targets: int
    rows: int


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
        """Terms of the step's loss."""
        return int(self.rows.targets[self.indices].sum())

    @property
    def divisor(self) -> Divisor:
        """What the step's loss is divided by."""
        return Divisor(self.n_targets, len(self.indices))


class Feed(Protocol):
    """A source of portions. `steps`: how many there are in all. `rows`: all its rows; of a stream the first ones."""

    steps: int
    rows: EncodedRows

    def start(self, cursor: Cursor) -> Iterator[Portion]:
        """Portions from `cursor` on."""
        ...


@dataclass(frozen=True)
class EpochPlan:
    """Packs of every optimizer step of an epoch, 8 bytes a row: a million rows are no million objects.

    `rows` [rows]: row indices in order. `pack_ends` [packs]: where each pack ends in `rows`. `step_ends` [steps]: where
    each step ends among the packs.
    """

    rows: Ints
    pack_ends: Ints
    step_ends: Ints

    def __len__(self) -> int:
        return len(self.step_ends)

    def __getitem__(self, step: int) -> Packs:
        """The packs of a step, 0 to `len(self) - 1`."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        first, last = int(self.step_ends[step - 1]) if step else 0, int(self.step_ends[step])
        starts = [int(self.pack_ends[first - 1]) if first else 0, *self.pack_ends[first:last].tolist()]
        rows = self.rows[starts[0] : starts[-1]].tolist()
        return [rows[start - starts[0] : end - starts[0]] for start, end in pairwise(starts)]

    def __iter__(self) -> Iterator[Packs]:
        return (self[step] for step in range(len(self)))


class PlannedFeed:
    """Portions of rows that are all at hand. `sources`: numbers of rows and weights of a mixture's parts.

    One epoch's plan is held at a time; how many steps an epoch has is known only once it is planned.
    """

    def __init__(
        self, rows: EncodedRows, data: Data, train: Train, sources: Sequence[tuple[int, float]] | None = None
    ) -> None:
        self.rows, self._data, self._train = rows, data, train
        self._sources = sources or [(len(rows), 1.0)]
        self._held: tuple[int, EpochPlan] | None = None
        self._counts: dict[int, int] = {}
        self.steps = train.max_steps or self._steps_of_epochs(train.epochs)

    def over(self, rows: EncodedRows) -> "PlannedFeed":
        """The same portions of `rows`, which are as long as its own."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def epoch(self, epoch: int) -> EpochPlan:
        """Every optimizer step of a whole epoch."""
        if self._held is None or self._held[0] != epoch:
            self._held = None  # before the next is made: two would be held otherwise
            self._held = epoch, plan_epoch(self.rows.lengths, self._data, self._train, epoch, self._sources)
        plan = self._held[1]
        self._counts[epoch] = len(plan)
        return plan

    def start(self, cursor: Cursor) -> Iterator[Portion]:
        """Portions from `cursor` on, to the end of the run: the last epoch may be cut by `epochs` or `max_steps`."""
        epoch, done = cursor.epoch, sum(map(self._count, range(cursor.epoch)))
        while done < self.steps and len(plan := self.epoch(epoch)):
            position = cursor.position if epoch == cursor.epoch else 0
            first, last = int(np.searchsorted(plan.step_ends, position, "right")), min(len(plan), self.steps - done)
            for step in range(first, last):
                yield Portion(self.rows, plan[step], Cursor(epoch, int(plan.step_ends[step])))
            epoch, done = epoch + 1, done + last

    def _count(self, epoch: int) -> int:
        return self._counts[epoch] if epoch in self._counts else len(self.epoch(epoch))

    def _steps_of_epochs(self, epochs: float) -> int:
        n_epochs = math.ceil(epochs - 1e-9)
        # Backwards, so that the first epoch's plan is at hand when training starts.
        counts = [self._count(epoch) for epoch in reversed(range(n_epochs))]
        share = min(1.0, epochs - (n_epochs - 1))
        return sum(counts[1:]) + max(1, round(share * counts[0]))


def plan_epoch(
    lengths: Sequence[int] | Ints,
    data: Data,
    train: Train,
    epoch: int,
    sources: Sequence[tuple[int, float]] | None = None,
) -> EpochPlan:
    """Packs of every optimizer step of `epoch`: each row once, in an order drawn from (`train.seed`, `epoch`).

    A step takes packs until the next would exceed `train.tokens_per_step` tokens (padding not counted); a pack that is
    longer by itself is a step by itself. With several `sources` (numbers of rows, weights) see `mixed_order`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    draw = random.Random(f"{train.seed} {epoch}")
    rows = np.array(mixed_order(sources or [(len(sizes), 1.0)], train.seed, epoch, draw), dtype=np.int64)
    if data.batches == "packed":
        rows, pack_ends = _packed(rows, sizes, data.pack_tokens or data.max_tokens, draw)
        filled = np.diff(np.cumsum(sizes[rows])[pack_ends - 1], prepend=0)
        return EpochPlan(rows, pack_ends, _cut(filled, train.tokens_per_step))
    if train.group_by_length:
        rows = _grouped(rows, sizes, train.tokens_per_step)
    step_ends = _cut(sizes[rows], train.tokens_per_step)
    if train.group_by_length:
        rows, step_ends = _shuffled(rows, step_ends, draw)
    return EpochPlan(rows, np.arange(1, len(rows) + 1), step_ends)


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


def _grouped(order: Ints, lengths: Ints, tokens_per_step: int) -> Ints:
    """`order` with rows of similar length near each other."""
    grouped = order.copy()
    start = 0
    for number, end in enumerate(_cut(lengths[order], WINDOW_STEPS * tokens_per_step).tolist()):
        window = order[start:end]
        # Up and down in turn, so that the step on the seam of two windows is even too.
        keys = -lengths[window] if number % 2 else lengths[window]
        grouped[start:end] = window[np.argsort(keys, kind="stable")]
        start = end
    return grouped


def _packed(order: Ints, lengths: Ints, capacity: int, draw: random.Random) -> tuple[Ints, Ints]:
    """Best-fit packs of `order` in random order: their rows one after the other, and where each pack ends."""
    rows, sizes = [order[:0]], [order[:0]]
    for start in range(0, len(order), PACK_WINDOW_ROWS):
        window = order[start : start + PACK_WINDOW_ROWS]
        packs = best_fit(lengths[window].tolist(), capacity)
        rows.append(window[np.fromiter(chain.from_iterable(packs), np.int64, len(window))])
        sizes.append(np.array([len(pack) for pack in packs], dtype=np.int64))
    return _shuffled(np.concatenate(rows), np.cumsum(np.concatenate(sizes)), draw)  # best-fit sorts them by length


def _shuffled(rows: Ints, ends: Ints, draw: random.Random) -> tuple[Ints, Ints]:
    """Stretches of `rows` that end at `ends`, in an order drawn from `draw`."""
    order = list(range(len(ends)))
    draw.shuffle(order)
    starts, stops = np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist()
    parts = [rows[starts[number] : stops[number]] for number in order]
    return np.concatenate([rows[:0], *parts]), np.cumsum(np.diff(ends, prepend=0)[order], dtype=np.int64)


def _cut(sizes: Ints, tokens: int) -> Ints:
    """Ends of stretches of at most `tokens` tokens each, at least one of `sizes` each."""
    totals: list[int] = [0, *np.cumsum(sizes).tolist()]
    ends: list[int] = []
    start = 0
    while start < len(sizes):
        # The last place where the sum since `start` is still small enough.
        start = max(start + 1, bisect_right(totals, totals[start] + tokens, start + 1) - 1)
        ends.append(start)
    return np.array(ends, dtype=np.int64)
