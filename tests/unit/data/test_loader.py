import itertools
import random

import pytest
import torch

from ingot.data.loader import IGNORE, collate, microbatches, plan_epoch
from ingot.data.template import Encoded


def some_lengths(n: int, seed: int, longest: int = 200) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(n)]


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize(
    ("n", "tokens_per_step"), [(0, 100), (1, 100), (7, 100), (500, 300), (500, 100_000), (3000, 1)]
)
def test_an_epoch_holds_every_row_once_and_no_step_overflows(n, tokens_per_step, group_by_length):
    lengths = some_lengths(n, seed=n)
    steps = plan_epoch(lengths, tokens_per_step, seed=1, epoch=0, group_by_length=group_by_length)
    assert sorted(row for step in steps for row in step) == list(range(n))
    assert all(steps)
    assert all(len(step) == 1 or sum(lengths[row] for row in step) <= tokens_per_step for step in steps)


def test_steps_are_full_where_rows_allow(tmp_path):
    lengths = some_lengths(2000, seed=0)
    steps = plan_epoch(lengths, 1000, seed=0, epoch=0, group_by_length=False)
    assert all(sum(lengths[row] for row in step) > 1000 - 200 for step in steps[:-1])


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_plan_is_drawn_from_seed_and_epoch_and_nothing_else(group_by_length):
    lengths = some_lengths(400, seed=0)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(lengths, 1000, seed, epoch, group_by_length)

    random.seed(1)
    first = plan(3, 0)
    random.seed(2)
    assert plan(3, 0) == first
    assert plan(3, 1) != first
    assert plan(4, 0) != first
    assert plan(0, 1) != plan(1, 0)
    assert [row for step in first for row in step] != list(range(400))


def padded(steps: list[list[int]], lengths: list[int]) -> int:
    return sum(len(step) * max(lengths[row] for row in step) for step in steps)


def test_grouping_by_length_saves_padding_and_keeps_steps_in_random_order():
    lengths = some_lengths(5000, seed=0)
    plain = plan_epoch(lengths, 2000, 0, 0, group_by_length=False)
    grouped = plan_epoch(lengths, 2000, 0, 0, group_by_length=True)
    assert padded(plain, lengths) > 1.5 * sum(lengths)
    assert padded(grouped, lengths) < 1.1 * sum(lengths)
    assert len(grouped) < 1.1 * len(plain)
    means = [sum(lengths[row] for row in step) / len(step) for step in grouped]
    # Neighbours differ about as much as steps drawn at random do; unshuffled, they differ by almost nothing.
    apart = sum(abs(a - b) for a, b in itertools.pairwise(means)) / (len(means) - 1)
    drawn = random.Random(0).sample(means, len(means))
    assert apart > 0.8 * sum(abs(a - b) for a, b in itertools.pairwise(drawn)) / (len(means) - 1)


@pytest.mark.parametrize("budget", [200, 500, 4000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_ranks_share_a_step_exactly(n, world, budget):
    lengths = some_lengths(100, seed=n)
    step = random.Random(n).sample(range(100), n)
    shares = [microbatches(step, lengths, rank, world, budget) for rank in range(world)]
    assert sorted(row for share in shares for batch in share for row in batch) == sorted(step)
    for batch in (batch for share in shares for batch in share):
        assert batch
        assert len(batch) * max(lengths[row] for row in batch) <= budget
    loads = [sum(lengths[row] for batch in share for row in batch) for share in shares]
    assert max(loads) - min(loads) <= max(lengths[row] for row in step)
    assert n < world or min(loads) > 0


def test_microbatches_do_not_depend_on_the_order_of_the_step():
    lengths = [5] * 20
    step = list(range(20))
    shuffled = random.Random(0).sample(step, 20)
    assert microbatches(step, lengths, 1, 3, 20) == microbatches(shuffled, lengths, 1, 3, 20)


def test_microbatches_run_from_long_to_short_so_that_the_first_takes_the_most_memory():
    lengths = some_lengths(50, seed=0)
    rows = [row for batch in microbatches(range(50), lengths, 0, 1, 400) for row in batch]
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)


def test_a_row_over_the_budget_stands_alone():
    assert microbatches([0, 1, 2], [5, 50, 5], 0, 1, 10) == [[1], [0, 2]]


def test_collate_pads_on_the_right_and_does_not_shift():
    rows = [
        Encoded([5, 6, 7], [False, True, True], None, "a"),
        Encoded([8], [True], None, "b"),
        Encoded([9, 9, 9, 4], [False, False, False, True], None, "c"),
    ]
    batch = collate(rows, pad_id=9)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9], [9, 9, 9, 4]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [
        [IGNORE, 6, 7, IGNORE],
        [8, IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, IGNORE, 4],
    ]
    assert batch.class_labels_B is None
    assert batch.n_targets == 3  # the first token of the second row has nothing before it
    assert {batch.ids_BT.dtype, batch.attention_BT.dtype, batch.labels_BT.dtype} == {torch.int64}


def test_a_stop_token_that_is_the_pad_token_stays_a_target():
    batch = collate([Encoded([5, 2], [False, True], None, ""), Encoded([5, 6, 2], [False, True, True], None, "")], 2)
    assert batch.labels_BT.tolist() == [[IGNORE, 2, IGNORE], [IGNORE, 6, 2]]
    assert batch.n_targets == 3


def test_collate_of_classes():
    batch = collate([Encoded([1, 2], [False, False], 3, ""), Encoded([1], [False], 0, "")], 0)
    assert batch.class_labels_B is not None
    assert batch.class_labels_B.tolist() == [3, 0]
    assert batch.n_targets == 2
    assert (batch.labels_BT == IGNORE).all()
