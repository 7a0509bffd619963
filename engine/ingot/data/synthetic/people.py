"""`people`: a question about somebody and a text about one or two people -> the words of the text that answer it, if any.

The wordings of test questions are in no other split.
"""

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

from ingot.data.synthetic.values import CITIES, MONTHS, company, person

SIZES = {"train": 3000, "validation": 200, "test": 400}
UNANSWERED = 0.12  # share of questions whose answer is not in the text
JOBS = (
    "a nurse|a carpenter|a judge|an engineer|a teacher|a baker|a pilot|a florist|an architect|a cook|a tailor|a chemist|a vet|"
    "a lawyer|a librarian|a plumber|an editor|a surgeon|a farmer|a translator|a painter|a gardener"
).split("|")
HOBBIES = (
    "chess|rowing|pottery|climbing|knitting|sailing|archery|tennis|origami|cycling|fishing|ballet|karate|astronomy|"
    "photography|skiing|gardening|fencing"
).split("|")


class Fact(NamedTuple):
    """Statements with `{who}` and `{what}`, and questions about `{who}`: those of training, then those of test."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    tested: tuple[str, ...]


FACTS: dict[str, Fact] = {
    "birthplace": Fact(
        ("{who} was born in {what}.", "The birthplace of {who} is {what}.", "{who} was born in a suburb of {what}."),
        ("Where was {who} born?", "In which city was {who} born?", "What is the birthplace of {who}?"),
        ("Which town is {who} from by birth?", "Name the city in which {who} was born."),
    ),
    "home": Fact(
        (
            "{who} lives in {what} now.",
            "These days {who} has a flat in {what}.",
            "Since last year {who} lives in {what}.",
        ),
        ("Where does {who} live?", "In which city does {who} live now?", "Which city is the home of {who}?"),
        ("What city does {who} live in these days?", "Where is {who} living at present?"),
    ),
    "job": Fact(
        ("{who} works as {what}.", "By trade {who} is {what}.", "For a living {who} is {what}."),
        ("What does {who} do for a living?", "What is the job of {who}?", "What does {who} work as?"),
        ("Which profession does {who} have?", "What work does {who} do?"),
    ),
    "employer": Fact(
        ("{who} is employed by {what}.", "{what} pays the wages of {who}.", "{who} has a contract with {what}."),
        ("Who employs {who}?", "Which company is {who} employed by?", "Which company does {who} have a contract with?"),
        ("Name the employer of {who}.", "What company employs {who}?"),
    ),
    "hobby": Fact(
        (
            "In the evenings {who} enjoys {what}.",
            "The hobby of {who} is {what}.",
            "At weekends {who} is fond of {what}.",
        ),
        ("What is the hobby of {who}?", "What does {who} enjoy in the evenings?", "What is {who} fond of?"),
        ("Which hobby does {who} have?", "What does {who} like to do at weekends?"),
    ),
    "married": Fact(
        ("{who} married in {what}.", "The wedding of {who} was in {what}.", "{who} celebrated a wedding in {what}."),
        ("When did {who} marry?", "When was the wedding of {who}?", "In which month did {who} marry?"),
        ("When did {who} get married?", "What is the date of {who}'s wedding?"),
    ),
}


def _value(rng: Random, kind: str) -> str:
    if kind == "married":
        return f"{rng.choice(MONTHS)} {rng.randint(1970, 2024)}"
    if kind == "employer":
        return company(rng)
    return rng.choice({"birthplace": CITIES, "home": CITIES, "job": JOBS, "hobby": HOBBIES}[kind])


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`: `question`, `context`, `answers` as SQuAD writes them."""
    rng = Random(f"people {split} 1")
    for _ in range(SIZES[split]):
        names = sorted({person(rng) for _ in range(rng.choice((1, 1, 2)))})
        told = [(who, kind) for who in names for kind in rng.sample(list(FACTS), 4 if len(names) == 1 else 2)]
        rng.shuffle(told)
        asked, kind = rng.choice(told)
        context, answer = "", (0, "")
        for who, what in told:
            value = _value(rng, what)
            statement = rng.choice(FACTS[what].statements)
            if (who, what) == (asked, kind):
                answer = len(context) + statement.replace("{who}", who).index("{what}"), value
            context += statement.replace("{who}", who).replace("{what}", value) + " "
        if rng.random() < UNANSWERED:
            kind = rng.choice([other for other in FACTS if (asked, other) not in told])
            answer = 0, ""
        wordings = FACTS[kind].tested if split == "test" else FACTS[kind].questions
        start, text = answer
        found = {"text": [text], "answer_start": [start]} if text else {"text": [], "answer_start": []}
        yield {"question": rng.choice(wordings).replace("{who}", asked), "context": context.strip(), "answers": found}
