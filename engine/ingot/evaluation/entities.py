"""Entities in rows of tags, as seqeval reads them, counted by row: sums of these counts give its scores."""

# N rows

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
OUTSIDE = "O"
_ENTITY = re.compile(r"[BIESUL]-\S")


def entity_counts(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Array:
    """[N, 3]: entities with the right words and type, predicted ones, real ones; seqeval's default definition."""
    from seqeval.metrics.sequence_labeling import get_entities

    counts = []
    for found, wanted in zip(predicted, right, strict=True):
        ours, real = set(get_entities(list(found))), set(get_entities(list(wanted)))
        counts.append([len(ours & real), len(ours), len(real)])
    return np.asarray(counts, dtype=np.float64).reshape(-1, 3)


def tag_counts(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Array:
    """[N, 2]: words with the right tag, and words."""
    pairs = zip(predicted, right, strict=True)
    return np.asarray([[sum(a == b for a, b in zip(p, r, strict=True)), len(r)] for p, r in pairs], dtype=np.float64)


def ratio(sums: Array, part: int, whole: int) -> Array:
    """`sums[..., part] / sums[..., whole]`; 0 where there is nothing."""
    wholes = sums[..., whole]
    found: Array = np.divide(sums[..., part], wholes, out=np.zeros(wholes.shape), where=wholes > 0)
    return found


def precision_of(sums: Array) -> Array:
    """Share of the predicted entities that are right."""
    return ratio(sums, 0, 1)


def recall_of(sums: Array) -> Array:
    """Share of the real entities that are found."""
    return ratio(sums, 0, 2)


def f1_of(sums: Array) -> Array:
    """Harmonic mean of precision and recall."""
    both = np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1)
    return ratio(both, 0, 1)


def share_of(sums: Array) -> Array:
    """Rows are (hits, tries): weighted by tries, not the mean of rows."""
    return ratio(sums, 0, 1)


def entities_undefined(references: Sequence[Sequence[str]]) -> str | None:
    """Why entities cannot be counted in these tags (a row's are in one text, blanks between them)."""
    tags = {tag for texts in references for text in texts for tag in text.split()}
    others = sorted(tag for tag in tags if tag != OUTSIDE and not _ENTITY.match(tag))
    if others:
        return f"the tag {others[0]!r} neither begins nor continues an entity (B-, I-, E-, S-); use token_accuracy"
    return "no row has an entity; use token_accuracy" if tags <= {OUTSIDE} else None
