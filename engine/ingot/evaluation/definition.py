"""A task as a small versioned file: which rows, how they are asked, what is right, how it is scored.

Two kinds of files are read: Ingot's own, whose fields are here, and a declared part of lm-evaluation-harness's task
files (lm_eval_yaml.py). Both come to a `Definition`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ingot.errors import RecipeError
from ingot.recipe import JUDGED, Data, Evaluate, Judge, Model, Objective, Recipe, Source
from ingot.recipe_data import Positive, Section
from ingot.recipe_io import apply_override, parse_draft, read_text, validate

PROMPTED = ("text-generation", "chat-completion", "multiple-choice", "perplexity")
SUPERVISED = (
    "text-classification",
    "multi-label-classification",
    "token-classification",
    "question-answering",
    "summarization",
    "translation",
    "fill-mask",
)
NEEDS = "task, version, kind and data"
RUNS_OWN = "test"  # what a recipe's own test rows are called among tasks
FOR_PEOPLE = frozenset({"description", "notes"})
FOR_SCORES = frozenset({"extract", "metrics", "judge", "group", "slices", "id"})
Change = Literal["strip", "lower", "upper"]


class Part(Source):
    """Rows of a source, or a run of them."""

    skip: int = Field(default=0, ge=0)
    """Leave out so many rows at the beginning."""
    take: Positive | None = None
    """Then take so many. None: all."""

    @model_validator(mode="after")
    def _unweighted(self) -> Self:
        if self.weight != 1.0:
            raise ValueError("rows that are asked have no weight; remove it")
        return self


def _as_part(value: object) -> object:
    return {"uri": value} if isinstance(value, str) else value


Rows = Annotated[Part, BeforeValidator(_as_part)]


def _as_use(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Fewshot(Section):
    """Examples that stand before the question, each with its answer."""

    count: Positive
    """How many."""
    data: Rows | None = None
    """Rows to take them from. None: the rows that are asked."""
    pick: Literal["first", "seeded", "in-turn"] = "first"
    """first: the first rows, the same for every question. seeded: drawn anew for every question, from the seed and the
    question alone. in-turn: one generator draws for all questions in their order, as lm-evaluation-harness does."""
    seed: int = 0
    """seeded, in-turn: where the drawing starts."""
    among: Positive | None = 10_000
    """seeded, in-turn: draw among so many rows at the beginning, which are held in memory. None: all."""
    separator: str = "\n\n"
    """Stands after each example."""
    leave_out_asked: bool = True
    """An example that equals the row that is asked is never shown: it holds the answer."""


class Chat(Section):
    """The prompt as a user's turn, through the model's own chat template."""

    system: str | None = None
    """Text of the system's turn, a Jinja template. None: there is none."""


class Extract(Section):
    """What of a written answer is scored. The whole answer is kept, so that another pattern needs no new answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, `.`, `_`, `-`. Where a task has several, its scores are called `metric@name`."""
    before: tuple[Change, ...] = ()
    """Changes before the search, in order."""
    regex: str | None = None
    """What to search for, in Python's syntax. A group says which part of it counts; of several groups, the first that
    matched something. None: the whole text."""
    which: Literal["first", "last"] | int = "first"
    """Which of several findings."""
    fallback: str = "[invalid]"
    """The answer where nothing is found."""
    after: tuple[Change, ...] = ("strip",)
    """Changes after the search, in order; a finding is always stripped."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex is no regular expression ({error}): {self.regex!r}") from error
        return self


class Use(Section):
    """A metric and how it is used."""

    name: str
    """Its name, or what others call it."""
    extract: str | None = None
    """Score this extract only. None: each of them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the metric, e.g. `{ignore_case: true}` of exact_match."""


class Grading(Judge):
    """How a judge grades the answers. Who it is may also be said on the command line."""

    gold: str | None = None
    """Column with people's own grade of this answer (a number of the scale; win, tie or loss), which the judge's
    agreement is measured with. Rows where it is empty are passed over."""


class Definition(Section):
    """What is asked and how it is scored.

    `prompt`, `target`, `choices`, `answer`, `header` and `chat.system` are the name of a column, or a Jinja template
    over the columns of a row (`{{question}}`).
    """

    task: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Short name: letters, digits, `.`, `_`, `-`. Its results are named after it."""
    version: int | float | str
    """Raise it whenever the same model would get another score: results of two versions are not compared."""
    description: str = ""
    """One sentence for people."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, e.g. what of a harness's file was passed over."""
    kind: Literal[
        "text-generation",
        "chat-completion",
        "multiple-choice",
        "perplexity",
        "text-classification",
        "multi-label-classification",
        "token-classification",
        "question-answering",
        "summarization",
        "translation",
        "fill-mask",
    ]
    """text-generation, chat-completion: an answer is written. multiple-choice: the likeliest of given texts.
    perplexity: how likely a whole text is. The others are a recipe's tasks: data, columns and metrics are enough."""
    data: Rows
    """Rows to ask: a path or URI, or a mapping with `uri`, `format`, `skip`, `take`. Relative paths start at the task
    file's folder."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the engine or a template calls a column -> what the file calls it."""
    header: str = ""
    """Stands before everything, once."""
    prompt: str | None = None
    """The question. None: text-generation and chat-completion read their rows as a recipe does."""
    chat: Chat | None = None
    """multiple-choice, chat-completion: ask through the model's chat template."""
    fewshot: Fewshot | None = None
    """Examples with their answers before the question."""
    delimiter: str | None = None
    """Stands between a question and its answer. None: a blank; nothing in a chat."""
    target: str | None = None
    """text-generation, chat-completion: the right answer, or a list of right ones. perplexity: the text."""
    choices: str | tuple[str, ...] | None = None
    """Texts to choose from: a list, or a column or template that gives one."""
    answer: str | int | tuple[int, ...] | None = None
    """The right choice: its place (from 0), its letter (A is the first) or its text; or a list of places."""
    answer_as: Literal["auto", "index", "letter", "text", "index-or-text"] = "auto"
    """How `answer` is read. auto: whichever fits, and an error where two fit and differ. text: numbers are still a
    place, digits in quotes are not. index-or-text: digits are a place, everything else is a text."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a written answer; they are no part of it."""
    max_new_tokens: Positive = 256
    """Longest written answer, or answer found in a context, in tokens."""
    extract: tuple[Extract, ...] = ()
    """What of a written answer is scored. None: all of it, without blanks around it."""
    metrics: tuple[Annotated[Use, BeforeValidator(_as_use)], ...] = ()
    """Names of metrics, or mappings with `name` and options. None: those of the kind."""
    judge: Grading | None = None
    """Written answers: how a judge grades them. Without `endpoint` or --judge, nobody is asked."""
    group: str | None = None
    """Column whose rows of equal value are no independent measurements, e.g. the passage that they ask about."""
    slices: tuple[str, ...] = ()
    """Columns that name parts of the set, e.g. `[language]`."""
    id: str | None = None
    """Column that names a row, once. None: its file and line."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def prompted(self) -> bool:
        """Whether it says itself how to ask (else `as_recipe` is for it)."""
        written = self.kind in ("text-generation", "chat-completion")
        return self.kind in PROMPTED and not (written and self.prompt is None)

    @property
    def is_chat(self) -> bool:
        """Whether it is asked through a chat template."""
        return self.chat is not None or self.kind == "chat-completion"

    @property
    def between(self) -> str:
        """What stands between a question and its answer."""
        return self.delimiter if self.delimiter is not None else "" if self.is_chat else " "

    @property
    def fingerprint(self) -> str:
        """Hash of all but what is for people, 16 hex digits."""
        return self._hash(FOR_PEOPLE)

    @property
    def asking(self) -> str:
        """Hash of how rows become questions, 16 hex digits: not of how answers are scored, or of where rows lie."""
        return self._hash(FOR_PEOPLE | FOR_SCORES | {"data", "task", "version"})

    def _hash(self, without: frozenset[str]) -> str:
        values = self.model_dump(mode="json", exclude=set(without))
        if "data" in without and values["fewshot"]:
            del values["fewshot"]["data"]  # what its rows say stands in every question
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# Fields of each kind that asks itself: those it needs, and those it may have beside what all may.
_ASKING = {"header", "prompt", "chat", "fewshot", "delimiter", "target", "choices", "answer", "answer_as", "stop"}
_ASKING |= {"max_new_tokens", "extract"}
_WRITTEN = {"header", "prompt", "fewshot", "delimiter", "target", "choices", "answer", "answer_as", "stop"}
_WRITTEN |= {"max_new_tokens", "extract"}
_OF_KIND: dict[str, tuple[set[str], set[str]]] = {
    "text-generation": ({"prompt"}, _WRITTEN),
    "chat-completion": ({"prompt"}, _WRITTEN | {"chat"}),
    "multiple-choice": ({"prompt", "choices", "answer"}, _ASKING - {"target", "stop", "max_new_tokens", "extract"}),
    "perplexity": ({"target"}, {"target"}),
}


def _problems(made: Definition) -> list[str]:
    """What does not go together; each names its field."""
    kind, written = made.kind, made.model_fields_set
    if made.task == RUNS_OWN:
        return [f"task must not be {RUNS_OWN!r}: so the test rows of a recipe are called"]
    writes = {"max_new_tokens"} if kind in ("summarization", "translation", "question-answering") else set[str]()
    needed, allowed = _OF_KIND[kind] if made.prompted else (set[str](), writes)
    for name in sorted(_ASKING & written):
        if name not in allowed and getattr(made, name) not in (None, (), ""):
            has = ", ".join(["data", "columns", "metrics", *sorted(allowed)])
            missing = "" if made.prompted or kind in SUPERVISED else " without prompt"
            return [f"{kind}{missing} does not use {name}; it has {has}"]
    for name in sorted(needed):
        if getattr(made, name) is None:
            return [f"{kind} needs {name}"]
    if not made.prompted and (made.data.skip or made.data.take):
        return [f"{kind} reads its rows as a recipe does, which knows no data.skip and data.take; write a file of them"]
    if made.prompted and kind in ("text-generation", "chat-completion"):
        if (made.target is None) == (made.answer is None):
            return [f"{kind} needs target: the right answer" + (" and no answer beside it" if made.answer else "")]
        if (made.answer is None) != (made.choices is None):
            return ["answer and choices go together: one of several texts is the right one"]
    if isinstance(made.choices, tuple) and len(made.choices) < 2:
        return [f"choices must be two at least, not {len(made.choices)}"]
    if made.header and made.is_chat:
        return ["header is for plain prompts; in a chat write chat.system"]
    if made.judge is not None and kind not in JUDGED:
        return [f"judge grades written answers ({', '.join(JUDGED)}), not {kind}; remove it"]
    if made.judge is not None and made.judge.gold is not None and not made.prompted:
        return ["judge.gold is for tasks with a prompt of their own; remove it"]
    names = [one.name for one in made.extract]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return [f"extract names {twice[0]!r} twice"]
    for use in made.metrics:
        if use.extract is not None and use.extract not in names:
            return [f"metrics: {use.name} wants extract {use.extract!r}, and there is {', '.join(names) or 'none'}"]
    return []


def load_definition(path: str | Path, overrides: Sequence[str] = ()) -> Definition:
    """Read a task file, Ingot's own or lm-evaluation-harness's; each override is `dotted.field=value`, as a recipe's.

    Raises `RecipeError` with file, line, field, value and fix.
    """
    from ingot.evaluation.lm_eval_yaml import is_of_harness, to_draft

    path = Path(path)
    draft = parse_draft(read_text(path, "task"), str(path), "task", NEEDS)
    if is_of_harness(draft.values):
        draft = to_draft(draft, path.parent)
    for override in overrides:
        apply_override(draft, override)
    return validate(draft, Definition)


def list_definitions(folder: str | Path) -> dict[str, Path]:
    """Task -> its file, of all `.yaml` files in `folder` and below. Raises `RecipeError` for two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        name = load_definition(path).task
        if name in found:
            raise RecipeError("task", name, f"{found[name]} has the same name; rename one", where=str(path))
        found[name] = path
    return found


def as_recipe(definition: Definition, model: Model) -> Recipe:
    """The recipe that measures `model` on the rows of a supervised kind. Raises `RecipeError` for one that asks itself.

    Classes, where the task has any, are those of the measured rows.
    """
    if definition.prompted:
        raise RecipeError("kind", definition.kind, "says itself how to ask; it is no recipe's task")
    source = Source(**definition.data.model_dump(exclude={"skip", "take"}))
    metrics = [use.name for use in definition.metrics] or None
    options = {use.name: use.options for use in definition.metrics if use.options}
    belongs: dict[str, Any] = {"cluster_by": definition.group, "slices": list(definition.slices)}
    return Recipe(
        name=definition.task,
        description=definition.description,
        model=model,
        data=Data(train=source, validation=source, test=source, columns=definition.columns),
        objective=Objective(task=definition.kind),  # type: ignore[arg-type]
        evaluate=Evaluate(metrics=metrics, metric_options=options, max_new_tokens=definition.max_new_tokens, **belongs),
    )
