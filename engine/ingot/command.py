"""What the verbs of the command line share: arguments, options, and how an error ends."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

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

# What a wrong option, argument or verb raises. typer has no public name for it, and no longer click's class.
UsageError: Any = typer.BadParameter.__base__


class Verbs(TyperGroup):
    """The verbs. A wrong option or argument becomes one line as any other mistake, and not a box."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        """As typer does, for what stands before the verb."""
        with _one_line():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        """As typer does, for the verb and what stands behind it."""
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which shows the help
            raise
        help_of = f"; see: {error.ctx.command_path} --help" if error.ctx else ""
        _say("error", _sentence(error) + help_of)
        raise typer.Exit(error.exit_code) from None


def _sentence(error: Any) -> str:
    """Field, value and fix where it is a value that is wrong."""
    problems, param = getattr(error.__cause__, "errors", None), getattr(error, "param", None)
    if problems is None or param is None:
        return str(error.format_message()).removeprefix("Invalid value: ").rstrip(".")
    problem = problems()[0]
    field = max(param.opts, key=len) if param.param_type_name == "option" else param.human_readable_name
    fix = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    return f"{field} = {problem['input']!r}: {fix}"


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
    _say(prefix, str(error))
    raise typer.Exit(error.exit_code) from None


def _say(prefix: str, message: str) -> None:
    err.print(f"[bold red]{prefix}:[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
