"""Worked solutions: the number that one ends in, and how many of several are right."""

import math
import re
from collections.abc import Sequence
from typing import Any

from ingot.evaluation.statistic import References, Statistic, row_mean
from ingot.evaluation.text_metrics import Ignored

# lm-evaluation-harness' gsm8k, version 3: two ways to find the number, one to compare it.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = Ignored(case=True, regexes=(",", r"\$", r"(?s).*#### ", r"\.$"))


def strict_number(text: str) -> str | None:
    """The number after the FIRST "#### ", or None."""
    found = _STRICT.search(text)
    return found[1].strip() if found else None


def flexible_number(text: str) -> str | None:
    """The LAST stretch that looks like a number, a price or an amount with commas, or None."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else None


def gsm8k_strict(predictions: Sequence[str], references: References) -> Statistic:
    """Share of answers whose `strict_number` is the reference's, without commas, $ and a last full stop."""
    return row_mean([_same(strict_number(p), refs) for p, refs in zip(predictions, references, strict=True)])


def gsm8k_flexible(predictions: Sequence[str], references: References) -> Statistic:
    """The same with `flexible_number`."""
    return row_mean([_same(flexible_number(p), refs) for p, refs in zip(predictions, references, strict=True)])


def _same(number: str | None, references: Sequence[str]) -> float:
    return float(number is not None and _IGNORED.strip(number) in map(_right, references))


def _right(reference: str) -> str:
    """What is compared of a reference: what follows its last "#### ", or all of it."""
    return _IGNORED.strip(reference.strip())


def gsm8k_undefined(references: References, **options: Any) -> str | None:
    """Why these references hold no number to compare."""
    for refs in references:
        for text in refs:
            if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", _right(text)):
                return f"the reference {text[-40:]!r} does not end in a number, alone or after '#### '; use exact_match"
    return None


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that `k` of `n` solutions, of which `right` are right, hold a right one: 1 - C(n - right, k) / C(n, k)
    (Chen et al. 2021, equation 1). Raises ValueError for counts that cannot be.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, right={right}, k={k}): needs 0 <= right <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
