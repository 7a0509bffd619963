"""`ingot batch`: a model's answers to files of rows."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ingot.command import Debug, Json, Override, err, guarded, out
from ingot.errors import FieldError, TooManyErrors
from ingot.judge_options import AllowHttp, AtOnce, KeyEnv
from ingot.launch.detect import detect
from ingot.progress import Progress

Pairs = list[str] | None


def batch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run, package or Hugging Face folder, models:/NAME/VERSION, ingot://, hf://, or the endpoint "
            "http(s)://HOST/v1#MODEL.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A file, a folder, or a quoted glob: JSONL (also .gz), Parquet, CSV, or OpenAI batch files.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="A new folder, or the one of the same batch, to go on.", show_default=False
        ),
    ],
    file_format: Annotated[str, typer.Option("--format", help="Of the part files: jsonl, parquet or csv.")] = "jsonl",
    param: Annotated[
        Pairs, typer.Option("--param", help="A parameter of the model: max_tokens=64.", show_default=False)
    ] = None,
    mapping: Annotated[
        Pairs, typer.Option("--map", help="Which column the model reads: text=review.", show_default=False)
    ] = None,
    keep: Annotated[
        Pairs,
        typer.Option(help="Copy a column of the input into the output: NAME or NEW=NAME.", show_default=False),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids. None: custom_id, id, else file:line.", show_default=False)
    ] = None,
    max_errors: Annotated[
        str, typer.Option(help="How many rows may fail: a number, a share, or -1 for any number.")
    ] = "10%",
    retries: Annotated[int, typer.Option(help="Further tries of what failed for a moment.", min=0, max=10)] = 2,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", "--limit", help="Only so many rows.", min=1, show_default=False)
    ] = None,
    bucket_rows: Annotated[
        int | None, typer.Option(help="Rows a part. None: 512, more in long inputs.", min=1, show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What lines of a batch file call the model.", show_default=False)
    ] = None,
    key_env: KeyEnv = None,
    allow_http: AllowHttp = False,
    at_once: AtOnce = None,
    override: Override = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the rows, answer the first 3, write nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer every row of files, in order, into part files. The same command goes on after a kill.

    N rows in, N rows out: an answer in a part file, or a line in errors.jsonl. Start it with torchrun, or several
    times, and the rows are shared.

    Exit code 3: the model's promotion policy is not met. 4: more rows failed than --max-errors allows.

    Examples:

        ingot batch runs/quickstart-20261124-101500-1a2b3c mails.jsonl answers --map text=body --keep sender

        ingot batch hf://org/name 'prompts/*.parquet' answers --param max_tokens=64 --format parquet

        ingot batch models:/support/3 requests.jsonl answers --name gpt-4o-mini

        torchrun --nproc-per-node 8 -m ingot batch hf://org/name rows.jsonl answers
    """

    def work() -> None:
        from ingot import batches
        from ingot.remotes import Reach

        own = key_env is not None or at_once is not None or allow_http
        reach = Reach(key_env, allow_http, at_once or Reach().at_once) if own else None
        options = batches.Options(
            file_format=file_format,
            params={key: _value(text) for key, text in _pairs("--param", param).items()},
            mapping=_pairs("--map", mapping),
            keep=_pairs("--keep", keep, alone=True),
            id_column=id_column,
            max_errors=max_errors,
            retries=retries,
            limit=max_rows,
            bucket_rows=bucket_rows,
            name=name,
            override=override,
            reach=reach,
        )
        try:
            found = batches.batch(model, source, output, options, dry_run=dry_run, progress=Progress(quiet=as_json))
        except TooManyErrors as error:
            if as_json and error.summary:
                print(json.dumps(error.summary, ensure_ascii=False))
            raise
        if detect(os.environ).main:
            _show(found, as_json)

    guarded(work, debug)


def _show(found: dict[str, Any], as_json: bool) -> None:
    from ingot.batching.sinks import json_line, json_text, storable

    if as_json:
        print(json_line(found).decode(), end="")
        return
    if found["status"] == "dry run":
        out.print_json(storable(json_text(found)))
        return
    tokens = "".join(f", {count:,} {name} tokens" for name, count in found["tokens"].items())
    out.print(
        f"{found['answers']:,} of {found['rows']:,} rows answered in {found['seconds']:.1f} s "
        f"({found['rows_per_second']:.3g} rows/s{tokens})",
        highlight=False,
    )
    out.print(f"answers: {found['output']}/part-*", highlight=False, soft_wrap=True)
    if found["repeated_ids"]:
        err.print(f"{found['repeated_ids']:,} rows have the id of an earlier one", highlight=False)
    if found["errors"]:
        err.print(f"{found['errors']:,} rows failed: {found['output']}/errors.jsonl", highlight=False, soft_wrap=True)


def _pairs(option: str, given: Pairs, alone: bool = False) -> dict[str, str]:
    """["a=b"] -> {"a": "b"}; with `alone` also ["a"] -> {"a": "a"}. Raises FieldError for other text."""
    found: dict[str, str] = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or (not equals and not alone):
            raise FieldError(option, text, "write NAME=VALUE" if not alone else "write NAME or NEW=NAME")
        if key in found:
            raise FieldError(option, text, f"{key} is there twice; remove one")
        found[key] = value if equals else key
    return found


def _value(text: str) -> Any:
    """A parameter as JSON where it is some, else as the text that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
