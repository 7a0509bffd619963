"""`ingot evaluate`: measure models."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ingot.address import is_address
from ingot.command import Debug, Json, Overrides, guarded, out
from ingot.display import short, show_overlaps, show_promotion, show_scores
from ingot.errors import RecipeError
from ingot.judge_options import AllowHttp, AtOnce, JudgeKey, JudgeNames, KeyEnv, Rubric
from ingot.launch.detect import detect
from ingot.progress import Progress
from ingot.recipe_evaluate import Engine
from ingot.recipe_io import load_recipe

if TYPE_CHECKING:  # numpy is for the verb, not for its help
    from ingot.evaluation.result import Evaluation
    from ingot.recipe import Judge
    from ingot.remotes import Reach

Tasks = Annotated[
    list[Path] | None, typer.Option("--task", help="A task file, ours or the harness's; several may be named.")
]


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="A run's folder (base and tuned are measured), or a recipe (its base model is). With --task: any "
            "model, as a run, package, adapter, folder, ingot://, hf://, models:/NAME/VERSION, or the endpoint "
            "http(s)://HOST/v1#MODEL.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    task: Tasks = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for scores and rows. None: evaluations/MODEL-HASH.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="An adapter's base model, where it names none.", show_default=False)
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Only so many rows a task.", min=1, show_default=False)] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option("--harness", help="A task of lm-evaluation-harness, run by its own library.", show_default=False),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder of further task files for --harness.", show_default=False)
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples for --harness. None: the task's.", min=0, show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="--harness: prompts by the model's chat template.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what was answered before.")] = False,
    key_env: KeyEnv = None,
    allow_http: AllowHttp = False,
    at_once: AtOnce = None,
    judge: JudgeNames = None,
    judge_key_env: JudgeKey = None,
    rubric: Rubric = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows that the model's training saw: those of --task among them are counted, and the scores without "
            "them. Several may be named; a run's own rows are looked at anyway.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="What writes the answers; evaluate.engine has more.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models on rows, with intervals; a run's base against its tuned model, with a paired test.

    Answers are stored as they come: what was interrupted goes on, with any number of ranks, and what is there is only
    scored again. A page with every row is written beside the scores.

    Examples:

        ingot evaluate runs/quickstart-20261124-101500-1a2b3c

        ingot evaluate recipes/quickstart.yaml evaluate.max_rows=50

        ingot evaluate ingot://nano --task recipes/tasks/choose-tool.yaml --out nano

        torchrun --nproc-per-node 2 -m ingot evaluate hf://org/name --task task.yaml --out name

        ingot evaluate http://127.0.0.1:8000/v1#support --task task.yaml

        ingot evaluate hf://org/name --harness arc_easy --max-rows 100
    """

    def work() -> None:
        progress = Progress(quiet=as_json)
        way = "--harness" if harness else "--task" if task else "run" if Path(target).is_dir() else "recipe"
        _require_used(
            way,
            {
                "--harness": harness,
                "--task": task,
                "overrides": overrides,
                "--out": folder,
                "--base": base,
                "--max-rows": max_rows,
                "--include": include,
                "--fewshot": fewshot,
                "--chat": chat or None,
                "--fresh": fresh or None,
                "--key-env": key_env,
                "--allow-http": allow_http or None,
                "--at-once": at_once,
                "--judge": judge,
                "--judge-key-env": judge_key_env,
                "--rubric": rubric,
                "--against": against,
                "--engine": engine,
            },
        )
        if way == "recipe" and not Path(target).is_file():
            fix = "no such file; name a run's folder or a recipe, or measure a model with --task FILE or --harness TASK"
            raise RecipeError("target", target, fix)
        if harness:
            _on_harness(target, harness, base, max_rows, fewshot, chat, include, as_json, engine)
            return
        if task:
            from ingot.judging import named_judge
            from ingot.remotes import Reach

            named = named_judge(judge or [], judge_key_env, allow_http, rubric)
            own = key_env is not None or at_once is not None or (allow_http and named is None)
            reach = Reach(key_env, allow_http, at_once or Reach().at_once) if own or is_address(target) else None
            seen = against or []
            _on_tasks(target, task, overrides or [], folder, base, max_rows, fresh, seen, as_json, reach, named, engine)
            return
        from ingot import verbs
        from ingot.runfolder import open_run
        from ingot.summary import scores_as_dict, scores_of

        if Path(target).is_dir():
            verbs.evaluate(Path(target), fresh=fresh, progress=progress)
            if not detect(os.environ).main:
                return
            result = scores_of(open_run(Path(target)))
        else:
            loaded = load_recipe(Path(target), overrides or ())
            found = verbs.evaluate_base(loaded, home=Path(target).resolve().parent, progress=progress)
            if loaded.evaluate.tasks:
                progress.note("evaluate.tasks are asked of a run's models, or by --task FILE; these are the test rows")
            if loaded.evaluate.judge is not None:
                progress.note("evaluate.judge grades a run's models; nobody was asked here")
            result = scores_as_dict({found.task: found.scores}, None, None)
        if as_json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            show_scores(result, out)
            if "promotion" in result:
                out.print()
                show_promotion(result["promotion"], out)

    guarded(work, debug)


REACH = ("--key-env", "--allow-http", "--at-once", "--judge", "--judge-key-env", "--rubric")
# What each way of measuring takes.
TAKEN = {
    "--harness": ("--harness", "--base", "--max-rows", "--include", "--fewshot", "--chat", "--engine"),
    "--task": ("--task", "overrides", "--out", "--base", "--max-rows", "--fresh", "--against", "--engine", *REACH),
    "run": ("--fresh",),
    "recipe": ("overrides",),
}


def _require_used(way: str, given: dict[str, Any]) -> None:
    """Raise RecipeError for an option that would change nothing, or is there twice in another form."""
    for name, value in given.items():
        if value is None or name in TAKEN[way]:
            continue
        if name == "overrides" and way == "run":
            fix = "a run is measured as its recipe says; settings can be changed only when a recipe is given"
            raise RecipeError(name, value[0], fix)
        if name in TAKEN:
            raise RecipeError(name, ", ".join(map(str, value)), f"{way} measures another way; name one of them")
        ways = [title for title, names in TAKEN.items() if name in names]
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        raise RecipeError(name, shown, f"changes nothing here, it goes with {' or '.join(ways)}; remove it")


def _on_tasks(
    target: str,
    files: list[Path],
    overrides: list[str],
    folder: Path | None,
    base: str | None,
    max_rows: int | None,
    fresh: bool,
    against: list[str],
    as_json: bool,
    reach: "Reach | None",
    judge: "Judge | None",
    engine: Engine | None,
) -> None:
    from ingot import evaluating
    from ingot.evaluation import contamination
    from ingot.task_files import open_task

    definitions = [open_task(file, overrides) for file in files]
    progress = Progress(quiet=as_json)
    place, found = evaluating.measure_target(
        target,
        definitions,
        folder,
        progress,
        base=base,
        max_rows=max_rows,
        fresh=fresh,
        against=against,
        reach=reach,
        judge=judge,
        engine=engine,
    )
    if not detect(os.environ).main:
        return
    overlaps = contamination.summary(place, found)
    if as_json:
        values: dict[str, Any] = {"folder": str(place), "tasks": _plain(found), "contamination": overlaps}
        if missing := _missing(found):
            values["missing"] = missing
        print(json.dumps(values, ensure_ascii=False))
        return
    out.print(_scores(found))
    show_overlaps(overlaps, out)
    out.print(f"\nrows, scores, page: {short(place)}/report.html", highlight=False, soft_wrap=True)


def _on_harness(
    target: str,
    names: list[str],
    base: str | None,
    max_rows: int | None,
    fewshot: int | None,
    chat: bool,
    include: Path | None,
    as_json: bool,
    engine: Engine | None,
) -> None:
    from ingot import evaluating

    found = evaluating.measure_harness(
        target,
        names,
        base=base,
        max_rows=max_rows,
        num_fewshot=fewshot,
        chat=chat,
        include=include,
        engine=engine or "auto",
        note=Progress(quiet=as_json).note,
    )
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    table = Table(box=None, header_style="bold")
    for column in ("task", "metric", "score"):
        table.add_column(column, justify="right" if column == "score" else "left", no_wrap=True)
    for name, result in found.items():
        for metric, value in result["metrics"].items():
            table.add_row(name, metric, f"{value:.4f}")
    out.print(table)


def _plain(found: "dict[str, Evaluation]") -> dict[str, Any]:
    from ingot.evaluation.report import metrics_json

    return {task: metrics_json(evaluation.scores) for task, evaluation in found.items()}


def _missing(found: "dict[str, Evaluation]") -> dict[str, str]:
    """Task -> why it has no judge's metric, of those where one was asked in vain."""
    told = {task: evaluation.about.get("judge", {}) for task, evaluation in found.items()}
    return {task: f"{it['missing']}: {it['reason']}" for task, it in told.items() if "missing" in it}


def _scores(found: "dict[str, Evaluation]") -> Table:
    from ingot.evaluation.metrics import METRICS
    from ingot.evaluation.report import with_interval

    table = Table(box=None, header_style="bold")
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("score", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, evaluation in found.items():
        for metric, score in evaluation.scores.items():
            shown = with_interval(score.value, score.low, score.high, METRICS[metric].decimals)
            table.add_row(task, metric, shown, f"{score.n:,}")
    return table
