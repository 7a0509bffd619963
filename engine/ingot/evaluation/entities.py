"""Entities in rows of tags, as seqeval reads them, counted by row: sums of these counts give its scores."""

# N rows, E types of entities

import re
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.averages import BY_AVERAGE, f1_of, precision_of, recall_of
from ingot.evaluation.statistic import Array, Compute, Statistic, ratio, share_of
from ingot.model.pointing import OUTSIDE
from ingot.registry import nearest

__all__ = [
    "OUTSIDE",
    "entities_of",
    "entities_undefined",
    "entity_counts",
    "f1_of",
    "precision_of",
    "ratio",
    "recall_of",
    "share_of",
    "statistics_of_tags",
    "tag_counts",
]

Mode = Literal["lenient", "strict"]
Tags = Sequence[Sequence[str]]
SCHEMES = ("IOB1", "IOE1", "IOB2", "IOE2", "IOBES", "BILOU")
_ENTITY = re.compile(r"[BIESUL]-\S")
Entity = tuple[str, int, int]
"""Type, first word, last word."""


def entities_of(tags: Sequence[str], mode: Mode = "lenient", scheme: str | None = None) -> set[Entity]:
    """The entities of one row. Lenient, as conlleval reads them: an I- after nothing of its type begins one. Strict:
    only what `scheme` allows. Raises IngotError for a tag that the scheme has not.
    """
    from seqeval import scheme as schemes
    from seqeval.metrics.sequence_labeling import get_entities

    if mode == "lenient":
        return set(get_entities(list(tags)))
    try:
        found = schemes.Entities([list(tags)], getattr(schemes, str(scheme))).entities[0]
    except ValueError as error:
        raise IngotError(f"a tag is none of {scheme} ({error}); use another scheme, or mode lenient") from error
    return {(entity.tag, entity.start, entity.end - 1) for entity in found}


def scheme_of(right: Tags, scheme: str | None = None) -> str:
    """The scheme as named, or what seqeval takes these tags for. Raises IngotError where there is none."""
    from seqeval.scheme import auto_detect

    if scheme is None:
        try:
            name: str = auto_detect([list(row) for row in right]).__name__
        except ValueError as error:
            raise IngotError(f"the tags fit no scheme ({error}); use mode lenient") from error
        return name
    if scheme not in SCHEMES:
        raise IngotError(f"the scheme {scheme!r} is unknown: {nearest(scheme, SCHEMES)}")
    return scheme


def entity_counts(predicted: Tags, right: Tags, mode: Mode = "lenient", scheme: str | None = None) -> Array:
    """[N, 3]: entities with the right words and type, predicted ones, real ones."""
    return _typed_counts(predicted, right, mode, scheme)[1].sum(2)


def _typed_counts(predicted: Tags, right: Tags, mode: Mode, scheme: str | None) -> tuple[list[str], Array]:
    """Types, sorted, and [N, 3, E]: right, predicted and real entities of each."""
    pairs = [
        (entities_of(found, mode, scheme), entities_of(wanted, mode, scheme))
        for found, wanted in zip(predicted, right, strict=True)
    ]
    types = sorted({kind for pair in pairs for side in pair for kind, _, _ in side})
    place = {kind: index for index, kind in enumerate(types)}
    counts = np.zeros((len(pairs), 3, len(types)))
    for row, (found, wanted) in enumerate(pairs):
        for part, side in enumerate((found & wanted, found, wanted)):
            for kind, _, _ in side:
                counts[row, part, place[kind]] += 1
    return types, counts


def tag_counts(predicted: Tags, right: Tags) -> Array:
    """[N, 2]: words with the right tag, and words."""
    pairs = zip(predicted, right, strict=True)
    return np.asarray([[sum(a == b for a, b in zip(p, r, strict=True)), len(r)] for p, r in pairs], dtype=np.float64)


ENTITY_SCORES = {"entity_f1": f1_of, "entity_precision": precision_of, "entity_recall": recall_of}


def statistics_of_tags(predicted: Tags, right: Tags, mode: Mode = "lenient", scheme: str | None = None) -> Compute:
    """Every metric of token classification; mode and scheme stand in the details."""
    scheme = scheme_of(right, scheme) if mode == "strict" else None
    details: dict[str, Any] = {"seqeval": version("seqeval"), "mode": mode, "scheme": scheme or "conlleval"}

    def whole(value_of: Any) -> Statistic:
        return Statistic(entity_counts(predicted, right, mode, scheme), value_of, details)

    def by_type(value_of: Any) -> Statistic:
        types, counts = _typed_counts(predicted, right, mode, scheme)
        return Statistic(counts.reshape(len(counts), -1), value_of, details | {"types": types})

    averages = {f"entity_{name}": of for name, of in BY_AVERAGE.items() if not name.endswith("_micro")}
    return {
        "token_accuracy": lambda: Statistic(tag_counts(predicted, right), share_of),
        **{name: partial(whole, of) for name, of in ENTITY_SCORES.items()},
        **{name: partial(by_type, of) for name, of in averages.items()},
    }


def entities_undefined(references: Sequence[Sequence[str]], **options: Any) -> str | None:
    """Why entities cannot be counted in these tags (a row's are in one text, blanks between them)."""
    tags = {tag for texts in references for text in texts for tag in text.split()}
    others = sorted(tag for tag in tags if tag != OUTSIDE and not _ENTITY.match(tag))
    if others:
        return f"the tag {others[0]!r} neither begins nor continues an entity (B-, I-, E-, S-); use token_accuracy"
    return "no row has an entity; use token_accuracy" if tags <= {OUTSIDE} else None
