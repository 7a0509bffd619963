"""`ingot keys`: who may call an endpoint."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ingot.command import Debug, Json, guarded, out

keys = typer.Typer(no_args_is_help=True, help="Keys of an endpoint's callers; the file holds their hashes only.")
KeyName = Annotated[str, typer.Argument(help="Who calls with it.", show_default=False)]
KeyFile = Annotated[Path, typer.Option("--file", help="The file, as `ingot serve --keys` takes it.")]
DEFAULT_FILE = Path("keys.json")


@keys.command()
def add(
    name: KeyName,
    file: KeyFile = DEFAULT_FILE,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="None: the server's limit.", min=1, show_default=False)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompts and answers. None: the server's.", min=1, show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a key and show it, once.

    Example:

        ingot keys add ann --requests-per-minute 60
    """

    def work() -> None:
        from ingot.serving.keys import add_key

        key = add_key(file, name, requests_per_minute, tokens_per_minute)
        shown = f"{key}\nIt is shown this once: {file} holds its hash."
        print(json.dumps({"name": name, "key": key, "file": str(file)}) if as_json else shown)

    guarded(work, debug)


@keys.command("list")
def list_keys(file: KeyFile = DEFAULT_FILE, as_json: Json = False, debug: Debug = False) -> None:
    """Show names and limits.

    Example:

        ingot keys list --file keys.json
    """

    def work() -> None:
        from ingot.serving.keys import read_keys

        columns = ("name", "created", "requests_per_minute", "tokens_per_minute")
        found = [{column: getattr(key, column) for column in columns} for key in read_keys(file)]
        if as_json:
            print(json.dumps(found))
            return
        table = Table(*(column.replace("_", " ") for column in columns), box=None, header_style="bold")
        for key in found:
            table.add_row(*("" if value is None else str(value) for value in key.values()))
        out.print(table)

    guarded(work, debug)


@keys.command()
def remove(name: KeyName, file: KeyFile = DEFAULT_FILE, as_json: Json = False, debug: Debug = False) -> None:
    """Forget a key: servers refuse it from the next second on.

    Example:

        ingot keys remove ann
    """

    def work() -> None:
        from ingot.serving.keys import remove_key

        remove_key(file, name)
        print(json.dumps({"name": name, "file": str(file)}) if as_json else f"removed: {name}")

    guarded(work, debug)
