"""What a judge is told to judge by. A text is never changed without a higher version: verdicts are kept by the text."""

import hashlib
from typing import NamedTuple

SHIPPED: dict[str, tuple[int, str]] = {
    "quality": (
        1,
        "You judge how good an answer to a question is. The best answer is correct, does all that the question asks, "
        "keeps to its form and language, and is no longer than it needs to be. The worst is wrong, off the point or "
        "unreadable. Where a reference answer is given, take what it says for right; an answer in other words is as "
        "good.",
    ),
    "coherence": (
        1,
        "You judge whether an answer holds together: its sentences follow from each other, do not contradict each "
        "other, and lead to one point. Whether it is true does not count.",
    ),
    "fluency": (
        1,
        "You judge the language of an answer alone: grammar, spelling, choice of words, and how well it reads. Whether "
        "it is true or to the point does not count.",
    ),
    "groundedness": (
        1,
        "You judge whether everything that an answer states is supported by the text in the question. The best answer "
        "adds nothing; the worst states what the text does not say or contradicts. What is true elsewhere does not "
        "count.",
    ),
    "relevance": (
        1,
        "You judge whether an answer deals with what the question asks: all of it, and nothing beside it. Whether it "
        "is true counts only where it misses the question.",
    ),
    "similarity": (
        1,
        "You judge whether an answer means the same as the reference answer. The best says the same in whatever words; "
        "the worst says something else. Nothing but the meaning counts.",
    ),
}


class Rubric(NamedTuple):
    """`name`: for people, with its version."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Hash of the text, 16 hex digits."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rubric_of(written: str) -> Rubric:
    """A rubric of ours by its name, or by Azure's (`gpt_fluency`); everything else is a rubric's text."""
    name = written.strip().lower().removeprefix("gpt_").removeprefix("llm_")
    if name not in SHIPPED:
        return Rubric("own", written)
    version, text = SHIPPED[name]
    return Rubric(f"{name} {version}", text)
