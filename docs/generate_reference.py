"""mkdocs hook: the recipe and command-line references, written from the schema and from typer at every build."""

import inspect
import json
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ingot.cli import app
from ingot.recipe_io import json_schema


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: add the generated pages to those of the folder."""
    files.append(File.generated(config, "reference/recipe.md", content=recipe_page()))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    return files


def recipe_page() -> str:
    """Return the page with a table per section of the recipe."""
    schema = json_schema()
    sections = {name: part["$ref"].rsplit("/", 1)[-1] for name, part in schema["properties"].items() if "$ref" in part}
    parts = [
        "# Recipe reference",
        "A recipe is a YAML file. Unknown keys and wrong types are errors with file, line and the nearest name. "
        "Any field can be set on the command line as `section.field=value`. "
        "`ingot schema` prints this reference as JSON Schema, for editors.",
        "## Top level",
        _table(
            "", {name: part for name, part in schema["properties"].items() if name not in sections}, schema["required"]
        ),
    ]
    for name, definition in sections.items():
        section = schema["$defs"][definition]
        parts += [f"## {name}", section.get("description", "")]
        parts.append(_table(f"{name}.", section["properties"], section.get("required", [])))
    source = schema["$defs"]["Source"]
    parts += [
        "## Rows: data.train, data.validation, data.test",
        source["description"] + " A path or URI alone is short for `uri`.",
    ]
    parts.append(_table("", source["properties"], source["required"]))
    return "\n\n".join(parts) + "\n"


def _table(prefix: str, fields: dict[str, Any], required: list[str]) -> str:
    rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
    for name, part in fields.items():
        default = "required" if name in required else f"`{json.dumps(part.get('default', {}), ensure_ascii=False)}`"
        meaning = " ".join(part.get("description", "").split())
        rows.append(f"| `{prefix}{name}` | {_values(part)} | {_cell(default)} | {_cell(meaning)} |")
    return "\n".join(rows)


def _values(part: dict[str, Any]) -> str:
    """Return a field's type and limits in words."""
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_values(option) for option in part["anyOf"]))
    if "$ref" in part:
        return "rows"
    if "enum" in part or "const" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    names = {
        "integer": "whole number",
        "string": "text",
        "boolean": "true, false",
        "array": "list",
        "object": "mapping",
    }
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    shown = [f"{sign} {part[key]:g}" for key, sign in limits.items() if key in part]
    return " ".join([names.get(part.get("type", ""), part.get("type", "any")), ", ".join(shown)]).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def cli_page() -> str:
    """Return the page with every verb, its arguments and options."""
    root = typer.main.get_command(app)
    context = click.Context(root, info_name="ingot")  # type: ignore[arg-type]
    parts = ["# Command line", 'Every verb is also a function of the Python package: `ingot.run("recipe.yaml")`.']
    for name, command in sorted(root.commands.items()):  # type: ignore[attr-defined]
        parts += [f"## ingot {name}", inspect.cleandoc(command.help or "")]
        inner = click.Context(command, info_name=name, parent=context)
        records = [parameter.get_help_record(inner) for parameter in command.params]
        rows = [f"| `{_cell(record[0])}` | {_cell(record[1])} |" for record in records if record]
        parts.append(f"```bash\n{command.get_usage(inner).removeprefix('Usage: ')}\n```")
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
