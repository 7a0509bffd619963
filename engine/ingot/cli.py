"""The command line: typer verbs over `ingot.verbs`. torch is imported only by the verb that needs it."""

import json
import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ingot.batch_command import batch
from ingot.cache_command import cache
from ingot.check_command import check
from ingot.command import Debug, Json, Override, Overrides, RecipeFile, Verbs, guarded, out
from ingot.compare_command import compare
from ingot.conform_command import conform
from ingot.display import short, show_summary
from ingot.errors import IngotError, NotPromoted, RecipeError
from ingot.evaluate_command import evaluate
from ingot.keys_command import keys
from ingot.launch.detect import detect
from ingot.models_command import models
from ingot.progress import Progress
from ingot.recipe import Recipe
from ingot.recipe_io import json_schema, load_recipe
from ingot.serve_command import serve

# Bars and notices of libraries would break into ours; a user's own setting of these wins.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at import of kernels that only its 4-bit layers want

app = typer.Typer(
    name="ingot",
    cls=Verbs,
    help="One recipe from a foundation model and data to a tested, servable model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Resume = Annotated[
    Path | None, typer.Option("--resume", help="Folder of an interrupted run to continue.", show_default=False)
]
ProfileSteps = Annotated[
    int | None,
    typer.Option("--profile", help="Record so many steps with torch's profiler: diagnose.profile_steps.", min=1),
]
MemorySnapshot = Annotated[
    bool, typer.Option("--memory-snapshot", help="Record the GPU's allocations of them: diagnose.memory_snapshot.")
]


class Part(StrEnum):
    """Which rows `inspect` shows."""

    train = "train"
    validation = "validation"
    test = "test"


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    summary: Annotated[
        Path | None, typer.Option(help="Also write what happened as JSON to this file.", show_default=False)
    ] = None,
    resume: Resume = None,
    profile: ProfileSteps = None,
    memory_snapshot: MemorySnapshot = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole path: fine-tune, evaluate base and tuned, package, verify, ask the endpoint one question.

    Exit code 3: it ended behind the evaluation, because the promotion policy (`evaluate.promotion`) is not met.

    Examples:

        ingot run recipes/quickstart.yaml

        ingot run recipes/quickstart.yaml train.epochs=2 --summary summary.json
    """

    def work() -> None:
        loaded = load_recipe(recipe, [*(overrides or ()), *_diagnosed(profile, memory_snapshot)])
        if summary is not None and not summary.resolve().parent.is_dir():
            raise RecipeError("--summary", str(summary), f"the folder {summary.resolve().parent} does not exist")
        from ingot import verbs

        refused: NotPromoted | None = None
        try:
            result = verbs.run(loaded, home=recipe.resolve().parent, resume=resume, progress=Progress(quiet=as_json))
        except NotPromoted as error:
            refused, result = error, error.summary or {}
        if not result:  # not rank 0
            return
        if summary is not None:
            summary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if as_json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            show_summary(result, out)
        if refused is not None:
            raise refused

    guarded(work, debug)


@app.command()
def finetune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = None,
    profile: ProfileSteps = None,
    memory_snapshot: MemorySnapshot = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train only; leaves checkpoints, adapter and merged model in a new run's folder.

    Examples:

        ingot finetune recipes/quickstart.yaml adapter.rank=8

        torchrun --nproc-per-node 2 -m ingot finetune recipes/quickstart.yaml

        ingot finetune recipes/quickstart.yaml --resume runs/quickstart-20261124-101500-1a2b3c
    """

    def work() -> None:
        loaded = load_recipe(recipe, [*(overrides or ()), *_diagnosed(profile, memory_snapshot)])
        from ingot import verbs

        done = verbs.finetune(loaded, home=recipe.resolve().parent, resume=resume, progress=Progress(quiet=as_json))
        if detect(os.environ).main:
            record = done.record()
            _result(
                as_json,
                {"run": str(done.folder), **record["stages"]["finetune"]},
                f"run: {done.folder}\nnext: ingot evaluate {short(done.folder)}",
            )

    guarded(work, debug)


app.command()(evaluate)
app.command()(compare)


@app.command()
def package(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    form: Annotated[
        list[str] | None,
        typer.Option("--form", help="merged, adapter, quantized or gguf in place of the recipe's.", show_default=False),
    ] = None,
    override: Override = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run's tuned model as an MLflow model, and prove that a clean process gets the same answers from it.

    Exit code 3: the recipe's promotion policy is not met, and nothing is written.

    Examples:

        ingot package runs/quickstart-20261124-101500-1a2b3c

        ingot package runs/quickstart-20261124-101500-1a2b3c --form adapter --form quantized

        ingot package runs/quickstart-20261124-101500-1a2b3c --override "Jane Doe: customer demo, ticket 123"
    """

    def work() -> None:
        from ingot import verbs
        from ingot.runfolder import open_run

        path = verbs.package(folder, override=override, forms=form, progress=Progress(quiet=as_json))
        run = open_run(folder)
        made = {name: str(run.form(name)) for name in dict.fromkeys(form or run.recipe.package.forms)}
        lines = [f"package: {place}" for place in made.values()]
        _result(
            as_json,
            {"package": str(path), "forms": made},
            "\n".join([*lines, f"next: ingot serve {short(path)}"]),
        )

    guarded(work, debug)


@app.command()
def consolidate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, or a checkpoint's.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a sharded checkpoint into one folder that transformers (or, for an adapter, peft) loads.

    Examples:

        ingot consolidate runs/quickstart-20261124-101500-1a2b3c adapter

        ingot consolidate runs/quickstart-20261124-101500-1a2b3c/checkpoints/step-000100 adapter-100
    """

    def work() -> None:
        from ingot import verbs

        path = verbs.consolidate(source, folder)
        _result(as_json, {"folder": str(path)}, f"consolidated: {path}")

    guarded(work, debug)


@app.command()
def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    part: Annotated[Part, typer.Option(help="Which rows.")] = Part.train,
    rows: Annotated[int, typer.Option(help="How many rows.", min=1)] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show rows as the model sees them: what is learned in green, what is only read dimmed, every special token.

    Example:

        ingot inspect recipes/quickstart.yaml --rows 5
    """

    def work() -> None:
        loaded = load_recipe(recipe, overrides or ())
        from ingot import verbs

        verbs.inspect(loaded, recipe.resolve().parent, part.value, rows, None if as_json else out)

    guarded(work, debug)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors and forms.

    Example:

        ingot schema > recipe.schema.json
    """
    print(json.dumps(json_schema(), indent=2))


@app.command()
def runs(
    output: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path(Recipe.model_fields["output"].default),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List runs, newest first, with their scores.

    Example:

        ingot runs --json
    """

    def work() -> None:
        from ingot.runfolder import list_runs

        found = list_runs(output)
        if as_json:
            print(json.dumps(found, ensure_ascii=False))
            return
        if not found:
            raise IngotError(f"no runs in {output.resolve()}; start one with: ingot run recipes/quickstart.yaml")
        table = Table(box=None, header_style="bold")
        table.add_column("run", no_wrap=True, min_width=max(len(short(Path(record["folder"]))) for record in found))
        for column in ("created", "status", "scores (tuned)"):
            table.add_column(column)
        for record in found:
            scores = record["metrics"].get("tuned") or {}
            shown = "\n".join(f"{name} {score['value']:.3f}" for name, score in scores.items())
            created = record["created"][:16].replace("T", " ")
            table.add_row(short(Path(record["folder"])), created, record["status"], shown)
        out.print(table)

    guarded(work, debug)


def _diagnosed(profile: int | None, memory_snapshot: bool) -> list[str]:
    """The flags as settings."""
    settings = [f"diagnose.profile_steps={profile}"] if profile is not None else []
    return [*settings, "diagnose.memory_snapshot=true"] if memory_snapshot else settings


app.command()(batch)
app.command()(serve)
app.add_typer(keys, name="keys")
app.command()(cache)
app.command()(check)
app.add_typer(models, name="models")
app.command()(conform)


def main() -> None:
    """Entry point of `ingot` and `python -m ingot`."""
    app()


def _result(as_json: bool, values: dict[str, Any], text: str) -> None:
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        out.print(text, highlight=False, soft_wrap=True)
