"""`errands`: a letter in which one thing is asked for, among sentences that ask for nothing -> that thing in a line."""

from collections.abc import Iterator
from random import Random
from typing import Any

from ingot.data.synthetic.corpus import request
from ingot.data.synthetic.situations import PROSE, SITUATIONS, Situation
from ingot.data.synthetic.values import choose, fill, person

SIZES = {"train": 20_000, "validation": 200, "test": 500}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`, as `text` and `summary`; no letter twice."""
    rng, seen = Random(f"errands {split} 1"), set[str]()
    while len(seen) < SIZES[split]:
        text, summary = letter(rng)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "summary": summary}


def letter(rng: Random) -> tuple[str, str]:
    """One letter and what it is about. The request stands at the beginning, in the middle or at the end."""
    situation: Situation = rng.choice(SITUATIONS)
    asked, values = request(rng, situation)
    parts = [fill(rng, choose(rng, rng.choice(PROSE)))[0] for _ in range(rng.randint(1, 2))]
    parts.insert(rng.randint(0, len(parts)), asked)
    sentences = " ".join(part[:1].upper() + part[1:] for part in parts)
    summary = ", ".join([situation.topic, *(f"{name} {values[kind]}" for name, kind in situation.fields.items())])
    return f"Dear {person(rng)}, {sentences}", summary
