"""From beats of ranks to a sentence that names rank, step and collective."""

from dataclasses import replace

import pytest

from ingot.parallel.blame import (
    BEAT_BYTES,
    Beat,
    all_stuck,
    collectives,
    died,
    left,
    silent,
    stalled,
    story,
    stuck_story,
)
from ingot.recipe import Parallel

DDP = collectives(Parallel(strategy="ddp"), cuda=False)
FSDP = collectives(Parallel(strategy="fsdp"), cuda=False)


def beat(rank: int, step: int = 13, phase: str = "backward", for_s: float = 600.0, **more: object) -> Beat:
    known = Beat(rank, f"worker-{rank}", "machine", 800 + rank, "1", step=step, phase=phase, for_s=for_s)
    return replace(known, **more)


def test_the_rank_that_is_stuck_in_its_data_is_named_with_where_the_others_wait():
    beats = [beat(0), beat(1, 12, "data", 601.4), beat(2), beat(3)]
    assert story(stalled(beats, 600, DDP), beats, DDP, "Continue.") == (
        'rank 1 (node worker-1, pid 801) has been in step 12, "data", for 601 s; '
        'ranks 0, 2 and 3 wait for it in the gradient reduction (all-reduce) of step 13 ("backward"). Continue.'
    )


@pytest.mark.parametrize(
    ("places", "words", "blamed"),
    [
        # Behind by a step, by a phase, and in a phase that waits for nobody under DDP while it does under FSDP.
        ([(12, "validation"), (13, "backward")], DDP, [0]),
        ([(13, "communication"), (13, "backward")], DDP, [1]),
        ([(13, "backward"), (13, "forward")], DDP, [1]),
        ([(13, "backward"), (13, "forward")], FSDP, []),
        ([(13, "evaluation"), (13, "validation")], DDP, [1]),
        ([(0, "evaluation"), (1, "communication")], DDP, [0]),
        # Nobody waits: all validate, all load, or all read data.
        ([(13, "validation"), (13, "validation")], DDP, []),
        ([(13, "evaluation"), (13, "evaluation")], DDP, []),
        ([(0, "start"), (0, "start")], DDP, []),
        ([(13, "data"), (14, "data")], DDP, []),
        ([(13, "data"), (13, "communication"), (13, "communication")], DDP, [0]),
    ],
)
def test_who_is_behind(places, words, blamed):
    beats = [beat(rank, step, phase) for rank, (step, phase) in enumerate(places)]
    assert [lost.rank for lost in stalled(beats, 600, words)] == blamed


def test_a_slow_rank_is_left_alone_until_the_timeout_and_while_others_still_work():
    assert stalled([beat(0, 12, "data", 599), beat(1)], 600, DDP) == []
    assert stalled([beat(0, 12, "data"), beat(1, for_s=3)], 600, DDP) == []
    assert stalled([beat(0, 12, "data"), beat(1, left="KeyError")], 600, DDP) == []


def test_a_network_that_carries_nothing():
    beats = [beat(rank, phase="communication") for rank in range(3)]
    assert stalled(beats, 600, DDP) == []
    assert all_stuck(beats, 3, 600)
    assert not all_stuck(beats[:2], 3, 600)
    assert not all_stuck([beat(rank, phase="validation") for rank in range(3)], 3, 600)
    assert "all 3 ranks have been in the sum of the losses (all-reduce) of step 13" in stuck_story(beats, DDP, "")


def test_the_dead_the_silent_and_those_that_failed():
    assert died(beat(1)).text == 'rank 1 (node worker-1, pid 801) died in step 13, "backward"'
    assert silent(1, beat(1), 12.3).text.startswith(
        "rank 1 (node worker-1, pid 801) has shown no sign of life for 12 s"
    )
    assert silent(1, None, 12.3).text == "rank 1 has shown no sign of life for 12 s"
    assert left(beat(1, left="KeyError: 'x'")).text.endswith("ended in step 13, \"backward\": KeyError: 'x'")


def test_hundreds_of_ranks_fit_into_a_message():
    beats = [beat(rank) for rank in range(512)]
    text = story([died(each) for each in beats[:256]], beats, DDP, "")
    assert "and 248 more" in text
    assert "256 ranks (256, 257, 258, ...) wait for them" in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("section", "phase", "word"),
    [
        (Parallel(strategy="ddp"), "backward", "gradient reduction (all-reduce)"),
        (Parallel(strategy="fsdp"), "forward", "all-gather"),
        (Parallel(strategy="hsdp"), "backward", "reduce-scatter"),
        (Parallel(strategy="zero1"), "step", "updated parameters"),
        (Parallel(strategy="zero3"), "forward", "gathering of parameters"),
        (Parallel(strategy="ddp", context=2), "forward", "all-to-all"),
        (Parallel(strategy="none", tensor=2), "backward", "inside a layer"),
    ],
)
def test_each_strategy_waits_in_its_own_collectives(section, phase, word):
    assert word in collectives(section, cuda=False)[phase]


def test_on_a_gpu_the_host_waits_later_than_the_work():
    assert "gradient reduction" in collectives(Parallel(strategy="ddp"), cuda=True)["communication"]


def test_a_beat_survives_any_error_text_in_the_same_space():
    told = beat(1, left='ValueError: "quoted" \\ \n\t ü 漢字 ' * 100)
    line = told.to_bytes()
    assert len(line) == BEAT_BYTES == len(beat(1).to_bytes())
    assert Beat.from_bytes(line).left.startswith("ValueError: 'quoted' ")
    assert Beat.from_bytes(beat(1).to_bytes()) == beat(1)
    assert Beat.from_bytes(line[:40]) is None
    assert Beat.from_bytes(b"{}") is None
