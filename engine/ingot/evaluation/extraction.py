"""What of a written answer is scored: found when scoring, so that another pattern asks no model again."""

import re
from collections.abc import Callable, Sequence

from ingot.evaluation.definition import Change, Extract

CHANGES: dict[Change, Callable[[str], str]] = {"strip": str.strip, "lower": str.lower, "upper": str.upper}
WHOLE = Extract(name="whole")


def extracted(text: str, how: Extract) -> str:
    """The part of `text` that counts, or the fallback. The rules are those of lm-evaluation-harness's regex filter."""
    text = _changed(text, how.before)
    if how.regex is not None:
        found: list[str | tuple[str, ...]] = re.findall(how.regex, text)
        text = how.fallback
        place = {"first": 0, "last": -1}.get(str(how.which), how.which)
        if found and -len(found) <= int(place) < len(found):
            one = found[int(place)]
            parts = [part for part in one if part] if isinstance(one, tuple) else [one]
            text = parts[0].strip() if parts else how.fallback
    return _changed(text, how.after)


def _changed(text: str, changes: Sequence[Change]) -> str:
    for change in changes:
        text = CHANGES[change](text)
    return text
