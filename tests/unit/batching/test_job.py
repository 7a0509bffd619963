"""N rows in, N rows out: after kills, with poison, over the threshold, on a full disk, with several processes."""

import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingot.batching import manifest as manifests
from ingot.batching import sinks
from ingot.batching.job import Job, allowed_errors
from ingot.batching.manifest import FINISHED, STOPPED, check_folder, read
from ingot.errors import FieldError, IngotError, TooManyErrors

Make = Callable[..., Job]


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that does `work`, and ends with 0 when it succeeds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Parts and errors of a folder."""
    names = [*sorted(folder.glob("part-*")), *folder.glob("errors.jsonl")]
    return {path.name: path.read_bytes() for path in names}


def test_every_row_is_answered_once_in_order(rows_file: Any, make_job: Make, answers_in: Any, tmp_path: Path) -> None:
    job = make_job(rows_file(11), tmp_path / "out")
    job.run()
    assert [row["id"] for row in answers_in(tmp_path / "out")] == [f"r{n}" for n in range(11)]
    assert answers_in(tmp_path / "out")[3] == {"id": "r3", "said": "ROW 3 É", "length": 7}
    found = read(tmp_path / "out")
    assert (found["status"], found["answers"], found["errors"], len(found["buckets"])) == (FINISHED, 11, 0, 3)
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_an_input_without_rows_has_an_output_without_parts(rows_file: Any, make_job: Make, tmp_path: Path) -> None:
    make_job(rows_file(0), tmp_path / "out").run()
    assert read(tmp_path / "out")["status"] == FINISHED
    assert contents(tmp_path / "out") == {}


def test_poisoned_rows_cost_the_others_nothing(rows_file: Any, make_job: Make, answers_in: Any, tmp_path: Path) -> None:
    make_job(rows_file(12, poisoned=(1, 6, 7)), tmp_path / "out").run()
    assert len(answers_in(tmp_path / "out")) == 9
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["r1", "r6", "r7"]
    wanted = {"id": "r1", "row": "rows.jsonl:2", "field": "text", "message": "the text cannot be answered"}
    assert errors[0] == wanted
    assert "poison" not in (tmp_path / "out" / "errors.jsonl").read_text()


def test_a_bucket_of_poison_has_no_part(rows_file: Any, make_job: Make, tmp_path: Path) -> None:
    make_job(rows_file(8, poisoned=(0, 1, 2, 3)), tmp_path / "out").run()
    assert sorted(contents(tmp_path / "out")) == ["errors.jsonl", "part-00001.jsonl"]


def test_lines_that_are_no_rows_are_errors_with_their_place(make_job: Make, answers_in: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{broken\n[1]\n\xff\xfe\n\n{"other": 1}\n{"text": "b"}\n')
    make_job(tmp_path / "rows.jsonl", tmp_path / "out").run()
    assert [row["id"] for row in answers_in(tmp_path / "out")] == ["rows.jsonl:1", "rows.jsonl:7"]
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == [f"rows.jsonl:{line}" for line in (2, 3, 4, 6)]


def test_too_many_errors_end_it_and_a_higher_limit_goes_on(
    rows_file: Any, make_job: Make, answers_in: Any, tmp_path: Path
) -> None:
    rows = rows_file(16, poisoned=(0, 1, 2))
    with pytest.raises(TooManyErrors, match="3 of 4 rows failed, and --max-errors allows 2"):
        make_job(rows, tmp_path / "out", max_errors="2").run()
    assert read(tmp_path / "out")["status"] == STOPPED
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 3
    assert len(answers_in(tmp_path / "out")) == 1
    with pytest.raises(TooManyErrors):  # asked again, nothing is answered again
        make_job(rows, tmp_path / "out", max_errors="2").run()
    make_job(rows, tmp_path / "out", max_errors="20%").run()
    assert read(tmp_path / "out")["status"] == FINISHED
    assert len(answers_in(tmp_path / "out")) == 13


def test_a_limit_of_errors_is_a_number_a_share_or_none() -> None:
    assert [allowed_errors(text, 250) for text in ("0", "7", "10%", "0.5%", "-1")] == [0, 7, 25, 1, None]
    for text in ("-2", "ten", "5 %", "101%", "", "%"):
        with pytest.raises(FieldError, match="--max-errors"):
            allowed_errors(text, 250)


# --- kills -------------------------------------------------------------------------------------------------------


def test_killed_at_30_random_points_it_ends_as_if_it_had_not_been(
    rows_file: Any,
    make_job: Make,
    make_answers: Any,
    answers_in: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sinks.os, "fsync", lambda handle: None)  # which is for a loss of power, and slow
    rows, draws = rows_file(400, poisoned=(5, 50, 51)), random.Random(7)

    heard, said = os.pipe()

    def start(output: str) -> None:
        job = make_job(rows, tmp_path / output, make_answers(seconds=0.004))
        os.write(said, b"!")
        job.run()

    began = time.monotonic()
    assert ended(forked(lambda: start("whole"))) == 0
    os.read(heard, 1)
    longest, left = (time.monotonic() - began) / 20, []
    for number in range(30):
        pid = forked(lambda: start("killed"))
        if number % 3:  # else it may be killed while it begins
            os.read(heard, 100)
        time.sleep(draws.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        begun = (tmp_path / "killed" / "manifest.json").exists()
        left.append(len(read(tmp_path / "killed")["buckets"]) if begun else 0)
    start("killed")
    assert left == sorted(left) and left[-1] > 5  # they went on where others had been killed
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    ids = [row["id"] for row in answers_in(tmp_path / "killed")]
    assert len(ids) == len(set(ids)) == 397


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_around_every_rename_nothing_is_lost_or_twice(
    rows_file: Any, make_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: bool
) -> None:
    """Each start lives for one rename more than the last: of a part, of errors, of the manifest."""
    rows = rows_file(16, poisoned=(5,))
    make_job(rows, tmp_path / "whole").run()
    rename, starts, codes = os.replace, 0, []

    def killing(*paths: Any) -> None:
        nonlocal starts
        starts -= 1
        if before and starts < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)
        if starts < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sinks.os, "replace", killing)
    for number in range(20):
        starts = 1 + number % 6
        codes.append(ended(forked(lambda: make_job(rows, tmp_path / "killed").run())))
        if codes[-1] == 0:
            break
    monkeypatch.undo()
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("**/.*.partial"))


def test_killed_at_the_first_manifest_it_is_begun_again(
    rows_file: Any, make_job: Make, answers_in: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, out = rows_file(4), tmp_path / "out"
    monkeypatch.setattr(sinks.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(forked(lambda: make_job(rows, out))) == -signal.SIGKILL
    monkeypatch.undo()
    assert len(list(out.glob(".manifest.json.*.partial"))) == 1
    assert check_folder(out) is None
    make_job(rows, out).run()
    assert len(answers_in(out)) == 4
    assert not list(out.glob(".*.partial"))


# --- several processes, and what goes wrong outside ---------------------------------------------------------------


def test_two_processes_share_the_buckets(rows_file: Any, make_job: Make, make_answers: Any, tmp_path: Path) -> None:
    rows = rows_file(80)
    make_job(rows, tmp_path / "whole").run()

    def work(name: str) -> None:
        answers = make_answers(seconds=0.01)
        make_job(rows, tmp_path / "shared", answers).run()
        (tmp_path / name).write_text(str(answers.calls))

    assert [ended(pid) for pid in [forked(lambda: work("a")), forked(lambda: work("b"))]] == [0, 0]
    calls = [int((tmp_path / name).read_text()) for name in "ab"]
    assert sum(calls) == 20
    assert min(calls) > 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_what_another_did_meanwhile_is_not_done_again(
    rows_file: Any, make_job: Make, make_answers: Any, tmp_path: Path
) -> None:
    rows, late = rows_file(12), make_answers()
    waiting = make_job(rows, tmp_path / "out", late)
    make_job(rows, tmp_path / "out").run()
    waiting.run()
    assert late.calls == 0


def test_another_process_takes_what_a_killed_one_had_claimed(
    rows_file: Any, make_job: Make, make_answers: Any, tmp_path: Path
) -> None:
    rows = rows_file(12)
    lost = forked(lambda: make_job(rows, tmp_path / "shared", make_answers(seconds=60)).run())
    while not (tmp_path / "shared" / ".batch" / "claims").exists():
        time.sleep(0.005)
    time.sleep(0.1)
    other = forked(lambda: make_job(rows, tmp_path / "shared").run())
    time.sleep(0.3)
    assert os.waitpid(other, os.WNOHANG)[0] == 0  # it waits for the bucket of the first
    assert len(read(tmp_path / "shared")["buckets"]) == 2
    os.kill(lost, signal.SIGKILL)
    assert (ended(lost), ended(other)) == (-signal.SIGKILL, 0)
    assert read(tmp_path / "shared")["status"] == FINISHED


def test_without_locks_nothing_is_there_twice(
    rows_file: Any, make_job: Make, make_answers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(manifests.fcntl, "lockf", none)
    rows = rows_file(20)
    make_job(rows, tmp_path / "whole").run()
    work = lambda: make_job(rows, tmp_path / "shared", make_answers(seconds=0.002)).run()  # noqa: E731
    pids = [forked(work), forked(work)]
    [ended(pid) for pid in pids]
    work()  # where one overwrote what the other had recorded
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_what_can_be_gone_on_with(
    rows_file: Any, make_job: Make, make_answers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, sync, left = rows_file(16), os.fsync, 5
    make_job(rows, tmp_path / "whole").run()
    job = make_job(rows, tmp_path / "full")

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(sinks.os, "fsync", full)
    with pytest.raises(IngotError, match="cannot be written: No space left on device; what is done is kept"):
        job.run()
    monkeypatch.undo()
    done = read(tmp_path / "full")["buckets"]
    assert 0 < len(done) < 4
    assert not list((tmp_path / "full").glob("**/.*.partial"))
    answers = make_answers()
    make_job(rows, tmp_path / "full", answers).run()
    assert answers.calls == 4 - len(done)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", range(9))
def test_whatever_cannot_be_written_is_told_and_gone_on_with(
    rows_file: Any, make_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: int
) -> None:
    """A part, the errors of its bucket, the manifest, all errors, the manifest of the end: each, then its folder."""
    rows = rows_file(4, poisoned=(1,))
    job = make_job(rows, tmp_path / "full")

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sinks.os, "fsync", full)
    with pytest.raises(IngotError, match="cannot be written: No space left on device; what is done is kept"):
        job.run()
    monkeypatch.undo()
    assert read(tmp_path / "full")["status"] != FINISHED
    make_job(rows, tmp_path / "full").run()
    assert read(tmp_path / "full")["status"] == FINISHED


def test_an_output_that_cannot_be_made_is_told(rows_file: Any, make_job: Make, tmp_path: Path) -> None:
    rows = rows_file(4)
    with pytest.raises(IngotError, match=r"rows\.jsonl/out cannot be written: Not a directory"):
        make_job(rows, rows / "out")


def test_a_part_that_was_changed_is_answered_again(
    rows_file: Any, make_job: Make, make_answers: Any, tmp_path: Path
) -> None:
    rows = rows_file(12, poisoned=(1,))
    make_job(rows, tmp_path / "out").run()
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "part-00001.jsonl").unlink()
    (tmp_path / "out" / "part-00002.jsonl").write_text("{}\n")
    answers = make_answers()
    make_job(rows, tmp_path / "out", answers).run()
    assert answers.calls == 2
    assert contents(tmp_path / "out") == whole


def test_rows_that_are_missing_at_the_end_are_not_called_finished(
    rows_file: Any, make_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job(rows_file(8), tmp_path / "out")
    monkeypatch.setattr(sinks, "json_line", lambda record: b"" if record["id"] == "r6" else b"{}\n")
    with pytest.raises(IngotError, match=r"part-00001\.jsonl: not the 4 rows that were written"):
        job.run()
    assert read(tmp_path / "out")["status"] != FINISHED


def test_a_model_that_answers_nothing_any_more_ends_it(
    rows_file: Any, make_job: Make, make_answers: Any, tmp_path: Path
) -> None:
    def broken(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise RuntimeError(f"device lost at {rows[0]['text']}")

    with pytest.raises(IngotError, match=r"the model answers no row any more \(RuntimeError") as told:
        make_job(rows_file(8), tmp_path / "out", make_answers(broken)).run()
    assert "row 0" not in str(told.value)
    assert read(tmp_path / "out")["buckets"] == {}
