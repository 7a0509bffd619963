"""What `ingot conform` asks of a package, where its results are kept, and what they say."""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingot import pages
from ingot.conformance.case import TOLERANCE, Case, Record
from ingot.conformance.targets import FAILED, PASSED, SKIPPED, TARGETS, Result, all_passed, conform
from ingot.errors import DataError, IngotError, ModelError, PackageError, RecipeError
from ingot.model.adapted import find_base, is_packaged_adapter
from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.packaging.bundle import check_manifest, metadata_of
from ingot.packaging.gguf import MODEL_FILE
from ingot.packaging.registry import REFERENCE, fetched
from ingot.packaging.versions import CONFORM, manifest_digest
from ingot.progress import Progress
from ingot.registering import find, open_registry, package_of
from ingot.registry import nearest
from ingot.runfolder import Run, open_run, write_json
from ingot.stages import requests_of

TEMPLATE = Path(__file__).parent / "conformance" / "report.html.jinja"
VERSIONS = ("torch", "transformers", "mlflow")
MOST_ROWS = 20
Place = tuple[str, str]  # field and value of a DataError about a row


@dataclass(frozen=True)
class Conformance:
    """Results of one package. `manifest`: the digest that names its files."""

    name: str
    task: str
    manifest: str
    results: list[Result]

    @property
    def passed(self) -> bool:
        """Whether everything that ran passed, and something ran."""
        return all_passed(self.results)

    @property
    def sentence(self) -> str:
        """How it ended."""
        counts = {state: sum(it.state == state for it in self.results) for state in (PASSED, FAILED, SKIPPED)}
        ran = counts[PASSED] + counts[FAILED]
        return f"{counts[PASSED]} of {ran} targets that ran passed, {counts[SKIPPED]} skipped"

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = {name: getattr(self, name) for name in ("name", "task", "manifest")}
        verdict = {"passed": self.passed, "sentence": self.sentence, "tolerance": TOLERANCE}
        return found | verdict | {"results": [it.as_dict() for it in self.results]}


def run(
    model: str,
    targets: Sequence[str] = (),
    *,
    rows_file: Path | None = None,
    install: bool = True,
    store: str | None = None,
    timeout_s: float = 300.0,
    progress: Progress | None = None,
) -> Conformance:
    """Load the package `model` (a package, a run, or models:/NAME/VERSION) as each of `targets` would, all by default,
    and compare what they answer with what this process does. Keeps the results beside the package, and as tags of a
    registered version.

    Raises RecipeError for an unknown target, PackageError for a package that is not what was written, DataError for
    rows that cannot be read.
    """
    progress = progress or Progress(quiet=True)
    if unknown := [name for name in targets if name not in TARGETS]:
        raise RecipeError("--target", unknown[0], nearest(unknown[0], TARGETS))
    package, trained_by = opened(model, store)
    _earlier(package)  # before minutes of asking
    if rows_file is not None:
        rows = read_rows(rows_file)
    else:
        rows = {("data.test", f"row {n}"): row for n, row in enumerate(test_rows(trained_by, progress), 1)}
    chosen = list(dict.fromkeys(targets)) or list(TARGETS)
    used = {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
    results = []
    with case_of(package, trained_by, rows, install, timeout_s) as case:
        with progress.stage("conform", len(chosen), "targets") as bar:
            for name in chosen:
                at = datetime.now().astimezone().isoformat(timespec="seconds")
                results.append(replace(conform(case, name), at=at, rows=len(case.rows), versions=used))
                progress.note(f"{name}: {results[-1].state} {results[-1].reason}".rstrip())
                bar.advance()
        check_manifest(package)  # a target that wrote into the package would have changed it
    about = _gguf_about(package) if case.gguf is not None else metadata_of(package)
    found = Conformance(str(about.get("name") or package.name), case.task, manifest_digest(package), results)
    keep(found, model, package, store)
    return found


def opened(model: str, store: str | None = None) -> tuple[Path, Run | None]:
    """The package that `model` names, and the run that it lies in. Raises ModelError where there is none, PackageError
    where it is not what was written.
    """
    run = None
    if model.startswith(REFERENCE):
        package = fetched(model, store)
        if not (package / "MLmodel").is_file():
            fix = "is no package of Ingot's (no MLmodel); register one: ingot models register"
            raise ModelError("MODEL", model, fix)
    elif (Path(model).expanduser() / "model" / MODEL_FILE).is_file():
        package, run = _gguf_form(Path(model).expanduser().resolve())
    else:
        package, run = package_of(Path(model))
    check_manifest(package)
    return package.resolve(), run


def _gguf_form(package: Path) -> tuple[Path, Run]:
    """llama.cpp's form of a run's model, which is no MLflow model, and its run. Raises ModelError for one alone."""
    if not (package.parent / "run.json").is_file():
        fix = "holds a GGUF file, which is held against the model of the run that it was made in: move it back there"
        raise ModelError("MODEL", str(package), fix)
    return package, open_run(package.parent)


def _gguf_about(package: Path) -> dict[str, Any]:
    return dict(json.loads((package / "metadata.json").read_text(encoding="utf-8")))


@contextmanager
def case_of(
    package: Path, run: Run | None, further: Mapping[Place, Record], install: bool, timeout_s: float
) -> Iterator[Case]:
    """What targets are asked about `package`: its example, and further rows. What is expected is computed here, on the
    CPU: by the package's own model, or of a GGUF file by the model of its `run`. Raises DataError for a row that the
    model does not answer.
    """
    folder = run.model if run is not None and (package / "model" / MODEL_FILE).is_file() else package / "model"
    base = _base_of(folder)
    runtime = Runtime.load(folder, "cpu")
    asked = {("example", "ingot.json"): _strings(runtime.about["example"]), **further}
    rows, expected = map(list, zip(*(_answered(runtime, row, place) for place, row in asked.items()), strict=True))
    verified = package / "verification.json"
    proof = json.loads(verified.read_text(encoding="utf-8")) if verified.is_file() else {}
    about = {"new_tokens": runtime.default_new_tokens, "longest": runtime.answering.longest}
    about |= {"answered_on": proof.get("device", "cpu")}
    task = runtime.task
    del runtime  # before others load it too
    scratch = Path(tempfile.mkdtemp(prefix="ingot-conform-"))
    try:
        yield Case(package, task, rows, expected, scratch, proof.get("answer"), install, timeout_s, about, base)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _answered(runtime: Runtime, row: Record, place: Place) -> tuple[Record, Record]:
    """The row by its columns' own names, which is all that other libraries know, and its answer."""
    try:
        named = _strings(runtime.read([row])[0][0])
        return named, json.loads(json.dumps(runtime.answer([named])[0]))
    except InputError as error:
        raise DataError(*place, f"the model does not answer this row: {error}") from error


def _base_of(folder: Path) -> Path | None:
    """The base of an adapter, None for a whole model. Raises PackageError where it is not here, or is another one."""
    if not is_packaged_adapter(folder):
        return None
    try:
        return find_base(folder).resolve()
    except (OSError, ValueError) as error:
        raise PackageError(str(error)) from error


def test_rows(run: Run | None, progress: Progress) -> list[Record]:
    """Rows that a run was measured on, as its packages are asked them; none where its data are gone."""
    if run is None:
        return []
    try:
        return [_strings(row) for row in requests_of(run)]
    except IngotError as error:
        progress.note(f"only the example is asked, not the run's test rows: {error}")
        return []


def read_rows(path: Path) -> dict[Place, Record]:
    """Rows of input columns from JSON lines. Raises DataError with the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also cuts at what JSON leaves in its strings
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("--rows", str(path), f"cannot be read ({error})") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = ("--rows", f"{path}:{number}")
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row:
            raise DataError(*place, "write one JSON object of input columns a line")
        found[place] = _strings(row)
        if wrong := [name for name, value in found[place].items() if not isinstance(value, str)]:
            raise DataError(*place, f"column {wrong[0]!r} holds no text: write a string, or leave the column out")
    if len(found) > MOST_ROWS:
        raise DataError(
            "--rows", str(path), f"holds {len(found)} rows: write at most {MOST_ROWS}, every target is asked"
        )
    return found


def _strings(row: Record) -> Record:
    """Columns as signatures have them: what is nested becomes JSON."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
        for name, value in row.items()
    }


def keep(found: Conformance, model: str, package: Path, store: str | None) -> Path | None:
    """Write the results beside the package's folder (in a run: the run's), with earlier ones of other targets on the
    same files, over all of which its verdict then is; those of a registered version become its tags. Returns the file.
    """
    if model.startswith(REFERENCE):
        registry = open_registry(store)
        said = {f"{CONFORM}{it.target}": f"{it.state} {it.at[:10]} {it.reason}".strip() for it in found.results}
        registry.tag(find(registry, model), said)
        return None
    manifest, before = _earlier(package)
    if manifest == found.manifest:
        asked = {it.target for it in found.results}
        found = replace(found, results=[*(it for it in before if it.target not in asked), *found.results])
    write_json(_kept_in(package), found.as_dict())
    return _kept_in(package)


def _kept_in(package: Path) -> Path:
    return package.with_name(f"{package.name}.conformance.json")


def _earlier(package: Path) -> tuple[str, list[Result]]:
    """What was kept beside the package: the digest of its files, and their results. Raises DataError."""
    path = _kept_in(package)
    if not path.is_file():
        return "", []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return str(kept["manifest"]), [Result(**it) for it in kept["results"]]
    except (ValueError, KeyError, TypeError) as error:
        fix = f"is not what `ingot conform` keeps there ({error!r}); remove it, and all targets are asked anew"
        raise DataError("results", str(path), fix) from error


def report(found: Conformance, path: Path) -> None:
    """Write the results as one HTML page."""
    path.write_text(pages.render(TEMPLATE, {}, it=found, passed=found.passed), encoding="utf-8")
