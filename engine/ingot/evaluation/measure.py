"""The recipe's own test rows as a task: how each kind of rows is asked of a model in this process, and scored.

A kind is two functions: `answer` (the model's work on some rows) and `read` (all answers -> predictions for people and
what computes each metric). `KINDS` names them; text, classes and likelihoods are here.

B rows, T tokens, C classes.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import nn

from ingot.data.encoded import Encoded
from ingot.data.example import Example
from ingot.data.loader import IGNORE, collate
from ingot.data.seen import question_of
from ingot.data.splits import Scan, scan
from ingot.data.template import encode_all, prompt_ids, prompt_text, reference_text
from ingot.errors import DataError, RecipeError
from ingot.evaluation.class_metrics import statistics_of_classes
from ingot.evaluation.likelihood_metrics import statistics_of_documents
from ingot.evaluation.marks import Marked, test_windows
from ingot.evaluation.metrics import metric_names, options_of, statistics_of_texts
from ingot.evaluation.result import Evaluation
from ingot.evaluation.runner import measure_task, merge_items
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.subject import Local, Writer, require_local, require_writer
from ingot.evaluation.task import Compute, Subject
from ingot.model.generate import context_limit
from ingot.model.kinds import batches, pad_id
from ingot.model.load import Tokenizer
from ingot.model.pooling import class_probabilities
from ingot.model.projection import target_nll
from ingot.recipe import Recipe
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE
from ingot.registry import resolve

Row = TypeVar("Row")
WINDOW_ROWS = 10_000
TEST = "test"  # what the recipe's own rows are called among tasks
GENERATING = ("chat-completion", "text-generation")


@dataclass(frozen=True)
class How:
    """What the rows of a task are asked with: its recipe, and the class names that training saw."""

    recipe: Recipe
    labels: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Metric -> its options."""
        return options_of(self.recipe.evaluate, self.recipe.objective.rows)


class Kind(NamedTuple):
    """How a kind of rows is asked, and what its answers come to."""

    answer: Callable[[Any, Sequence[Item], How], list[Output]]  # of a Local; kinds that only write take any Writer
    read: Callable[[Sequence[Item], Sequence[Output], How], tuple[Sequence[str], Compute]]


KINDS: dict[str, str] = {
    "chat-completion": "ingot.evaluation.measure:TEXTS",
    "text-generation": "ingot.evaluation.measure:TEXTS",
    "language-modeling": "ingot.evaluation.measure:LIKELIHOODS",
    "text-classification": "ingot.evaluation.measure:CLASSES",
    "summarization": "ingot.evaluation.targets:TARGETS",
    "translation": "ingot.evaluation.targets:TARGETS",
    "preference": "ingot.evaluation.preferences:PREFERENCES",
    "multi-label-classification": "ingot.evaluation.pointing:LABEL_SETS",
    "token-classification": "ingot.evaluation.pointing:TAGS",
    "question-answering": "ingot.evaluation.pointing:ANSWERS",
    "fill-mask": "ingot.evaluation.pointing:MASKED",
}


class RecipeTask:
    """Rows of a recipe as a task. `context`: tokens that the model reaches, None without a limit. `tokenizer`: for the
    check that prompts leave room for answers; None: it is made as they are asked.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Callable[[], Iterator[list[Any]]],
        labels: tuple[str, ...],
        tokenizer: Tokenizer | None,
        context: int | None,
        name: str = TEST,
        version: str | None = None,
    ) -> None:
        self.name, self.kind = name, recipe.objective.rows
        self._recipe, self._rows, self._tokenizer, self._context = recipe, rows, tokenizer, context
        self._how, self._version = How(recipe, labels), version
        self._kind: Kind = resolve(KINDS, "objective.task", self.kind)

    def asked(self) -> dict[str, Any]:
        """Settings that change what is asked or how it is cut."""
        recipe = self._recipe
        found: dict[str, Any] = {} if self._version is None else {"version": self._version}
        if self.kind in (*GENERATING, *SEQUENCE_TO_SEQUENCE, "question-answering"):
            found["max_new_tokens"] = recipe.evaluate.max_new_tokens
        if self.kind not in GENERATING:
            found["max_tokens"] = recipe.data.max_tokens
        if self.kind == "question-answering":
            found["overlap_tokens"] = recipe.data.overlap_tokens
        if self.kind == "fill-mask":
            found |= {"mask_share": recipe.objective.mask_share, "split_seed": recipe.data.split_seed}
        return found if not self._how.labels else found | {"labels": list(self._how.labels)}

    def scoring(self) -> dict[str, Any]:
        """Metric -> its options, of those that have any."""
        return {metric: options for metric, options in self._how.options.items() if options}

    def windows(self) -> Iterator[list[Item]]:
        """The rows, a window at a time; rows that are merged by their prompts are one window."""
        if self._recipe.evaluate.merge_references:
            yield merge_items([item for window in self._rows() for item in map(self._item, window)])
            return
        for window in self._rows():
            yield [self._item(row) for row in window]

    def _item(self, row: Example | Marked) -> Item:
        example, group, slices = row if isinstance(row, Marked) else Marked(row)
        asked = prompt_text(example)
        return Item(example.where, asked, _references(example), example, _content(example), group, dict(slices))

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """What each row asks, and its right answers."""
        for window in self.windows():
            for item in window:
                yield question_of(item.request), item.references

    def size(self, item: Item) -> int:
        """Characters of all that is read: a tokenizer's count would be nearly the same order in more time."""
        return len(item.content)

    def _check_room(self, items: Sequence[Item]) -> None:
        if self.kind not in GENERATING or self._tokenizer is None or self._context is None:
            return
        for item in items:
            ids = prompt_ids(item.request, self._tokenizer, self._recipe.data, self._recipe.objective)
            check_room(len(ids), item.id, self._recipe, self._context)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[Output]:
        """What the subject gives for each row."""
        require: Any = require_writer if self.kind in GENERATING else require_local
        return self._kind.answer(require(subject, self.kind), items, self._how)

    def predictions(self, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[str]:
        """What people read as the answers."""
        return self._kind.read(items, outputs, self._how)[0]

    def metrics(self, items: Sequence[Item]) -> list[str]:
        """The recipe's metrics, or those of the task. Raises DataError for a prompt that leaves no room for answers."""
        self._check_room(items)
        return metric_names(self._recipe.evaluate, self.kind, [item.references for item in items])

    def compute(self, items: Sequence[Item], outputs: Sequence[Output]) -> Compute:
        """Metric -> what computes it."""
        return self._kind.read(items, outputs, self._how)[1]


def _references(example: Example) -> list[str]:
    answers = getattr(example, "answers", None)
    return [reference_text(example)] if answers is None else [text for text, _ in answers] or [""]


def _content(example: Example) -> str:
    """Everything in a row but where it stands: turns, tools, the rejected answer."""

    def bare(values: Any) -> Any:
        if isinstance(values, dict):
            return {name: bare(value) for name, value in values.items() if name != "where"}
        return [bare(value) for value in values] if isinstance(values, list | tuple) else values

    return json.dumps(bare(asdict(example)), default=str)


def test_rows(recipe: Recipe, home: Path, found: Scan) -> Callable[[], Iterator[list[Marked]]]:
    """What reads the test rows, windows of them at a time, as often as it is called: all, or `evaluate.max_rows`."""
    total = found.report.counts.get("test", 0)
    limit = recipe.evaluate.max_rows
    chosen = None if limit is None or limit >= total else set(_drawn(total, recipe))
    return lambda: test_windows(found, recipe, home, chosen, WINDOW_ROWS)


def recipe_task(
    recipe: Recipe,
    home: Path,
    tokenizer: Tokenizer | None,
    context: int | None,
    found: Scan | None = None,
    name: str = TEST,
    version: str | None = None,
) -> RecipeTask:
    """The test rows of `recipe` as a task; `found` spares reading the data again."""
    found = found or scan(recipe, home)
    return RecipeTask(recipe, test_rows(recipe, home, found), found.labels, tokenizer, context, name, version)


def choose(rows: Sequence[Row], recipe: Recipe) -> list[Row]:
    """All rows, or `evaluate.max_rows` of them drawn with `data.split_seed` (in their own order)."""
    limit = recipe.evaluate.max_rows
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[place] for place in _drawn(len(rows), recipe)]


def _drawn(total: int, recipe: Recipe) -> list[int]:
    limit = recipe.evaluate.max_rows or total
    return sorted(random.Random(recipe.data.split_seed).sample(range(total), limit))


def check_room(n_prompt: int | None, where: str, recipe: Recipe, context: int | None) -> None:
    """Raise DataError when a prompt of `n_prompt` tokens (None: none is asked) leaves no room for the answer."""
    room = (context or 1 << 60) - recipe.evaluate.max_new_tokens
    if n_prompt is not None and n_prompt > room:
        raise DataError(
            "evaluate.max_new_tokens",
            recipe.evaluate.max_new_tokens,
            f"the prompt has {n_prompt} tokens and the model's context {context}; lower it, or shorten the row",
            where=where,
        )


def encoded_rows(
    tokenizer: Tokenizer, rows: Sequence[Example], labels: tuple[str, ...], recipe: Recipe
) -> list[Encoded]:
    """Test rows, encoded. Raises RecipeError when one loses what it is measured on."""
    found, dropped = encode_all(rows, tokenizer, recipe.data, recipe.objective, labels)
    if len(found) != len(rows):
        raise RecipeError(
            "data.max_tokens",
            recipe.data.max_tokens,
            f"{len(rows) - len(found)} test rows do not fit ({dropped.as_dict()}); raise it",
        )
    return found


def row_batches(rows: Sequence[Encoded], tokens: int) -> list[list[int]]:
    """Places of the rows of each padded batch of at most `tokens` tokens, long rows first."""
    return list(batches([len(row.ids) for row in rows], tokens))


def measure(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Measure `model` on `rows` in memory; `tick(n)` hears of every n rows answered."""
    context = context_limit(model) if recipe.objective.rows in GENERATING else None
    task = RecipeTask(recipe, lambda: iter([list(rows)] if rows else []), labels, tokenizer, context)
    local = Local(model, tokenizer, recipe.evaluate.tokens_per_batch)
    return measure_task(task, local, recipe.evaluate, name, tick)


# --- texts ---


def _answer_texts(local: Writer, items: Sequence[Item], how: How) -> list[Output]:
    recipe = how.recipe
    asked = [prompt_ids(item.request, local.tokenizer, recipe.data, recipe.objective) for item in items]
    for item, ids in zip(items, asked, strict=True):
        check_room(len(ids), item.id, recipe, local.context)
    written = local.written(asked, max_new_tokens=recipe.evaluate.max_new_tokens)
    return [
        {
            "text": it.text,
            "finish": it.finish_reason,
            "n_prompt_tokens": it.n_prompt,
            "n_output_tokens": len(it.ids),
            "engine": local.engine,
        }
        for it in written
    ]


def read_texts(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    """Written answers, without blanks around them."""
    predictions = [str(output["text"]).strip() for output in outputs]
    return predictions, statistics_of_texts(predictions, [item.references for item in items], how.options)


TEXTS = Kind(_answer_texts, read_texts)

# --- classes ---


def _answer_classes(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    encoded = encoded_rows(local.tokenizer, [item.request for item in items], how.labels, how.recipe)
    rows = [row.ids for row in encoded]
    shares = class_probabilities(local.model, rows, pad_id(local.tokenizer), how.recipe.evaluate.tokens_per_batch)
    return [{"probabilities": row, "n_prompt_tokens": len(ids)} for row, ids in zip(shares, rows, strict=True)]


def _read_classes(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    shares = [output["probabilities"] for output in outputs]
    predictions = [how.labels[max(range(len(row)), key=row.__getitem__)] for row in shares]
    truth = [item.references[0] for item in items]
    compute = dict(statistics_of_classes(np.asarray(shares), truth, how.labels))
    for metric, options in how.options.items():
        compute[metric] = statistics_of_classes(np.asarray(shares), truth, how.labels, **options)[metric]
    return predictions, compute


CLASSES = Kind(_answer_classes, _read_classes)

# --- likelihoods ---


def _answer_likelihoods(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """Summed negative log-likelihood in nats, and number of predicted tokens, of each row."""
    rows = encoded_rows(local.tokenizer, [item.request for item in items], (), how.recipe)
    device = next(local.model.parameters()).device
    outputs: list[Output] = [{} for _ in rows]
    for part in row_batches(rows, how.recipe.evaluate.tokens_per_batch):
        batch = collate([rows[i] for i in part], pad_id(local.tokenizer))
        assert batch.attention_BT is not None
        nll_B = target_nll(local.model, batch.ids_BT.to(device), batch.attention_BT.to(device), batch.labels_BT)
        counts_B = (batch.labels_BT[:, 1:] != IGNORE).sum(1)
        for index, nll, tokens in zip(part, nll_B.tolist(), counts_B.tolist(), strict=True):
            outputs[index] = {"nll": nll, "tokens": tokens, "n_prompt_tokens": tokens}
    return outputs


def _read_likelihoods(items: Sequence[Item], outputs: Sequence[Output], how: How) -> tuple[Sequence[str], Compute]:
    for item, output in zip(items, outputs, strict=True):
        if output["tokens"] < 1:
            raise DataError("data.test", item.id, "the row has no token to predict; remove it")
    counts = [int(output["tokens"]) for output in outputs]
    return [""] * len(outputs), statistics_of_documents([output["nll"] for output in outputs], counts)


LIKELIHOODS = Kind(_answer_likelihoods, _read_likelihoods)
