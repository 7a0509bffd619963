"""What a model was made from, as plain values: base, data, recipe, code, seeds, environment, each with its hash.

All forms of one run carry the same lineage, and its identity: that is how a registry knows that they belong together.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ingot.model.adapted import digest_of, sha256

ID_CHARACTERS = 32
HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
# Fields of a recipe that say where things lie on one machine, or whom it reports to, and decide no result.
LOCAL = ("output", "track")


def hashes(folder: Path, patterns: Iterable[str] = HASHED) -> dict[str, str]:
    """File name -> SHA-256, of what decides a model in its folder."""
    found = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: sha256(found[name]) for name in sorted(found)}


def weights_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 of the weights among `files` (as `hashes` gives them), whatever they are called."""
    return digest_of(value for name, value in files.items() if name.endswith(".safetensors"))


def lineage_id(lineage: Mapping[str, Any]) -> str:
    """The identity of a lineage: of its content, whatever the order it is written in."""
    plain = json.dumps(lineage, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:ID_CHARACTERS]


def public(value: Any) -> Any:
    """`value` without places of this machine and without names and passwords in addresses."""
    if isinstance(value, Mapping):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    return public_name(value) if isinstance(value, str) else value


def public_name(text: str) -> str:
    """The last part of an absolute path; an address without its user; every other text as it is."""
    if re.match(r"^(/|~|[A-Za-z]:[\\/])", text) and not set(text) & set("\n{"):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1] or text
    return re.sub(r"^([a-z][a-z0-9+.-]*://)[^/@\s]*@", r"\1", text)


def public_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values as a package may show them."""
    found: dict[str, Any] = public({key: value for key, value in values.items() if key not in LOCAL})
    return found
