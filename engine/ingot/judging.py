"""When answers are stored, judges grade them: nothing of the measured model is asked again, and a judge that is down
costs its own metric only.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ingot.address import key_for, read_address
from ingot.errors import EndpointError, IngotError, RecipeError
from ingot.evaluation.api import Api, Limits
from ingot.evaluation.definition import Definition
from ingot.evaluation.endpoint import Endpoint
from ingot.evaluation.judge import Case, Grader
from ingot.evaluation.kept import Kept, key_of
from ingot.evaluation.prompted import DefinedTask
from ingot.evaluation.result import Evaluation, write_text
from ingot.evaluation.runner import score_of
from ingot.evaluation.task import Task
from ingot.evaluation.verdicts import (
    AT_ONCE,
    METRIC_OF,
    cases_of,
    statistic_of_verdicts,
    verdicts_of,
    with_verdicts,
    without_verdicts,
)
from ingot.progress import Progress
from ingot.recipe import JUDGED, Evaluate, Judge

FILE = "judged.json"
WHO = ("endpoint", "key_env", "allow_http")  # of a Judge
KEPT = "verdicts-{}.jsonl"


def named_judge(endpoints: Sequence[str], key_env: str | None, allow_http: bool, rubric: str | None) -> Judge | None:
    """The judges that a command line names; None where it names none. Raises RecipeError for one that is none, and for
    what changes nothing without one.
    """
    if not endpoints:
        for name, value in (("--judge-key-env", key_env), ("--rubric", rubric)):
            if value is not None:
                raise RecipeError(name, value, "changes nothing without --judge; name who judges, or remove it")
        return None
    told: dict[str, Any] = {"endpoint": list(dict.fromkeys(endpoints)), "key_env": key_env, "allow_http": allow_http}
    for place in endpoints:
        if read_address(place, "--judge").model is None:
            raise RecipeError("--judge", place.partition("?")[0], "must name the judge's model: URL#MODEL")
    return Judge(**told | ({"rubric": rubric} if rubric else {}))


def judges_of(
    tasks: Iterable[tuple[Definition, Path]], named: Judge | None, fields: Sequence[str] = WHO
) -> dict[str, Judge]:
    """Task -> its judge, of those that have one: what the task's file says, but for `fields`, which `named` says if it
    is given; where the file says nothing, `named`.
    """
    found: dict[str, Judge] = {}
    for definition, _ in tasks:
        own: Judge | None = definition.judge
        if definition.kind not in JUDGED:
            continue
        if named is not None:
            own = named if own is None else own.model_copy(update={name: getattr(named, name) for name in fields})
        if own is not None and own.endpoint:
            found[definition.task] = own
    return found


def check_judges(hows: Mapping[str, Judge], named: Judge | None) -> None:
    """Raise RecipeError for a judge whose key is not set or could not be sent, and where `named` has nothing to do."""
    if named is not None and not hows:
        raise RecipeError("--judge", ", ".join(named.endpoint), f"grades written answers only: {', '.join(JUDGED)}")
    for how in hows.values():
        for place in how.endpoint:
            key_for(read_address(place, "judge"), how.key_env, how.allow_http, "judge")


@contextlib.contextmanager
def graders_of(how: Judge, folder: Path) -> Iterator[list[Grader]]:
    """The judges of `how`, with the verdicts kept in `folder`. Raises RecipeError for a key that is not set."""
    with contextlib.ExitStack() as stack:
        graders = []
        for place in how.endpoint:
            address = read_address(place, "judge")
            key = key_for(address, how.key_env, how.allow_http, "judge")
            api = stack.enter_context(Api(address, key, Limits(at_once=how.at_once)))
            who = {"judge": address.model, "endpoint": address.host}
            kept = Kept(folder / KEPT.format(key_of(who)[:8]), who)
            graders.append(Grader(f"{address.model} at {address.host}", Endpoint(api, str(address.model), kept), how))
        yield graders


def judge_evaluations(
    found: Mapping[str, Evaluation],
    hows: Mapping[str, Judge],
    tasks: Iterable[Task],
    folder: Path,
    section: Evaluate,
    progress: Progress,
) -> dict[str, Evaluation]:
    """The evaluations of `folder`, those of the tasks in `hows` with their judge's metric; where a judge fails, without
    it and with the reason.
    """
    done, asked = dict(found), {task.name: task for task in tasks}
    for task, how in hows.items():
        evaluation = found[task]
        if evaluation.kind not in JUDGED:
            continue
        try:
            with (
                graders_of(how, folder) as graders,
                progress.stage(f"judge {evaluation.name} {task}", total=len(evaluation.samples), unit="rows") as bar,
            ):
                names, verdicts = verdicts_of(graders, cases_of(evaluation.samples), bar.advance)
                statistic = statistic_of_verdicts(graders, names, verdicts, _gold(asked[task]))
            done[task] = with_verdicts(evaluation, statistic, how, folder, section)
        except IngotError as error:
            progress.note(f"warning: {task}: {METRIC_OF[how.kind]} is missing: {error}")
            done[task] = without_verdicts(evaluation, how, str(error), folder)
    return done


def judge_models(
    results: Mapping[str, dict[str, Evaluation]],
    hows: Mapping[str, Judge],
    tasks: Sequence[Task],
    home: Path,
    section: Evaluate,
    progress: Progress,
) -> dict[str, dict[str, Evaluation]]:
    """`judge_evaluations` of each model, kept in `home/MODEL`. A task on which one of them could not be judged has the
    metric of none: models are shown side by side.
    """
    done = {name: judge_evaluations(it, hows, tasks, home / name, section, progress) for name, it in results.items()}
    for task, how in hows.items():
        lacking = [name for name, it in done.items() if METRIC_OF[how.kind] not in it[task].scores]
        for name in done if lacking else ():
            if name not in lacking and done[name][task].kind in JUDGED:
                reason = f"{lacking[0]} could not be judged"
                done[name][task] = without_verdicts(done[name][task], how, reason, home / name)
    return done


def _gold(task: Task) -> list[str | None]:
    """People's grades of a task's rows, in order; none where its file names no column of them."""
    how = task.definition.judge if isinstance(task, DefinedTask) else None
    if how is None or how.gold is None:
        return []
    return [item.request.gold for window in task.windows() for item in window]


def prefer(
    first: Mapping[str, Evaluation],
    second: Mapping[str, Evaluation],
    how: Judge,
    folder: Path,
    section: Evaluate,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Task -> how often judges prefer the second model's answer to the first's: `win_rate` with its interval, wins,
    ties, losses and the rest; or `missing`, the reason. Rows that one of them lacks are left out. Verdicts are kept in
    `folder`.
    """
    told: dict[str, dict[str, Any]] = {}
    how = how.model_copy(update={"kind": "pairwise"})
    for task in (it for it in first if it in second and first[it].kind in JUDGED):
        try:
            with graders_of(how, folder) as graders:
                names, verdicts = verdicts_of(graders, _pairs(first[task], second[task]))
                statistic = statistic_of_verdicts(graders, names, verdicts)
            score = score_of(METRIC_OF["pairwise"], statistic, section)
            told[task] = {"win_rate": score.value, "low": score.low, "high": score.high, "n": score.n, **score.details}
        except (EndpointError, RecipeError) as error:
            progress.note(f"warning: {task}: {METRIC_OF['pairwise']} is missing: {error}")
            told[task] = {"missing": str(error)}
    return told


def _pairs(first: Evaluation, second: Evaluation) -> Iterator[list[tuple[str, Case]]]:
    others: dict[str, list[str]] = {}
    for row in first.samples:
        others.setdefault(row.document, []).append(str(row.output.get("text", row.prediction)))
    rows = iter(second.samples)
    while some := list(islice(rows, AT_ONCE)):
        yield [
            (row.id, Case(row.prompt, str(row.output.get("text", row.prediction)), others[row.document].pop(0)))
            for row in some
            if others.get(row.document)
        ]


def write_judged(folder: Path, told: Sequence[Mapping[str, Any]]) -> None:
    """Write `prefer`'s results, one for each model after the first, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
