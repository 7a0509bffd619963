"""Versions of models in a registry: written with what a package says of itself, read back as plain values."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ingot.errors import ModelError
from ingot.packaging.bundle import MANIFEST_FILE, metadata_of
from ingot.packaging.registry import RegistryError, calls, client_of, every, linked, local_folder

PREFIX = "ingot."
METRIC, CONFORM = f"{PREFIX}metric.", f"{PREFIX}conform."
MANIFEST, LINEAGE, FORM, TASK = f"{PREFIX}manifest", f"{PREFIX}lineage", f"{PREFIX}form", f"{PREFIX}task"
PROMOTION, SENTENCE, VERDICT = f"{PREFIX}promotion", f"{PREFIX}promotion.sentence", f"{PREFIX}promotion.verdict"
OVERRIDE = f"{PREFIX}override"
EXPERIMENT = "ingot-packages"


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model. `source`: where its files lie. `created`: ISO 8601."""

    name: str
    version: int
    source: str
    created: str
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """The reference that every verb takes."""
        return f"models:/{self.name}/{self.version}"

    @property
    def lineage(self) -> str | None:
        """What its forms (adapter, merged, quantized) share."""
        return self.tags.get(LINEAGE)

    def group(self, prefix: str) -> dict[str, str]:
        """Its tags below `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tags.items() if key.startswith(prefix)}

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        tags = self.tags
        return {
            "name": self.name,
            "version": self.version,
            "uri": self.uri,
            "created": self.created,
            "source": self.source,
            "aliases": list(self.aliases),
            "task": tags.get(TASK),
            "form": tags.get(FORM),
            "lineage": self.lineage,
            "manifest": tags.get(MANIFEST),
            "promotion": {"status": tags.get(PROMOTION), "sentence": tags.get(SENTENCE), "verdict": tags.get(VERDICT)},
            "override": tags.get(OVERRIDE),
            "metrics": self.group(METRIC),
            "conformance": self.group(CONFORM),
        }


def manifest_digest(package: Path) -> str:
    """SHA-256 of a package's manifest, which holds that of every file: it names exactly these files."""
    return hashlib.sha256((package / MANIFEST_FILE).read_bytes()).hexdigest()


class Registry:
    """The models registered in the store at `uri`. Every method raises RegistryError where it does not answer."""

    def __init__(self, uri: str) -> None:
        self.uri, self._client = uri, client_of(uri)

    def register(
        self, package: Path, name: str, tags: Mapping[str, str], run_id: str | None = None
    ) -> tuple[ModelVersion, int]:
        """A new version of `name` with these files and tags, and the bytes that were copied for it.

        The same files under the same name are the version that they are already. A store on this disk gets hard links,
        another one an upload as artifacts of the MLflow run `run_id` (None, or not of this store: of a new one). Raises
        PackageError for a package that is not what was written.
        """
        digest = manifest_digest(package)
        known = [it for it in self.versions(name) if it.tags.get(MANIFEST) == digest]
        if known:
            self.tag(known[0], tags)
            return self.version(name, known[0].version), 0
        folder, copied, run_id = local_folder(self.uri), 0, self._of_this_store(run_id)
        if folder is None:
            source, run_id, copied = self._upload(package, name, run_id)
        else:
            place = folder / name / digest[:16]
            copied = 0 if place.is_dir() else linked(package, place)
            source = place.as_uri()
        with calls(self.uri, f"did not register {name}"):
            if not any(it.name == name for it in self._client.search_registered_models(f"name = '{name}'")):
                self._client.create_registered_model(name)
            made = self._client.create_model_version(name, source, run_id, tags={**tags, MANIFEST: digest})
        return self.version(name, int(made.version)), copied

    def _of_this_store(self, run_id: str | None) -> str | None:
        """The run, None where it was tracked elsewhere."""
        if run_id is None:
            return None
        from mlflow.exceptions import MlflowException

        with calls(self.uri, "does not tell its runs"):
            try:
                return str(self._client.get_run(run_id).info.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return None

    def _upload(self, package: Path, name: str, run_id: str | None) -> tuple[str, str, int]:
        with calls(self.uri, "did not take the files"):
            if run_id is None:
                experiment = self._client.get_experiment_by_name(EXPERIMENT)
                made = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
                run_id = self._client.create_run(made, run_name=name).info.run_id
                self._client.set_terminated(run_id)
            self._client.log_artifacts(run_id, str(package), "package")
            root = self._client.get_run(run_id).info.artifact_uri
        size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
        return f"{root}/package", run_id, size

    def names(self) -> list[str]:
        """Names of all models, of those without a version too."""
        with calls(self.uri, "does not list its models"):
            return sorted(it.name for it in every(self._client.search_registered_models))

    def newest(self) -> list[ModelVersion]:
        """The newest version of every model that has one."""
        return [it for name in self.names() for it in self.versions(name)[:1]]

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of `name`, newest first; none for an unknown name."""
        return self._found(f"name = '{_quoted(name)}'")

    def of_lineage(self, lineage: str) -> list[ModelVersion]:
        """All forms of one lineage, whatever their names."""
        return self._found(f"tags.`{LINEAGE}` = '{_quoted(lineage)}'")

    def _found(self, wanted: str) -> list[ModelVersion]:
        with calls(self.uri, "does not list versions"):
            found = every(self._client.search_model_versions, wanted)
            aliases: dict[str, dict[str, str]] = {}
            for name in {it.name for it in found}:
                aliases[name] = dict(self._client.get_registered_model(name).aliases)
        versions = [_version(it, aliases[it.name]) for it in found]
        return sorted(versions, key=lambda it: (it.name, -it.version))

    def version(self, name: str, which: int | str | None = None) -> ModelVersion:
        """The version of this number or alias; None: the newest. ModelError where there is none."""
        found = self.versions(name)
        if not found:
            names = self.names()
            if name in names:
                raise ModelError("MODEL", name, "has no version; begin with: ingot models register PACKAGE")
            known = ", ".join(names[:10]) or "none"
            raise ModelError("MODEL", name, f"the registry holds no model {name!r}; it has: {known}")
        if which is None:
            return found[0]
        chosen = [it for it in found if it.version == which or which in it.aliases]
        if not chosen:
            known = ", ".join(str(it.version) for it in found[:10])
            aliases = ", ".join(f"@{alias}" for it in found for alias in it.aliases) or "no alias"
            fix = f"{name} has no version or alias {which!r}; it has {known} and {aliases}"
            raise ModelError("MODEL", f"{name}{'/' if isinstance(which, int) else '@'}{which}", fix)
        return chosen[0]

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Add tags to a version, or change them."""
        with calls(self.uri, f"did not tag {version.uri}"):
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    self._client.set_model_version_tag(version.name, str(version.version), key, value)

    def set_alias(self, version: ModelVersion, alias: str) -> None:
        """Let `alias` name this version from now on."""
        with calls(self.uri, f"did not name {version.uri} {alias!r}"):
            self._client.set_registered_model_alias(version.name, alias, str(version.version))

    def remove_alias(self, name: str, alias: str) -> ModelVersion:
        """Take an alias away; returns the version that had it."""
        version = self.version(name, alias)
        with calls(self.uri, f"did not remove {alias!r} of {name}"):
            self._client.delete_registered_model_alias(name, alias)
        return version


def about(package: Path) -> dict[str, str]:
    """Tags of what a package says of itself: task, form, lineage, promotion. Raises PackageError."""
    metadata = metadata_of(package)
    promotion = metadata.get("promotion") or {}
    lineage = metadata.get("lineage")
    found = {
        TASK: metadata.get("task"),
        FORM: metadata.get("form") or "merged",
        LINEAGE: lineage if isinstance(lineage, str | int) else (lineage or {}).get("id"),
        PROMOTION: promotion.get("status") or "no policy",
        SENTENCE: promotion.get("sentence"),
        VERDICT: promotion.get("verdict"),
    }
    if override := promotion.get("override"):
        found[OVERRIDE] = json.dumps(override, ensure_ascii=False)
    return {key: str(value) for key, value in found.items() if value}


def _version(found: Any, aliases: Mapping[str, str]) -> ModelVersion:
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    number = int(found.version)
    named = tuple(sorted(alias for alias, version in aliases.items() if int(version) == number))
    return ModelVersion(found.name, number, str(found.source), created, named, dict(found.tags))


def _quoted(text: str) -> str:
    if "'" in text or "\\" in text:
        raise RegistryError(f"{text!r} cannot be the name of a model: it holds a quote; use letters, digits, - and _")
    return text
