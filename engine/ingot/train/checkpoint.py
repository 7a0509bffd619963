"""Resumable checkpoints: sharded safetensors and JSON only, written in the background and published by one rename, so
that a half-written one is never seen.

Randomness needs no state: dropout is seeded from (seed, step, rank) and row order is a function of (seed, epoch).
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ingot.data.plan import Cursor
from ingot.errors import CheckpointError
from ingot.parallel.sharded import OPTIMIZER, Sharded
from ingot.ranks import Ranks, on_main
from ingot.train import manifest, shards
from ingot.train.watch import VALIDATION_LOSS, Measured

Value = TypeVar("Value")

# How long ranks wait for the slowest disk among them. One that died is noticed at once: its connection closes.
WRITE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Progress:
    """Where training stands after `step` optimizer steps."""

    steps: int
    recipe_hash: str
    step: int = 0
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    skipped: int = 0
    spikes: int = 0
    recent_losses: tuple[float, ...] = ()
    validation_loss: float | None = None
    best_loss: float | None = None
    """The lowest validation loss."""
    measured: tuple[Measured, ...] = ()
    """Metrics so far, by step; the base model's are step 0."""
    best_by: str = VALIDATION_LOSS
    higher_is_better: bool = False
    judged: float | None = None
    """What `best_by` names, at this step."""
    best_step: int | None = None
    best_value: float | None = None

    def watched(self, loss: float) -> "Progress":
        """With the validation loss of this step."""
        lowest = loss if self.best_loss is None else min(loss, self.best_loss)
        found = replace(self, validation_loss=loss, best_loss=lowest)
        return found._judged(loss) if self.best_by == VALIDATION_LOSS else found

    def with_scores(self, point: Measured) -> "Progress":
        """With the metrics of this step. The base model, step 0, is no candidate: it has no checkpoint."""
        found = replace(self, measured=(*self.measured, point))
        return found._judged(point.scores[self.best_by].value) if self.step and self.best_by in point.scores else found

    def _judged(self, value: float) -> "Progress":
        """Of equal steps the first is the best."""
        best = self.best_value
        if best is None or (value > best if self.higher_is_better else value < best):
            return replace(self, judged=value, best_value=value, best_step=self.step)
        return replace(self, judged=value)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """What `asdict` and JSON made of one."""
        made = {
            "cursor": Cursor(**values["cursor"]),
            "recent_losses": tuple(values["recent_losses"]),
            "measured": tuple(map(Measured.from_json, values["measured"])),
        }
        return cls(**(values | made))


class Checkpoints:
    """The checkpoints of a run: `folder`/step-NNNNNN, and the links `last` and `best`.

    Every rank has one and calls it alike. As a context it first removes what killed writes left, and waits at the end
    for the write in the background, also when training fails; only Ctrl-C does not wait.
    """

    def __init__(self, folder: Path, ranks: Ranks, recipe_hash: str, keep: int, *, strategy: str = "") -> None:
        self.folder, self.ranks, self.recipe_hash, self.keep = folder, ranks, recipe_hash, keep
        self.strategy = strategy
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "Checkpoints":
        if self.ranks.main:
            for leftover in self.folder.glob(".*.partial"):
                if leftover.is_symlink():
                    leftover.unlink()
                else:
                    shutil.rmtree(leftover, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            with contextlib.suppress(CheckpointError):  # the error under way says more
                self.wait()

    @property
    def last(self) -> Path:
        """The newest one."""
        return self.folder / "last"

    def save(self, sharded: Sharded, progress: Progress) -> None:
        """Copy this rank's part of the state to host memory and write it in the background.

        Waits for the write before, and raises its CheckpointError.
        """
        self.wait()
        self._connect()
        part = shards.take(sharded.state(), self.ranks, self._buffers)
        # A daemon: Ctrl-C need not wait for it, an unfinished write harms nothing.
        self._thread = threading.Thread(target=self._write, args=(part, progress, sharded.device), daemon=True)
        self._thread.start()

    def failed(self) -> CheckpointError | None:
        """What went wrong with the write in the background, once it is known."""
        return self._error

    def wait(self) -> None:
        """Until the write in the background is published. Raises its CheckpointError, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load(
        self, sharded: Sharded, name: str, notify: Callable[[str], None], *, weights_only: bool = False
    ) -> Progress:
        """Fill `sharded` from a checkpoint whose every byte is what was written; return where it stands.

        name: "last" to go on with training: a damaged one is set aside with a word to `notify`, and the one before is
        taken. Anything else ("best"), and everything with `weights_only`, which is for what is exported: exactly that
        one, since another model in its place would be told apart by nobody.

        Raises CheckpointError, on every rank alike: none usable, not the one that was asked for, another recipe's, or
        one that does not fit the model.
        """
        self.wait()
        self._connect()
        exact = weights_only or name != "last"
        damaged: dict[str, str] = {}
        for candidate in on_main(lambda: self._candidates(name, exact)):
            progress, problem = self._inspect(self.folder / candidate)
            if progress is not None and not problem:
                break
            damaged[candidate] = problem
        else:
            found = on_main(lambda: self._unusable(name, exact, damaged))
            raise CheckpointError(found)
        for bad, problem in damaged.items():
            notify(f"checkpoint {bad} is damaged ({problem}); it is kept as damaged-{bad}, and {candidate} is taken")
        self._fill(sharded, self.folder / candidate, weights_only)
        if not exact:
            on_main(lambda: self._settle(candidate, progress, damaged))
        return progress

    def _fill(self, sharded: Sharded, path: Path, weights_only: bool) -> None:
        state = {n: t for n, t in sharded.state().items() if not (weights_only and n.startswith(OPTIMIZER))}

        def fill() -> None:
            written = shards.Written(path)
            written.fill(state, others=[n for n in written.tensors if weights_only and n.startswith(OPTIMIZER)])

        try:
            self._together(fill)
        except _RankFailed as error:
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        sharded.load(state)

    def _candidates(self, name: str, exact: bool) -> list[str]:
        """Names to try, best first. The newest folder counts, not the link, which a kill may leave behind."""
        if name == "last":
            return [path.name for path in reversed(published(self.folder))][: 1 if exact else None]
        path = self.folder / name
        return [path.resolve().name] if path.exists() else []

    def _unusable(self, name: str, exact: bool, damaged: dict[str, str]) -> str:
        """The message when nothing that was asked for can be loaded."""
        if not damaged and name == "last":
            return f"there is no checkpoint in {self.folder}; start a new run"
        found = "; ".join(f"{bad}: {problem}" for bad, problem in damaged.items()) or "it does not exist"
        if not exact:
            return f"no checkpoint in {self.folder} is usable ({found}); start a new run"
        if name == "last":
            return (
                f"the last checkpoint in {self.folder} is damaged ({found}); --resume trains again from the one before"
            )
        judged = {}
        best_by, pick = VALIDATION_LOSS, min
        for path in published(self.folder):
            with contextlib.suppress(CheckpointError):
                progress = manifest.read(path)["progress"]
                if path.name not in damaged and progress["judged"] is not None:
                    judged[path.name] = progress["judged"]
                    best_by, pick = progress["best_by"], max if progress["higher_is_better"] else min
        message = f"the checkpoint {self.folder / name} cannot be loaded ({found}), and no other was put in its place. "
        if not judged:
            return f"{message}No other one was validated; start a new run"
        other = pick(judged, key=judged.__getitem__)
        link = f"ln -sfn {other} {self.folder / name}"
        what = best_by.replace("validation_loss", "validation loss")
        return f"{message}The next best is {other} ({what} {judged[other]:.4g}): {link}, then --resume"

    def _inspect(self, path: Path) -> tuple[Progress | None, str]:
        """(progress, what is wrong with the files: "" for nothing); the same on every rank. Raises CheckpointError for
        another recipe's checkpoint.
        """

        def read() -> tuple[dict[str, Any], Progress | None, str]:
            try:
                content = manifest.read(path)
                return content, Progress.from_json(content["progress"]), manifest.strangers(path, content)
            except (CheckpointError, KeyError, TypeError) as error:
                return {}, None, str(error)

        content, progress, problem = on_main(read)
        if progress is not None and progress.recipe_hash != self.recipe_hash:
            raise CheckpointError(
                f"{path} was written by another recipe (hash {progress.recipe_hash}, now {self.recipe_hash}); "
                "start a new run, or restore its recipe"
            )
        if progress is None or problem:
            return progress, problem
        # Ranks share the reading: one alone would hash a terabyte for ten minutes.
        problems = self._together(lambda: manifest.problems(path, content, self.ranks.rank, self.ranks.world))
        return progress, "; ".join(text for found in problems for text in found)

    def _settle(self, name: str, progress: Progress, damaged: dict[str, str]) -> None:
        """Make the folder say what is loaded: damaged ones aside, the links as `progress` has them."""
        for bad in damaged:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder / f"damaged-{bad}", ignore_errors=True)
                os.replace(self.folder / bad, self.folder / f"damaged-{bad}")
        _link(self.folder / "last", name)
        if progress.best_step is not None and (self.folder / step_name(progress.best_step)).is_dir():
            _link(self.folder / "best", step_name(progress.best_step))

    def _write(self, part: shards.Part, progress: Progress, device: torch.device) -> None:
        """What runs in the background. Where one rank fails, all learn of it."""
        name = step_name(progress.step)
        partial = self.folder / f".{name}.partial"
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread's is the first one: its context costs memory there
        try:
            self._together(lambda: _fresh(partial) if self.ranks.main else None)
            found = self._together(lambda: manifest.digests(partial, shards.write(partial, part, self.ranks.rank)))
            files = {file: entry for part in found for file, entry in part.items()}
            self._together(lambda: self._publish(partial, name, progress, files) if self.ranks.main else None)
        except Exception as error:  # whatever it is, training must hear of it
            if self.ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            good = f"the last good one is {self.last.resolve()}" if self.last.exists() else "there is no earlier one"
            reason = _reason(error)
            full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
            self._error = CheckpointError(
                f"checkpoint {name} could not be written to {self.folder} ({reason}); {good}. "
                f"{'Free some disk' if full else 'Mend that'}, then --resume"
            )

    def _publish(self, partial: Path, name: str, progress: Progress, files: dict[str, manifest.Entry]) -> None:
        """On rank 0, when every rank's files are complete and synced."""
        for file, entry in files.items():
            if not (partial / file).is_file():
                raise CheckpointError(f"{file} is not there: the folder must be on a disk that all nodes share")
            if (partial / file).stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file} has another size here than where it was written")
        shards.Written(partial).check_complete()
        manifest.write(partial, progress, files, self.ranks.world, self.strategy)
        if (self.folder / name).exists():
            _discard(self.folder / name)
        os.replace(partial, self.folder / name)
        manifest.sync(self.folder)
        if progress.best_step == progress.step:
            _link(self.folder / "best", name)
        _link(self.folder / "last", name)
        manifest.sync(self.folder)
        kept = {(self.folder / link).resolve() for link in ("best", "last") if (self.folder / link).exists()}
        for path in published(self.folder)[: -self.keep]:
            if path.resolve() not in kept:
                _discard(path)

    def _connect(self) -> None:
        """A process group of its own for the thread: gloo, so that it never meets the loop's collectives."""
        if self._group is None and self.ranks.world > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)

    def _together(self, work: Callable[[], Value]) -> list[Value]:
        """Run `work` on every rank and return all results. Raises _RankFailed on all when it fails on one."""
        value: Any = None
        problem = ""
        try:
            value = work()
        except Exception as error:  # any: a rank that left would leave the others waiting
            problem = f"rank {self.ranks.rank}: {_reason(error)}" if self.ranks.world > 1 else _reason(error)
        found: list[Any] = [(value, problem)]
        if self._group is not None:
            found = [None] * self.ranks.world
            try:
                dist.all_gather_object(found, (value, problem), group=self._group)
            except RuntimeError as error:
                raise _RankFailed("another rank ended meanwhile") from error
        problems = [text for _, text in found if text]
        if problems:
            raise _RankFailed("; ".join(problems))
        return [value for value, _ in found]


class _RankFailed(CheckpointError):
    """What went wrong on which ranks."""


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:06d}"


def published(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _link(link: Path, target: str) -> None:
    """Point `link` at `target` in one step."""
    fresh = link.with_name(f".{link.name}.partial")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _discard(path: Path) -> None:
    """Remove a checkpoint so that at no time half of it looks like a whole one."""
    away = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(away, ignore_errors=True)
    os.replace(path, away)
    shutil.rmtree(away, ignore_errors=True)
