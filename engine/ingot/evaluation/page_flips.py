"""Row by row: what got better and what broke, which of the rows a page shows, and the words that differ."""

# N rows

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.metrics import Array
from ingot.evaluation.result import Evaluation
from ingot.evaluation.samples import Sample
from ingot.pages import visible

# About 2 MB of page: a browser still opens it at once, and so does an attachment's viewer.
MAX_ROWS = 600
MAX_CHARACTERS = 900_000
MAX_TEXT = 1_600
MAX_WORDS = 800  # of an answer whose differences are marked: the comparison's time grows with the square
MARKED_SHARE = 0.25  # of the longer answer's letters: what shares less is another text, and marks would cover it
MAX_REFERENCES = 3
STATES = {"better": "got better", "broke": "broke", "wrong": "both wrong", "right": "both right", "same": "no change"}
Words = list[tuple[str, bool]]
"""Pieces of a text in order; True where the other answer does not have them."""


@dataclass(frozen=True)
class Contest:
    """Two models on one task, judged row by row by `metric`: `before` and `after` [N] are its values of each row."""

    task: str
    metric: str
    a: Evaluation
    b: Evaluation
    before: Array
    after: Array
    states: list[str]

    def counts(self) -> dict[str, int]:
        """State -> rows, in the order of STATES, without those that cannot occur."""
        found = Counter(self.states)
        possible = [state for state in STATES if (state != "same") == self.binary or state in ("better", "broke")]
        return {state: found[state] for state in possible}

    @property
    def binary(self) -> bool:
        """Whether a row is right or wrong and nothing between."""
        return _binary(self.before) and _binary(self.after)

    @property
    def where(self) -> str:
        """What the pair is called where there are several."""
        return f"{self.task}: {self.a.name} → {self.b.name}"


def contest(a: Evaluation, b: Evaluation) -> Contest | None:
    """None where no metric of both says something of single rows (BLEU), or they are of other rows."""
    if a.asked.get("documents") != b.asked.get("documents"):
        return None
    for metric, score in b.scores.items():
        before, after = (_per_row(side, metric) for side in (a, b))
        if before is None or after is None or len(before) != len(after):
            continue
        gain = (after - before) * (1 if score.higher_is_better else -1)
        if _binary(before) and _binary(after):
            names = np.where(before > 0, "right", "wrong")
        else:
            names = np.full(len(before), "same")
        names = np.where(gain > 0, "better", np.where(gain < 0, "broke", names))
        return Contest(b.task, metric, a, b, before, after, names.tolist())
    return None


def _per_row(side: Evaluation, metric: str) -> Array | None:
    statistic = side.statistics.get(metric)
    if statistic is None:
        return None
    values = statistic.per_row()
    if values is not None:
        return np.asarray(values, dtype=np.float64)
    if side.kind == "language-modeling" and statistic.rows.shape[1] == 2:
        return np.asarray(statistic.value_of(statistic.rows), dtype=np.float64)  # each document's own
    return None


def _binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def chosen(contests: Sequence[Contest], limit: int = MAX_ROWS) -> list[tuple[int, int]]:
    """(contest, row) of at most `limit` rows: what broke and what got better first, the largest changes before others.

    Every contest and state gets its share, so that one that has thousands leaves room for the others.
    """
    queues = []
    for number, one in enumerate(contests):
        change = np.abs(one.after - one.before)
        order = np.argsort(-change, kind="stable")
        states = np.asarray(one.states)
        for state in ("broke", "better", "wrong", "right", "same"):
            rows = order[states[order] == state].tolist()
            if rows:
                queues.append((state in ("broke", "better"), [(number, row) for row in rows]))
    found: list[tuple[int, int]] = []
    for changed in (True, False):
        waiting = [iter(rows) for is_changed, rows in queues if is_changed == changed]
        while waiting and len(found) < limit:
            waiting = [queue for queue in waiting if _take(queue, found, limit)]
    return found


def _take(queue: Iterator[tuple[int, int]], found: list[tuple[int, int]], limit: int) -> bool:
    row = next(queue, None)
    if row is not None and len(found) < limit:
        found.append(row)
    return row is not None


def cards(contests: Sequence[Contest], limit: int = MAX_ROWS) -> list[dict[str, Any]]:
    """What the page shows of each chosen row, those of a state together. Stops at MAX_CHARACTERS of text."""
    found: list[dict[str, Any]] = []
    used = 0
    picked = chosen(contests, limit)
    rank = {place: number for number, place in enumerate(picked)}
    # In the order of the files: a file is read once, a group at a time.
    samples = {place: _both(contests[place[0]], place[1]) for place in sorted(picked)}
    for place in sorted(picked, key=rank.__getitem__):
        card = _card(place[0], contests[place[0]], place[1], *samples[place])
        used += card.pop("characters")
        if used > MAX_CHARACTERS and found:
            break
        found.append(card)
    order = {state: number for number, state in enumerate(("broke", "better", "wrong", "right", "same"))}
    return sorted(found, key=lambda card: order[card["state"]])


def _both(one: Contest, row: int) -> tuple[Sample, Sample]:
    a, b = one.a.samples[row], one.b.samples[row]
    if a.document != b.document:
        raise IngotError(
            f"row {row + 1} of {one.task} is {a.id} for {one.a.name} and {b.id} for {one.b.name}: evaluate again"
        )
    return a, b


def _card(number: int, one: Contest, row: int, a: Sample, b: Sample) -> dict[str, Any]:
    prompt = shortened(b.prompt)
    references = [shortened(text) for text in b.references[:MAX_REFERENCES]]
    answers = shortened(a.prediction), shortened(b.prediction)
    left, right = different_words(*answers)
    return {
        "contest": number,
        "state": one.states[row],
        "id": b.id,
        "metric": one.metric,
        "before": float(one.before[row]),
        "after": float(one.after[row]),
        "slices": b.slices,
        "prompt": prompt,
        "references": references,
        "more_references": len(b.references) - len(references),
        "silent": not (a.prediction or b.prediction or b.references),  # likelihoods: nothing is answered
        "same_answer": a.prediction == b.prediction,
        "left": left,
        "right": right,
        "characters": sum(map(len, (prompt, *references, *answers))),
    }


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its beginning and its longer end with what is missing counted: a prompt asks at its end."""
    text = visible(text)
    if len(text) <= limit:
        return text
    head = limit // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[-tail:]}"


def different_words(a: str, b: str) -> tuple[Words, Words]:
    """Both texts in pieces, those that the other does not have marked; nothing where nearly all would be."""
    left, right = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (a, b))
    plain = [(a, False)] if a else [], [(b, False)] if b else []
    if a == b or max(len(left), len(right)) > MAX_WORDS:
        return plain
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    blocks = matcher.get_matching_blocks()
    shared = sum(len(word) for it in blocks for word in left[it.a : it.a + it.size] if word[0].isalnum())
    longer = max(sum(len(word) for word in words if word[0].isalnum()) for words in (left, right))
    if shared < MARKED_SHARE * longer:
        return plain
    parts: tuple[Words, Words] = [], []
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, words in ((parts[0], left[a0:a1]), (parts[1], right[b0:b1])):
            text = "".join(words)
            blank = len(text) - len(text.lstrip())
            # Blanks are never marked: they would be underlined.
            pieces = (
                (text[:blank], False),
                (text[blank:].rstrip(), kind != "equal"),
                (text[len(text.rstrip()) :], False),
            )
            side += [piece for piece in pieces[: 3 if text.strip() else 1] if piece[0]]
    return parts


def slice_names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """`name = value` of every slice that the cards belong to, sorted."""
    return sorted({f"{name} = {value}" for card in found for name, value in card["slices"].items()})
