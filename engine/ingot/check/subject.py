"""What is examined: sampled training rows beside the batches that will be made of them, and probes for the model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from ingot.data import inspect as view
from ingot.data.encoded import IGNORE, Encoded
from ingot.data.example import Example
from ingot.data.loader import Batch, microbatches
from ingot.data.plan import Cursor
from ingot.data.turns import Tokenizer
from ingot.parallel.layout import Layout
from ingot.preparation import Prepared
from ingot.recipe import CAUSAL, Parallel, Recipe

from .verdict import Evidence, Shown

SHOWN_ROWS = 8
SHOWN_PACKS = 24
MOST_PROBES = 8  # each is forwarded some ten times, alone and with others
FEWEST_PROBES = 3  # isolation and accumulation say nothing about a single row


@dataclass(frozen=True)
class Piece:
    """One sequence of a sampled row as the batch holds it. `learned[t]`: token t is a target.

    `where` of its row; `side`: which of two answers it is, 0 where there is one.
    """

    ids: list[int]
    learned: list[bool]
    row: int
    side: int = 0


@dataclass(frozen=True)
class Subject:
    """A recipe's rows and how they are learned. `rows`: encoded rows, a sample; `probes`: those that the model is tried
    on; `examples`: what both were made from, by `where`; `sampled`: sentences that say how many of how many.
    """

    recipe: Recipe
    home: Path
    prepared: Prepared
    device: torch.device
    rows: list[Encoded]
    probes: list[Encoded]
    examples: dict[str, Example]
    sampled: list[str]

    @property
    def tokenizer(self) -> Tokenizer:
        """The recipe's."""
        return self.prepared.tokenizer

    @property
    def alone(self) -> Recipe:
        """The recipe for one rank: what a rank computes does not depend on how the others are tied to it."""
        return self.recipe.model_copy(update={"parallel": Parallel(strategy="none", backend="gloo")})

    @property
    def writes(self) -> bool:
        """Whether text is learned, from left to right, by a model without an encoder."""
        return self.recipe.objective.task in CAUSAL

    def batch(self, part: Sequence[Encoded], *, flat: bool | None = None) -> Batch:
        """A microbatch as training makes it. `flat`: None as the recipe says."""
        recipe = self.alone
        if flat is not None:
            data = recipe.data.model_copy(update={"batches": "padding-free" if flat else "padded"})
            recipe = recipe.model_copy(update={"data": data})
        return self.prepared.rows.batch(part, recipe, Layout(), 0)

    def parts(self, rows: Sequence[Encoded], budget: int, rank: int = 0, world: int = 1) -> list[list[Encoded]]:
        """`rows` as the microbatches of a rank, of at most `budget` tokens each."""
        lengths, flat = [len(row.ids) for row in rows], self.recipe.data.batches != "padded"
        packs = [[number] for number in range(len(rows))]
        return [[rows[i] for i in part] for part in microbatches(packs, lengths, rank, world, budget, flat)]

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every sampled row as it comes out of its batch, one sequence after the other."""
        found: list[Piece] = []
        numbers = {id(row): number for number, row in enumerate(self.rows)}
        for part in self.parts(self.rows, max(self.recipe.train.tokens_per_microbatch, 1)):
            found += _pieces(self.batch(part), [numbers[id(row)] for row in part], part)
        return sorted(found, key=lambda piece: (piece.row, piece.side))

    @property
    def first(self) -> Example:
        """One of the examples, which are all of a kind."""
        return self.examples[self.rows[0].where]

    def evidence(self) -> Evidence:
        """Rows, counts and packs for people."""
        trainable = [sum(piece.learned) for piece in self.pieces]
        return Evidence(list(self._shown()), trainable, self._packs(), self._pack_tokens)

    def _shown(self) -> Iterator[Shown]:
        labels = self.prepared.facts.labels
        for piece in self.pieces[:SHOWN_ROWS]:
            row = self.rows[piece.row]
            one = Encoded(piece.ids, piece.learned, row.labels, row.where)
            segments = [dict(vars(segment)) for segment in view.segments(one, self.tokenizer)]
            named = row.labels is not None and len(row.labels) == 1 and labels
            label = labels[row.labels[0]] if named and row.labels else ""
            yield Shown(row.where, segments, len(piece.ids), sum(piece.learned), label)

    @property
    def _pack_tokens(self) -> int:
        data, train = self.recipe.data, self.recipe.train
        return (data.pack_tokens or data.max_tokens) if data.batches == "packed" else train.tokens_per_microbatch

    def _packs(self) -> list[list[int]]:
        """What lies in one forward pass: packs, or microbatches of the first steps."""
        found: list[list[int]] = []
        for portion in islice(self.prepared.rows.train.start(Cursor()), 8):
            lengths = dict(zip(portion.indices, portion.rows.lengths[portion.indices].tolist(), strict=True))
            packs = portion.packs
            if self.recipe.data.batches != "packed":
                flat, budget = self.recipe.data.batches != "padded", self.recipe.train.tokens_per_microbatch
                packs = microbatches(packs, lengths, 0, 1, budget, flat)
            found += [[int(lengths[row]) for row in pack] for pack in packs]
            if len(found) >= SHOWN_PACKS:
                break
        return found[:SHOWN_PACKS]


def probes_of(prepared: Prepared, recipe: Recipe) -> list[Encoded]:
    """The shortest rows of the first steps: MOST_PROBES or `check.max_probe_tokens`, but at least FEWEST_PROBES."""
    rows: list[Encoded] = []
    for portion in islice(prepared.rows.train.start(Cursor()), 4):
        rows += [portion.rows[index] for index in portion.indices]
        if len(rows) > MOST_PROBES:
            break
    rows.sort(key=lambda row: len(row.ids))
    kept, total = rows[:FEWEST_PROBES], sum(len(row.ids) for row in rows[:FEWEST_PROBES])
    for row in rows[FEWEST_PROBES:MOST_PROBES]:
        total += len(row.ids)
        if total > recipe.check.max_probe_tokens:
            break
        kept.append(row)
    return kept


def draw(n: int, limit: int, seed: int) -> list[int]:
    """`limit` of `n` numbers in their order, drawn with `seed`; all where there are no more."""
    return list(range(n)) if n <= limit else sorted(random.Random(f"check {seed}").sample(range(n), limit))


def _pieces(batch: Batch, numbers: list[int], part: Sequence[Encoded]) -> Iterator[Piece]:
    """The sequences of a batch: one a row, or two answers a row."""
    sides = 2 if len(batch.row_lengths or batch.ids_BT) >= 2 * len(part) and all(len(r.parts) == 2 for r in part) else 1
    if batch.targets_BU is not None:
        for number, targets in zip(numbers, batch.targets_BU.tolist(), strict=True):
            ids = [token for token in targets if token != IGNORE]
            yield Piece(ids, [True] * len(ids), number)
        return
    for place, (ids, labels) in enumerate(_cut(batch)):
        if place < sides * len(part):  # a line may be filled up behind its last row
            learned = [label != IGNORE for label in labels]
            yield Piece(ids, learned, numbers[place // sides], place % sides)


def _cut(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    if batch.row_lengths is not None:
        ids, labels = batch.ids_BT[0], batch.labels_BT[0]
        pairs = zip(ids.split(batch.row_lengths), labels.split(batch.row_lengths), strict=True)
        yield from ((some.tolist(), marks.tolist()) for some, marks in pairs)
        return
    assert batch.attention_BT is not None
    for ids, labels, here in zip(batch.ids_BT, batch.labels_BT, batch.attention_BT.bool(), strict=True):
        yield ids[here].tolist(), labels[here].tolist()
