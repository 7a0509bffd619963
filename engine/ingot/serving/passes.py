"""Passes through a model that answers a row by one pass: on threads of this process, or in processes of their own."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from ingot.model.memory import free_bytes
from ingot.model.running import pass_tokens
from ingot.model.runtime import WRITING, Runtime
from ingot.model.sampling import InputError
from ingot.model.unpadded import unpad

Rows = Sequence[dict[str, Any]]
Answers = list[dict[str, Any]]
Stopped = Callable[[], bool]  # whether nobody waits for the answers any more
SEVERAL_PASSES = ("summarization", "translation")
BESIDE = 8  # passes at most; each has a tokenizer of its own
PROCESS_BYTES = 400_000_000  # that a process holds beside its model, mostly torch's libraries
END_S = 5.0  # that a process has to end
log = logging.getLogger("ingot.serve")


def never() -> bool:
    """Somebody waits for it to the end."""
    return False


class PassError(Exception):
    """A pass failed in its process. Never holds a part of a request."""


class Passes(Protocol):
    """Up to `beside` passes at a time. `spare`: tokens of padding that one may have, see `alike`; None: padding is not
    computed, and rows of any length go together.
    """

    beside: int
    spare: int | None

    def begin(self, rows: Rows, params: dict[str, Any], stopped: Stopped, *, alone: bool) -> Future[Answers]:
        """As `Runtime.answer`. `alone`: with all threads."""

    def prove(self, row: dict[str, Any]) -> None:
        """Answer `row` wherever passes run. Raises what goes wrong."""

    def close(self) -> None:
        """End threads and processes."""


def beside(runtime: Runtime) -> int:
    """How many passes run side by side: on a CPU one a thread.

    Threads of one pass wait for each other at every layer, and longest where other programs use the cores, too. 64
    questions to a BERT of 6 layers in 4 groups on 2 busy cores: 19 ms a row one after the other with two threads, 6 ms
    side by side.
    """
    model: Any = runtime.model
    alone = next(model.parameters()).device.type != "cpu" or runtime.task in SEVERAL_PASSES
    return 1 if alone else min(torch.get_num_threads(), BESIDE)


def obstacle(runtime: Runtime) -> str | None:
    """Why passes of this model cannot run in processes of their own; None: they can."""
    model: Any = runtime.model
    count = beside(runtime)
    if runtime.task in WRITING or runtime.task in SEVERAL_PASSES:
        return "it writes"
    if count < 2:
        return "only one pass runs at a time"
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantized"
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed, free = count * (size + PROCESS_BYTES), free_bytes(torch.device("cpu"))
    if free is not None and needed > free // 2:
        return f"{count} of them take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


class Threads:
    """See `Passes`: one model, whose passes wait for each other and for HTTP wherever they need Python's lock."""

    def __init__(self, runtime: Runtime) -> None:
        self._threads, self.beside = torch.get_num_threads(), beside(runtime)
        self.spare = None if unpad(runtime.model) else pass_tokens(next(runtime.model.parameters()).device)
        self._free: SimpleQueue[Runtime] = SimpleQueue()
        for _ in range(self.beside):  # a tokenizer refuses a second thread while it is set to cut texts
            self._free.put(Runtime(runtime.model, copy.deepcopy(runtime.tokenizer), runtime.about))
        # A thread that has not asked for their number takes that of the process again at its first operation.
        self._pool = ThreadPoolExecutor(self.beside, "ingot-pass", torch.get_num_threads)

    def begin(self, rows: Rows, params: dict[str, Any], stopped: Stopped, *, alone: bool) -> Future[Answers]:
        """See `Passes`."""
        return self._pool.submit(self._answer, rows, params, stopped, self._threads // (1 if alone else self.beside))

    def _answer(self, rows: Rows, params: dict[str, Any], stopped: Stopped, threads: int) -> Answers:
        torch.set_num_threads(threads)  # of this thread
        runtime = self._free.get()
        try:
            return runtime.answer(rows, params, stopped)
        finally:
            self._free.put(runtime)

    def prove(self, row: dict[str, Any]) -> None:
        """See `Passes`."""
        self.begin([row], {}, never, alone=True).result()

    def close(self) -> None:
        """See `Passes`."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Processes:
    """See `Passes`: each in a process that has read the model in `folder` itself, on the CPU. One that dies is started
    again, and its pass is made again once.

    Raises ValueError where the model does not load.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._threads, self.beside = torch.get_num_threads(), count
        self._all = [_Process(folder) for _ in range(count)]  # they read it at the same time
        self._free: SimpleQueue[_Process] = SimpleQueue()
        try:
            unpadded = min([one.opened() for one in self._all])
            self.spare = None if unpadded else pass_tokens(torch.device("cpu"))
        except EOFError:
            self._end()
            raise ValueError("its process ended while it read the model") from None
        except BaseException:
            self._end()
            raise
        for one in self._all:
            self._free.put(one)
        self._pool = ThreadPoolExecutor(count, "ingot-pass")

    def begin(self, rows: Rows, params: dict[str, Any], stopped: Stopped, *, alone: bool) -> Future[Answers]:
        """See `Passes`. `stopped` is not asked: what writes token by token has no passes here."""
        return self._pool.submit(self._answer, rows, params, self._threads // (1 if alone else self.beside))

    def _answer(self, rows: Rows, params: dict[str, Any], threads: int) -> Answers:
        process = self._free.get()
        try:
            return process.answer(rows, params, threads)
        finally:
            self._free.put(process)

    def prove(self, row: dict[str, Any]) -> None:
        """See `Passes`."""
        held = [self._free.get() for _ in self._all]
        try:
            for one in held:
                one.answer([row], {}, self._threads)
        finally:
            for one in held:
                self._free.put(one)

    def close(self) -> None:
        """See `Passes`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _end(self) -> None:
        for one in self._all:
            one.end()
        for one in self._all:
            one.wait()


class _Process:
    """One process: a line of JSON to it for each pass, and one from it (pass_process.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ended = folder, False
        self._child = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: not whatever is called `ingot` in the folder where the server was started.
        command = [sys.executable, "-P", "-m", "ingot.serving.pass_process", str(self._folder.resolve())]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def opened(self) -> bool:
        """Wait until it has read the model; whether it computes no padding. Raises ValueError where it could not."""
        said = self._hear()
        if "refused" in said:
            raise ValueError(said["refused"])
        return bool(said["unpadded"])

    def answer(self, rows: Rows, params: dict[str, Any], threads: int) -> Answers:
        """As `Runtime.answer`. Raises InputError and PassError."""
        asked = [list(rows), params, threads]
        try:
            said = self._ask(asked)
        except (OSError, EOFError, ValueError) as error:  # ValueError: closed meanwhile
            if self._ended:
                raise PassError("the server stops") from error
            said = self._again(asked)
        if "input" in said:
            raise InputError(*said["input"])
        if "failed" in said:
            raise PassError(said["failed"])
        answers: Answers = said["answers"]
        return answers

    def _ask(self, asked: list[Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(asked).encode() + b"\n")
        self._child.stdin.flush()
        return self._hear()

    def _again(self, asked: list[Any]) -> dict[str, Any]:
        """The same of a new process."""
        log.error("a process of the model ended with status %s; another takes its place", self.wait())
        self._child = self._start()
        try:
            self.opened()
            return self._ask(asked)
        except (OSError, EOFError, ValueError) as error:
            raise PassError(f"a process of the model ended with status {self.wait()} again") from error

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise EOFError
        said: dict[str, Any] = json.loads(line)
        return said

    def end(self) -> None:
        """Let it end, after the pass that it makes."""
        self._ended = True
        with suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.close()

    def wait(self) -> int:
        """Until it has: its status. It is killed where that takes too long."""
        try:
            status = self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            status = self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        return status
