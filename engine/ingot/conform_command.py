"""`ingot conform`: does a package answer the same everywhere?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ingot.command import Debug, Json, guarded, out
from ingot.display import short
from ingot.errors import RecipeError
from ingot.progress import Progress

if TYPE_CHECKING:  # torch is for the verb, not for its help
    from ingot.conforming import Conformance

STYLES = {"passed": "bold green", "failed": "bold red", "skipped": "dim"}


def conform(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A package, a run's folder, or models:/NAME/VERSION.", show_default=False),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Only this target; several may be named. None: all.", show_default=False),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="JSON lines of input columns, asked besides the example.", show_default=False)
    ] = None,
    no_install: Annotated[
        bool, typer.Option("--no-install", help="Skip targets whose environment is not there yet.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--report", help="Also write an HTML page.", show_default=False)] = None,
    timeout: Annotated[
        float, typer.Option(help="Most seconds that a target may take to start, and to answer.", min=1)
    ] = 300.0,
    store: Annotated[str | None, typer.Option(help="The registry of models:/ names.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Load a package as each target would, and compare what it answers with what Ingot answers here, on the CPU.

    A target that cannot run here is skipped, with the reason, and never counts as passed. Packages that conflict with
    ours are installed in environments of their own, kept below INGOT_CACHE (else ~/.cache/ingot).

    Exit code 0: everything that ran passed. 1: something failed, or nothing ran.

    Examples:

        ingot conform runs/quickstart-20261124-101500-1a2b3c

        ingot conform models:/support/3 -t pyfunc -t mlflow-serve --report conformance.html
    """
    passed = True

    def work() -> None:
        nonlocal passed
        if page is not None and not page.resolve().parent.is_dir():
            raise RecipeError("--report", str(page), f"the folder {page.resolve().parent} does not exist")
        from ingot import conforming

        found = conforming.run(
            model,
            target or (),
            rows_file=rows,
            install=not no_install,
            store=store,
            timeout_s=timeout,
            progress=Progress(quiet=as_json),
        )
        if page is not None:
            conforming.report(found, page)
        if as_json:
            print(json.dumps(found.as_dict(), ensure_ascii=False))
        else:
            _show(found, page)
        passed = found.passed

    guarded(work, debug)
    if not passed:
        raise typer.Exit(1)


def _show(found: "Conformance", page: Path | None) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("target", "result", "seconds", "difference", "forms or reason"):
        table.add_column(
            column, no_wrap=column in ("target", "result"), justify="right" if column[:1] == "s" else "left"
        )
    for it in found.results:
        apart = "" if it.difference is None else f"{it.difference:.1e}"
        said = it.reason or ", ".join(it.forms)
        table.add_row(it.target, Text(it.state, STYLES[it.state]), f"{it.seconds:.1f}", apart, Text(said))
    out.print(table)
    out.print(f"\n{found.name}: {found.sentence}", highlight=False, soft_wrap=True)
    if page is not None:
        out.print(f"page: {short(page)}", highlight=False, soft_wrap=True)
