"""What of a batch is done: one JSON file in the output's folder, and who works on what meanwhile.

Any number of processes may work on one folder. They claim buckets by locks that end with the process, so that what a
killed one had begun is taken by another. Where a file system has no locks a bucket may be answered twice; it is written
once either way, since a part is renamed to its name when it is whole.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ingot.batching.sinks import written
from ingot.data.sources import file_sha256
from ingot.errors import FieldError, IngotError

NAME, STATE = "manifest.json", ".batch"
CLAIMS = f"{STATE}/claims"
PARTIAL = f".{NAME}.*.partial"  # a manifest that `written` has not renamed
WHOLE = 2**40  # the byte of the claims that stands for the manifest; a bucket's is its number
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
# What decides a batch -> how whoever started it wrote that.
ASKED = {
    "files": "INPUT",
    "model": "MODEL",
    "format": "--format",
    "params": "--param",
    "map": "--map",
    "keep": "--keep",
    "id_column": "--id-column",
    "limit": "--max-rows",
    "bucket_rows": "--bucket-rows",
}
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"


@dataclass(frozen=True)
class Done:
    """A bucket that is answered: rows with an answer, rows without; its files' SHA-256 by their names in the folder."""

    answers: int
    errors: int
    files: dict[str, str]
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What decides a batch's output. `job`: plain values by which two starts are known to be the same. `kinds`: of the
    kept columns.
    """

    job: dict[str, Any]
    rows: int
    bucket_rows: int
    kinds: dict[str, str]

    @property
    def buckets(self) -> int:
        """How many there are."""
        return -(-self.rows // self.bucket_rows)

    def span(self, number: int) -> tuple[int, int]:
        """First row of a bucket, and how many rows it has."""
        start = number * self.bucket_rows
        return start, min(self.bucket_rows, self.rows - start)


class Manifest:
    """The manifest of a folder. `begin` first; what others did since is known after `refresh` or `record`. A disk that
    fails raises IngotError in `begin` and where it is made; after that, OSError.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.done: dict[int, Done] = {}
        self.status = RUNNING
        with writing(folder):
            (folder / STATE).mkdir(parents=True, exist_ok=True)
            # One handle for good: the locks of a process end when it closes any handle of the file.
            self._claims = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        """Give back all claims."""
        os.close(self._claims)

    def begin(self) -> None:
        """Begin, or go on with what is there: buckets whose files are not what was written are asked again."""
        with writing(self.folder), self.locked():
            for path in self.folder.glob(".*.partial"):
                if not path.name.startswith(".part-"):  # written under this lock, so by nobody any more
                    path.unlink(missing_ok=True)
            if not (self.folder / NAME).is_file():
                self._write()
                return
            self.refresh()
            self.done = {number: one for number, one in self.done.items() if not damaged(self.folder, one)}
            self.status = RUNNING
            self._write()

    def refresh(self) -> None:
        """See what others did."""
        found = read(self.folder)
        self.done = {int(number): Done(**one) for number, one in found["buckets"].items()}
        self.status = found["status"]

    def record(self, number: int, done: Done) -> None:
        """A bucket is done. Raises OSError when the disk fails; the bucket is then not done."""
        with self.locked():
            self.refresh()
            self.done[number] = done
            self._write()

    def end(self, status: str) -> None:
        """Write how the batch ended; to be called within `locked`. Raises OSError when the disk fails."""
        self.status = status
        self._write()

    @property
    def answers(self) -> int:
        """Rows with an answer."""
        return sum(one.answers for one in self.done.values())

    @property
    def errors(self) -> int:
        """Rows without."""
        return sum(one.errors for one in self.done.values())

    def tokens(self) -> dict[str, int]:
        """Sums over all buckets."""
        names = sorted({name for one in self.done.values() for name in one.tokens})
        return {name: sum(one.tokens.get(name, 0) for one in self.done.values()) for name in names}

    def pending(self) -> list[int]:
        """Buckets that are not done."""
        return [number for number in range(self.plan.buckets) if number not in self.done]

    def claim(self, number: int) -> bool:
        """Whether this process may work on a bucket now."""
        return self._lock(number, wait=False)

    def release(self, number: int) -> None:
        """Let others have the bucket."""
        with contextlib.suppress(OSError):
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, number)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes the manifest meanwhile."""
        self._lock(WHOLE, wait=True)
        try:
            yield
        finally:
            self.release(WHOLE)

    def _lock(self, place: int, wait: bool) -> bool:
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except OSError as error:
            return error.errno in NO_LOCKS
        return True

    def _write(self) -> None:
        buckets = {str(number): asdict(self.done[number]) for number in sorted(self.done)}
        content = {
            "version": 1,
            "status": self.status,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": self.plan.rows,
            "answers": self.answers,
            "errors": self.errors,
            "bucket_rows": self.plan.bucket_rows,
            "kinds": self.plan.kinds,
            "job": self.plan.job,
            "buckets": buckets,
        }
        text = (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()

        def write(file: IO[bytes]) -> None:
            file.write(text)

        written(self.folder / NAME, write)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise IngotError where the disk that holds `folder` fails meanwhile."""
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        raise IngotError(
            f"{folder} cannot be written: {told}; what is done is kept, and the same command goes on"
        ) from error


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder as it stands. Raises IngotError where it is missing or damaged."""
    path = folder / NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"status", "rows", "bucket_rows", "job", "buckets"} <= found.keys():
            raise ValueError("fields are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise IngotError(f"{path} cannot be read ({error}); write the batch into another folder") from error
    return found


def damaged(folder: Path, done: Done) -> list[str]:
    """Files of a bucket that are missing or not what was written."""
    return [name for name, sha256 in done.files.items() if _sha256(folder / name) != sha256]


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


def check_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of the batch that `folder` holds; None for a new or empty folder. Raises FieldError for one with
    other content, IngotError for a damaged manifest.
    """
    if (folder / NAME).is_file():
        return read(folder)
    if folder.exists() and not folder.is_dir():
        raise FieldError("OUTPUT", str(folder), "is a file; name a new folder")
    # The first manifest may have been cut off, or be written just now by another process of the same batch.
    if folder.is_dir() and any(path.name != STATE and not path.match(PARTIAL) for path in folder.iterdir()):
        raise FieldError("OUTPUT", str(folder), "holds other files and no batch; name a new folder")
    return None


def check_same(folder: Path, before: dict[str, Any], job: dict[str, Any]) -> None:
    """Raise FieldError that names what `job` asks otherwise than the batch in `folder` does."""
    changed = [name for name in {**before, **job} if before.get(name) != job.get(name)]
    if not changed:
        return
    told = "; ".join(_change(name, before.get(name), job.get(name)) for name in changed)
    raise FieldError("OUTPUT", str(folder), f"holds a batch of something else ({told}); name another folder")


def _change(name: str, before: Any, now: Any) -> str:
    if name == "files" and isinstance(before, list) and isinstance(now, list):
        old, new = ({one["name"]: one for one in some} for some in (before, now))
        names = [file for file in {**old, **new} if old.get(file) != new.get(file)]
        return f"{ASKED[name]}: {', '.join(names[:3]) or 'files'} changed"
    was, asked = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return f"{ASKED.get(name, name)} was {was}, now {asked}"
