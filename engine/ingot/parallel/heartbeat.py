"""Ranks watch each other by small files in the run's folder: one that dies or hangs ends the job, with its name.

No collective and no clock is shared: a rank's file changes every second, and the others see it by their own clocks.
"""

import contextlib
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

from ingot.errors import CheckpointError, IngotError
from ingot.launch.process import born, machine
from ingot.parallel import blame
from ingot.parallel.blame import Beat, Lost
from ingot.ranks import Ranks

# A rank watches so many that come after it: each is watched by as many, at any number of ranks.
WATCHED = 8
# How long a rank whose peer is gone may take to end by itself (a failed collective does it) before it is ended.
GRACE_S = 10.0
# A peer that ended with an error of its own: this rank may be at the same error, and saving what caused it.
LEFT_GRACE_S = 60.0
# Without a beat for so long, a rank counts as gone once a collective has failed or the launcher asks to end. Caches of
# network file systems show another node's file some seconds late.
SILENT_S = 10.0
# A network file system may show a new folder late.
SHARED_DISK_S = 30.0
DONE, TERMINATED = "done", "stopped by SIGTERM"
# What gloo, NCCL and the store say when a peer is gone. Other errors are defects, and shown at once.
_PEER_GONE = re.compile(r"connection|by peer|broken pipe|socket|nccl|gloo|timed? ?out|another rank", re.IGNORECASE)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)


class RankLost(IngotError):
    """A rank died or hangs. The message is on standard error already: one rank prints it for all."""

    printed = True


def fresh(folder: Path) -> Path:
    """A new folder in `folder`, which holds nothing else then: ranks of an earlier start are not heard of."""
    shutil.rmtree(folder, ignore_errors=True)
    made = folder / f"{os.getpid()}-{time.time_ns()}"
    made.mkdir(parents=True, exist_ok=True)
    return made


class Heartbeat:
    """A context around training. `at` says where this rank is; a thread writes it down and watches the others.

    folder: the same new folder on all ranks. timeout_s: how long a rank may keep the others waiting. words: phase ->
    collective (`blame.collectives`). advice: how to go on, for the end of the message. on_lost: called with the
    message, on the one rank that prints it, before the process ends.

    When a collective's failure leaves the context and a rank is gone, RankLost is raised from it. When the main thread
    waits in a collective and cannot raise, the thread prints the message and ends the process with exit code 1.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        timeout_s: float,
        words: Mapping[str, str] | None = None,
        *,
        advice: Callable[[], str] = lambda: "",
        on_lost: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.ranks, self.timeout_s = folder, ranks, timeout_s
        self.words, self.advice, self.on_lost = words or {}, advice, on_lost
        self._others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        ring = [*range(ranks.rank + 1, ranks.world), *range(ranks.rank)]
        self._watched = ring[:WATCHED]
        self._seen: dict[int, tuple[Beat | None, float]] = {}  # newest beat, and when it was new
        self._me = Beat(ranks.rank, socket.gethostname(), machine(), os.getpid(), born(os.getpid()))
        self._here = (0, "start", time.monotonic())
        self._left = ""
        self._asked_at: float | None = None  # when a signal asked this process to end
        self._gone_since: float | None = None
        self._explaining = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ingot-heartbeat", daemon=True)
        self._signals = contextlib.ExitStack()
        self._wakeups = -1
        self._page: mmap.mmap | None = None

    def at(self, step: int, phase: str) -> None:
        """This rank is now in `phase` of optimizer step `step` (counted from 1)."""
        self._here = (step, phase, time.monotonic())
        if self._page is not None:  # so that it is known to the moment where a killed process was
            self._page[:] = self._beat().to_bytes()

    def __enter__(self) -> "Heartbeat":
        if self.ranks.world > 1:
            now = time.monotonic()
            self._here, self._seen = (0, "start", now), dict.fromkeys(self._others, (None, now))
            self._wait_for_folder(now + SHARED_DISK_S)
            self._write()
            self._page = self._mapped()
            if threading.current_thread() is threading.main_thread():
                self._signals.enter_context(self._hearing_signals())
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ranks.world == 1:
            return
        try:
            if isinstance(error, RuntimeError | CheckpointError):
                self._explaining = True
                text = self._explain(error)
                if text is not None:
                    raise RankLost(self._tell(text)) from error
        finally:
            self._over.set()
            self._thread.join(timeout=5)
            self._signals.close()
            self._leave(error)

    def _run(self) -> None:
        """The thread."""
        while not self._over.wait(min(1.0, self.timeout_s / 5)):
            # A file system that stands still for a moment is no reason to stop watching.
            with contextlib.suppress(OSError):
                self._write()
                self._hear()
                self._look(self._watched)
                if not self._explaining:
                    self._judge(time.monotonic())

    def _judge(self, now: float) -> None:
        """End the process when a rank keeps the others waiting and the main thread does not say so itself."""
        if self._verdict() is not None:
            self._end_after(GRACE_S, now, None)
            return
        gone = self._gone(self._watched, self.timeout_s)
        if gone:
            silent = any(now - self._seen[found.rank][1] >= self.timeout_s for found in gone)
            left = all((beat := self._seen[found.rank][0]) is not None and beat.left for found in gone)
            self._end_after(0.0 if silent else LEFT_GRACE_S if left else GRACE_S, now, gone)
            return
        self._gone_since = None
        short = min(SILENT_S, self.timeout_s)
        if self._asked_at is not None and now - max(self._asked_at, self._here[2]) >= short:
            self._look(self._others)
            if gone := self._gone(self._others, short):
                self._end(self._story(gone))
        if any(beat.for_s >= self.timeout_s for beat in self._beats()):
            self._look(self._others)
            beats = self._beats()
            if found := blame.stalled(beats, self.timeout_s, self.words):
                self._end(self._story(found))
            elif blame.all_stuck(beats, self.ranks.world, self.timeout_s):
                self._end(blame.stuck_story(beats, self.words, self.advice()))

    def _end_after(self, grace_s: float, now: float, gone: list[Lost] | None) -> None:
        """Leave the main thread `grace_s` to end by the collective that fails."""
        self._gone_since = now if self._gone_since is None else self._gone_since
        if now - self._gone_since >= min(grace_s, self.timeout_s):
            self._end(None if gone is None else self._story(gone))

    def _end(self, text: str | None) -> None:
        """End this process: its main thread waits for a rank that will not come. Without `text` it is said already."""
        if self._over.is_set() or self._explaining:
            return
        self._left = "ended with the job"
        if text is not None:
            self._tell(text)
        with contextlib.suppress(OSError):
            self._write()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1)

    def _explain(self, error: BaseException) -> str | None:
        """The message for a failed collective; None when all ranks are well and the error is another one's."""
        peer_gone = _PEER_GONE.search(str(error)) is not None
        silent_s = min(SILENT_S, self.timeout_s)
        deadline = time.monotonic() + (silent_s + 3.0 if peer_gone else 0.0)
        while True:
            with contextlib.suppress(OSError):
                self._look(self._others)
            if (verdict := self._verdict()) is not None:
                return verdict
            if gone := self._gone(self._others, silent_s):
                return self._story(gone)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        if _LATE.search(str(error)) and isinstance(error, RuntimeError):
            return blame.stuck_story(self._beats(), self.words, self.advice())
        return None

    def _gone(self, ranks: Iterable[int], silent_s: float) -> list[Lost]:
        """Those of `ranks` that are dead, ended with an error, or have not been heard of for `silent_s`."""
        found = []
        now = time.monotonic()
        for rank in ranks:
            beat, since = self._seen[rank]
            if beat is not None and beat.left:
                if beat.left != DONE and (beat.left != TERMINATED or self._asked_at is None):
                    found.append(blame.left(beat))
            elif beat is not None and beat.machine == self._me.machine and born(beat.pid) != beat.born:
                found.append(blame.died(beat))
            elif now - since >= silent_s:
                found.append(blame.silent(rank, beat, now - since))
        return found

    def _look(self, ranks: Iterable[int]) -> None:
        """Read the files of `ranks`."""
        for rank in ranks:
            old, _ = self._seen[rank]
            try:
                beat = Beat.from_bytes(self._file(rank).read_bytes())
            except FileNotFoundError:  # not there yet, or gone: those that end well take theirs away
                beat = replace(old, left=DONE) if old is not None else None
            if beat is not None and (old is None or (beat.beats, beat.left) != (old.beats, old.left)):
                self._seen[rank] = (beat, time.monotonic())

    def _beats(self) -> list[Beat]:
        """What is known of all ranks, in order."""
        known = [self._beat(), *(beat for beat, _ in self._seen.values() if beat is not None)]
        return sorted(known, key=lambda beat: beat.rank)

    def _story(self, lost: list[Lost]) -> str:
        with contextlib.suppress(OSError):
            self._look(self._others)
        return blame.story(lost, self._beats(), self.words, self.advice())

    def _beat(self) -> Beat:
        step, phase, since = self._here
        now = time.monotonic()
        return replace(self._me, beats=int(now * 1e3), step=step, phase=phase, for_s=now - since, left=self._left)

    def _wait_for_folder(self, deadline: float) -> None:
        while not self.folder.is_dir():
            if time.monotonic() > deadline:
                raise IngotError(
                    f"rank {self.ranks.rank} on node {self._me.host} does not see {self.folder}, which rank 0 made; "
                    "set output to a folder on a disk that all nodes share"
                )
            time.sleep(0.2)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    def _write(self) -> None:
        """In place and not by a rename: readers on other nodes see a known file's new bytes sooner than a new file."""
        descriptor = os.open(self._file(self.ranks.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, self._beat().to_bytes(), 0)
        finally:
            os.close(descriptor)

    def _mapped(self) -> mmap.mmap | None:
        """This rank's file in memory: what is written there outlives the process and never waits for a disk."""
        try:
            with self._file(self.ranks.rank).open("r+b") as file:
                return mmap.mmap(file.fileno(), blame.BEAT_BYTES)
        except OSError:  # some network file systems have no shared pages: the thread writes every second
            return None

    def _leave(self, error: BaseException | None) -> None:
        """Take this rank's file away, or leave in it what ended the rank."""
        if self._page is not None:
            self._page.close()
            self._page = None
        with contextlib.suppress(OSError):
            if error is None:
                self._file(self.ranks.rank).unlink()
                self.folder.rmdir()  # the last one can
                self.folder.parent.rmdir()
                return
            self._left = f"{type(error).__name__}: {error}"
            self._write()

    def _verdict(self) -> str | None:
        """What a rank has said for all; None so far."""
        try:
            return (self.folder / "verdict").read_text(encoding="utf-8")
        except OSError:
            return None

    def _tell(self, text: str) -> str:
        """Print `text` unless another rank has printed its own; return what was printed."""
        try:
            with (self.folder / "verdict").open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return self._verdict() or text
        except OSError:
            pass  # nothing can be written any more; better twice than never
        with contextlib.suppress(Exception):
            print(f"\nerror: {text}", file=sys.stderr, flush=True)
        # It writes to disks and servers, which may be what is stuck.
        telling = threading.Thread(target=self.on_lost, args=(text,), daemon=True)
        telling.start()
        telling.join(timeout=5)
        return text

    @contextlib.contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        """Know of a SIGTERM while the main thread waits in a collective, where no handler of Python runs."""
        heard, told = os.pipe()
        os.set_blocking(heard, False)
        os.set_blocking(told, False)
        before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        own = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if own:
            signal.signal(signal.SIGTERM, self._terminated)
        self._wakeups = heard
        try:
            yield
        finally:
            self._wakeups = -1
            if own:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(before)
            os.close(heard)
            os.close(told)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._wakeups >= 0 and {signal.SIGTERM, signal.SIGINT} & set(os.read(self._wakeups, 64)):
                self._asked_at = time.monotonic() if self._asked_at is None else self._asked_at

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM outside of the training loop. A launcher sends it to the ranks that are left when one has died."""
        if self._explaining:
            return
        self._asked_at = time.monotonic()
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            self._look(self._others)
            if (verdict := self._verdict()) is not None or (gone := self._gone(self._others, self.timeout_s)):
                self._explaining = True
                raise RankLost(self._tell(verdict if verdict is not None else self._story(gone)))
            time.sleep(0.1)
        self._left = TERMINATED
        with contextlib.suppress(OSError):
            self._write()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
