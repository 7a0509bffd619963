"""Answers that came over the network, kept one by one as they come: what was paid for once is not asked again."""

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """Hash of plain values, 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Kept:
    """Key -> plain value for JSON, in the file `path`, a line each; also read are the files of `beside` (of other ranks
    of an earlier start). Written by one process, by any of its threads. Of a line that a kill tore nothing is read.

    `about`: what the values depend on. A file that says otherwise is of no use and written anew; `stale` holds what it
    says.
    """

    def __init__(self, path: Path, about: dict[str, Any] | None = None, beside: Sequence[Path] = ()) -> None:
        self.path, self._about, self._lock = path, about or {}, threading.Lock()
        self.stale: dict[str, Any] | None = None
        self._values: dict[str, Any] = {}
        for each in dict.fromkeys([*beside, path]):
            self._read(each)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        lines: list[Any] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # torn
                continue
        about = lines[0] if lines and isinstance(lines[0], dict) else {}
        if about != self._about:
            self.stale = about
            return
        self._values.update((it[0], it[1]) for it in lines[1:] if isinstance(it, list) and len(it) == 2)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value: it is on the disk when this returns."""
        with self._lock:
            if not self._values or not self.path.is_file():
                self._begin()
            with self.path.open("a", encoding="utf-8") as file:
                # Behind a torn line the first break ends it.
                file.write(f"\n{json.dumps([key, value])}\n")
            self._values[key] = value

    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.stale is not None or not self.path.is_file():
            self.path.write_text(json.dumps(self._about) + "\n", encoding="utf-8")
