"""Rows asked once, killed anywhere, shared by any number of ranks, scored again without a model: the same result."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from scripted import SECTION, Questions, Scripted, evaluated, right

from ingot.errors import IngotError
from ingot.evaluation.result import load_evaluation, load_evaluations, read_record
from ingot.evaluation.runner import Crew, evaluate_task, merge_items
from ingot.evaluation.samples import Item, Samples


def content(folder: Path) -> Any:
    """What an evaluation came to, but for the time that it took."""
    record = json.loads((folder / "questions.json").read_text())
    record.pop("seconds")
    rows = [row.__dict__ | {"seconds": None} for row in Samples(folder / "questions.parquet")]
    return record, rows


def test_rows_are_asked_by_length_and_kept_in_their_order(tmp_path: Path) -> None:
    subject, task = Scripted(), Questions(10)
    task.group = lambda number: f"g{number % 2}"
    found = evaluated(task, subject, tmp_path)
    assert [row.id for row in found.samples] == [f"q:{n}" for n in range(10)]
    assert [row.prediction for row in found.samples] == ["yes", "no"] * 5
    assert [row.numbers["exact_match"][0] for row in found.samples] == [
        float((n % 2 == 0) == (right(n) == "yes")) for n in range(10)
    ]
    assert [len(prompt) for prompt in subject.asked] == sorted(map(len, subject.asked), reverse=True)
    assert (found.samples[3].n_output_tokens, found.samples[3].group) == (1, "g1")
    assert found.samples[3].seconds is not None
    assert "n_output_tokens" not in found.samples[3].output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.json", "questions.parquet"]


def test_an_evaluation_is_read_back_whole(tmp_path: Path) -> None:
    found = evaluated(Questions(12), Scripted(), tmp_path)
    again = load_evaluation(tmp_path, "questions")
    assert (again.scores, again.asked, again.about, again.name) == (found.scores, found.asked, found.about, "tuned")
    assert list(again.samples) == list(found.samples)
    assert again.statistics["exact_match"].value() == found.scores["exact_match"].value
    assert list(load_evaluations(tmp_path)) == ["questions"]
    assert again.asked["rows"] == 12


class Killed(Exception):
    """Stands in for a kill: raised after so many answers."""


def test_an_evaluation_killed_anywhere_comes_to_the_same(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    evaluated(Questions(30), Scripted(), whole)
    for point in (1, 4, 5, 17, 29):
        folder, left = tmp_path / str(point), count()

        def dying(prompt: str, left: Iterator[int] = left, point: int = point) -> str:
            if next(left) >= point:
                raise Killed
            return Scripted().answer(prompt)

        with pytest.raises(Killed):
            evaluated(Questions(30), Scripted(dying), folder)
        kept = sum(path.read_text().count("\n") for path in folder.rglob("*.jsonl"))
        assert kept == point // SECTION.save_every_rows * SECTION.save_every_rows
        after = Scripted()
        evaluated(Questions(30), after, folder)
        assert len(after.asked) == 30 - kept  # what was answered is not asked again
        assert content(folder) == content(whole)


@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # Python 3.12 on: threads of torch, which do not matter
def test_twenty_kills_at_random_points_lose_nothing(tmp_path: Path) -> None:
    """A real SIGKILL, wherever it hits: while rows are asked, while a portion or the result is written."""
    evaluated(Questions(120), Scripted(), tmp_path / "whole")
    folder, log, draw = tmp_path / "killed", tmp_path / "asked", random.Random(0)

    def answered_and_noted(prompt: str) -> str:
        time.sleep(0.0005)
        with log.open("a") as file:
            file.write(f"{prompt}\n")
        return Scripted().answer(prompt)

    kept: set[str] = set()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                evaluated(Questions(120), Scripted(answered_and_noted), folder)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = {path.name for path in folder.rglob("*.jsonl")}
        assert kept <= now or (folder / "questions.json").exists()  # what was answered once is never lost
        kept = now
    evaluated(Questions(120), Scripted(answered_and_noted), folder)
    assert content(folder) == content(tmp_path / "whole")
    assert len({row.id for row in Samples(folder / "questions.parquet")}) == 120
    assert len(log.read_text().splitlines()) < 120 + 21 * SECTION.save_every_rows  # at most one portion a kill, twice


def test_windows_larger_than_memory_give_the_same_scores(tmp_path: Path) -> None:
    one = evaluated(Questions(25), Scripted(), tmp_path / "one")
    several = evaluated(Questions(25, window=7), Scripted(), tmp_path / "several")
    assert several.scores == one.scores
    assert [row.id for row in several.samples] == [row.id for row in one.samples]
    assert [row.prediction for row in several.samples] == [row.prediction for row in one.samples]


def test_only_one_window_is_held(tmp_path: Path) -> None:
    task = Questions(25, window=7)
    alive: list[int] = []
    whole = task.windows

    def watched() -> Iterator[list[Item]]:
        for window in whole():
            alive.append(len(window))
            yield window

    task.windows = watched  # type: ignore[method-assign]
    evaluated(task, Scripted(), tmp_path)
    assert set(alive) == {7, 4}


def test_rows_that_change_under_way_are_told(tmp_path: Path) -> None:
    task = Questions(25, window=7)
    reads = count()
    whole = task.windows

    def shrinking() -> Iterator[list[Item]]:
        windows = list(whole())
        yield from windows if next(reads) < 2 else windows[:-1]

    task.windows = shrinking  # type: ignore[method-assign]
    with pytest.raises((IngotError, ValueError)):
        evaluated(task, Scripted(), tmp_path)


# --- asked before ---


def test_another_metric_is_scored_without_asking(tmp_path: Path) -> None:
    evaluated(Questions(12), Scripted(), tmp_path)
    seconds = read_record(tmp_path, "questions")["seconds"]
    nobody = Scripted(lambda prompt: pytest.fail("asked again"))
    found = evaluated(Questions(12, metrics=("exact_match", "chrf")), nobody, tmp_path)
    assert set(found.scores) == {"exact_match", "chrf"}
    assert set(found.samples[0].numbers) == {"exact_match", "chrf"}
    assert read_record(tmp_path, "questions")["seconds"] == seconds  # what the answers took
    assert found.samples[0].n_output_tokens == 1


@pytest.mark.parametrize("change", ["rows", "version", "model", "fresh"])
def test_another_question_or_model_is_asked(tmp_path: Path, change: str) -> None:
    evaluated(Questions(12), Scripted(), tmp_path)
    task, options, subject = Questions(13 if change == "rows" else 12), {}, Scripted()
    if change == "version":
        task.version = 2
    if change == "model":
        options = {"model": {"fingerprint": "another"}}
    if change == "fresh":
        options = {"fresh": True}
    evaluated(task, subject, tmp_path, **options)
    assert len(subject.asked) == task.rows


def test_a_torn_file_is_asked_again(tmp_path: Path) -> None:
    evaluated(Questions(12), Scripted(), tmp_path)
    (tmp_path / "questions.parquet").write_bytes(b"PAR1")
    subject = Scripted()
    evaluated(Questions(12), subject, tmp_path)
    assert len(subject.asked) == 12


def test_answers_of_two_tasks_lie_side_by_side(tmp_path: Path) -> None:
    other = Questions(5)
    other.name = "others"
    evaluated(Questions(12), Scripted(), tmp_path)
    evaluated(other, Scripted(), tmp_path)
    assert {name: len(found.samples) for name, found in load_evaluations(tmp_path).items()} == {
        "others": 5,
        "questions": 12,
    }


# --- ranks ---


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_ask_each_once(tmp_path: Path, world: int) -> None:
    evaluated(Questions(40), Scripted(), tmp_path / "alone")
    barrier, lock, counters = threading.Barrier(world), threading.Lock(), dict[str, Iterator[int]]()
    subjects = [Scripted() for _ in range(world)]
    told: list[int] = []  # by the first rank, which shows the progress of all

    def turns(name: str) -> Iterator[int]:
        while True:
            with lock:
                number = next(counters.setdefault(name, count()))
            yield number

    def work(rank: int) -> None:
        crew = Crew(rank == 0, turns, lambda: barrier.wait() and None)
        evaluate_task(
            Questions(40), lambda: subjects[rank], tmp_path / "crew", name="tuned", model={"fingerprint": "f"},
            section=SECTION, crew=crew, start=lambda total, before: told.append if rank == 0 else lambda n: None,
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert sorted(prompt for it in subjects for prompt in it.asked) == sorted(
        item.prompt for window in Questions(40).windows() for item in window
    )
    assert content(tmp_path / "crew") == content(tmp_path / "alone")
    assert sum(told) == 40
    assert min(told) >= 0


def test_a_crew_goes_on_where_another_number_of_ranks_stopped(tmp_path: Path) -> None:
    left = count()

    def dying(prompt: str) -> str:
        if next(left) >= 9:
            raise Killed
        return Scripted().answer(prompt)

    with pytest.raises(Killed):
        evaluated(Questions(40), Scripted(dying), tmp_path / "crew")
    numbers, subject = count(), Scripted()
    crew = Crew(True, lambda name: numbers)  # a crew of which one rank does all that is left
    evaluated(Questions(40), subject, tmp_path / "crew", crew=crew)
    assert len(subject.asked) == 32
    evaluated(Questions(40), Scripted(), tmp_path / "alone")
    assert content(tmp_path / "crew") == content(tmp_path / "alone")


# --- refused ---


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IngotError, match=r"data\.test"):
        evaluated(Questions(0), Scripted(), tmp_path)


def test_half_an_evaluation_is_told(tmp_path: Path) -> None:
    evaluated(Questions(4), Scripted(), tmp_path)
    with pytest.raises(IngotError, match="others was not evaluated there"):
        load_evaluation(tmp_path, "others")
    (tmp_path / "questions.json").write_text("{")
    with pytest.raises(IngotError, match="damaged"):
        load_evaluation(tmp_path, "questions")
    with pytest.raises(IngotError, match="holds no evaluation"):
        load_evaluations(tmp_path / "nowhere")


# --- merging ---


def test_items_of_one_prompt_merge_in_the_order_of_first_sight() -> None:
    items = [Item("1", "p", ["a"]), Item("2", "q", ["b"]), Item("3", "p", ["c"])]
    assert merge_items(items) == [Item("1", "p", ["a", "c"]), Item("2", "q", ["b"])]
    assert items[0].references == ["a"]  # what came in is untouched
