"""What a checkpoint consists of: sizes and SHA-256 of its files and where training stood, in one JSON file with its own
SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from ingot.errors import CheckpointError

NAME = "checkpoint.json"
PACKAGES = ("ingot", "torch", "transformers", "peft", "safetensors")
HASH_THREADS = 4  # hashing releases the interpreter; 4 threads keep up with an NVMe disk


class Entry(TypedDict):
    """One file."""

    bytes: int
    sha256: str


def digests(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Sizes and SHA-256 of files in `folder`. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def write(folder: Path, progress: Any, files: dict[str, Entry], world: int, strategy: str) -> None:
    """Write the manifest of `folder` and sync it. `progress` is a dataclass."""
    content: dict[str, Any] = {
        "progress": asdict(progress),
        "files": files,
        "world": world,
        "strategy": strategy,
        "versions": _versions(),
    }
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump(content | {"sha256": _own_hash(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises CheckpointError when it is missing or not what was written."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        expected = content.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{NAME}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{NAME} is not what was written") from error
    if expected != _own_hash(content):
        raise CheckpointError(f"{NAME} is not what was written: its SHA-256 differs")
    return content


def problems(folder: Path, content: dict[str, Any], rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with the files that the manifest names; of several ranks each looks at its share."""
    files = dict(sorted(content["files"].items())[rank::world])
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        found = pool.map(lambda item: _problem(folder / item[0], item[1]), files.items())
        return [text for text in found if text]


def strangers(folder: Path, content: dict[str, Any]) -> str:
    """Weights that the manifest does not name would be read with the others: say so; "" when there are none."""
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in content["files"])
    return f"{names[0]} does not belong to it" if names else ""


def sync(folder: Path) -> None:
    """Make names in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _problem(path: Path, expected: Entry) -> str:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}"
        return "" if _digest(path) == expected else f"{path.name} is not what was written: its SHA-256 differs"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _digest(path: Path) -> Entry:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
