"""Heartbeats on one machine: who is noticed, when, and how the process ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ingot.errors import CheckpointError
from ingot.launch.process import born, machine
from ingot.parallel import heartbeat
from ingot.parallel.blame import Beat, collectives
from ingot.parallel.heartbeat import Heartbeat, RankLost, fresh
from ingot.ranks import Ranks
from ingot.recipe import Parallel

WORDS = collectives(Parallel(strategy="ddp"), cuda=False)
SOON = 20.0


@pytest.fixture
def ended(monkeypatch) -> threading.Event:
    """Set when a heartbeat's thread ends the process."""
    event = threading.Event()

    def end(code: int) -> None:
        assert code == 1
        event.set()
        raise OSError("a process that ended does no more")  # the thread goes on with its next beat

    monkeypatch.setattr(heartbeat.os, "_exit", end)
    return event


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for rank 1."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as process:
        yield process
        process.kill()


def beat_of(pid: int, **known: object) -> Beat:
    return replace(Beat(1, "worker-3", machine(), pid, born(pid), beats=1, step=12, phase="data"), **known)


def make(folder: Path, timeout_s: float = 60.0, **more: object) -> Heartbeat:
    return Heartbeat(folder, Ranks(0, 2, 0, 2), timeout_s, WORDS, advice=lambda: "Continue.", **more)


def test_a_dead_rank_ends_the_process_that_waits_for_it(tmp_path, ended, other, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.5)
    told: list[str] = []
    (tmp_path / "rank-1").write_bytes(beat_of(other.pid).to_bytes())
    with make(tmp_path, 5.0, on_lost=told.append) as pulse:
        pulse.at(13, "backward")
        assert not ended.wait(2)  # alive: that it does not move is no reason before the timeout
        other.kill()
        other.wait()
        assert ended.wait(SOON)
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert f'rank 1 (node worker-3, pid {other.pid}) died in step 12, "data"; rank 0 waits for it in the' in err
    assert "gradient reduction (all-reduce) of step 13" in err
    assert told == [err.removeprefix("\nerror: ").strip()]


def test_a_rank_without_a_sign_of_life(tmp_path, ended, capsys):
    """On another machine: nobody can look whether its process lives."""
    (tmp_path / "rank-1").write_bytes(beat_of(1, machine="another").to_bytes())
    with make(tmp_path, 1.0) as pulse:
        pulse.at(13, "backward")
        assert ended.wait(SOON)
    assert "has shown no sign of life for 1 s; it was in step 12" in capsys.readouterr().err


def test_a_rank_that_is_alive_and_stuck(tmp_path, ended, other, capsys):
    stop = threading.Event()

    def live() -> None:
        for number in range(1000):
            line = beat_of(other.pid, beats=number, for_s=2.0 + number / 10).to_bytes()
            (tmp_path / "rank-1").write_bytes(line)
            if stop.wait(0.1):
                return

    living = threading.Thread(target=live)
    living.start()
    try:
        with make(tmp_path, 2.0) as pulse:
            pulse.at(13, "backward")
            assert ended.wait(SOON)
    finally:
        stop.set()
        living.join()
    assert 'has been in step 12, "data", for' in capsys.readouterr().err


def test_a_rank_that_leaves_well_is_not_missed(tmp_path, ended, other):
    (tmp_path / "rank-1").write_bytes(beat_of(other.pid).to_bytes())
    with make(tmp_path, 1.0) as pulse:
        pulse.at(13, "backward")
        time.sleep(0.5)
        (tmp_path / "rank-1").unlink()
        assert not ended.wait(3)


def test_a_failed_collective_names_the_dead_rank(tmp_path, other, capsys):
    other.kill()
    other.wait()
    (tmp_path / "rank-1").write_bytes(beat_of(other.pid, born="123").to_bytes())
    pulse = make(tmp_path)
    with pytest.raises(RankLost, match=r"rank 1 .* died in step 12.* of step 0 .*Continue\.") as raised, pulse:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    assert raised.value.printed
    assert raised.value.exit_code == 1
    assert capsys.readouterr().err.strip() == f"error: {raised.value}"
    assert Beat.from_bytes((tmp_path / "rank-0").read_bytes()).left.startswith("RuntimeError")


def test_a_checkpoint_that_another_rank_left_names_it_too(tmp_path):
    (tmp_path / "rank-1").write_bytes(beat_of(1, left="KeyError: 'text'").to_bytes())
    with pytest.raises(RankLost, match=r"rank 1 .* ended in step 12, .data.: KeyError: 'text'"), make(tmp_path):
        raise CheckpointError("checkpoint step-000003 could not be written (another rank ended meanwhile)")


def test_only_the_first_rank_prints(tmp_path, capsys):
    (tmp_path / "rank-1").write_bytes(beat_of(1, born="123").to_bytes())
    (tmp_path / "verdict").write_text("rank 7 died")
    with pytest.raises(RankLost, match=r"^rank 7 died$"), make(tmp_path):
        raise RuntimeError("Connection reset by peer")
    assert capsys.readouterr().err == ""


def test_a_defect_keeps_its_own_traceback(tmp_path, other):
    (tmp_path / "rank-1").write_bytes(beat_of(other.pid).to_bytes())
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised, make(tmp_path):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(raised.value, RankLost)
    assert time.monotonic() - started < heartbeat.SILENT_S


def test_a_sigterm_while_the_main_thread_waits_is_heard_and_the_silent_rank_named(tmp_path, ended, monkeypatch, capsys):
    """The handler of Python that the loop installs does not run while a collective waits: only the thread hears."""
    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    (tmp_path / "rank-1").write_bytes(beat_of(1, machine="another").to_bytes())
    before = signal.getsignal(signal.SIGTERM)
    with make(tmp_path, 60.0) as pulse:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        pulse.at(13, "backward")
        time.sleep(1.5)
        assert not ended.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(SOON)
        signal.signal(signal.SIGTERM, pulse._terminated)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "rank 1 (node worker-3, pid 1) has shown no sign of life" in capsys.readouterr().err


def test_one_rank_needs_none(tmp_path):
    with Heartbeat(tmp_path / "nowhere", Ranks(), 1.0) as pulse:
        pulse.at(1, "data")
    assert not (tmp_path / "nowhere").exists()


def test_a_good_end_leaves_nothing(tmp_path):
    folder = fresh(tmp_path / "heartbeat")
    with make(folder) as pulse:
        pulse.at(1, "data")
        assert (folder / "rank-0").exists()
    assert not (tmp_path / "heartbeat").exists()


def test_an_earlier_start_is_not_heard_of(tmp_path):
    old = fresh(tmp_path / "heartbeat")
    (old / "verdict").write_text("rank 1 died")
    new = fresh(tmp_path / "heartbeat")
    assert new != old
    assert not old.exists()
    assert list(new.iterdir()) == []


def test_the_place_of_a_killed_process_is_known_to_the_moment(tmp_path):
    """Without waiting for the thread's next beat."""
    with make(tmp_path, 600.0) as pulse:
        pulse.at(41, "forward")
        seen = Beat.from_bytes((tmp_path / "rank-0").read_bytes())
    assert (seen.step, seen.phase) == (41, "forward")
