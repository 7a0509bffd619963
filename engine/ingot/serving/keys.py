"""API keys: a file that holds their SHA-256 hashes, names and limits, and never a key."""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ingot.errors import ServeError

KEY_VARIABLE = "INGOT_API_KEY"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LOOK_S = 1.0  # between two looks whether the file has changed


@dataclass(frozen=True)
class Key:
    """Who may call. `sha256`: of the key, in hex. Limits: a minute; None: the server's own."""

    name: str
    sha256: str
    created: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        limits = [it for it in (self.requests_per_minute, self.tokens_per_minute) if it is not None]
        if not NAME.fullmatch(self.name) or not SHA256.fullmatch(self.sha256):
            raise ValueError("name or sha256")
        if any(type(it) is not int or it < 1 for it in limits):
            raise ValueError("limits")


def hashed(key: str) -> str:
    """The form in which a key is kept. Made keys hold 256 random bits: a slow hash would add nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises ServeError."""
    try:
        return [Key(**one) for one in json.loads(path.read_text(encoding="utf-8"))["keys"]]
    except FileNotFoundError as error:
        raise ServeError("keys", str(path), "no such file; make a first key with: ingot keys add NAME") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServeError("keys", str(path), "is not a file of keys as `ingot keys add` writes it") from error


def _write(path: Path, keys: list[Key]) -> None:
    """Replace the file at once; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump({"keys": [asdict(key) for key in keys]}, out, indent=2)
        out.write("\n")
    fresh.replace(path)


def add_key(path: Path, name: str, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> str:
    """Make a key and store its hash. The key, which nothing can show again. Raises ServeError."""
    if not NAME.fullmatch(name):
        raise ServeError("name", name, "use up to 64 letters, digits, dots, dashes and underscores")
    keys = read_keys(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ServeError("name", name, f"{path} has a key of this name; remove it first, or choose another name")
    secret = f"ingot-{secrets.token_urlsafe(32)}"
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _write(path, [*keys, Key(name, hashed(secret), created, requests_per_minute, tokens_per_minute)])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Forget a key: servers refuse it a second later. Raises ServeError."""
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise ServeError("name", name, f"{path} has no key of this name; it has {known}")
    _write(path, [key for key in keys if key.name != name])


class Keyring:
    """Who may call: the key of the environment, and those of a file, which is read again when it changes."""

    def __init__(self, path: Path | None = None, key: str | None = None) -> None:
        self._path, self._fixed = path, [] if key is None else [Key("environment", hashed(key))]
        self._seen, self._looked = 0, time.monotonic()
        self._keys = self._fixed + self._read()

    def _read(self) -> list[Key]:
        if self._path is None:
            return []
        with contextlib.suppress(FileNotFoundError):
            self._seen = self._path.stat().st_mtime_ns  # before it is read: a later change is then seen
        return read_keys(self._path)

    @property
    def open(self) -> bool:
        """Whether everybody may call."""
        return self._path is None and not self._fixed

    def find(self, sent: bytes) -> Key | None:
        """Whose key this is. Every stored hash is compared, so that time tells nothing."""
        self._refresh()
        digest, found = hashlib.sha256(sent).hexdigest(), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        if self._path is None or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            if self._path.stat().st_mtime_ns != self._seen:
                self._keys = self._fixed + self._read()
        except (OSError, ServeError):  # a file that is gone or broken lets nobody in
            self._keys, self._seen = self._fixed, 0
