"""Packages into the registry and aliases onto them: `ingot models`, and what `ingot run` does behind packaging."""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path

from ingot.errors import ModelError, NotPromoted, PackageError, RecipeError
from ingot.evaluation.measure import TEST
from ingot.packaging import versions
from ingot.packaging.bundle import check_manifest
from ingot.packaging.registry import fetched, linked, read_reference, store_uri
from ingot.packaging.versions import MANIFEST, METRIC, ModelVersion, Registry
from ingot.progress import Progress
from ingot.promoting import NO_POLICY, OVERRIDDEN, Clearance, parse_override, record_override, require_promotion
from ingot.runfolder import Run, open_run
from ingot.track import redact

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# MLflow keeps the names latest and v1 to itself.
ALIAS = re.compile(r"(?!(?:latest|v\d+)$)[A-Za-z0-9_-]{1,100}", re.IGNORECASE | re.ASCII)


def open_registry(store: str | None = None, output: Path = Path("runs")) -> Registry:
    """The registry at `store`, else of the environment, else of the runs in `output`."""
    return Registry(store_uri(output, given=store))


def package_of(target: Path) -> tuple[Path, Run | None]:
    """(the package, the run that it belongs to if it lies in one) of a package's or a run's folder. Raises ModelError
    where there is no package.
    """
    target = target.expanduser().resolve()
    run = next((open_run(folder) for folder in (target, target.parent) if (folder / "run.json").is_file()), None)
    package = target
    if run is not None and target == run.folder:
        forms = [run.form(form) for form in ("merged", *run.recipe.package.forms)]
        package = next((it for it in forms if (it / "MLmodel").is_file()), run.package)
    if not (package / "MLmodel").is_file():
        fix = f"ingot package {target}" if run is not None else "name a package or a run's folder"
        raise ModelError("PACKAGE", str(package), f"is no package (no MLmodel); {fix}")
    return package, run


def register(
    registry: Registry, target: Path, name: str | None = None, alias: str | None = None, override: str | None = None
) -> tuple[ModelVersion, int]:
    """Register the package of `target` as a version of `name` (None: the package's own name), and give it `alias`.

    Returns the version and the bytes copied for it. Raises NotPromoted where an alias is asked for that its verdict
    does not allow (nothing is registered then), PackageError for files that are not what was packaged.
    """
    if alias is not None:
        _check_alias(alias)
    package, run = package_of(target)
    check_manifest(package)
    name = name or str(versions.metadata_of(package).get("name") or package.name)
    if not NAME.fullmatch(name):  # it names a folder, and stands in references
        raise RecipeError("--name", name, "write letters, digits, . - and _, beginning with a letter or digit")
    if override is not None and alias is None:
        raise RecipeError("--override", override, "only an alias needs one; add --alias, or remove it")
    cleared = None if alias is None else require_granted(package, alias, override)
    tags = versions.about(package) | _metrics(package)
    made, copied = registry.register(package, name, tags, run.record().get("tracking_run") if run else None)
    if alias is not None and cleared is not None:
        made = _named(registry, made, alias, cleared)
    return made, copied


def register_run(run: Run, progress: Progress) -> None:
    """Register a run's packages as its recipe says, the alias for the first form, and note which versions they are."""
    recipe, started = run.recipe, time.perf_counter()
    registry = open_registry(recipe.track.uri, run.folder.parent)
    places = [run.form(form) for form in recipe.package.forms]
    made: list[ModelVersion] = []
    copied = 0
    with progress.stage("register", total=len(places), unit="forms") as bar:
        for place in places:
            if (place / "MLmodel").is_file():  # llama.cpp's form is no MLflow model
                alias = recipe.package.alias if not made else None
                version, n_bytes = register(registry, place, recipe.package.registered_model, alias)
                made.append(version)
                copied += n_bytes
            bar.advance()
    for version in made:
        progress.note(f"registered: {version.uri} {' '.join(f'@{alias}' for alias in version.aliases)}".rstrip())
    run.note_stage(
        "register",
        time.perf_counter() - started,
        models=[it.uri for it in made],
        alias=recipe.package.alias,
        store=redact("", registry.uri),
        copied_bytes=copied,
    )


def promote(registry: Registry, reference: str, alias: str, override: str | None = None) -> ModelVersion:
    """Give `alias` to the version that `reference` names, if its verdict is granted and its files are what was
    registered; it is taken from the version that has it. Raises NotPromoted otherwise.
    """
    _check_alias(alias)
    version = find(registry, reference)
    folder = fetched(version.uri, registry.uri)
    try:
        check_manifest(folder)
        if versions.manifest_digest(folder) != version.tags.get(MANIFEST, versions.manifest_digest(folder)):
            raise PackageError(f"{folder}: another package stands there than was registered")
    except PackageError as error:
        raise NotPromoted(f"{version.uri} gets no alias: {error}, and register it") from error
    cleared = require_granted(folder, alias, override)
    return _named(registry, version, alias, cleared)


def _check_alias(alias: str) -> None:
    """Before anything is written: the store finds it out only when it has the version."""
    if not ALIAS.fullmatch(alias):
        raise RecipeError("--alias", alias, "write letters, digits, _ and -, and neither latest nor v with a number")


def demote(registry: Registry, name: str, alias: str) -> ModelVersion:
    """Take `alias` from the version that has it, which is returned."""
    return registry.remove_alias(name, alias)


def fetch(registry: Registry, reference: str, out: Path) -> tuple[Path, int]:
    """The files of a version in the new folder `out`, as they were packaged, and the bytes that were copied."""
    if out.exists():
        raise PackageError(f"{out} exists; it is left alone: choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError("OUT", str(out), f"cannot be made ({error.strerror}); choose another place") from error
    return out, linked(fetched(find(registry, reference).uri, registry.uri), out)


def find(registry: Registry, reference: str) -> ModelVersion:
    """The version that `reference` names, as `read_reference` reads it. Raises ModelError where there is none."""
    return registry.version(*read_reference(reference))


def family(registry: Registry, version: ModelVersion) -> list[ModelVersion]:
    """The version and all others of its lineage: adapter, merged, quantized."""
    return registry.of_lineage(version.lineage) if version.lineage else [version]


def require_granted(package: Path, alias: str, override: str | None) -> Clearance:
    """As `require_promotion`, but a package without a policy has no granted verdict either."""
    stated = versions.about(package)[versions.PROMOTION]
    if stated != NO_POLICY:
        return require_promotion(package, override)
    missing = "Its recipe has no promotion policy (evaluate.promotion), so there is no verdict."
    recorded = record_override(package, None if override is None else parse_override(override), missing)
    if recorded is None:
        fix = 'give the recipe a policy, or let it pass by name, which is recorded: --override "NAME: REASON"'
        raise NotPromoted(f"{package}: no alias {alias!r}: {missing} To go on, {fix}")
    return Clearance(OVERRIDDEN, f"{missing} {recorded.sentence}", override=recorded)


def _named(registry: Registry, version: ModelVersion, alias: str, cleared: Clearance) -> ModelVersion:
    tags = {f"{versions.PREFIX}alias.{alias}": cleared.status}
    if cleared.override is not None:
        tags[versions.OVERRIDE] = json.dumps(asdict(cleared.override), ensure_ascii=False)
    registry.tag(version, tags)
    registry.set_alias(version, alias)
    return registry.version(version.name, version.version)


def _metrics(package: Path) -> dict[str, str]:
    """Tags of what was measured before it was packaged, with intervals."""
    file = package / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    tasks = {TEST: found, **found.get("tasks", {})}
    tags = {}
    for task, measured in tasks.items():
        for metric, score in measured.get("metrics", {}).get("tuned", {}).items():
            low, high = ("?" if end is None else f"{end:.4g}" for end in score["interval"])
            value = "undefined" if score["value"] is None else f"{score['value']:.4g}"
            tags[f"{METRIC}{task}.{metric}".replace("@", ":")] = f"{value} [{low}, {high}] on {score['n']} rows"
    return tags
