"""The MLflow Model Registry: where it is, and a model of it -> its folder on this disk."""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ingot.errors import IngotError, MissingPackage, ModelError, RecipeError
from ingot.packaging.bundle import MANIFEST_FILE, check_manifest
from ingot.packaging.shards import link
from ingot.track import redact

REFERENCE = "models:/"
REFERENCES = re.compile(rf"(?:{REFERENCE})?([^/@'\\]+)(?:/(\d+|latest)|@([^/@]+))?")
STORE_VARIABLES = ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")


class RegistryError(IngotError):
    """The registry cannot be reached, or has not what it is asked for."""


def store_uri(output: Path = Path("runs"), *, given: str | None = None) -> str:
    """`given`, else MLFLOW_REGISTRY_URI, else MLFLOW_TRACKING_URI, else the database that runs in `output` track to."""
    named = [given, *(os.environ.get(name) for name in STORE_VARIABLES)]
    return next((uri for uri in named if uri), f"sqlite:///{output.resolve() / 'mlflow.db'}")


def local_folder(uri: str) -> Path | None:
    """Where the files of models lie that this store on this disk registers; None for a store elsewhere."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / "models"


@contextmanager
def calls(uri: str, what: str) -> Iterator[None]:
    """Turn whatever a store raises into one line. `what`: what was not done."""
    try:
        yield
    except IngotError:
        raise
    except Exception as error:  # of any kind: from the database, from HTTP, from the disk
        reason = redact("", (str(error).splitlines() or [type(error).__name__])[0][:300])
        where = redact("", uri)
        raise RegistryError(f"the registry {where} {what}: {reason}") from error


def client_of(uri: str) -> Any:
    """MLflow's client of the store at `uri`, quiet."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise MissingPackage("mlflow", "a model registry") from error
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).resolve().parent.mkdir(parents=True, exist_ok=True)
        with calls(uri, "cannot be opened"):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)


def read_reference(text: str) -> tuple[str, int | str | None]:
    """(name; number or alias, None for the newest) of NAME, NAME/latest, NAME/VERSION or NAME@ALIAS, with or without
    models:/ before it. Raises RecipeError for anything else.
    """
    if (found := REFERENCES.fullmatch(text)) is None:
        raise RecipeError("MODEL", text, "write NAME or NAME/latest, NAME/VERSION (a number) or NAME@ALIAS")
    name, number, alias = found.groups()
    return name, alias or (int(number) if number and number != "latest" else None)


def every(search: Callable[..., Any], wanted: str | None = None) -> list[Any]:
    """All that `search` of MLflow's client finds: it answers in pages."""
    found, token = list[Any](), None
    while True:
        page = search(filter_string=wanted, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def fetched(uri: str, store: str | None = None) -> Path:
    """The folder of what `uri` refers to as `read_reference` says: where it lies, or downloaded where it is elsewhere.

    `store`: the registry's address, None: that of `store_uri`. Raises ModelError when it has no such model or cannot
    be reached.
    """
    store = store or store_uri()
    name, which = read_reference(uri)
    try:
        client = client_of(store)
        import mlflow.artifacts

        if which is None:
            known = every(client.search_model_versions, f"name = '{name}'")
            which = max((int(it.version) for it in known), default=None)
        elif isinstance(which, str):
            which = client.get_model_version_by_alias(name, which).version
        if which is None:
            raise RegistryError(f"the registry holds no version of {name!r}")
        source = client.get_model_version_download_uri(name, str(which))
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=store, registry_uri=store))
    except MissingPackage:
        raise
    except Exception as error:  # of any kind: from the store, from HTTP, from the disk
        reason = redact("", (str(error).splitlines() or [type(error).__name__])[0][:300])
        fix = f"cannot be fetched: {reason}; set MLFLOW_TRACKING_URI, and name models:/NAME/VERSION or NAME@ALIAS"
        raise ModelError("MODEL", uri, fix) from error


def linked(source: Path, target: Path) -> int:
    """Put the files of the package `source` into the new folder `target`: hard links where the file system allows it.

    Files that its manifest does not list (overrides.jsonl grows) are copied. Returns the bytes that were copied.
    Raises PackageError for a package that is not what was written.
    """
    check_manifest(source)
    fixed, copied = manifest_files(source), 0
    building = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for path in sorted(source.rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            place = building / path.relative_to(source)
            if path.relative_to(source).as_posix() in fixed:
                copied += link(path, place)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place)
                copied += path.stat().st_size
        os.replace(building, target)
    except OSError as error:
        raise RegistryError(f"{target} cannot be written ({error.strerror}); choose another place") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return copied


def manifest_files(package: Path) -> set[str]:
    """The files that the manifest of `package` vouches for, itself included."""
    listed = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))["sha256"]
    return {MANIFEST_FILE, *listed}
