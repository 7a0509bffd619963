"""An endpoint of several versions, as a file or flags say it: targets, weights, mirroring, when to roll back."""

import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ingot.errors import ServeError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class Section(BaseModel):
    """Base of all sections: no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionSection(Section):
    """A run, package, folder or `models:/...`, and its share of the requests: weights are relative."""

    target: str = Field(min_length=1)
    weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)


class Mirror(Section):
    """A version that is asked a copy of requests that others answer; what it says is only counted."""

    version: str
    percent: float = Field(default=100.0, gt=0.0, le=100.0)


class Rollback(Section):
    """When a version loses its requests to the others: by its last `window_s` seconds, of at least `min_requests`."""

    window_s: float = Field(default=60.0, gt=0.0)
    min_requests: int = Field(default=20, ge=1)
    error_rate: float = Field(default=0.05, gt=0.0, le=1.0)
    """It fails more often than the others by more than this share of its requests, and than chance would have it."""
    latency_ratio: float | None = Field(default=None, gt=1.0)
    """Its median latency is more than so many times theirs. None: latency is not looked at."""


class EndpointSection(Section):
    """The whole file."""

    name: Name
    versions: dict[Name, VersionSection] = Field(min_length=1)
    mirror: Mirror | None = None
    rollback: Rollback | None = Rollback()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(one.weight for one in self.versions.values()):
            raise ValueError("no version has a weight above 0, so nothing would answer")
        if self.mirror is not None and self.mirror.version not in self.versions:
            raise ValueError(f"mirror.version names none of the versions ({', '.join(self.versions)})")
        return self


def read_endpoint(path: Path) -> EndpointSection:
    """The file's endpoint. Raises ServeError that names the field."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError("--endpoint", str(path), "cannot be read; give YAML, or a name and --version") from error
    except yaml.YAMLError as error:
        raise ServeError("--endpoint", str(path), f"is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ServeError("--endpoint", str(path), "must hold name, versions and, if wanted, mirror and rollback")
    return _checked(found, str(path))


def endpoint_of_flags(name: str, versions: list[str], mirror: str | None) -> EndpointSection:
    """`--endpoint NAME --version blue=MODEL:90 --version green=MODEL:10 --mirror green[:PERCENT]`."""
    found: dict[str, Any] = {}
    for text in versions:
        version, target = named(text)
        if version is None:
            raise ServeError("--version", text, "write VERSION=MODEL:WEIGHT, as in blue=runs/a/package:90")
        if version in found:
            raise ServeError("--version", text, f"there are two versions {version!r}; give each its own name")
        whole, _, weight = target.rpartition(":")
        weighted = bool(whole) and re.fullmatch(r"\d+(\.\d+)?", weight) is not None
        found[version] = {"target": whole, "weight": float(weight)} if weighted else {"target": target}
    if not found:
        raise ServeError("--endpoint", name, "is no file; to a name, add --version VERSION=MODEL:WEIGHT")
    if len(found) == 1:
        [only] = found.values()
        only.setdefault("weight", 1.0)
    body: dict[str, Any] = {"name": name, "versions": found}
    if mirror is not None:
        version, _, percent = mirror.partition(":")
        body["mirror"] = {"version": version, **({"percent": percent} if percent else {})}
    return _checked(body, "--endpoint")


def named(text: str) -> tuple[str | None, str]:
    """`NAME=MODEL` -> (name, model). Without a name, or where a folder is called that: (None, text)."""
    name, equals, target = text.partition("=")
    if not equals or not target or not re.fullmatch(NAME, name) or Path(text).exists():
        return None, text
    return name, target


def _checked(found: dict[str, Any], where: str) -> EndpointSection:
    try:
        return EndpointSection.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part != "[key]") or "versions"
        value = first["input"] if isinstance(first["input"], str | int | float) else "..."
        fix = {"extra_forbidden": "is unknown here; remove it"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        raise ServeError(field, value, fix, where=where) from error
