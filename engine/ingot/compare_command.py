"""`ingot compare`: say whether one model is better than another."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from ingot.command import Debug, Json, err, guarded, out
from ingot.display import short
from ingot.errors import RecipeError
from ingot.judge_options import AllowHttp, JudgeKey, JudgeNames, Rubric, preference_text, with_preferences
from ingot.progress import Progress

if TYPE_CHECKING:  # numpy is for the verb, not for its help
    from ingot.evaluation.compare import Comparison, Difference
    from ingot.evaluation.pairing import Kept

GOT_WORSE = 3
SIGNS = {1: "▲", -1: "▼", 0: "="}


def compare(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="A [B ...]",
            help="Folders of evaluations, or runs: one alone is its base against its tuned model, of several the tuned "
            "models; all are held against the first.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Write comparison.json and the page with every row here.", show_default=False),
    ] = None,
    every_slice: Annotated[
        bool, typer.Option("--slices", help="Compare parts of the rows too: by every field that there is.")
    ] = False,
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slice",
            metavar="FIELD",
            help="Compare the parts of this field: a column that evaluate.slices or a task file named, label (of "
            "classes) or length (of prompts); several may be named.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="A difference is shown by an adjusted p-value below this.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    rows: Annotated[
        str, typer.Option(help="same: refuse models of other rows; common: compare the rows that both have.")
    ] = "same",
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit with 3 when any metric is shown to be worse.")
    ] = False,
    judge: JudgeNames = None,
    judge_key_env: JudgeKey = None,
    rubric: Rubric = None,
    allow_http: AllowHttp = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether one model is better than another: paired by rows, with intervals, adjusted for the number of tests.

    Exit code 2: they cannot be compared; the message names what differs. 3, with --fail-if-worse: something got worse.

    Examples:

        ingot compare runs/quickstart-20261124-101500-1a2b3c

        ingot compare runs/a runs/b --slices --out compared

        ingot compare runs/a runs/b --fail-if-worse --alpha 0.01

        ingot compare evaluations/nano runs/a/evaluation/tuned --json

        ingot compare runs/a --judge https://api.openai.com/v1#gpt-4.1
    """

    def work() -> None:
        from ingot import comparing
        from ingot.evaluation.compare import ALL_SLICES
        from ingot.judging import named_judge

        if every_slice and slices:
            raise RecipeError("--slice", ", ".join(slices), "--slices compares every field; name one of the two")
        how = named_judge(judge or [], judge_key_env, allow_http, rubric)
        if how is None and allow_http:
            raise RecipeError("--allow-http", True, "changes nothing without --judge; name who judges, or remove it")
        wanted = ALL_SLICES if every_slice else tuple(slices or ())
        found = comparing.compare(
            *places, out=folder, slices=wanted, alpha=alpha, confidence=confidence, rows=cast("Kept", rows)
        )
        told = None if how is None else comparing.judge_folders(places, how, folder, Progress(quiet=as_json))
        if as_json:
            plain = [it.as_dict() for it in found]
            print(json.dumps(plain if told is None else with_preferences(plain, told), ensure_ascii=False))
        else:
            _show(found)
            for comparison, preferred in zip(found, told or (), strict=False):
                for task, it in preferred.items():
                    line = f"{task}: {preference_text(it, comparison.names)}"
                    out.print(line, markup=False, highlight=False, soft_wrap=True)
            if folder is not None:
                out.print(f"page: {short(folder)}/report.html", highlight=False, soft_wrap=True)
        worse = _worse(found)
        if fail_if_worse and worse:
            for line in worse:
                err.print(line, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(GOT_WORSE)

    guarded(work, debug)


def _show(found: "Sequence[Comparison]") -> None:
    from ingot.evaluation.report import notes_of

    for comparison in found:
        second, first = comparison.names[1], comparison.names[0]
        out.print(Text.assemble((second, "bold"), " against ", (first, "bold")))
        out.print(_differences(comparison))
        for note in notes_of(comparison):
            out.print(note, markup=False, highlight=False, soft_wrap=True)
    tests = [it.slice is not None for comparison in found for it in comparison.differences]
    adjusted = f"p (Holm): adjusted for {tests.count(False)} tests of whole tasks"
    adjusted += f", and for {tests.count(True)} of slices among themselves" if any(tests) else ""
    alpha = found[0].alpha
    out.print(f"{adjusted}; ▲ better, ▼ worse: below {alpha:g}", markup=False, highlight=False, soft_wrap=True)
    seen = f"sees: the smallest difference that such rows show four times in five, tested alone at {alpha:g}"
    out.print(seen, markup=False, highlight=False, soft_wrap=True)


def _differences(comparison: "Comparison") -> Table:
    from ingot.evaluation.report import p_text

    table = Table(box=None, header_style="bold")
    table.add_column("metric, task", overflow="fold")  # it gives way: figures stay whole
    for column in ("difference", "p", "p (Holm)", "better, worse", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for it in comparison.differences:
        # The interval below its value: the columns then fit a terminal of 80 characters.
        shown = _figures(it).replace(" [", "\n[")
        counts = "" if it.won is None else f"{it.won:,}, {it.lost:,}"
        named = Text.assemble(f"{SIGNS[it.verdict(comparison.alpha)]} {it.metric}\n", (it.slice or it.task, "dim"))
        seen = "" if it.detectable is None else f"\nsees {it.detectable:.2g}"
        rows = Text.assemble(f"{it.paired.n:,}", (seen, "dim"))
        table.add_row(named, Text(shown), p_text(it.p_value), p_text(it.p_adjusted), counts, rows)
    return table


def _figures(it: "Difference") -> str:
    from ingot.evaluation.metrics import METRICS
    from ingot.evaluation.report import with_interval

    found = it.paired
    return with_interval(found.difference, found.low, found.high, METRICS[it.metric].decimals, sign="+")


def _worse(found: "Sequence[Comparison]") -> list[str]:
    """A line for everything that is shown to be worse."""
    from ingot.evaluation.report import p_text

    return [
        f"worse: {comparison.names[1]}: {it.task} {it.metric}"
        + (f" where {it.slice}" if it.slice else "")
        + f": {_figures(it)}, adjusted p {p_text(it.p_adjusted)}"
        for comparison in found
        for it in comparison.differences
        if it.verdict(comparison.alpha) < 0
    ]
