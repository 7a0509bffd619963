"""mkdocs hook: the tables of objectives.md, written at every build from the schema, the rules and recipes' first lines.

A line `<!-- NAME -->` of that page becomes the table NAME of `TABLES`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from ingot.evaluation.metrics import DEFAULTS, OF_TASK, TEXT_METRICS
from ingot.model.lines import examine
from ingot.model.load import KINDS, POOLED
from ingot.parallel import rules
from ingot.recipe import Model, Objective, Task
from ingot.recipe_data import CAUSAL, COLUMNS, PREFERENCE_METHODS, SEQUENCE_TO_SEQUENCE
from ingot.recipe_io import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Whatever the model: `examine` says so without reading it.
NEVER_IN_LINES = (*SEQUENCE_TO_SEQUENCE, "question-answering")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs: put the tables into objectives.md."""
    if page.file.src_uri != "objectives.md":
        return markdown
    return re.sub(r"^<!-- (\w+) -->$", lambda found: TABLES[found[1]](), markdown, flags=re.MULTILINE)


def objectives() -> Iterator[tuple[str, str, Objective]]:
    """Each objective: its tasks and its method as people write them, and its section of a recipe."""
    for task in get_args(Task):
        yield _names([task]), "`supervised`", Objective(task=task)
    for method in (*PREFERENCE_METHODS, "distillation"):
        teacher = {"teacher": "a model"} if method == "distillation" else {}
        tasks = [task for task in CAUSAL if method not in PREFERENCE_METHODS or task != "language-modeling"]
        yield _names(tasks), _names([method]), Objective(method=method, **teacher)


def needs() -> str:
    """The table of what each objective needs, and what it is measured by where nothing is said."""
    rows = []
    for tasks, method, section in objectives():
        columns = _names(COLUMNS[section.rows])
        shown = "of texts" if OF_TASK[section.rows] == TEXT_METRICS else _names(DEFAULTS[section.rows])
        if section.method == "distillation":
            columns = shown = "those of the task"
        rows.append([tasks, method, columns, model_class(section.task), shown])
    table = _table(["`objective.task`", "`objective.method`", "columns", "read as", "metrics"], rows)
    return f"{table}\n\nThe metrics are those by default; [Metrics](metrics.md) has them all, with those of texts."


def model_class(task: str) -> str:
    """How transformers reads the task's model."""
    if task in POOLED:
        return "`AutoModelForSequenceClassification`, or `AutoModel` and a mean"
    kind = KINDS.get(task)
    return f"`{kind.__name__ if kind else 'AutoModelForCausalLM'}`"


def measured() -> str:
    """The table of recipes with what their first lines say."""
    rows = []
    for path in sorted(set(RECIPES.rglob("*.yaml")) - set(RECIPES.glob("tasks/*"))):
        facts = dict(re.findall(r"^# (\w+): +(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        section = load_recipe(path).objective
        name = section.task if section.method == "supervised" else f"{section.task}, {section.method}"
        rows.append([name, f"`{path.relative_to(RECIPES)}`", facts["score"], facts["time"], facts["hardware"]])
    return _table(["objective", "recipe", "score", "time", "hardware"], sorted(rows))


def together() -> str:
    """The table of how rows of each objective may lie, and whether ranks may share them, with the reasons."""
    reasons: list[str] = []

    def mark(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({1 + reasons.index(reason)})"

    rows = []
    for tasks, method, section in objectives():
        apart = examine(Model(source="none"), RECIPES, section.task)[0] if section.loss in NEVER_IN_LINES else None
        line = "yes" if section.task not in POOLED else "with a mean"
        packed = rules.broken(rules.Cell("ddp", task=section.loss, batches="packed"))
        shared = rules.broken(rules.Cell("ddp", task=section.loss, context=2))
        because = [apart or (packed.because if packed else None), shared.because if shared else None]
        rows.append([tasks, method, "yes", line if apart is None else mark(apart), *map(mark, because)])
    head = ["`objective.task`", "`objective.method`", "padded", "padding-free", "packed", "`parallel.context`"]
    table = _table(head, rows)
    notes = "\n".join(f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1))
    return f"{table}\n\n{notes}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


TABLES = {"needs": needs, "measured": measured, "together": together}
