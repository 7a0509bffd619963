"""What the verbs of the command line share: arguments, options, and how an error ends."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ingot.errors import IngotError
from ingot.launch.detect import detect

out = Console()
err = Console(stderr=True)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that win over the file: optim.lr=1e-4 train.epochs=2", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output; no progress bars.")]
Override = Annotated[
    str | None,
    typer.Option(
        help='"NAME: REASON" of who lets a model pass that its promotion policy does not; it is recorded.',
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Run `work`; an error that the user can mend becomes one message, anything else keeps its traceback."""
    try:
        work()
    except IngotError as error:
        _fail(error, debug)
    except KeyboardInterrupt:
        err.print("stopped", style="bold red")
        raise typer.Exit(130) from None


def _fail(error: IngotError, debug: bool) -> NoReturn:
    if debug:
        raise error
    if getattr(error, "printed", False):  # by one rank for all
        raise typer.Exit(error.exit_code) from None
    try:
        rank = detect(os.environ).rank
    except IngotError:  # which may be the error
        rank = 0
    prefix = f"error (rank {rank})" if rank else "error"
    err.print(f"[bold red]{prefix}:[/] ", end="")
    err.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(error.exit_code) from None
