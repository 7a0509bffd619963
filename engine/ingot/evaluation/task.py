"""What the runner needs of a task, and what a task may ask of a model: the two seams of evaluation.

A task knows its rows, how to ask and how to score. A subject answers: a model in this process. The
runner knows neither's inside: it cuts rows into units whose content depends on the data alone, has them answered,
stores every unit, and scores what is stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ingot.evaluation.metrics import Statistic
from ingot.evaluation.samples import Item, Output

Prompt = str | list[dict[str, Any]]
"""A text to go on from, or the turns of a chat that the assistant answers next."""
Compute = Mapping[str, Callable[[], Statistic]]
"""Metric -> what computes it; only the metrics that are wanted are."""


class Answer(NamedTuple):
    """What a model wrote. `finish_reason`: stop or length. Tokens are None where the subject does not count them.
    `engine`: what wrote it, where that is known.
    """

    text: str
    finish_reason: str
    n_prompt_tokens: int | None = None
    n_output_tokens: int | None = None
    engine: str | None = None


class Likelihood(NamedTuple):
    """Of a text given what stands before it: summed log-probability in nats, whether greedy decoding would have written
    it, its number of tokens.
    """

    logprob: float
    greedy: bool
    n_tokens: int


class Subject(Protocol):
    """What is measured."""

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Answer]:
        """Greedy answers, in order."""

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        """Of every continuation of every prompt, in order. A prompt of no characters is the start of a document."""

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Of whole documents, in windows of the model's context: summed log-probability in nats, number of tokens."""


class Task(Protocol):
    """Rows, how to ask, how to score. `kind`: of its rows, a key of OF_TASK."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def kind(self) -> str:
        """How its rows are asked."""

    def asked(self) -> dict[str, Any]:
        """What another evaluation must share to be compared, but for the rows: version, prompt hash, settings."""

    def scoring(self) -> dict[str, Any]:
        """Metric -> how it is read from answers (`extract`, options), as plain values: what another evaluation must
        share to be compared by that metric. No answer depends on it. Metrics of one reading only are left out.
        """

    def windows(self) -> Iterator[list[Item]]:
        """The rows in order, so many at a time as the memory should hold. The same at every call."""

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """Of every row, in order: what it asks by itself, without header and examples, and the right answers: what
        training should not have seen.
        """

    def size(self, item: Item) -> int:
        """About how many tokens the row takes: rows of similar size are asked together."""

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[Output]:
        """What the subject gives for each of `items`, in order. Keys `n_prompt_tokens`, `n_output_tokens` are kept as
        the sample's, where there are any.
        """

    def predictions(self, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[str]:
        """What people read as the answers."""

    def metrics(self, items: Sequence[Item]) -> list[str]:
        """Names of the wanted metrics. Raises RecipeError for one that is undefined on these rows; called before
        anything is asked.
        """

    def compute(self, items: Sequence[Item], outputs: Sequence[Output]) -> Compute:
        """Metrics that can be computed from all rows."""
