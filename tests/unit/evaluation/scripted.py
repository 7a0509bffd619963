"""A task whose rows and a subject whose answers are known, and that count what they are asked."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ingot.evaluation.metrics import statistics_of_texts
from ingot.evaluation.result import Evaluation
from ingot.evaluation.runner import evaluate_task
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.task import Answer, Compute, Likelihood, Prompt, Subject
from ingot.recipe import Evaluate

SECTION = Evaluate(bootstrap_samples=100, save_every_rows=4)


class Scripted:
    """Answers "yes" to every even question. `asked` holds the prompts in the order in which they came."""

    def __init__(self, answer: Callable[[str], str] | None = None) -> None:
        self.asked: list[str] = []
        self.answer = answer or (lambda prompt: "yes" if int(prompt.split()[1]) % 2 == 0 else "no")

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Answer]:
        self.asked += [str(prompt) for prompt in prompts]
        return [Answer(self.answer(str(prompt)), "stop", 3, 1) for prompt in prompts]

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        raise AssertionError

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        raise AssertionError


class Questions:
    """`rows` questions in windows of `window`; every third one is right with "no", the others with "yes".

    `group`, `slices`: of the row of a number.
    """

    name, kind = "questions", "text-generation"

    def __init__(self, rows: int, window: int = 10_000, metrics: Sequence[str] = ("exact_match",)) -> None:
        self.rows, self.window, self._metrics = rows, window, list(metrics)
        self.version = 1
        self.group: Callable[[int], str | None] = lambda number: None
        self.slices: Callable[[int], dict[str, str]] = lambda number: {}

    def asked(self) -> dict[str, Any]:
        return {"version": self.version}

    def scoring(self) -> dict[str, Any]:
        return {}

    def windows(self) -> Iterator[list[Item]]:
        for start in range(0, self.rows, self.window):
            numbers = range(start, min(self.rows, start + self.window))
            # Lengths that go up and down, so that the order of asking is another than that of the rows.
            yield [self._item(number) for number in numbers]

    def _item(self, n: int) -> Item:
        asked = f"question {n} " + "x" * (n * 7 % 11)
        return Item(f"q:{n}", asked, [right(n)], group=self.group(n), slices=self.slices(n))

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        return ((item.prompt, item.references) for window in self.windows() for item in window)

    def size(self, item: Item) -> int:
        return len(item.prompt)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[Output]:
        answers = subject.write([item.prompt for item in items], max_new_tokens=1)
        return [{"text": it.text, "n_output_tokens": it.n_output_tokens} for it in answers]

    def predictions(self, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[str]:
        return [output["text"] for output in outputs]

    def metrics(self, items: Sequence[Item]) -> list[str]:
        return self._metrics

    def compute(self, items: Sequence[Item], outputs: Sequence[Output]) -> Compute:
        return statistics_of_texts(self.predictions(items, outputs), [item.references for item in items])


def right(number: int) -> str:
    return "no" if number % 3 == 0 else "yes"


def evaluated(task: Questions, subject: Any, folder: Path, **options: Any) -> Evaluation:
    """`evaluate_task` on one rank, with a model of a fixed fingerprint."""
    settings: dict[str, Any] = {"name": "tuned", "model": {"fingerprint": "f"}, "section": SECTION} | options
    found = evaluate_task(task, lambda: subject, folder, **settings)
    assert found is not None
    return found
