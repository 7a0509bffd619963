"""`ingot check`: the trust gate on a recipe, its model and its data, before anything is trained."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ingot.command import Debug, Json, Overrides, RecipeFile, guarded, out
from ingot.display import short
from ingot.errors import RecipeError
from ingot.launch.detect import detect
from ingot.progress import Progress
from ingot.recipe_io import load_recipe

if TYPE_CHECKING:  # numpy and jinja2 are for the verb, not for its help
    from ingot.check.verdict import Report

PROOF_FAILED = 2
# Status -> the word, its symbol, its colour: never the colour alone.
MARKS = {
    "passed": ("✓ passed", "green"),
    "failed": ("✗ FAILED", "bold red"),
    "warning": ("! warning", "yellow"),
    "waived": ("! waived", "yellow"),
    "not applicable": ("– n/a", "dim"),
}


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Also write a page to this file: masked rows, histogram, packing.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove a recipe before training: masks, stop tokens, packing, gradients, adapter, save and reload, leaked rows.

    Exit code 0: every proof passed or is waived (`check.waive`). 2: one failed. Nothing is written without `--html`.

    Examples:

        ingot check recipes/quickstart.yaml

        ingot check recipes/quickstart.yaml data.max_tokens=64 --html check.html

        ingot check recipes/quickstart.yaml --json | jq .failed
    """

    def work() -> None:
        loaded = load_recipe(recipe, overrides or ())
        if html is not None:
            _require_place(html)
        from ingot import verbs
        from ingot.check import report as reports

        found = verbs.check(loaded, home=recipe.resolve().parent, progress=Progress(quiet=as_json))
        if detect(os.environ).main:
            page = reports.save_page(found, html) if html is not None else None
            if as_json:
                print(reports.as_json(found))
            else:
                show(found, out, page)
                if page is None:
                    out.print(f"report: ingot check {recipe} --html check.html", markup=False, highlight=False)
        if not found.passed:
            raise typer.Exit(PROOF_FAILED)

    guarded(work, debug)


def show(report: "Report", out: Console, page: Path | None = None) -> None:
    """A line for each proof, the fixes of those that failed, what was sampled, how it ended, where the page is."""
    out.print(_table(report))
    below = Table.grid(padding=(0, 2, 0, 0))
    for verdict in report.failures:
        below.add_row(Text(f"mend {verdict.name}", style="bold red"), Text(verdict.fix))
    for verdict in report.verdicts:
        if verdict.status.value == "warning":
            below.add_row(Text(f"look at {verdict.name}", style="yellow"), Text(verdict.fix))
    for sentence in report.sampled:
        below.add_row(Text("sampled", style="dim"), Text(sentence, style="dim"))
    out.print()
    out.print(below)
    out.print()
    out.print(_ending(report))
    if page is not None:
        out.print(f"report: {short(page)}", markup=False, highlight=False, soft_wrap=True)


def _table(report: "Report") -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("verdict", no_wrap=True)
    table.add_column("proof", no_wrap=True)
    table.add_column("why", overflow="fold")
    for verdict in report.verdicts:
        word, style = MARKS[verdict.status.value]
        dim = "dim" if verdict.status.value == "not applicable" else ""
        # Text and not markup: reasons quote rows, and rows may hold [brackets].
        table.add_row(Text(word, style=style), Text(verdict.name, style=dim), Text(verdict.because, style=dim))
    return table


def _ending(report: "Report") -> Text:
    tally = {name: sum(verdict.status.value == name for verdict in report.verdicts) for name in MARKS}
    parts = ", ".join(f"{n} {name}" for name, n in tally.items() if n)
    word, style = MARKS["passed" if report.passed else "failed"]
    return Text.assemble((f"{word}  ", style), f"{report.recipe}: {parts}, in {report.seconds:.0f} s")


def _require_place(path: Path) -> None:
    """Before minutes are spent, not after."""
    parent = path.resolve().parent
    if path.is_dir():
        raise RecipeError("--html", str(path), "is a folder; name a file in it")
    if not parent.is_dir():
        raise RecipeError("--html", str(path), f"the folder {parent} does not exist")
