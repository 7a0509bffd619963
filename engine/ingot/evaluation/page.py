"""The evaluation's report: one HTML file that loads nothing from elsewhere, and its facts as Markdown and JSON.

Texts of rows stand in the HTML alone: the other two can be posted where prompts may not be seen.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ingot import pages
from ingot.errors import IngotError
from ingot.evaluation import page_data, page_words
from ingot.evaluation import page_flips as flips
from ingot.evaluation import page_pictures as pictures
from ingot.evaluation.page_data import Evaluations, Line
from ingot.evaluation.page_input import Change, Overlap, Promotion
from ingot.evaluation.result import without_nan, write_text
from ingot.track import Tracker

FILES = ("report.html", "report.md", "report.json")
FORMAT = 1
STATIC_ROWS = 20  # that a viewer without scripts shows
HERE = Path(__file__).parent
SYMBOLS = {1: "▲", -1: "▼", 0: "="}
SIGN_NAMES = {1: "better", -1: "worse", 0: "unclear"}


def write_report(
    folder: Path,
    changes: Sequence[Change],
    evaluations: Evaluations,
    title: str,
    promotion: Promotion | None = None,
    contamination: Mapping[str, Overlap] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html`, `report.md` and `report.json` to `folder`, each in one step; returns the first's path.

    Args:
        changes: each model's differences from the first one; empty where nothing was compared.
        evaluations: model -> task -> evaluation.
        contamination: task -> its rows that training saw.
        notes: what a reader of the differences must know.

    Raises IngotError when there is no evaluation.
    """
    view = view_of(changes, evaluations, title, promotion, contamination or {}) | {"notes": list(notes)}
    folder.mkdir(parents=True, exist_ok=True)
    texts = (render(view), page_words.markdown(view), json.dumps(record(view), indent=1, ensure_ascii=False) + "\n")
    for name, text in zip(FILES, texts, strict=True):
        # Half of a character, which a model may well write, cannot be encoded.
        write_text(folder / name, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return folder / FILES[0]


def log_report(tracker: Tracker, folder: Path) -> None:
    """Copy the three files that `write_report` left in `folder` to the run's artifacts, below `report`."""
    for name in FILES:
        tracker.artifact(folder / name, "report")


def view_of(
    changes: Sequence[Change],
    evaluations: Evaluations,
    title: str,
    promotion: Promotion | None,
    contamination: Mapping[str, Overlap],
) -> dict[str, Any]:
    """Everything that the three files show."""
    models, tasks = list(evaluations), page_data.task_names(evaluations)
    if not tasks:
        raise IngotError("there is no evaluation to report on; make one: ingot evaluate")
    lines = page_data.score_lines(evaluations, changes)
    several = len(tasks) > 1
    compared = [name for name in models if any(name in line.changes for line in lines)]
    answers = [page_words.answer(lines, models[0], name, several) for name in compared]
    contests = [
        found
        for task in tasks
        for name in models[1:]
        if task in evaluations[models[0]] and task in evaluations[name]
        if (found := flips.contest(evaluations[models[0]][task], evaluations[name][task])) is not None
    ]
    return {
        "title": title,
        "models": models,
        "tasks": tasks,
        "compared": compared,
        "answers": answers or [page_words.alone(lines)],
        "promotion": promotion,
        "lines": lines,
        "rows": page_data.of_rows(evaluations, changes),
        "contests": contests,
        "contamination": contamination,
        "settings": page_data.different_settings(evaluations) if len(models) > 1 else [],
        "measured": page_data.measured(evaluations),
    }


def render(view: Mapping[str, Any]) -> str:
    """The HTML."""
    (style, style_source), (script, script_source) = (pages.inlined(HERE / f"report.{kind}") for kind in ("css", "js"))
    contests: Sequence[flips.Contest] = view["contests"]
    cards = flips.cards(contests)
    filters: dict[str, Callable[..., Any]] = {"number": _number, "p": page_words.p_text, "whole": _whole}
    return pages.render(
        HERE / "report.html.jinja",
        filters,
        **view,
        # The page obeys this script and no other: what the data brings along could not run even unescaped.
        policy=f"default-src 'none'; style-src {style_source}; script-src {script_source}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        symbols=SYMBOLS,
        sign_names=SIGN_NAMES,
        states=flips.STATES,
        state_symbols={"better": "▲", "broke": "▼", "wrong": "✗", "right": "✓", "same": "="},
        panels=pictures.forest(_intervals(view)),
        cards=cards,
        static=STATIC_ROWS,
        slices=flips.slice_names(cards),
        n_rows=sum(len(one.states) for one in contests),
        tally=_tally(contests),
    )


def record(view: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as plain values for JSON; a number that is undefined is null."""
    promotion: Promotion | None = view["promotion"]
    return without_nan(
        {
            "format": FORMAT,
            **{name: view[name] for name in ("title", "models", "answers")},
            "notes": view.get("notes", []),
            "promotion": None if promotion is None else asdict(promotion),
            "scores": [_line(line) for line in view["lines"]],
            "slices": [_line(line) for one in view["rows"] for line in one["slices"]],
            "flips": [
                {"task": it.task, "from": it.a.name, "to": it.b.name, "metric": it.metric, "rows": it.counts()}
                for it in view["contests"]
            ],
            "calibration": [
                {"task": one["task"], **it, "bins": [asdict(part) for part in it["bins"]]}
                for one in view["rows"]
                for it in one["calibration"]
            ],
            "confusion": [
                {
                    "task": one["task"],
                    **{name: it[name] for name in ("model", "classes", "mistakes", "n_mistakes", "n")},
                }
                for one in view["rows"]
                for it in one["confusion"]
            ],
            "lengths": [
                {"task": one["task"], "unit": one["unit"], **it}
                for one in view["rows"]
                if one["lengths"]
                for it in one["lengths"]["series"]
            ],
            "speed": [{"task": one["task"], **it} for one in view["rows"] for it in one["speed"]],
            "settings": view["settings"],
            "contamination": [asdict(it) for it in view["contamination"].values()],
            "measured": view["measured"],
        }
    )


def _line(line: Line) -> dict[str, Any]:
    return asdict(line)


def _intervals(view: Mapping[str, Any]) -> list[pictures.Interval]:
    several_tasks, several_models = len(view["tasks"]) > 1, len(view["compared"]) > 1
    return [
        pictures.Interval(
            page_words.measure_name(line, several_tasks) + (f" · {name}" if several_models else ""),
            line.panel,
            it.value,
            it.low,
            it.high,
            it.sign,
            line.changed(name),
        )
        for line in view["lines"]
        for name, it in line.changes.items()
    ]


def _tally(contests: Sequence[flips.Contest]) -> dict[str, int]:
    """State -> rows of all contests."""
    found: dict[str, int] = {}
    for one in contests:
        for state, n in one.counts().items():
            found[state] = found.get(state, 0) + n
    return {state: found[state] for state in flips.STATES if state in found}


def _whole(sentence: str) -> str:
    """`sentence` with its figures kept on one line each."""
    return re.sub(r"\[[^\]]*\]|p [<=] [\d.]+|[\d,]+ rows", lambda found: found[0].replace(" ", "\xa0"), sentence)


def _number(value: float | None, unit: str = "") -> str:
    """Three significant digits, or a dash where it was not measured."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()
