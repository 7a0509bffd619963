"""mkdocs hook: the sections of answers.md, written at every build from the table of tasks.

The line `<!-- tasks -->` of that page becomes a section for each task: input columns, parameters, output columns.
"""

import json
from collections.abc import Iterator, Sequence

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from ingot.model.task_schemas import TASKS, Column, Param, TaskSchema


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs: put the sections into answers.md."""
    if page.file.src_uri != "answers.md":
        return markdown
    return markdown.replace("<!-- tasks -->", "\n\n".join(map(section, TASKS.values())))


def section(schema: TaskSchema) -> str:
    """A task: a row of it, and three tables."""
    parts = [f"### {schema.task}", f"```json\n{json.dumps(schema.example, ensure_ascii=False)}\n```"]
    parts.append("\n".join(table(("input column", "other names", "type", "meaning"), map(_input, schema.inputs))))
    if len(schema.forms) > 1:
        forms = "; or ".join(" and ".join(f"`{name}`" for name in form) for form in schema.forms)
        parts.append(f"A row has {forms}.")
    if schema.params:
        parts.append(
            "\n".join(table(("parameter", "type", "default", "allowed", "meaning"), map(_param, schema.params)))
        )
    parts.append("\n".join(table(("output column", "type", "meaning"), _outputs(schema.outputs))))
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _input(column: Column) -> Sequence[str]:
    return f"`{column.name}`", ", ".join(f"`{name}`" for name in column.aliases), _type(column), column.doc


def _param(param: Param) -> Sequence[str]:
    bounds = [
        *([f"above {param.above:g}"] if param.above is not None else []),
        *([f"from {param.low:g}"] if param.low is not None else []),
        *([f"to {param.high:g}"] if param.high is not None else []),
        *(f"`{choice}`" for choice in param.choices),
    ]
    default = json.dumps(param.default)
    return f"`{param.name}`", param.type, f"`{default}`", " ".join(bounds), param.doc


def _outputs(columns: Sequence[Column], inside: str = "") -> Iterator[Sequence[str]]:
    for column in columns:
        yield f"`{inside}{column.name}`", _type(column), column.doc
        yield from _outputs(column.fields, f"{column.name}[].")


def _type(column: Column) -> str:
    names = {"strings": "list of strings", "doubles": "list of numbers", "objects": "list of objects"}
    return names.get(column.type, "string or list" if column.type in ("messages", "words") else column.type)
