"""Results for people: score tables and what a run has done."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def short(path: Path) -> str:
    """`path` as the user would type it from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def score_table(result: dict[str, Any]) -> Table:
    """The rows of `result["table"]`."""
    table = Table(box=None, header_style="bold")
    for column in result["columns"]:
        table.add_column(column, no_wrap=True, justify="left" if column == result["columns"][0] else "right")
    for row in result["table"]:
        # The interval below its value: five columns then fit a terminal of 80 characters.
        table.add_row(*(str(row[column]).replace(" [", "\n[") for column in result["columns"]))
    return table


def show_scores(result: dict[str, Any], out: Console) -> None:
    """The table, and what a reader of it must know."""
    out.print(score_table(result))
    for note in result["notes"]:
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    show_overlaps(result.get("contamination", {}), out)


def show_overlaps(found: dict[str, Any], out: Console) -> None:
    """Of each task the sentence about the rows that training saw."""
    for record in found.values():
        out.print(record["sentence"], markup=False, highlight=False, soft_wrap=True)


def show_promotion(promotion: dict[str, Any], out: Console) -> None:
    """A policy's verdict in a sentence, its conditions in a table, and who overrode it."""
    style = "bold green" if promotion["granted"] else "bold red"
    out.print(f"[{style}]{'✓' if promotion['granted'] else '✗'}[/] ", end="")
    out.print(promotion["sentence"], markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold")
    for column in ("condition", "measured", "rows", "verdict"):
        table.add_column(column, no_wrap=column == "measured", justify="left" if column == "condition" else "right")
    for row in promotion["table"]:
        # Text and not markup: slices are values of the users' rows, which may hold [brackets].
        shown = (row["condition"], row["measured"].replace(" [", "\n["), row["rows"], row["verdict"])
        table.add_row(*map(Text, shown))
    out.print(table)
    for it in promotion["overrides"]:
        out.print(f"overridden by {it['name']}, {it['at'][:10]}: {it['reason']}", markup=False, highlight=False)


def show_summary(result: dict[str, Any], out: Console) -> None:
    """What `ingot.run` returned: scores, the answer, seconds, paths."""
    out.print()
    if "table" in result:
        show_scores(result, out)
        out.print()
    if "promotion" in result:
        show_promotion(result["promotion"], out)
        out.print()
    if "answer" in result:
        out.print("[bold]asked over HTTP[/] ", end="")
        out.print(result["question"], markup=False, highlight=False)
        out.print("[bold]answered[/]        ", end="")
        out.print(result["answer"], markup=False, highlight=False)
        out.print()
    seconds = "   ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in result["stages"].items())
    out.print(f"[bold]stages[/]  {seconds}", highlight=False)
    for name, path in result["paths"].items():
        out.print(f"[bold]{name:<11}[/]{short(Path(path))}", highlight=False, soft_wrap=True)
    if "package" in result["paths"]:
        out.print(f"\nnext: ingot serve {short(Path(result['paths']['package']))}", highlight=False, soft_wrap=True)
