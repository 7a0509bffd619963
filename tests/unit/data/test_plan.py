import itertools
import math
import random

import numpy as np
import pytest

from ingot.data.packing import best_fit
from ingot.data.plan import PACK_WINDOW_ROWS, WINDOW_STEPS, Cursor, PlannedFeed, mixed_order, plan_epoch
from ingot.data.rows import ListRows
from ingot.data.template import Encoded
from ingot.recipe import Data, Train


def some_lengths(n: int, seed: int, longest: int = 200) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(n)]


def data(**values) -> Data:
    return Data(train="unused", **{"batches": "padded", **values})


def plan(lengths, tokens_per_step: int, seed: int = 0, epoch: int = 0, group: bool = False, **values):
    train = Train(tokens_per_step=tokens_per_step, seed=seed, group_by_length=group)
    return [[row for pack in packs for row in pack] for packs in plan_epoch(lengths, data(**values), train, epoch)]


# --- an epoch --------------------------------------------------------------------------------------------------


def filled(order, lengths, tokens):
    stretches, used = [], 0
    for row in order:
        if not stretches or used + lengths[row] > tokens:
            stretches.append([])
            used = 0
        stretches[-1].append(row)
        used += lengths[row]
    return stretches


def plainly(lengths, tokens_per_step, seed, epoch, group):
    """The plan of the first release, row by row: shipped scores were measured with its order."""
    draw = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if not group:
        return filled(order, lengths, tokens_per_step)
    ordered = []
    for number, window in enumerate(filled(order, lengths, WINDOW_STEPS * tokens_per_step)):
        ordered += sorted(window, key=lambda row: lengths[row], reverse=number % 2 == 1)
    steps = filled(ordered, lengths, tokens_per_step)
    draw.shuffle(steps)
    return steps


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("n", "tokens"), [(1, 100), (7, 100), (500, 300), (500, 100_000), (3000, 1), (3000, 500)])
def test_the_order_is_the_one_that_shipped_scores_were_measured_with(n, tokens, group):
    lengths = some_lengths(n, seed=n)
    for seed, epoch in ((0, 0), (3, 2)):
        assert plan(lengths, tokens, seed, epoch, group) == plainly(lengths, tokens, seed, epoch, group)


def test_packed_steps_hold_every_row_once_and_are_nearly_full():
    lengths = [min(512, length) for length in some_lengths(30_000, seed=1, longest=400)]
    found = list(plan_epoch(lengths, data(batches="packed", max_tokens=512), Train(tokens_per_step=4096), 0))
    packs = [pack for packs in found for pack in packs]
    assert sorted(row for pack in packs for row in pack) == list(range(30_000))
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(sizes) <= 512
    steps = [sum(lengths[row] for pack in packs for row in pack) for packs in found]
    assert max(steps) <= 4096
    assert sum(lengths) / (len(steps) * 4096) > 0.99
    assert [len(packs) for packs in found[:-1]].count(8) > 0.95 * len(found)
    assert sizes != sorted(sizes, reverse=True)  # best-fit leaves them sorted; steps must not be


def test_packs_are_those_of_best_fit_within_a_window():
    lengths = some_lengths(PACK_WINDOW_ROWS + 1000, seed=2, longest=90)
    found = plan_epoch(lengths, data(batches="packed", pack_tokens=100), Train(tokens_per_step=1000), 1)
    draw = random.Random("0 1")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    packs = []
    for start in (0, PACK_WINDOW_ROWS):
        window = order[start : start + PACK_WINDOW_ROWS]
        packs += [[window[i] for i in bin] for bin in best_fit([lengths[row] for row in window], 100)]
    draw.shuffle(packs)
    assert [pack for packs in found for pack in packs] == packs


# --- mixtures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100, 100], [1000, 10], [10, 1000, 90]])
@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 2]])
def test_a_mixture_takes_rows_by_weight_and_goes_round_evenly(sizes, weights):
    sources = list(zip(sizes, weights, strict=False))
    seen = np.zeros(sum(sizes), dtype=int)
    starts = np.cumsum([0, *sizes])
    for epoch in range(4):
        order = np.array(mixed_order(sources, 0, epoch, random.Random(f"0 {epoch}")))
        for number, (_, weight) in enumerate(sources):
            inside = (order >= starts[number]) & (order < starts[number + 1])
            assert inside.sum() == pytest.approx(sum(sizes) * weight / sum(w for _, w in sources), abs=0.51)
        seen += np.bincount(order, minlength=len(seen))
        for start, end in itertools.pairwise(starts):
            assert np.ptp(seen[start:end]) <= 1  # none n+1 times before every one n times, over the epochs too
    # Mixed, not one source after the other: the first half holds both halves of the rows.
    half = order[: len(order) // 2] < starts[1]
    assert 0.3 * (order < starts[1]).sum() < half.sum() < 0.7 * (order < starts[1]).sum() + 1


# --- a feed ----------------------------------------------------------------------------------------------------


def feed(n: int = 300, sources=None, **train) -> PlannedFeed:
    lengths = some_lengths(n, seed=n, longest=40)
    batches = train.pop("batches", "padded")
    rows = ListRows([Encoded([1] * length, [True] * length, None, f"r:{i}") for i, length in enumerate(lengths)])
    return PlannedFeed(rows, data(batches=batches, max_tokens=64), Train(tokens_per_step=200, **train), sources)


def steps_of(portions) -> list:
    return [(portion.packs, portion.cursor) for portion in portions]


KINDS = [
    {"epochs": 3},
    {"epochs": 2.4, "group_by_length": True},
    {"max_steps": 75},
    {"epochs": 2.5, "batches": "packed"},
    {"epochs": 2, "sources": [(250, 1.0), (50, 3.0)]},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_from_any_cursor_come_exactly_the_rest_of_the_steps(kind):
    whole = steps_of(feed(**kind).start(Cursor()))
    assert len(whole) == feed(**kind).steps
    assert len({cursor.epoch for _, cursor in whole}) > 1
    for number, (_, cursor) in enumerate(whole):
        at_the_end_of_an_epoch = whole[min(number + 1, len(whole) - 1)][1].epoch > cursor.epoch
        if number % 5 == 0 or at_the_end_of_an_epoch:
            # A feed of its own, as in a resumed run: it has planned nothing before.
            assert steps_of(feed(**kind).start(cursor)) == whole[number + 1 :]
    assert steps_of(feed(**kind).start(whole[-1][1])) == []


def test_a_feed_may_be_started_twice_and_says_the_same():
    one = feed(epochs=2)
    assert steps_of(one.start(Cursor())) == steps_of(one.start(Cursor()))


@pytest.mark.parametrize(("epochs", "share"), [(0.25, 0.25), (1, 1), (1.5, 0.5), (2.999999999999, 1)])
def test_fractions_of_an_epoch_are_fractions_of_its_steps(epochs, share):
    one = feed(epochs=epochs)
    *before, last = [len(one.epoch(epoch)) for epoch in range(math.ceil(epochs))]
    assert one.steps == sum(before) + round(share * last)
    assert len(steps_of(one.start(Cursor()))) == one.steps
    assert feed(n=5, epochs=0.01).steps == 1  # never none


def test_max_steps_wins_and_runs_over_as_many_epochs_as_it_takes():
    in_one = len(feed(epochs=1).epoch(0))
    one = feed(max_steps=3 * in_one + 2, epochs=1)
    cursors = [portion.cursor for portion in one.start(Cursor())]
    assert one.steps == len(cursors) == 3 * in_one + 2
    assert {cursor.epoch for cursor in cursors} == {0, 1, 2, 3}
    assert feed(max_steps=3).steps == len(list(feed(max_steps=3).start(Cursor()))) == 3


def test_epochs_differ_and_seeds_differ():
    orders = [plan(some_lengths(300, 0), 200, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_the_divisor_and_the_tokens_of_a_portion_are_sums_over_its_rows():
    one = feed()
    portion = next(iter(one.start(Cursor())))
    rows = [one.rows[index] for index in portion.indices]
    assert portion.n_tokens == sum(len(row.ids) for row in rows)
    assert portion.n_targets == sum(len(row.ids) - 1 for row in rows)  # nothing predicts a row's first token


def test_a_plan_is_arrays_and_not_a_million_lists():
    found = plan_epoch(np.full(50_000, 10), data(), Train(tokens_per_step=100), 0)
    held = found.rows.nbytes + found.pack_ends.nbytes + found.step_ends.nbytes
    assert held < 20 * 50_000
    assert found[len(found) - 1] == list(found)[-1]
    with pytest.raises(IndexError):
        found[len(found)]
