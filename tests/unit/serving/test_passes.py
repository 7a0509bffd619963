"""Passes in processes of their own: they answer as threads do, come back when they die, and go with the server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.errors import ServeError
from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.serving import passes
from ingot.serving.engine import Limits, Meter
from ingot.serving.fleet import Fleet, Target, deploy
from ingot.serving.passes import PassError, Processes, Threads, beside, never, obstacle

ROWS = [{"text": "word " * n} for n in (1, 9, 3, 20)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def processes(mean_folder: Path) -> Iterator[Processes]:
    found = Processes(mean_folder, 1)
    yield found
    found.close()


def _children(of: int | None = None) -> set[int]:
    """Processes of passes that live, and whose parent is `of`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if b"pass_process" in (folder / "cmdline").read_bytes() and state != "Z":
                found |= {int(folder.name)} if int(parent) == (of or os.getpid()) else set()
        except OSError:
            continue
    return found


def _gone(numbers: set[int]) -> bool:
    until = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in numbers) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(Path(f"/proc/{number}").exists() for number in numbers)


def test_they_answer_as_threads_do_and_end_when_they_are_closed(mean_folder: Path) -> None:
    threads, found = Threads(Runtime.load(mean_folder)), Processes(mean_folder, 2)
    children = _children()
    assert len(children) == found.beside == 2
    try:
        assert found.spare is None
        found.prove(ROWS[0])
        with pytest.raises(InputError):
            found.prove({"wrong": "row"})
        assert found._free.qsize() == 2  # none is held afterwards
        jobs = [found.begin(ROWS, {"top_k": 2}, never, alone=False) for _ in range(3)]
        wanted = threads.begin(ROWS, {"top_k": 2}, never, alone=True).result()
        for job in jobs:
            for one, other in zip(job.result(), wanted, strict=True):
                assert one["label"] == other["label"]
                assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    finally:
        threads.close()
        found.close()
    assert _gone(children)


def test_what_goes_wrong_in_a_pass_is_told_and_a_process_that_is_killed_comes_back(
    processes: Processes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as told:
        processes.begin([{"wrong": "secret"}], {}, never, alone=True).result()
    assert told.value.field == "wrong"
    with pytest.raises(PassError, match=r"^RuntimeError$"):
        processes._all[0].answer([{"text": "secret"}], {}, "two")  # type: ignore[arg-type]
    assert "secret" not in capfd.readouterr().err
    wanted = processes.begin(ROWS, {}, never, alone=True).result()
    [child] = _children()
    os.kill(child, signal.SIGKILL)
    assert processes.begin(ROWS, {}, never, alone=True).result() == wanted
    assert _children() != {child}
    assert "ended with status -9" in caplog.text


@pytest.mark.slow
def test_one_that_dies_again_fails_the_pass_and_not_the_next(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = passes._Process._start
    [child] = _children()
    os.kill(child, signal.SIGKILL)
    monkeypatch.setattr(
        passes._Process,
        "_start",
        lambda _: subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE),
    )
    with pytest.raises(PassError):
        processes.begin(ROWS, {}, never, alone=True).result()
    monkeypatch.setattr(passes._Process, "_start", start)
    assert processes.begin(ROWS, {}, never, alone=True).result()[0]["label"]


@pytest.mark.slow
def test_they_end_with_the_server_however_it_ends(mean_folder: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from ingot.serving.passes import Processes\n"
        "it = Processes(Path(sys.argv[1]), 1); print('there', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(mean_folder)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"there\n"
        children = _children(server.pid)
        assert len(children) == 1
        for child in children:  # as a signal to the whole group would: what runs may end
            os.kill(child, signal.SIGTERM)
        assert _children(server.pid) == children
        server.kill()
    assert _gone(children)


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_refused(mean_folder: Path) -> None:
    (mean_folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"[Ss]afetensors|[Hh]eader|ended"):
        Processes(mean_folder, 1)
    assert _gone(_children())


def test_where_they_cannot_be(mean_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(mean_folder)
    assert beside(runtime) == 2
    assert obstacle(runtime) is None
    assert obstacle(Runtime.load(text_folder)) == "it writes"
    with monkeypatch.context() as patched:
        patched.setattr(passes, "free_bytes", lambda _: 10**9)
        assert obstacle(runtime) == "2 of them take 0.8 GB, and 1.0 GB are free"
    with monkeypatch.context() as patched:
        patched.setattr(runtime.model.config, "quantization_config", {}, raising=False)
        assert obstacle(runtime) == "its weights are quantized"
    torch.set_num_threads(1)
    assert obstacle(runtime) == "only one pass runs at a time"


def _deployed(folder: Path, where: Any) -> Any:
    return deploy(Fleet((Target(folder),)), Limits(), lambda _: Meter(), where=where)[0]


@pytest.mark.parametrize(("where", "count"), [("auto", 2), ("threads", 0)])
def test_a_server_has_them_where_it_may(mean_folder: Path, where: Any, count: int) -> None:
    deployments = _deployed(mean_folder, where)
    try:
        assert deployments.wait_ready(60)
        assert len(_children()) == count
        [one] = deployments.all()
        assert next(one.engine.runtime.model.parameters()).is_meta == (count > 0)
    finally:
        deployments.close()
    assert not _children()


def test_a_server_that_was_told_to_have_them_says_why_it_cannot(mean_folder: Path) -> None:
    torch.set_num_threads(1)
    with pytest.raises(ServeError, match=r"--passes = 'processes': .*only one pass runs at a time; use threads"):
        _deployed(mean_folder, "processes")
