"""Results for people: score tables and what a run has done."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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


def show_summary(result: dict[str, Any], out: Console) -> None:
    """What `ingot.run` returned: scores, the answer, seconds, paths."""
    out.print()
    if "table" in result:
        out.print(score_table(result))
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
