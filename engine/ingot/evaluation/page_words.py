"""The report's answer in one sentence, and the report as Markdown: the same facts without the texts of rows."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ingot.evaluation.page_data import Line
from ingot.evaluation.page_flips import STATES
from ingot.evaluation.page_input import Change, Overlap, Promotion

SIGNS = {1: "▲ better", -1: "▼ worse", 0: "= not shown"}


def answer(lines: Sequence[Line], first: str, model: str, several_tasks: bool) -> str:
    """Whether `model` is better than `first`, in one sentence with figures."""
    tested = [line for line in lines if model in line.changes]
    better, worse = ([it for it in tested if it.changes[model].sign == sign] for sign in (1, -1))

    def figures(line: Line) -> str:
        change = line.changes[model]
        return f"{line.changed(model)} on {change.n:,} rows, p {p_text(change.p)}"

    def places(found: Sequence[Line]) -> str:
        others = len(found) - 1
        more = f", and on {others} more {'metrics' if others > 1 else 'metric'}" if others else ""
        return f"{measure_name(found[0], several_tasks)}: {figures(found[0])}{more}"

    if better:
        end = f"worse on {places(worse)}" if worse else "nothing got worse"
        return f"{model} is better than {first} on {places(better)}; {end}."
    if worse:
        return f"{model} is worse than {first} on {places(worse)}; nothing got better."
    return f"Between {first} and {model} there is no difference that {_seen(tested, model)}."


def _seen(tested: Sequence[Line], model: str) -> str:
    n = max(line.n for line in tested)
    known = [(line, it) for line in tested if (it := line.changes[model]).detectable is not None]
    if not known:
        return f"{n:,} rows could show"
    line, change = known[0]
    if change.detectable is None or not math.isfinite(change.detectable):
        return f"{n:,} rows could show; so few see none at all"
    least = f"{100 * change.detectable:.2g} points" if line.share else line.number(change.detectable)
    return f"{change.n:,} rows could show; these see {least} or more"


def measure_name(line: Line, several_tasks: bool) -> str:
    """A line's metric, with its task where there are several."""
    return f"{line.task} {line.metric}" if several_tasks else line.metric


def alone(lines: Sequence[Line]) -> str:
    """The answer where nothing was compared: the scores of the first metric."""
    line = lines[0]
    values = ", ".join(f"{name} {scored(line, name)}" for name in line.scores)
    return f"{line.metric} on {line.n:,} rows of {line.task}: {values}."


def scored(line: Line, model: str) -> str:
    """`0.873 [0.840, 0.903]`; without the interval where there is none, and a dash without a score."""
    score = line.scores.get(model)
    if score is None or math.isnan(score.value):
        return "–"
    if math.isnan(score.low):
        return line.number(score.value)
    return f"{line.number(score.value)} [{line.number(score.low)}, {line.number(score.high)}]"


def p_text(p: float) -> str:
    """`< 0.001` or `= 0.012`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def verdict(change: Change) -> str:
    """What a change comes to, in a sign and a word."""
    return SIGNS[change.sign]


def markdown(view: Mapping[str, Any]) -> str:
    """The report for a pull request or a chat. No row's text is in it."""
    lines: list[Line] = view["lines"]
    models: list[str] = view["models"]
    parts = [f"# {escaped(view['title'])}", *(f"**{escaped(text)}**" for text in view["answers"])]
    promotion: Promotion | None = view["promotion"]
    if promotion is not None:
        parts += [f"## {'Promoted' if promotion.granted else 'Not promoted'}", escaped(promotion.sentence)]
        parts += ["\n".join(f"- {'✓' if it.holds else '✗'} {escaped(it.text)}" for it in promotion.conditions)]
    parts += ["## Scores", "\n".join(f"- {escaped(note)}" for note in view.get("notes", ()))]
    parts += [_score_table(lines, models)]
    for one in view["rows"]:
        if one["slices"]:
            parts += [f"## Slices of {escaped(one['task'])}", _score_table(one["slices"], models)]
    if view["contests"]:
        parts += ["## Rows that changed", _flip_table(view["contests"])]
    overlaps: Mapping[str, Overlap] = view["contamination"]
    if overlaps:
        parts += ["## Rows that training saw", _overlap_table(overlaps)]
    if view["settings"]:
        rows = [[it["name"], *it["values"]] for it in view["settings"]]
        parts += ["## What differs in how they were made", _table(["setting", *models], rows)]
    parts.append("## What was measured")
    for task in view["measured"]:
        facts = {"kind": task["kind"], "rows": f"{task['rows']:,}", **task["asked"], **task["about"]}
        parts += [f"### {escaped(task['task'])}", _table(["", ""], [[name, text] for name, text in facts.items()])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _score_table(lines: Sequence[Line], models: Sequence[str]) -> str:
    sliced = any(line.slice for line in lines)
    heads = ["task", *(["slice"] if sliced else []), "metric", "rows", *models]
    changed = [name for name in models if any(name in line.changes for line in lines)]
    for name in changed:
        heads += [f"{name} − {models[0]}", "p", "verdict"]
    rows = []
    for line in lines:
        row = [line.task, *([line.slice or ""] if sliced else []), line.metric, f"{line.n:,}"]
        row += [scored(line, name) for name in models]
        for name in changed:
            it = line.changes.get(name)
            row += [line.changed(name), p_text(it.p).removeprefix("= "), verdict(it)] if it else ["–"] * 3
        rows.append(row)
    return _table(heads, rows)


def _flip_table(contests: Sequence[Any]) -> str:
    states = list(dict.fromkeys(state for it in contests for state in it.counts()))
    rows = [
        [it.where, it.metric, *(f"{it.counts()[state]:,}" if state in it.counts() else "–" for state in states)]
        for it in contests
    ]
    return _table(["task", "by", *(STATES[state] for state in states)], rows)


def _overlap_table(overlaps: Mapping[str, Overlap]) -> str:
    rows = []
    for task, it in overlaps.items():
        found = ", ".join(f"{n:,} {way}" for way, n in it.shared.items())
        without = "; ".join(
            f"{model} {metric} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
            for model, scores in it.without.items()
            for metric, score in scores.items()
        )
        changed = "; ".join(
            f"{change.model} {change.metric} {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}], "
            f"p {p_text(change.p)}"
            for change in it.changes
        )
        rows.append([task, f"{it.rows:,}", found, without or "–", changed or "–"])
    return _table(["task", "rows", "shared with training", "scores without them", "differences without them"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = [[escaped(head) for head in heads], ["---"] * len(heads), *([escaped(it) for it in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def escaped(text: str) -> str:
    """`text` on one line as Markdown that shows it as it is: names and settings are users' data."""
    # No more than needed: names such as exact_match and intervals in brackets stay readable as plain text.
    return re.sub(r"[\\`*<|~$&]|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", " ".join(text.split()))
