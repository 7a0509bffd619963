"""`ingot cache`: the encoded rows that runs share."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ingot.command import Debug, Json, guarded, out

MEGABYTE = 1_000_000


def cache(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of the cache: a recipe's data.cache. Without: INGOT_CACHE, else ~/.cache/ingot."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete them. Runs that have rows open keep them.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the encoded rows that runs share, or delete them: the next run encodes again.

    Examples:

        ingot cache

        ingot cache --clear
    """

    def work() -> None:
        from ingot.data.cache import clear as clear_cache
        from ingot.data.cache import default_folder, entries

        root = folder or default_folder()
        found, freed = entries(root), clear_cache(root) if clear else 0
        if as_json:
            print(json.dumps({"folder": str(root), "entries": found, "freed_bytes": freed}))
            return
        if clear:
            out.print(f"{root}: {freed / MEGABYTE:,.1f} MB freed", highlight=False, soft_wrap=True)
            return
        table = Table(box=None, header_style="bold")
        table.add_column("rows of", no_wrap=True)
        for column in ("rows", "MB", "last used"):
            table.add_column(column, justify="right")
        for entry in found:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"]))
            n_rows = "damaged" if entry["rows"] is None else f"{entry['rows']:,}"
            table.add_row(entry["name"], n_rows, f"{entry['bytes'] / MEGABYTE:,.1f}", used)
        out.print(table if found else f"{root}: nothing is cached", highlight=False)

    guarded(work, debug)
