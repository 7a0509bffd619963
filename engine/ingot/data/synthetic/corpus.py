"""`nano-corpus`: short dialogues that teach a very small model to copy, to read dates and sums, to write JSON and what words mean.

Left out on purpose: the tools and the answer format of `tool-calls`, and every sentence that holds one of its test
patterns, whole or with words around it. Dialogues are written in the chat format of `ingot://nano`.
"""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from ingot.data.synthetic.patterns import TEST
from ingot.data.synthetic.situations import CLOSERS, OPENERS, PROSE, SAME_WORDS, SITUATIONS, STATEMENTS, Situation
from ingot.data.synthetic.values import (
    CITIES,
    CODES,
    CURRENCIES,
    amount,
    choose,
    clock,
    company,
    date,
    fill,
    invented,
    money,
    order,
    person,
)

SIZES = {"train": 120_000, "validation": 1_000}
COPYING_SIZES = {"train": 25_000, "validation": 500}
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
Turns = tuple[str, ...]  # of user and assistant in turn
ODD = 0.2  # share of invented names


def skeleton(pattern: str) -> str:
    """`pattern` with all slots alike, in lower case and without punctuation: what two sentences of one pattern share."""
    return " ".join(re.sub(r"[^a-z_ ]", "", re.sub(r"\{\w+\}", "_", pattern).lower()).split())


HELD_OUT = re.compile("|".join(rf"\b{skeleton(pattern)}\b" for patterns in TEST.values() for pattern in patterns))


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Dialogues of `split`, as messages and as one text in the chat format of `ingot://nano`."""
    rng = Random(f"nano-corpus {split} 1")
    makers, weights = zip(*MIX, strict=True)
    for _ in range(SIZES[split]):
        yield _row(rng.choices(makers, weights)[0](rng))


def copying_rows(split: str) -> Iterator[dict[str, Any]]:
    """Dialogues of `nano-copying`: nothing but repeating, which has to be found out first.

    In the mixed corpus alone a model of this size takes many times as long to find out (2,000 steps: names still wrong).
    """
    rng = Random(f"nano-copying {split} 1")
    for _ in range(COPYING_SIZES[split]):
        yield _row(_copy(rng))


def _row(turns: Turns) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return {"messages": messages, "text": chat(*turns)}


def chat(*turns: str) -> str:
    """Turns of user and assistant in turn, in the chat format of `ingot://nano` (without the opening token)."""
    return "".join(f"{(USER, ASSISTANT)[number % 2]}{turn}{END}" for number, turn in enumerate(turns))


def request(rng: Random, situation: Situation) -> tuple[str, dict[str, object]]:
    """A request of `situation` in words, and its values."""
    while True:
        if rng.random() < 0.65:
            opener = rng.choice(OPENERS)
            end = "?" if opener.startswith(("can", "could", "would")) else "."
            pattern = opener + rng.choice(situation.orders) + rng.choice(CLOSERS) + end
        else:
            pattern = rng.choice(situation.sentences)
        pattern = choose(rng, pattern)
        if not HELD_OUT.search(skeleton(pattern)):
            return fill(rng, pattern, ODD)


# --- kinds of documents ------------------------------------------------------------------------------------------


def _situation(rng: Random, among: tuple[Situation, ...]) -> Situation:
    return rng.choices(among, [situation.weight for situation in among])[0]


def _asked_record(rng: Random) -> Turns:
    """A request and the names of fields -> a JSON record of these fields."""
    situation = _situation(rng, SITUATIONS[:-1])
    text, values = request(rng, situation)
    names = list(situation.fields)
    if rng.random() < 0.4:
        rng.shuffle(names)
        names = names[: rng.randint(1, len(names))]
    record = {name: values[situation.fields[name]] for name in names}
    return (
        f"{text} {rng.choice(('Fields', 'Record', 'JSON'))}: {', '.join(names)}",
        json.dumps(record, ensure_ascii=False),
    )


def _summary(rng: Random) -> Turns:
    """A request -> its topic and values as a note of `name: value` lines in one."""
    situation = _situation(rng, SITUATIONS)
    text, values = request(rng, situation)
    parts = [situation.topic, *(f"{name} {values[kind]}" for name, kind in situation.fields.items())]
    return (f"{text} {rng.choice(('Sum it up.', 'In short?', 'Short form.'))}", "; ".join(parts))


def _topic(rng: Random) -> Turns:
    situation = rng.choice(SITUATIONS)
    text, _ = request(rng, situation)
    return (f"{text} {rng.choice(('What is it about?', 'Topic?', 'Which business is it?'))}", situation.topic)


def _rewording(rng: Random) -> Turns:
    """One request said twice, with the same values."""
    situation = rng.choice(SITUATIONS[:-1])
    first, second = (choose(rng, rng.choice(situation.orders)) for _ in range(2))
    seed = rng.random()
    said, again = (fill(Random(seed), pattern, ODD) for pattern in (first, second))
    if said[1] != again[1] or HELD_OUT.search(f"{skeleton(first)}. {skeleton(second)}"):
        return _summary(rng)
    return (f"{rng.choice(('Say it in other words', 'Another way to say it', 'Reword'))}: {said[0]}.", f"{again[0]}.")


def _questions(rng: Random) -> Turns:
    """A statement and one or two questions about it, as a chat or as a record."""
    pattern, questions = rng.choice(STATEMENTS)
    text, values = fill(rng, choose(rng, pattern), ODD)
    picked = rng.sample(questions, rng.randint(1, 2))
    turns: list[str] = []
    for question, kind in picked:
        asked = choose(rng, question).replace("{person}", str(values.get("person")))
        turns += [asked[:1].upper() + asked[1:], str(values[kind])]
    return (f"{text} {turns[0]}", *turns[1:])


def _statement_record(rng: Random) -> Turns:
    text, values = fill(rng, choose(rng, rng.choice(STATEMENTS)[0]), ODD)
    return (f"{text} As JSON.", json.dumps(values, ensure_ascii=False))


def _conversion(rng: Random) -> Turns:
    """A date, a time, a number or a sum: as people write it -> as a record holds it."""
    kind = rng.choice(("date", "date", "time", "number", "money", "money"))
    if kind == "date":
        said, held = date(rng)
    elif kind == "time":
        said, held = clock(rng)
    elif kind == "number":
        said, number = amount(rng)
        held = json.dumps(number)
    else:
        said, value, code = money(rng)
        held = f"{json.dumps(value)} {code}"
    return (f"{rng.choice(('Write for a record', 'Short', 'Standard form'))}: {said}", held)


def _currency(rng: Random) -> Turns:
    code = rng.choice(CODES)
    word, sign = CURRENCIES[code]
    return (rng.choice((f"Which code do {word} have?", f"Which code has the sign {sign.strip()}?")), code)


def _meaning(rng: Random) -> Turns:
    one, two = rng.sample(rng.choice(SAME_WORDS), 2)
    return (rng.choice((f"What does {one} mean?", f"Another word for {one}?")), f"{one} means {two}")


def _kind_of_word(rng: Random) -> Turns:
    """A name, number or place -> what it is."""
    thing, kind = rng.choice((
        (person(rng), "a person"), (rng.choice(CITIES), "a city"), (date(rng)[0], "a date"), (order(rng), "an order number"),
    ))  # fmt: skip
    return (f"What is {thing}?", kind)


def _copy(rng: Random) -> Turns:
    """Words in no order, and again: nothing but copying predicts them, so the model learns to copy early.

    Mostly one to three of them: with long lists alone a small model never finds out (measured: not in 500 steps).
    """
    said = " ".join(_copied(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 6, 8))))
    return (f"{rng.choice(('Repeat', 'Say again', 'Copy'))}: {said}", said)


def _copied(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        return invented(rng, rng.randint(1, 3))
    if kind < 0.35:
        return str(rng.randint(0, 9999))
    return rng.choice((person, order, company, _city, _city, _word))(rng)


def _city(rng: Random) -> str:
    return rng.choice(CITIES)


def _word(rng: Random) -> str:
    return rng.choice(rng.choice(SAME_WORDS))


def _prose(rng: Random) -> Turns:
    return ("Tell me something.", fill(rng, choose(rng, rng.choice(PROSE)), ODD)[0])


def _listed_record(rng: Random) -> Turns:
    """Names and values in a line -> a JSON object."""
    slots = rng.choice(
        ("{person} {city} {date}", "{company} {money}", "{order} {city} {amount}", "{task} {time} {person}")
    )
    values = fill(rng, slots, ODD)[1]
    if rng.random() < 0.3:
        values["open"] = rng.choice((True, False, None))
    line = ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )
    return (f"JSON of: {line}", json.dumps(values, ensure_ascii=False))


MIX: tuple[tuple[Callable[[Random], Turns], float], ...] = (
    (_asked_record, 26),
    (_summary, 23),
    (_topic, 4),
    (_rewording, 2),
    (_questions, 7),
    (_statement_record, 6),
    (_conversion, 10),
    (_currency, 1),
    (_meaning, 3),
    (_kind_of_word, 1),
    (_copy, 14),
    (_prose, 1),
    (_listed_record, 2),
)
"""Kind of document -> share in percent."""
