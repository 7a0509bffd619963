"""Encoded rows that outlive the process: tokenized and masked once, mapped into memory by every later run and rank.

An entry is a folder, published whole by one rename:

    train.arrow, validation.arrow   rows (table.SCHEMA), with lengths and targets beside them
    questions.jsonl                 what the checks before training need of the test rows
    facts.json                      labels, report, sizes of the files, and the key: everything that decides the rest

Of all ranks of a node one encodes and the others wait for its file lock, which ends with the process that holds it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingot.data.example import Example
from ingot.data.rows import EncodedRows
from ingot.data.sources import file_sha256, fingerprint
from ingot.data.splits import PARTS, DataReport, Scan, examples, readings_of, report_from, scan
from ingot.data.table import ArrowRows, RowWriter
from ingot.data.template import (
    LISTED_DROPS,
    ROWS_PER_CALL,
    DroppedReport,
    encode_all,
    prompt_ids,
    prompt_text,
    reference_text,
    request_of,
)
from ingot.data.turns import Tokenizer
from ingot.errors import DataError
from ingot.progress import Bar, Progress
from ingot.recipe import Data, Recipe

CODE = Path(__file__).parent
INPUTS = CODE.parent / "model" / "inputs.py"  # the encoding that answers share with training
LOCKS = ".locks"
HEAD_START_SECONDS = 5.0
# What of the data section decides which rows there are and how they are encoded.
SETTINGS = (
    "columns", "prompt_template", "validation_share", "test_share", "split_seed", "max_train_rows", "max_tokens",
    "max_target_tokens", "overlap_tokens", "max_bad_rows", "streaming",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A test row as the checks before training see it. `n_prompt`: tokens of its prompt, None where none is asked."""

    where: str
    prompt: str
    reference: str
    n_prompt: int | None


@dataclass(frozen=True)
class Facts:
    """What is known of the data besides the rows. `example`: a row as a request to an endpoint, empty without rows.

    `sources`: encoded training rows of each source.
    """

    labels: tuple[str, ...]
    report: DataReport
    dropped: DroppedReport
    example: dict[str, Any]
    questions: list[Question]
    sources: list[int]


@dataclass(frozen=True)
class EncodedData:
    """The rows to learn from and to watch, in order (a mixture: source by source)."""

    train: EncodedRows
    validation: EncodedRows
    facts: Facts


def encoded(recipe: Recipe, home: Path, tokenizer: Tokenizer, progress: Progress, *, first: bool = True) -> EncodedData:
    """The recipe's data, encoded: from the cache, or now and into it. Streaming: without training rows.

    `first` is for one process of a node, whose bar people see: the others give it a head start. Where the cache cannot
    be written, the memory holds the rows. Raises `DataError` and `ModelError` for everything that is wrong with rows.
    """
    key = key_of(recipe, home, tokenizer)
    root = cache_folder(recipe.data, home)
    entry = root / f"{_slug(recipe)}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    found = _open(entry, Progress(quiet=True))
    try:
        if found is None:
            (root / LOCKS).mkdir(parents=True, exist_ok=True)
            with _locked(root / LOCKS / entry.name, entry, progress, first):
                found = _open(entry, progress)
                if found is None:
                    return _write(entry, key, recipe, home, tokenizer, progress)
    except OSError as error:
        progress.note(f"data: the cache {root} cannot be used ({error.strerror or error}); the memory holds the rows")
        return _encode(None, recipe, home, tokenizer, progress)
    progress.note(f"data: {len(found.train) + len(found.validation):,} rows from the cache ({entry})")
    with contextlib.suppress(OSError):  # it may be read-only
        os.utime(entry)  # when it was last of use, for people who tidy up
    return found


def cache_folder(data: Data, home: Path) -> Path:
    """`data.cache` (relative paths start at `home`), else INGOT_CACHE, else `~/.cache/ingot`."""
    return default_folder() if data.cache is None else home / Path(data.cache).expanduser()


def default_folder() -> Path:
    """INGOT_CACHE, else `~/.cache/ingot`."""
    return Path(os.environ.get("INGOT_CACHE") or Path("~/.cache/ingot").expanduser())


# --- keys ------------------------------------------------------------------------------------------------------


def key_of(recipe: Recipe, home: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides the encoded rows, as plain values: entries hold it, and are named after its hash."""
    settings = recipe.data.model_dump(mode="json", include=set(SETTINGS))
    return {
        "rows": {
            reading.name: fingerprint(reading.source, home, reading.field) for reading in readings_of(recipe.data)
        },
        "data": settings,
        "task": recipe.objective.task,
        "kind": recipe.objective.rows,
        "mask_share": recipe.objective.mask_share if recipe.objective.task == "fill-mask" else None,
        "train_on": recipe.objective.train_on,
        "chat_template": _digest(tokenizer.chat_template),
        "tokenizer": _digest(_tokenizer_state(tokenizer)),
        "code": _digest({path.name: file_sha256(path) for path in [*sorted(CODE.rglob("*.py")), INPUTS]}),
        "packages": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _tokenizer_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """What its files made of a tokenizer, and the code that came with them; not where they lie."""
    settings = {
        name: str(value)
        for name, value in tokenizer.init_kwargs.items()
        if name != "name_or_path" and not name.endswith("_file")
    }
    modules = {
        kind.__module__ for kind in type(tokenizer).__mro__ if kind.__module__.startswith("transformers_modules")
    }
    return {
        "class": type(tokenizer).__name__,
        "pipeline": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "settings": settings,
        "code": sorted(file_sha256(Path(str(sys.modules[name].__file__))) for name in modules),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _slug(recipe: Recipe) -> str:
    """What a person knows the data by, for the entry's name."""
    first = readings_of(recipe.data)
    name = first[0].source.uri.rstrip("/").rpartition("/")[2] if first else "streamed"
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:40].lstrip(".") or "rows"


# --- entries ---------------------------------------------------------------------------------------------------


def _open(entry: Path, progress: Progress) -> EncodedData | None:
    """What `entry` holds; None when there is no such entry, or (with a note) a damaged one."""
    if not entry.exists():
        return None
    try:
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        for name, size in facts["files"].items():
            if (entry / name).stat().st_size != size:
                raise ValueError(f"{name} has not the size it was written with")
        with (entry / "questions.jsonl").open(encoding="utf-8") as lines:
            questions = [Question(**json.loads(line)) for line in lines]
        found = EncodedData(
            ArrowRows.mapped(entry / "train.arrow"),
            ArrowRows.mapped(entry / "validation.arrow"),
            Facts(
                tuple(facts["labels"]),
                report_from(facts["report"]),
                DroppedReport(**facts["dropped"]),
                facts["example"],
                questions,
                facts["sources"],
            ),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        progress.note(f"data: the cache entry {entry} is damaged ({error}); rows are encoded again")
        return None
    return found


def _write(
    entry: Path, key: dict[str, Any], recipe: Recipe, home: Path, tokenizer: Tokenizer, progress: Progress
) -> EncodedData:
    """Encode into a folder beside `entry` and rename it; the caller holds the lock."""
    for left in entry.parent.glob(f".{entry.name}.*"):  # of encoders that were killed
        shutil.rmtree(left, ignore_errors=True)
    part = entry.with_name(f".{entry.name}.{socket.gethostname()}.{os.getpid()}")
    part.mkdir()
    try:
        made = _encode(part, recipe, home, tokenizer, progress)
        facts = asdict(made.facts) | {"report": made.facts.report.as_dict(), "key": key}
        facts["rows"] = len(made.train) + len(made.validation)
        with (part / "questions.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(question) + "\n" for question in facts.pop("questions"))
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        (part / "facts.json").write_text(json.dumps(facts | {"files": sizes}, indent=1), encoding="utf-8")
        for path in part.iterdir():
            _to_disk(path)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        try:
            part.rename(entry)
        except OSError:
            if not entry.exists():  # else: where locks do not work, another process was faster
                raise
        return made  # its rows stay mapped, whatever the folder is called
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Let nothing of `path` be lost with the power: a renamed folder must not hold files of zeros."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _locked(path: Path, entry: Path, progress: Progress, first: bool) -> Iterator[None]:
    """Hold the lock `path` of `entry`, after whoever holds it now.

    A file system without locks gives none: whoever finishes first publishes the entry.
    """
    with path.open("w") as stream:
        deadline = time.monotonic() + (0.0 if first else HEAD_START_SECONDS)
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"data: another process is encoding these rows; waiting for it ({path})")
                fcntl.flock(stream, fcntl.LOCK_EX)
                break
            except OSError:
                break
            if entry.exists() or time.monotonic() >= deadline:
                break
            fcntl.flock(stream, fcntl.LOCK_UN)
            time.sleep(0.1)
        yield


# --- encoding --------------------------------------------------------------------------------------------------


def _encode(folder: Path | None, recipe: Recipe, home: Path, tokenizer: Tokenizer, progress: Progress) -> EncodedData:
    """Read, split and encode everything: into files of `folder`, or into memory."""
    found = scan(recipe, home, folder)
    counts = {name: int((found.part_of == number).sum()) for number, name in enumerate(PARTS)}
    total = counts["train"] + counts["validation"]
    with (progress if total else Progress(quiet=True)).stage("encode", total=total, unit="rows") as bar:
        encoder = _Encoder(folder, found, recipe, tokenizer, bar)
        for part, source, example in examples(found, recipe, home):
            encoder.add(part, source, example)
        encoder.finish()
    for number, reading in enumerate(found.readings):
        if reading.part == "train" and not encoder.kept[number]:
            n_rows = found.report.sources.get(reading.name, counts["train"])
            of = f" of {reading.field}" if len(found.report.sources) > 1 else ""
            fix = f"none of {n_rows} training rows{of} keeps a trainable token; raise it"
            raise DataError("data.max_tokens", recipe.data.max_tokens, fix)
    sources = [encoder.kept[number] for number, reading in enumerate(found.readings) if reading.part == "train"]
    dropped = DroppedReport(counts["train"], encoder.truncated, encoder.n_dropped, encoder.dropped[:LISTED_DROPS])
    shown = encoder.firsts.get("test") or encoder.firsts.get("train")
    request = request_of(shown, recipe.objective.task, tokenizer) if shown else {}
    facts = Facts(found.labels, found.report, dropped, request, encoder.questions, sources)
    return EncodedData(encoder.writers["train"].rows(), encoder.writers["validation"].rows(), facts)


class _Encoder:
    """Takes rows one by one, encodes a thousand at a time, and holds no more of them."""

    def __init__(self, folder: Path | None, found: Scan, recipe: Recipe, tokenizer: Tokenizer, bar: Bar) -> None:
        self._settings = (tokenizer, recipe.data, recipe.objective, found.labels)
        self._generates = recipe.objective.rows in ("chat-completion", "text-generation")
        self._bar = bar
        self._pending: dict[str, tuple[int, list[Example]]] = {}  # part -> number of the reading, its rows
        self.writers = {
            name: RowWriter(folder / f"{name}.arrow" if folder else None) for name in ("train", "validation")
        }
        self.kept = Counter[int]()  # number of the reading -> rows in train
        self.truncated, self.n_dropped = 0, 0
        self.dropped: list[str] = []
        self.firsts: dict[str, Example] = {}
        self.questions: list[Question] = []

    def add(self, part: str, source: int, example: Example) -> None:
        """Take a row of `part`, from the reading of number `source`."""
        self.firsts.setdefault(part, example)
        if part == "test":
            self.questions.append(self._question(example))
            return
        before, pending = self._pending.get(part, (source, []))
        if before != source or len(pending) == ROWS_PER_CALL:
            self._flush(part)
            pending = []
        pending.append(example)
        self._pending[part] = (source, pending)

    def finish(self) -> None:
        """Encode what is left, and make the files readable."""
        for part in list(self._pending):
            self._flush(part)
        for writer in self.writers.values():
            writer.close()

    def _flush(self, part: str) -> None:
        source, rows = self._pending.pop(part)
        encoded_rows, report = encode_all(rows, *self._settings)
        self.writers[part].add(encoded_rows)
        self._bar.advance(len(rows))
        if part == "train":
            self.kept[source] += len(encoded_rows)
            self.truncated += report.truncated
            self.n_dropped += report.count
            self.dropped += report.where[: LISTED_DROPS - len(self.dropped)]

    def _question(self, example: Example) -> Question:
        tokenizer, data, objective, _ = self._settings
        n_prompt = len(prompt_ids(example, tokenizer, data, objective)) if self._generates else None
        return Question(example.where, prompt_text(example), reference_text(example), n_prompt)


# --- tidying up ------------------------------------------------------------------------------------------------


def entries(root: Path) -> list[dict[str, Any]]:
    """Every entry of the cache `root`, newest use first: `name`, `rows` (None: damaged), `bytes`, `used` (seconds since
    1970).
    """
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.startswith(".") or not all((path / name).is_file() for name in ("facts.json", "train.arrow")):
            continue
        n_rows = None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            n_rows = json.loads((path / "facts.json").read_text(encoding="utf-8"))["rows"]
        size = sum(file.stat().st_size for file in path.iterdir())
        found.append({"name": path.name, "rows": n_rows, "bytes": size, "used": path.stat().st_mtime})
    return sorted(found, key=lambda entry: -entry["used"])


def clear(root: Path) -> int:
    """Delete every entry that no process is encoding now, and return how many bytes that freed. Runs that have one open
    keep it until they end.
    """
    freed = 0
    for entry in entries(root):
        shutil.rmtree(root / entry["name"], ignore_errors=True)
        freed += entry["bytes"]
    for lock in (root / LOCKS).glob("*"):
        with lock.open("w") as stream, contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in root.glob(f".{lock.name}.*"):  # of encoders that were killed
                freed += sum(file.stat().st_size for file in left.iterdir())
                shutil.rmtree(left, ignore_errors=True)
    return freed
