"""mkdocs hook: the references, written at every build from the schema, from typer and from the rules."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ingot import VERBS
from ingot.cli import app
from ingot.errors import EXIT_CODES
from ingot.parallel import rules
from ingot.recipe_io import json_schema


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: add the generated pages to those of the folder."""
    files.append(File.generated(config, "reference/recipe.md", content=recipe_page()))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/support.md", content=support_page()))
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
    for title, name in (("evaluate.promotion", "Promotion"), ("evaluate.promotion.rules", "Rule")):
        section = schema["$defs"][name]
        parts += [f"## {title}", section["description"], _table("", section["properties"], section["required"])]
    return "\n\n".join(parts) + "\n"


def support_page() -> str:
    """Return the page of what goes together with what, from the rules that check recipes."""
    columns: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "LoRA over nf4": {"quantization": "nf4"},
        "LoRA over int8": {"quantization": "int8"},
        "LoRA over fp8": {"quantization": "fp8"},
        "full": {"adapter": "none"},
        "padded": {"batches": "padded"},
        "packed": {"batches": "packed"},
        "context": {"context": 2},
        "tensor": {"tensor": 2},
        "nf4 + context": {"quantization": "nf4", "context": 2},
        "nf4 + tensor": {"quantization": "nf4", "tensor": 2},
        "offload optimizer": {"offload": "optimizer"},
        "offload parameters": {"offload": "parameters"},
    }
    memory: dict[str, dict[str, Any]] = {
        "recompute full": {"activations": "full"},
        "selective": {"activations": "selective"},
        "selective + context": {"activations": "selective", "context": 2},
        "selective + tensor": {"activations": "selective", "tensor": 2},
        "offload activations": {"offload_activations": True},
        "offload + full": {"activations": "full", "offload_activations": True},
        "compile": {"compile": True},
        "compile + full": {"activations": "full", "compile": True},
    }
    held: dict[str, dict[str, Any]] = {
        "state int8": {"state": "int8"},
        "int8 + tensor": {"state": "int8", "tensor": 2},
        "full, state int8": {"adapter": "none", "state": "int8"},
        "full, weights bfloat16": {"adapter": "none", "weights": "bfloat16"},
        "both": {"adapter": "none", "state": "int8", "weights": "bfloat16"},
        "bfloat16 + tensor": {"adapter": "none", "weights": "bfloat16", "tensor": 2},
        "LoRA, weights bfloat16": {"weights": "bfloat16"},
    }
    reasons: list[str] = []
    lines, more, last = _support(columns, reasons), _support(memory, reasons), _support(held, reasons)
    allowed = list(rules.cells())
    return "\n\n".join(
        [
            "# What goes together",
            "Written from the rules that check a recipe (`ingot.parallel.rules`), the same that list what the tests "
            f"train: {len(allowed)} combinations of strategy, adapter, quantization, batches, offload, context and "
            "tensor on two gloo ranks, each compared step by step with one rank: losses within 1e-5 in float32.",
            "\n".join(lines),
            "What saves memory and time inside a block (`train.activation_checkpointing`, `train.offload_activations`, "
            "`train.compile`). Activations are offloaded from GPUs only, and this has not run on one yet.",
            "\n".join(more),
            "What the optimizer holds (`optim.state`, `optim.weights`).",
            "\n".join(last),
            "\n".join(f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)),
            "`none` with context or tensor: all ranks share one line, or each matrix. Nothing of this has run on GPUs "
            "and NCCL yet; the tests for them are run by `make test-gpu`.",
        ]
    )


def _support(columns: dict[str, dict[str, Any]], reasons: list[str]) -> list[str]:
    """Return a table of strategies by `columns` (name -> changes to a plain cell); `reasons` grows."""
    lines = [f"| strategy | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for strategy in rules.STRATEGIES:
        marks = []
        for changes in columns.values():
            alone = strategy == "none" and not {"context", "tensor"} & changes.keys()
            rule = rules.broken(rules.Cell(strategy, **changes, world=1 if alone else 2))
            if rule is not None and rule.because not in reasons:
                reasons.append(rule.because)
            marks.append("yes" if rule is None else f"no ({1 + reasons.index(rule.because)})")
        lines.append(f"| `{strategy}` | {' | '.join(marks)} |")
    return lines


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
        return "rows" if part["$ref"].endswith("/Source") else "a section, below"
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
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    functions = ", ".join(f"`ingot.{name}`" for name in sorted(VERBS))
    parts = [
        "# Command line",
        f"From Python: {functions}.",
        "## Exit codes",
        f"| code | meaning |\n|---|---|\n{codes}",
    ]
    for name, command, inner in _verbs(root, context):
        parts += [f"## {name}", inspect.cleandoc(command.help or "")]
        records = [parameter.get_help_record(inner) for parameter in command.params]
        rows = [f"| `{_cell(record[0])}` | {_cell(record[1])} |" for record in records if record]
        parts.append(f"```bash\n{command.get_usage(inner).removeprefix('Usage: ')}\n```")
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _verbs(group: Any, context: click.Context) -> Iterator[tuple[str, Any, click.Context]]:
    """Every verb of a group and of the groups in it, with its full name."""
    for name, command in sorted(group.commands.items()):
        inner = click.Context(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from _verbs(command, inner)
        else:
            yield inner.command_path, command, inner
