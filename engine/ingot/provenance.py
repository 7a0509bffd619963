"""Where a run's model comes from, and under which terms it may be passed on: for packages and for the trust gate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.data import sources
from ingot.errors import IngotError
from ingot.evaluation.result import without_nan
from ingot.model.source import model_folder
from ingot.packaging import licences
from ingot.packaging.lineage import hashes, public, public_name, public_recipe, weights_digest
from ingot.recipe import Recipe, Source
from ingot.recipe_io import recipe_hash
from ingot.runfolder import Run, write_json
from ingot.summary import scores_of

LINEAGE_FILE = "lineage.json"
ORIGIN_FILE = "origin.json"
SLOW_BYTES = 4 * 10**9


def terms_of(recipe: Recipe, home: Path) -> licences.Terms:
    """Under which terms the tuned model may be passed on, by what its base and its data say. Raises RecipeError for a
    conflict that is not waived.
    """
    section = recipe.package
    base = base_folder(recipe, home)
    parts = [licences.part_of("base", plain_name(recipe.model.source), base)]
    for _, source in _sources(recipe):
        if source.uri.startswith(sources.GENERATED):
            continue  # made by Ingot's own code: nobody's text
        place = (home / Path(source.uri).expanduser()).resolve()
        beside = place if place.is_dir() else place.parent
        # A licence in the recipe's own folder is the project's, not the data's.
        folder = beside if "://" not in source.uri and beside != home.resolve() else None
        part = licences.part_of("data", plain_name(source.uri), folder, source.license)
        if part not in parts:
            parts.append(part)
    name = section.name or recipe.name
    return licences.merge(parts, section.license, name, section.license_waiver)


def origin_of(recipe: Recipe, home: Path, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`base` and `data` of a lineage, with the SHA-256 that their files have now. Reads all of them once; `note` hears
    of a base that takes a while.
    """
    base = base_folder(recipe, home)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors")) if base is not None else 0
    if size > SLOW_BYTES:
        note(f"lineage: {size / 1e9:,.0f} GB of the base are read for their SHA-256")
    return {"base": _base(recipe, home), "data": [_data(recipe, home, *it) for it in _sources(recipe)]}


def keep_origin(run: Run, origin: dict[str, Any]) -> None:
    """Keep with the run what `origin_of` found before it trained: files may change before it is packaged."""
    write_json(run.folder / ORIGIN_FILE, origin)


def lineage_of(run: Run) -> dict[str, Any]:
    """What the run's model was made from: as the run's folder keeps it, else found now and kept there.

    Base and data are those that training began with; of a run that kept none, those that are here now.
    """
    path = run.folder / LINEAGE_FILE
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    recipe, record = run.recipe, run.record()
    machine = {key: record.get(key) for key in ("versions", "python", "machine", "device", "ranks")}
    kept_origin = run.folder / ORIGIN_FILE
    begun_with = json.loads(kept_origin.read_text(encoding="utf-8")) if kept_origin.is_file() else None
    origin = begun_with or origin_of(recipe, run.home)
    found: dict[str, Any] = {
        "format": 1,
        "run": {"name": recipe.name, "created": record["created"]},
        "base": origin["base"],
        "data": origin["data"],
        "recipe": public_recipe(recipe.model_dump(mode="json")),
        "recipe_hash": recipe_hash(recipe),
        "commit": record.get("commit"),
        "seeds": {"train": recipe.train.seed, "splits": recipe.data.split_seed},
        "environment": machine,
        "hashed": "before it was trained" if begun_with else "when it was packaged",
    }
    if "weights" in found["base"]:  # else it is looked for again
        write_json(path, found)
    return found


def evaluation_of(run: Run) -> dict[str, Any] | None:
    """Scores with intervals, as evaluation.json holds them; None where the run was not evaluated."""
    if not run.finished("evaluate"):
        return None
    found = {name: it for name, it in scores_of(run).items() if name != "promotion"}
    found |= {"confidence": run.recipe.evaluate.confidence, "run": run.recipe.name}
    plain: dict[str, Any] = without_nan(found)
    return plain


def base_folder(recipe: Recipe, home: Path) -> Path | None:
    """The base's folder; None where it is not on this machine."""
    try:
        return model_folder(recipe.model, home, weights=recipe.model.initialization == "pretrained")
    except IngotError:
        return None


def _base(recipe: Recipe, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": public_name(recipe.model.source),
        "revision": recipe.model.revision,
        "initialization": recipe.model.initialization,
    }
    folder = base_folder(recipe, home)
    if folder is None:
        return found | {"files": "it was not on this machine when it was to be hashed"}
    if folder.parent.name == "snapshots":  # the hub's cache calls a folder as its commit
        found["revision"] = folder.name
    files = hashes(folder)
    return found | {"files": files, "weights": weights_digest(files)}


def _sources(recipe: Recipe) -> list[tuple[str, Source]]:
    """(field, source) of all rows that the recipe names."""
    train = recipe.data.train
    found = [("data.train", one) for one in (train if isinstance(train, list) else [train])]
    others = (("data.validation", recipe.data.validation), ("data.test", recipe.data.test))
    return [*found, *((field, source) for field, source in others if source is not None)]


def _data(recipe: Recipe, home: Path, field: str, source: Source) -> dict[str, Any]:
    """A source by name, settings, and the SHA-256 of its files."""
    found: dict[str, Any] = {"field": field, "uri": public_name(source.uri), "license": source.license}
    if recipe.data.streaming and field == "data.train":  # nobody waits for a corpus to be read before it is learned
        return found | {"content": "streamed: not hashed"}
    try:
        told = sources.fingerprint(source, home, field)
    except IngotError:
        return found | {"content": "not readable when it was to be hashed"}
    return found | {"content": [" ".join(public(line.rsplit(" ", 1))) for line in told]}


def plain_name(source: str) -> str:
    """A model or data set as Hugging Face's cards name it."""
    return public_name(source).removeprefix("hf://").removeprefix("datasets/")
