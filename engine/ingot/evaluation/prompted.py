"""A task file as a task: rows become questions in its words, a subject answers, answers become scores.

It needs no tokenizer and no model: what it asks goes through a `Subject`, so a model in this process and an endpoint
are asked the same. Outputs keep everything that scoring needs (the whole answer, every choice's likelihood), so that
other metrics, extracts and normalisations ask nothing again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from ingot.data.sources import Row
from ingot.errors import DataError, RecipeError
from ingot.evaluation.choice_metrics import statistics_of_choices
from ingot.evaluation.definition import Definition, Use
from ingot.evaluation.extraction import WHOLE, extracted
from ingot.evaluation.fewshot import Examples, examples_of, readable
from ingot.evaluation.likelihood_metrics import statistics_of_documents
from ingot.evaluation.metrics import DEFAULTS, METRICS, canonical, check_options, undefined
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.statistic import Statistic
from ingot.evaluation.task import Compute, Prompt, Subject
from ingot.evaluation.wording import Wording, wording_of

WINDOW_ROWS = 1_000
WRITTEN = ("text-generation", "chat-completion")
UNCONDITIONAL = "acc_mutual_info"  # asks for every choice once more, without the question


@dataclass(frozen=True)
class Request:
    """What a row asks. `choices`: without delimiter. `answers`: places of the right ones. `text`: to roll over. `gold`:
    people's grade, for the judge's agreement with it.
    """

    prompt: Prompt = ""
    choices: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()
    text: str = ""
    gold: str | None = None


class DefinedTask:
    """A definition and its rows. `home`: where relative paths start. `max_rows`: ask only so many, drawn with `seed`.

    Raises RecipeError for a kind that a recipe is for, an unknown metric, or a template that is no Jinja.
    """

    def __init__(self, definition: Definition, home: Path, *, max_rows: int | None = None, seed: int = 0) -> None:
        if not definition.prompted:
            fix = "is measured as a recipe's task (as_recipe); only prompted kinds are asked here"
            raise RecipeError("kind", definition.kind, fix)
        self.name, self.kind, self.definition = definition.task, definition.kind, definition
        self._home, self._max_rows, self._seed = home, max_rows, seed
        self._wording: Wording = wording_of(definition)
        self._uses = _uses(definition)

    def asked(self) -> dict[str, Any]:
        """Version, hash of how rows become questions, and the settings of an answer."""
        made = self.definition
        found: dict[str, Any] = {"version": made.version, "prompt": made.asking}
        if self.kind in WRITTEN:
            found |= {"max_new_tokens": made.max_new_tokens, "stop": list(made.stop)}
        if UNCONDITIONAL in self._uses:
            found["unconditional"] = True
        return found

    def scoring(self) -> dict[str, Any]:
        """Score -> its extract, and the options of its metric."""
        extracts = {one.name: one.model_dump(mode="json", exclude={"name"}) for one in self.definition.extract}
        found = {
            name: ({"extract": extracts[use.extract]} if use.extract else {}) | dict(use.options)
            for name, use in self._uses.items()
        }
        return {name: reading for name, reading in found.items() if reading}

    def windows(self) -> Iterator[list[Item]]:
        """The rows in order, a thousand at a time. Raises DataError for a row that cannot be asked."""
        rows, examples = self._rows(), examples_of(self.definition, self._home)
        seen: set[bytes] = set()
        while window := [self._item(row, examples, seen) for row in islice(rows, WINDOW_ROWS)]:
            yield window

    def _rows(self) -> Iterator[Row]:
        rows = readable(self.definition.data, self._home, "data")
        if self._max_rows is None:
            return rows
        total = sum(1 for _ in readable(self.definition.data, self._home, "data"))
        if total <= self._max_rows:
            return rows
        chosen = set(Random(self._seed).sample(range(total), self._max_rows))
        return (row for place, row in enumerate(rows) if place in chosen)

    def _item(self, row: Row, examples: Examples, seen: set[bytes]) -> Item:
        made, wording = self.definition, self._wording
        # Without the folder that was typed to find the file, so that the same row has the same name from everywhere.
        name = row.where.removeprefix(f"{self._home}/") if made.id is None else wording.column("id", made.id, row)
        if made.id is not None:
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if digest in seen:
                fix = f"{name!r} names two rows; name a column that names each row"
                raise DataError("id", made.id, fix, where=row.where)
            seen.add(digest)
        group = None if made.group is None else wording.column("group", made.group, row)
        slices = {column: wording.column("slices", column, row) for column in made.slices}
        if made.kind == "perplexity":
            text = wording.targets(row)[0]
            return Item(name, text, [], Request(text=text), group=group, slices=slices)
        prompt = self._prompt(row, examples(row))
        if made.kind != "multiple-choice":
            judge = made.judge
            gold = None if judge is None or judge.gold is None else wording.optional("judge.gold", judge.gold, row)
            request = Request(prompt, gold=gold)
            return Item(name, shown(prompt), wording.targets(row), request, group=group, slices=slices)
        choices = wording.choices(row)
        answers = wording.answers(row, choices)
        request = Request(prompt, tuple(choices), tuple(answers))
        return Item(
            name, shown(prompt, choices), [choices[place] for place in answers], request, group=group, slices=slices
        )

    def _prompt(self, row: Row, examples: Sequence[Row]) -> Prompt:
        made, wording = self.definition, self._wording
        if made.is_chat:
            return self._turns(row, examples)
        separator = made.fewshot.separator if made.fewshot else ""
        shots = [f"{wording.prompt(it)}{made.between}{wording.example_answer(it)}{separator}" for it in examples]
        header = wording.text("header", row) if made.header else ""
        return "".join([header, *shots, wording.prompt(row)])

    def _turns(self, row: Row, examples: Sequence[Row]) -> list[dict[str, Any]]:
        wording, system = self._wording, self.definition.chat.system if self.definition.chat else None
        turns = [] if system is None else [{"role": "system", "content": wording.text("chat.system", row)}]
        for it in examples:
            turns += self._question(it)
            turns.append({"role": "assistant", "content": wording.example_answer(it)})
        return turns + self._question(row)

    def _question(self, row: Row) -> list[dict[str, Any]]:
        return self._wording.turns(row) or [{"role": "user", "content": self._wording.prompt(row)}]

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """What each row asks by itself, and its right answers; of a text to roll over, the text."""
        for row in self._rows():
            if self.kind == "perplexity":
                yield self._wording.targets(row)[0], []
                continue
            answers = self._wording.targets(row) if self.kind != "multiple-choice" else self._right_choices(row)
            yield self._wording.question(row), answers

    def _right_choices(self, row: Row) -> list[str]:
        choices = self._wording.choices(row)
        return [choices[place] for place in self._wording.answers(row, choices)]

    def size(self, item: Item) -> int:
        """Characters: a tokenizer's count would be the same order in more time."""
        return len(item.prompt)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[Output]:
        """What the subject gives for each row."""
        requests: list[Request] = [item.request for item in items]
        if self.kind == "perplexity":
            rolled = subject.roll([it.text for it in requests])
            return [{"logprob": logprob, "tokens": n, "n_prompt_tokens": n} for logprob, n in rolled]
        if self.kind == "multiple-choice":
            return self._score(subject, requests)
        made = self.definition
        written = subject.write(
            [it.prompt for it in requests], max_new_tokens=made.max_new_tokens, stop=tuple(made.stop)
        )
        return [
            {
                "text": it.text,
                "finish": it.finish_reason,
                "n_prompt_tokens": it.n_prompt_tokens,
                "n_output_tokens": it.n_output_tokens,
                **({"engine": it.engine} if it.engine else {}),
            }
            for it in written
        ]

    def _score(self, subject: Subject, requests: Sequence[Request]) -> list[Output]:
        between = self.definition.between
        texts = [[f"{between}{choice}" for choice in it.choices] for it in requests]
        scored = subject.score([(it.prompt, own) for it, own in zip(requests, texts, strict=True)])
        outputs: list[Output] = [
            {
                "logprobs": [one.logprob for one in of_row],
                "greedy": [one.greedy for one in of_row],
                "tokens": [one.n_tokens for one in of_row],
                "characters": [len(choice) for choice in it.choices],
                "bytes": [len(choice.encode("utf-8", "surrogatepass")) for choice in it.choices],
            }
            for of_row, it in zip(scored, requests, strict=True)
        ]
        if UNCONDITIONAL in self._uses:
            alone = subject.score([("", own) for own in texts])
            for output, of_row in zip(outputs, alone, strict=True):
                output["unconditional"] = [one.logprob for one in of_row]
        return outputs

    def predictions(self, items: Sequence[Item], outputs: Sequence[Output]) -> Sequence[str]:
        """Answers as people read them: what the first extract finds, the likeliest choice, nothing for a whole text."""
        if self.kind == "perplexity":
            return [""] * len(items)
        if self.kind == "multiple-choice":
            pairs = zip(items, outputs, strict=True)
            return [it.request.choices[_largest(output["logprobs"])] for it, output in pairs]
        how = self.definition.extract[0] if self.definition.extract else WHOLE
        return [extracted(output["text"], how) for output in outputs]

    def metrics(self, items: Sequence[Item]) -> list[str]:
        """Names of the wanted metrics, `metric@extract` where there are several extracts."""
        if self.kind == "perplexity":  # measured against the text itself
            return list(self._uses)
        references = [item.references for item in items]
        for use in self._uses.values():
            if reason := undefined(use.name, self.kind, references, **use.options):
                raise RecipeError("metrics", use.name, f"it is undefined on the rows of {self.name}: {reason}")
        return list(self._uses)

    def compute(self, items: Sequence[Item], outputs: Sequence[Output]) -> Compute:
        """Metric -> what computes it."""
        if self.kind == "multiple-choice":
            requests: list[Request] = [item.request for item in items]
            alone = [output["unconditional"] for output in outputs] if UNCONDITIONAL in self._uses else None
            likelihoods = [output["logprobs"] for output in outputs]
            return statistics_of_choices(
                likelihoods, [it.choices for it in requests], [it.answers for it in requests], alone
            )
        if self.kind == "perplexity":
            losses, tokens = [-output["logprob"] for output in outputs], [output["tokens"] for output in outputs]
            return statistics_of_documents(losses, tokens, [item.request.text for item in items])
        return {name: self._of_texts(use, items, outputs) for name, use in self._uses.items()}

    def _of_texts(self, use: Use, items: Sequence[Item], outputs: Sequence[Output]) -> Callable[[], Statistic]:
        how = next((one for one in self.definition.extract if one.name == use.extract), WHOLE)

        def compute() -> Statistic:
            found = [extracted(output["text"], how) for output in outputs]
            return METRICS[use.name].compute(found, [item.references for item in items], **use.options)

        return compute


def _uses(definition: Definition) -> dict[str, Use]:
    """Name of a score -> the metric behind it, by our name. Raises RecipeError for an unknown metric or option, or one
    of another kind.
    """
    kind = definition.kind
    found: dict[str, Use] = {}
    extracts: list[str | None] = [one.name for one in definition.extract]
    defaults = ("exact_match",) if kind in WRITTEN else DEFAULTS[kind]
    for use in definition.metrics or [Use(name=name) for name in defaults]:
        metric = canonical(use.name, kind, "metrics")
        check_options(metric, use.options, f"metrics.{use.name}")
        for extract in [use.extract] if use.extract else extracts or [None]:
            name = f"{metric}@{extract}" if len(extracts) > 1 else metric
            if name in found:
                raise RecipeError("metrics", use.name, "is named twice; its results would have one name")
            found[name] = use.model_copy(update={"name": metric, "extract": extract})
    return found


def _largest(numbers: Sequence[float]) -> int:
    return max(range(len(numbers)), key=numbers.__getitem__)


def shown(prompt: Prompt, choices: Sequence[str] = ()) -> str:
    """A prompt as one text for people: turns under their roles, choices as a list below."""
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"[{turn.get('role')}]\n{turn.get('content')}" for turn in prompt)
    return "\n".join([prompt, *(f"( ) {choice}" for choice in choices)])


def describe(definition: Definition, home: Path, rows: int = 2) -> str:
    """The first questions as a model sees them, and what is right, for people who want to know what is asked.

    Of a supervised kind, whose questions depend on the model, the first rows as they are.
    """
    lines = [f"{definition.task}, version {definition.version}: {definition.kind}", *definition.notes]
    if not definition.prompted:
        for row in islice(readable(definition.data, home, "data"), rows):
            lines += [f"--- {row.where}", *(f"{name}: {value}" for name, value in row.values.items())]
        return "\n".join(lines)
    task = DefinedTask(definition, home)
    if definition.is_chat:
        lines.append("Turns go through the model's own chat template.")
    for item in islice((item for window in task.windows() for item in window), rows):
        lines += [f"--- {item.id}", item.prompt]
        if item.references:
            lines.append(f"--- right: {' | '.join(map(repr, item.references))}")
    return "\n".join(lines)
