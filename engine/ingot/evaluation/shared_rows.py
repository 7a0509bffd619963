"""Which rows of a test training saw: test rows are indexed, training rows stream by once and are not kept.

Three ways of finding them, each over what a row asks (`prompt`) and over that with its answer (`whole`):

- exact: the text of a training row, or of one part of it, but for case, blanks and the forms that NFKC makes equal.
- ngram: the share of the row's 13-grams of words that training saw anywhere (13-grams: Brown et al. 2020, appendix C,
  who count a row from the first one on; a share: Chowdhery et al. 2022, section 8, with 70 %, and Touvron et al. 2023,
  appendix A.6, who call 80 % dirty). A shorter row, of 8 words at least (their smallest gram), is one gram.
- minhash: Jaccard's index of the sets of 5-grams of words with one training row, or one part of it. MinHash (Broder
  1997) with 128 hashes in bands finds the pairs, and the sets themselves are then compared: none is found in error.

What very many training rows hold (`too_many`: a system prompt, the words of a template) is no likeness in the last two.

E test texts, H hashes of a signature.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ingot.data import overlap
from ingot.data.overlap import Known, MinHash, Stretches
from ingot.data.seen import Seen
from ingot.data.words import Ints, Places, plain, words
from ingot.recipe_evaluate import Way

Text = Literal["prompt", "whole"]
SHORTEST = 8  # words of a row that is compared by n-grams: a shorter one stands by chance in other texts
SHINGLE = 5  # words
HASHES = 128
SLACK = 0.2  # a pair is compared when its signatures promise so much less than the threshold: 5.6 standard deviations
CANDIDATES = 20  # training texts of a block that are compared with a test text: those that promise most
BLOCK_ROWS, BLOCK_CHARACTERS = 4096, 1 << 20
PAIRS_AT_ONCE = 1 << 16
SURVEYED = 1000  # rows of a block that show by themselves what is common
Flags = NDArray[np.bool_]
Row = TypeVar("Row")


class Hit(NamedTuple):
    """Row number `row` of the test stands in training row `where`: which text of it, and how similar."""

    row: int
    way: Way
    text: Text
    where: str
    similarity: float


class Read(NamedTuple):
    """So many more rows and words of training were read."""

    rows: int
    words: int


class Index:
    """Test rows, and what was found of them so far. `rows`: what each asks, and its right answers.

    Holds about 150 bytes a word of the test rows, and of training rows the block that is compared.
    """

    def __init__(
        self,
        rows: Iterable[tuple[str, Sequence[str]]],
        ways: Sequence[Way] = ("exact", "ngram", "minhash"),
        ngram: int = 13,
        threshold: float = 0.8,
    ) -> None:
        self.n_rows = self.seen_rows = self.seen_words = self.unreadable = 0
        self.stopped = False  # before the training rows ended
        self._of: list[tuple[int, Text]] = []
        self._digests: dict[int, list[int]] = {}
        grams: dict[int, list[Stretches]] = {}
        sets: list[Stretches] = []
        for some in blocks(rows, lambda row: len(row[0]) + sum(map(len, row[1]))):
            first = len(self._of)
            texts, compared = self._texts(some)
            for number, text in enumerate(texts, first):
                self._digests.setdefault(overlap.digest(text), []).append(number)
            made = words(texts)
            begins, ends = made.starts[:-1], made.starts[1:]
            lengths = np.where(compared, np.minimum(ends - begins, ngram), 0)
            for length in range(min(SHORTEST, ngram), ngram + 1):
                its = np.flatnonzero(lengths == length)
                found = overlap.distinct(overlap.stretches(made.hashes, begins[its], ends[its], length, short=False))
                grams.setdefault(length, []).append(Stretches(found.hashes, first + its[found.owner]))
            its = np.flatnonzero(compared)
            found = overlap.distinct(overlap.stretches(made.hashes, begins[its], ends[its], SHINGLE, short=True))
            sets.append(Stretches(found.hashes, first + its[found.owner]))
        self._exact: dict[int, str] | None = {} if "exact" in ways else None
        together = {length: _joined(found) for length, found in grams.items()} if "ngram" in ways else {}
        self._grams = [_Grams(length, found) for length, found in together.items() if len(found.owner)]
        self._near = _Near(_joined(sets), len(self._of), threshold) if "minhash" in ways else None
        self._threshold = threshold

    def _texts(self, rows: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[str], Flags]:
        """The texts of some rows that are looked for, empty ones not, and none twice; and which of them by likeness.

        A short answer (a label, a number) beside its question would only make different questions alike.
        """
        asked = plain([prompt for prompt, _ in rows])
        answers = plain([answer for _, answers in rows for answer in answers])
        sized = iter(zip(answers, np.diff(words(answers).starts).tolist(), strict=True))
        texts: list[str] = []
        compared: list[bool] = []
        for prompt, (_, own) in zip(asked, rows, strict=True):
            found = {prompt: True}
            for answer, n_words in islice(sized, len(own)):
                if answer and answer != prompt:
                    found.setdefault(f"{prompt} {answer}".strip(), n_words >= SHORTEST)
            found.pop("", None)
            texts += found
            compared += found.values()
            self._of += [(self.n_rows, "prompt" if text == prompt else "whole") for text in found]
            self.n_rows += 1
        return texts, np.array(compared, dtype=bool)

    def scan(self, training: Iterable[Seen], most_words: int | None = None) -> Iterator[Read]:
        """Hold training rows against the test rows; yields what more was read, block by block.

        `most_words`: stop when so many words were read.
        """
        for block in blocks(training, lambda row: sum(map(len, row.parts))):
            if most_words is not None and self.seen_words >= most_words:
                self.stopped = True
                return
            yield self._add(block)

    def _add(self, block: Sequence[Seen]) -> Read:
        parts = plain([part for row in block for part in row.parts])
        made = words(parts)
        bounds = np.cumsum([0, *(len(row.parts) for row in block)])
        if self._exact is not None:
            self._find_exact(block, parts, bounds.tolist())
        begins, ends = made.starts[bounds[:-1]], made.starts[bounds[1:]]
        for grams in self._grams:
            found = overlap.stretches(made.hashes, begins, ends, grams.length, short=False)
            grams.add(found, [row.where for row in block])
        if self._near is not None:
            # Beside whole rows their parts, where there are several: the first, and those that are longer than a label.
            several = np.repeat(np.diff(bounds) > 1, np.diff(bounds))
            first = np.isin(np.arange(len(parts)), bounds[:-1])
            several &= first | (np.diff(made.starts) >= SHINGLE)
            of = np.concatenate([np.arange(len(block)), np.repeat(np.arange(len(block)), np.diff(bounds))[several]])
            starts = np.concatenate([begins, made.starts[:-1][several]])
            stops = np.concatenate([ends, made.starts[1:][several]])
            found = overlap.stretches(made.hashes, starts, stops, SHINGLE, short=True)
            self._near.add(found, of, [row.where for row in block])
        unreadable = sum(row.unreadable for row in block)
        self.unreadable += unreadable
        self.seen_rows += len(block) - unreadable
        self.seen_words += len(made.hashes)
        return Read(len(block), len(made.hashes))

    def _find_exact(self, block: Sequence[Seen], parts: Sequence[str], bounds: Sequence[int]) -> None:
        assert self._exact is not None
        for row, start, stop in zip(block, bounds, bounds[1:], strict=False):
            texts = list(parts[start:stop])
            for text in [*texts, " ".join(filter(None, texts))] if len(texts) > 1 else texts:
                for number in self._digests.get(overlap.digest(text), ()):
                    self._exact.setdefault(number, row.where)

    def hits(self) -> list[Hit]:
        """What was found: of each row, way and text the best, in the order of the rows."""
        best: dict[tuple[int, Way, Text], Hit] = {}
        for number, way, where, similarity in self._found():
            row, text = self._of[number]
            before = best.get((row, way, text))
            if before is None or similarity > before.similarity:
                best[row, way, text] = Hit(row, way, text, where, similarity)
        return [best[key] for key in sorted(best)]

    def _found(self) -> Iterator[tuple[int, Way, str, float]]:
        for number, where in (self._exact or {}).items():
            yield number, "exact", where, 1.0
        for grams in self._grams:
            yield from ((number, "ngram", where, share) for number, where, share in grams.dirty(self._threshold))
        if self._near is not None:
            yield from ((number, "minhash", where, found) for number, (found, where) in self._near.best.items())


def _joined(found: Sequence[Stretches]) -> Stretches:
    none = Stretches(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64))
    return Stretches(*(np.concatenate(arrays) for arrays in zip(none, *found, strict=True)))


class _Grams:
    """Grams of one length: which of them training saw, and where first. `found`: those of each test text."""

    def __init__(self, length: int, found: Stretches) -> None:
        self.length = length
        self._known = Known(found.hashes)
        self._owner, self._number = found.owner, np.searchsorted(self._known.values, found.hashes)
        self._first = np.full(len(self._known.values), -1, dtype=np.int64)  # number of the training row
        self._common = _Common(len(self._known.values))
        self._where: dict[int, str] = {}

    def add(self, found: Stretches, where: Sequence[str]) -> None:
        """Note the grams of a block of training rows."""
        places, numbers = self._known.find(found.hashes)
        before, rows = self._common.rows, found.owner[places]
        self._common.count(rows, numbers, len(where))
        new = self._first[numbers] < 0
        for row in np.unique(rows[new]).tolist():
            self._where[before + row] = where[row]
        # From the last to the first: of several rows that have a gram, the first one stays.
        self._first[numbers[new][::-1]] = before + rows[new][::-1]

    def dirty(self, threshold: float) -> Iterator[tuple[int, str, float]]:
        """Texts of which `threshold` of the grams was seen: number, training row that brought most of them, share."""
        own = ~self._common.flags[self._number]
        owner, first = self._owner[own], self._first[self._number[own]]
        totals, seen = np.bincount(owner), np.bincount(owner[first >= 0], minlength=int(owner.max(initial=-1)) + 1)
        for number in np.flatnonzero((seen >= threshold * totals) & (seen > 0)).tolist():
            begin, end = np.searchsorted(owner, [number, number + 1])
            rows = Counter(first[begin:end][first[begin:end] >= 0].tolist())
            row = max(rows.items(), key=lambda found: (found[1], -found[0]))[0]
            yield number, self._where[row], float(seen[number] / totals[number])


class _Common:
    """How many training rows hold each of `size` stretches, and which of these are no likeness therefore."""

    def __init__(self, size: int) -> None:
        self.flags: Flags = np.zeros(size, dtype=bool)
        self.rows = 0
        self._held = np.zeros(size, dtype=np.int64)

    def count(self, owner: Places, numbers: Places, rows: int) -> bool:
        """Count a block of `rows` rows, stretch `numbers[i]` standing in row `owner[i]`. True: more are common now."""
        pairs = np.unique(owner * len(self.flags) + numbers) if len(numbers) else np.zeros(0, dtype=np.int64)
        held = np.bincount(pairs % max(1, len(self.flags)), minlength=len(self.flags))
        self._held += held
        self.rows += rows
        new = self._held > overlap.too_many(self.rows)
        if rows >= SURVEYED:  # a source among others has a template of its own
            new |= held > overlap.too_many(rows)
        more = bool((new & ~self.flags).any())
        self.flags |= new
        return more


class _Near:
    """Sets of stretches, and of each the most similar text of training. `found`: those of each of `count` test texts.

    `best`: number of a text -> (similarity, where).
    """

    def __init__(self, found: Stretches, count: int, threshold: float) -> None:
        self.best: dict[int, tuple[float, str]] = {}
        self._sets, self._threshold = found, threshold
        self._bounds = np.searchsorted(found.owner, np.arange(count + 1))
        self._known = Known(found.hashes)
        self._number = np.searchsorted(self._known.values, found.hashes)
        self._common = _Common(len(self._known.values))
        self._hashing = MinHash(HASHES, overlap.rows_per_band(HASHES, threshold))
        self._settled = np.zeros(count, dtype=bool)  # an equal one was found
        self._signed: _Signed | None = None

    def add(self, found: Stretches, of: Places, where: Sequence[str]) -> None:
        """Compare a block: text i is of row `of[i]`."""
        places, numbers = self._known.find(found.hashes)
        if self._common.count(of[found.owner[places]], numbers, len(where)):
            self._signed = None
        sets = self._likely(found, places, len(of))
        places, numbers = self._known.find(sets.hashes)
        uncommon = np.ones(len(sets.hashes), dtype=bool)
        uncommon[places] = ~self._common.flags[numbers]
        if not uncommon.any():
            return
        signed = _Signed.of(Stretches(sets.hashes[uncommon], sets.owner[uncommon]), self._hashing)
        common = self._known.values[self._common.flags]
        for text, number in self._pairs(signed):
            low, high = np.searchsorted(sets.owner, [text, text + 1])
            mine = self._sets.hashes[self._bounds[number] : self._bounds[number + 1]]
            similarity = overlap.similarity(mine, sets.hashes[low:high], common)
            if similarity >= self._threshold and similarity > self.best.get(number, (0.0, ""))[0]:
                self.best[number] = similarity, where[int(of[text])]
                self._settled[number] = similarity == 1.0

    def _likely(self, found: Stretches, places: Places, texts: int) -> Stretches:
        """The sets of the texts of which so many stretches are known as one that is similar enough must have."""
        known = overlap.distinct_counts(Stretches(found.hashes[places], found.owner[places]), texts)
        some = known[found.owner] > 0
        sizes = overlap.distinct_counts(Stretches(found.hashes[some], found.owner[some]), texts)
        likely = ((known >= self._threshold * sizes) & (known > 0))[found.owner]
        return overlap.distinct(Stretches(found.hashes[likely], found.owner[likely]))

    def _pairs(self, texts: "_Signed") -> list[tuple[int, int]]:
        """Training and test texts that are worth comparing, at most CANDIDATES for each test text."""
        if self._signed is None:
            uncommon = ~self._common.flags[self._number]
            own = Stretches(self._sets.hashes[uncommon], self._sets.owner[uncommon])
            self._signed = _Signed.of(own, self._hashing)
        mine, pairs = self._signed, np.zeros(0, dtype=np.int64)
        open_ = np.flatnonzero(~self._settled[mine.numbers])
        for ours, theirs in zip(mine.buckets[open_].T, texts.buckets.T, strict=True):
            order = np.argsort(ours, kind="stable")
            low, high = (np.searchsorted(ours[order], theirs, side=side) for side in ("left", "right"))
            text = np.repeat(np.arange(len(theirs)), high - low)
            place = np.arange(len(text)) - np.repeat(np.cumsum(high - low) - high, high - low)
            pairs = np.unique(np.concatenate([pairs, text * len(mine.numbers) + open_[order[place]]]))
        text, place = pairs // max(1, len(mine.numbers)), pairs % max(1, len(mine.numbers))
        equal = np.zeros(len(pairs), dtype=np.int64)
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            equal[part] = (mine.signatures[place[part]] == texts.signatures[text[part]]).sum(axis=1)
        promising = equal >= (self._threshold - SLACK) * HASHES
        text, place, equal = text[promising], place[promising], equal[promising]
        order = np.lexsort((text, -equal, place))
        text, place = text[order], place[order]
        rank = np.arange(len(place)) - np.searchsorted(place, place)
        chosen = rank < CANDIDATES
        return list(zip(texts.numbers[text[chosen]].tolist(), mine.numbers[place[chosen]].tolist(), strict=True))


class _Signed(NamedTuple):
    """Texts with something of their own: `numbers` [E], `signatures` [E, H], `buckets` [E, bands]."""

    numbers: Places
    signatures: NDArray[np.uint32]
    buckets: Ints

    @classmethod
    def of(cls, found: Stretches, hashing: MinHash) -> "_Signed":
        numbers, begins = np.unique(found.owner, return_index=True)
        signatures = hashing.signatures(found.hashes, begins)
        return cls(numbers, signatures, hashing.buckets(signatures))


def blocks(rows: Iterable[Row], size: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Rows so many at a time as are read at once: by number, and by characters, which `size` tells."""
    block: list[Row] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += size(row)
        if len(block) == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block
