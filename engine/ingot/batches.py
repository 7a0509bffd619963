"""The verb `batch`: a model's answers to files of rows."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ingot.address import Address, is_address, key_for, read_address
from ingot.batching.answering import RETRIES, Answerer, Patience
from ingot.batching.job import Job, allowed_errors
from ingot.batching.local import CountingRuntime, Requests, Rows, forms_of, kinds_of
from ingot.batching.manifest import Manifest, Plan, check_folder, check_same, writing
from ingot.batching.remote import FORMS, KINDS, Remote
from ingot.batching.rows import Failure, Reading
from ingot.batching.sinks import FORMATS, check_format, json_text
from ingot.batching.sources import Content, Cursor, Input, is_batch_file
from ingot.errors import DataError, FieldError, ModelError, TooManyErrors
from ingot.evaluation.api import Api, Limits
from ingot.evaluation.endpoint import model_of
from ingot.model.adapted import is_packaged_adapter
from ingot.model.runtime import describe
from ingot.progress import Progress
from ingot.promoting import NO_POLICY, require_promotion
from ingot.ranks import Ranks, on_main, pick_device, process_group, read_ranks
from ingot.recipe import Parallel
from ingot.remotes import Reach
from ingot.runfolder import write_json
from ingot.stages import servable
from ingot.subjects import Target, open_target

QUIET = Progress(quiet=True)
BUCKET_ROWS, MOST_BUCKETS = 512, 2_000
TRIED = 3  # rows that a dry run asks
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Options:
    """How a batch is read and written. `keep` and `mapping`: new name -> column of the input. `bucket_rows`: rows a
    part, decided by their number where None. `name`: what lines of a batch file call the model.
    """

    file_format: str = "jsonl"
    params: dict[str, Any] = field(default_factory=dict)
    mapping: dict[str, str] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    id_column: str | None = None
    max_errors: str = "10%"
    retries: int = RETRIES
    limit: int | None = None
    bucket_rows: int | None = None
    name: str | None = None
    override: str | None = None
    reach: Reach | None = None


def batch(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Answer every row of `source` (a file, a folder, a glob) with `model` into part files in the folder `output`.

    `model`: a run, a package, a Hugging Face folder, `models:/NAME/VERSION`, `ingot://`, `hf://`, or an endpoint
    `http(s)://HOST/v1#MODEL`. The same call goes on where an earlier one was interrupted. Ranks of one job share the
    rows, and so do processes that are started with the same arguments.

    Returns what was done, as plain values; on ranks other than 0 nothing. `dry_run`: counts the rows, answers the first
    few, and writes nothing.

    Raises TooManyErrors when more rows fail than allowed, NotPromoted, and IngotError and its other children.
    """
    options, folder, ranks = options or Options(), Path(output), read_ranks()
    progress = progress if ranks.main else QUIET
    device = pick_device(ranks)
    if ranks.local_world > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.local_world))
    started = time.perf_counter()
    with ExitStack() as held:
        with process_group(ranks, Parallel(strategy="ddp", backend="gloo"), torch.device("cpu")):
            work = on_main(lambda: _prepare(str(model), str(source), folder, options, progress))
            answerer = held.enter_context(_answerer(work, options, device))
            on_main(answerer.check)
            if dry_run:
                return _tried(work, answerer) if ranks.main else {}
            manifest = Manifest(folder, work.plan)
            held.callback(manifest.close)
            on_main(manifest.begin)
        # From here on ranks share nothing but the folder: one that dies takes no other with it.
        manifest.refresh()
        before = manifest.answers + manifest.errors
        if before:
            progress.note(f"{folder}: {before:,} of {work.plan.rows:,} rows are done from before")
        with progress.stage("batch", total=work.plan.rows - before, unit="rows") as bar:
            job = Job(
                manifest,
                Cursor(work.source, work.content),
                work.reading,
                answerer,
                options.file_format,
                allowed_errors(options.max_errors, work.plan.rows),
                lambda rows, errors: bar.advance(rows, errors=str(errors)),
            )
            try:
                job.run()
            except TooManyErrors as error:
                error.printed = not ranks.main
                error.summary = _ended(manifest, before, time.perf_counter() - started, work.content.repeated, ranks)
                raise
        return _ended(manifest, before, time.perf_counter() - started, work.content.repeated, ranks)


@dataclass(frozen=True)
class _Work:
    """What is decided before the model is loaded, which is in `folder`, or behind `address`."""

    source: Input
    content: Content
    reading: Reading
    plan: Plan
    name: str
    folder: Path | None
    address: Address | None


def _prepare(model: str, uri: str, folder: Path, options: Options, progress: Progress) -> _Work:
    """Everything that can be refused without the model: what is wrong is said before anything is written or loaded."""
    if options.file_format not in FORMATS:
        raise FieldError("--format", options.file_format, f"write one of {', '.join(FORMATS)}")
    check_format(options.file_format)
    allowed_errors(options.max_errors, 0)
    before = check_folder(folder)
    source = Input(uri, options.limit, folder)
    requests = is_batch_file(source)
    if requests:
        _require_plain(options)
    address: Address | None = None
    if is_address(model):
        forms: tuple[tuple[str, ...], ...] = FORMS
        reach = options.reach or Reach()
        address = read_address(model, "MODEL")
        key_for(address, reach.key_env, reach.allow_http, "MODEL")
        outputs, facts, name, place = KINDS, {"endpoint": str(address)}, "", None
    else:
        if options.reach is not None:
            raise FieldError("MODEL", model, "is no endpoint: remove --key-env, --allow-http and --at-once")
        target = _opened(model, options.override, progress)
        place = target.adapter or target.folder
        try:
            task = str(describe(place)["task"])
            forms, outputs = forms_of(task), kinds_of(task)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("MODEL", model, f"does not say what it is for: {error}") from error
        facts, name = {"fingerprint": target.fingerprint()}, options.name or target.name
    reading = Reading(() if requests else forms, options.id_column, options.keep, options.mapping, requests)
    if not requests:
        reading.check_mapping()
    for column, kept in options.keep.items():
        if column == "id" or column in outputs:
            fix = f"the answers have a column of this name; call it otherwise: --keep input_{column}={kept}"
            raise FieldError("--keep", column, fix)
    with progress.stage("count", total=len(source.paths), unit="files") as bar:
        content = source.count(reading, lambda: bar.advance(1))
    if content.repeated:
        _tell_repeated(content, requests, progress)
    if requests and address is None:
        _require_name(source, name)
    elif options.name is not None:
        raise FieldError("--name", options.name, "goes with OpenAI batch files and a model of this machine; remove it")
    size = options.bucket_rows or (before or {}).get("bucket_rows") or _bucket_rows(content.rows)
    job = {
        "files": [asdict(one) for one in content.files],
        "model": facts,
        "format": options.file_format,
        "params": options.params,
        "map": options.mapping,
        "keep": options.keep,
        "id_column": options.id_column,
        "limit": options.limit,
        "bucket_rows": size,
    }
    job = json.loads(json.dumps(job))  # as it will be read back
    if before is not None:
        check_same(folder, before["job"], job)
    return _Work(source, content, reading, Plan(job, content.rows, size, content.kinds | outputs), name, place, address)


def _tell_repeated(content: Content, requests: bool, progress: Progress) -> None:
    """Raise DataError for lines of a batch file that share a custom_id, as OpenAI does; of rows only say it."""
    count = f"{content.repeated:,} rows have the id of an earlier one"
    if requests:
        fix = f"{count}, and answers are told apart by it alone; give each line its own"
        raise DataError("custom_id", "repeated", fix, where=content.first_repeated)
    progress.note(f"batch: {count}, the first at {content.first_repeated}; their answers stand in the rows' order")


def _bucket_rows(rows: int) -> int:
    """Rows a bucket: few, so that little is lost with a killed process, and not too many buckets for one manifest."""
    return max(BUCKET_ROWS, -(-rows // MOST_BUCKETS))


def _require_plain(options: Options) -> None:
    """Raise FieldError for options that make no sense with lines of a batch file, which say everything themselves."""
    given = {
        "--format": "" if options.file_format == "jsonl" else options.file_format,
        "--param": options.params,
        "--map": options.mapping,
        "--keep": options.keep,
        "--id-column": options.id_column,
    }
    for name, value in given.items():
        if value:
            fix = "the input is an OpenAI batch file, whose lines say it all, and so is the output; remove it"
            raise FieldError(name, value, fix)


def _require_name(source: Input, name: str) -> None:
    """Raise FieldError where the first line asks another model: all lines would be refused."""
    row = source.first()
    body = getattr(row, "values", {}).get("body")
    asked = body.get("model") if isinstance(body, dict) else None
    if isinstance(asked, str) and asked != name:
        raise FieldError("--name", name, f"the lines ask the model {asked!r}; to answer as that one, --name {asked}")


def _opened(model: str, override: str | None, progress: Progress) -> Target:
    """The model, if it may be used: as `ingot serve` asks."""
    local = "://" not in model and not model.startswith("models:/")
    place = servable(Path(model).expanduser()) if local else Path(model)
    target = open_target(str(place) if local else model)
    if target.adapter is not None and not is_packaged_adapter(target.adapter):
        fix = "is an adapter without its task and the hash of its base; give a package of it (package.forms: adapter)"
        raise ModelError("MODEL", model, fix)
    cleared = require_promotion(Path(model) if local else target.adapter or target.folder, override)
    if local and place != Path(model) and (place / "MLmodel").is_file():
        require_promotion(place)
    if cleared.status != NO_POLICY:
        progress.note(cleared.sentence)
    return target


@contextmanager
def _answerer(work: _Work, options: Options, device: torch.device) -> Iterator[Answerer]:
    """What answers, loaded on this rank's device."""
    patience = Patience(options.retries)
    answerer: Answerer
    if work.address is not None:
        reach = options.reach or Reach()
        key = key_for(work.address, reach.key_env, reach.allow_http, "MODEL")
        api = Api(work.address, key, Limits(at_once=reach.at_once))
        answerer = Remote(api, model_of(api), options.params, work.reading.requests)
    else:
        try:
            runtime = cast(CountingRuntime, CountingRuntime.load(str(work.folder), str(device)))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("MODEL", str(work.folder), f"does not load: {error}") from error
        requests = work.reading.requests
        answerer = Requests(runtime, work.name, patience) if requests else Rows(runtime, options.params, patience)
    try:
        yield answerer
    finally:
        answerer.close()


def _tried(work: _Work, answerer: Answerer) -> dict[str, Any]:
    """What a batch would do, and answers to its first rows."""
    count = min(TRIED, work.plan.rows)
    rows = Cursor(work.source, work.content).take(0, count)
    entries = [work.reading.entry(row, place) for place, row in enumerate(rows)]
    asked = [entry for entry in entries if entry.problem is None]
    found = dict(zip((entry.place for entry in asked), answerer.answer(asked), strict=True))
    tried: list[dict[str, Any]] = []
    for entry in entries:
        outcome = entry.problem or found[entry.place]
        said = {"error": outcome.message} if isinstance(outcome, Failure) else {"answer": outcome}
        tried.append({"id": entry.id, **said})
    return {
        "status": "dry run",
        "files": len(work.content.files),
        "rows": work.plan.rows,
        "buckets": work.plan.buckets,
        "form": "OpenAI batch file" if work.reading.requests else "rows",
        "tried": json.loads(json_text(tried)),  # ids may be dates
    }


def _ended(manifest: Manifest, before: int, seconds: float, repeated_ids: int, ranks: Ranks) -> dict[str, Any]:
    """What the batch has come to, also written beside its parts; nothing on ranks other than 0."""
    if not ranks.main:
        return {}
    manifest.refresh()
    rows = manifest.answers + manifest.errors
    found = {
        "output": str(manifest.folder),
        "status": manifest.status,
        "rows": manifest.plan.rows,
        "answers": manifest.answers,
        "errors": manifest.errors,
        "repeated_ids": repeated_ids,
        "parts": sum(bool(one.answers) for one in manifest.done.values()),
        "tokens": manifest.tokens(),
        "rows_from_before": before,
        "seconds": round(seconds, 3),
        "rows_per_second": round((rows - before) / seconds, 3) if seconds > 0 else 0.0,
    }
    with writing(manifest.folder):
        write_json(manifest.folder / SUMMARY_FILE, found)
    return found
