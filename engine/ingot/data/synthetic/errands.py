"""`errands`: a letter that asks for up to three things, among sentences that ask for nothing -> these things in a line.

No name or number of the letter stands in the line: a small model from random weights takes long to find out how to copy
(`recipes/summarization/errands.yaml`: ROUGE-1 0.69 after 600 steps; with names and numbers 0.25 after 800).
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from ingot.data.synthetic.corpus import request
from ingot.data.synthetic.situations import PROSE, SITUATIONS
from ingot.data.synthetic.values import choose, fill, person

SIZES = {"train": 20_000, "validation": 200, "test": 500}
# Topic of a situation -> how the line calls it.
GIST = {
    "payment": "pay somebody",
    "bill": "write a bill",
    "appointment": "fix an appointment",
    "note": "send a reminder",
    "weather": "look up the weather",
    "journey": "book a seat on a plane",
    "exchange": "change money",
    "parcel": "find a parcel",
}
ORDER = ("first", "then", "at last")


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`, as `text` and `summary`; no letter twice."""
    rng, seen = Random(f"errands {split} 1"), set[str]()
    while len(seen) < SIZES[split]:
        text, summary = letter(rng)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "summary": summary}


def letter(rng: Random) -> tuple[str, str]:
    """One letter and what it asks for, in the letter's order."""
    situations = rng.sample([situation for situation in SITUATIONS if situation.topic in GIST], rng.randint(1, 3))
    parts = [request(rng, situation)[0] for situation in situations]
    if rng.random() < 0.5:
        parts.insert(rng.randint(0, len(parts)), fill(rng, choose(rng, rng.choice(PROSE)))[0])
    sentences = " ".join(part[:1].upper() + part[1:] for part in parts)
    named = zip(ORDER, (GIST[situation.topic] for situation in situations), strict=False)
    summary = ", ".join(f"{when} {what}" for when, what in named)
    return f"Dear {person(rng)}, {sentences}", f"{summary[:1].upper()}{summary[1:]}."
