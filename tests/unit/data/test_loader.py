import itertools
import random

import pytest
import torch

from ingot.data.loader import IGNORE, batches_of, collate, microbatches
from ingot.data.plan import Cursor, Portion, plan_epoch
from ingot.data.rows import ListRows
from ingot.data.template import Encoded
from ingot.recipe import Data, Train


def some_lengths(n: int, seed: int, longest: int = 200) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(n)]


def planned(lengths: list[int], tokens_per_step: int, seed: int, epoch: int, group_by_length: bool) -> list[list[int]]:
    """Rows of every step of an epoch that is not packed: each row is a pack of its own."""
    train = Train(tokens_per_step=tokens_per_step, seed=seed, group_by_length=group_by_length)
    steps = list(plan_epoch(lengths, Data(train="unused", batches="padded"), train, epoch))
    assert all(len(pack) == 1 for packs in steps for pack in packs)
    return [[row for [row] in packs] for packs in steps]


def alone(rows) -> list[list[int]]:
    return [[row] for row in rows]


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize(
    ("n", "tokens_per_step"), [(0, 100), (1, 100), (7, 100), (500, 300), (500, 100_000), (3000, 1)]
)
def test_an_epoch_holds_every_row_once_and_no_step_overflows(n, tokens_per_step, group_by_length):
    lengths = some_lengths(n, seed=n)
    steps = planned(lengths, tokens_per_step, seed=1, epoch=0, group_by_length=group_by_length)
    assert sorted(row for step in steps for row in step) == list(range(n))
    assert all(steps)
    assert all(len(step) == 1 or sum(lengths[row] for row in step) <= tokens_per_step for step in steps)


def test_steps_are_full_where_rows_allow():
    lengths = some_lengths(2000, seed=0)
    steps = planned(lengths, 1000, seed=0, epoch=0, group_by_length=False)
    assert all(sum(lengths[row] for row in step) > 1000 - 200 for step in steps[:-1])


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_plan_is_drawn_from_seed_and_epoch_and_nothing_else(group_by_length):
    lengths = some_lengths(400, seed=0)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return planned(lengths, 1000, seed, epoch, group_by_length)

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
    plain = planned(lengths, 2000, 0, 0, group_by_length=False)
    grouped = planned(lengths, 2000, 0, 0, group_by_length=True)
    assert padded(plain, lengths) > 1.5 * sum(lengths)
    assert padded(grouped, lengths) < 1.1 * sum(lengths)
    assert len(grouped) < 1.1 * len(plain)
    means = [sum(lengths[row] for row in step) / len(step) for step in grouped]
    # Neighbours differ about as much as steps drawn at random do; unshuffled, they differ by almost nothing.
    apart = sum(abs(a - b) for a, b in itertools.pairwise(means)) / (len(means) - 1)
    drawn = random.Random(0).sample(means, len(means))
    assert apart > 0.8 * sum(abs(a - b) for a, b in itertools.pairwise(drawn)) / (len(means) - 1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("budget", [200, 500, 4000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_ranks_share_a_step_exactly(n, world, budget, flat):
    lengths = some_lengths(100, seed=n)
    step = random.Random(n).sample(range(100), n)
    shares = [microbatches(alone(step), lengths, rank, world, budget, flat) for rank in range(world)]
    assert sorted(row for share in shares for batch in share for row in batch) == sorted(step)
    for batch in (batch for share in shares for batch in share):
        assert batch
        sizes = [lengths[row] for row in batch]
        assert (sum(sizes) if flat else len(batch) * max(sizes)) <= budget
    loads = [sum(lengths[row] for batch in share for row in batch) for share in shares]
    assert max(loads) - min(loads) <= max(lengths[row] for row in step)
    assert n < world or min(loads) > 0


@pytest.mark.parametrize("flat", [False, True])
def test_microbatches_do_not_depend_on_the_order_of_the_step(flat):
    lengths = [5] * 20
    step = list(range(20))
    shuffled = random.Random(0).sample(step, 20)
    args = (lengths, 1, 3, 20, flat)
    assert microbatches(alone(step), *args) == microbatches(alone(shuffled), *args)


def test_microbatches_run_from_long_to_short_so_that_the_first_takes_the_most_memory():
    lengths = some_lengths(50, seed=0)
    rows = [row for batch in microbatches(alone(range(50)), lengths, 0, 1, 400, flat=False) for row in batch]
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("flat", [False, True])
def test_a_row_over_the_budget_stands_alone(flat):
    assert microbatches([[0], [1], [2]], [5, 50, 5], 0, 1, 10, flat) == [[1], [0, 2]]


def test_packs_stay_whole_and_full_microbatches_are_few():
    packs = [[0, 1], [2], [3, 4, 5], [6]]
    lengths = [3, 4, 7, 2, 2, 3, 4]
    shares = [microbatches(packs, lengths, rank, 2, 14, flat=True) for rank in (0, 1)]
    assert shares == [[[0, 1, 3, 4, 5]], [[2, 6]]]  # 7 + 7 and 7 + 4: the packs of a rank fit one line


# --- a rank's rows of a step -----------------------------------------------------------------------------------


def portion_of(lengths: list[int], label: int | None = None) -> Portion:
    rows = [
        Encoded([7] * n, [label is None] * n, None if label is None else [label], f"r:{number}")
        for number, n in enumerate(lengths)
    ]
    return Portion(ListRows(rows), alone(range(len(lengths))), Cursor(0, len(lengths)))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_row_reaches_one_rank_and_targets_add_up_to_the_divisor(world):
    portion = portion_of(some_lengths(40, seed=3))
    shares = [batches_of(portion, rank, world, 400, flat=False, even=False) for rank in range(world)]
    assert sorted(row.where for share in shares for part in share for row in part) == sorted(
        row.where for row in portion.rows
    )
    batches = [collate(part, 0) for share in shares for part in share]
    assert sum(batch.n_targets for batch in batches) == portion.n_targets


@pytest.mark.parametrize("label", [None, 4])
def test_a_rank_without_rows_gets_a_muted_one(label):
    portion = portion_of([9, 5], label)
    shares = [batches_of(portion, rank, 4, 100, flat=False, even=False) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]
    for [[row]] in shares[2:]:
        assert len(row.ids) == 5  # the shortest: the least work
        assert not any(row.trainable)
        assert row.labels == (None if label is None else [IGNORE])
        assert collate([row], 0).n_targets == 0
    assert sum(collate(part, 0).n_targets for share in shares for part in share) == portion.n_targets


@pytest.mark.parametrize("flat", [False, True])
def test_even_gives_every_rank_as_many_microbatches_as_the_busiest(flat):
    portion = portion_of([100, 50, 50, 50, 50, 10])
    loose = [batches_of(portion, rank, 3, 100, flat=flat, even=False) for rank in range(3)]
    even = [batches_of(portion, rank, 3, 100, flat=flat, even=True) for rank in range(3)]
    assert len({len(share) for share in even}) == 1
    assert len(even[0]) == max(map(len, loose))
    for rank in range(3):
        assert even[rank][: len(loose[rank])] == loose[rank]
        assert not any(any(row.trainable) for part in even[rank][len(loose[rank]) :] for row in part)
    batches = [collate(part, 0, flat=flat) for share in even for part in share]
    assert sum(batch.n_targets for batch in batches) == portion.n_targets


# --- a batch ---------------------------------------------------------------------------------------------------


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
        [IGNORE, IGNORE, IGNORE, IGNORE],  # trainable, but nothing stands before it
        [IGNORE, IGNORE, IGNORE, 4],
    ]
    assert batch.row_labels is None
    assert batch.n_targets == 3
    assert {batch.ids_BT.dtype, batch.attention_BT.dtype, batch.labels_BT.dtype} == {torch.int64}


def test_a_stop_token_that_is_the_pad_token_stays_a_target():
    batch = collate([Encoded([5, 2], [False, True], None, ""), Encoded([5, 6, 2], [False, True, True], None, "")], 2)
    assert batch.labels_BT.tolist() == [[IGNORE, 2, IGNORE], [IGNORE, 6, 2]]
    assert batch.n_targets == 3


def test_collate_of_classes():
    batch = collate([Encoded([1, 2], [False, False], [3], ""), Encoded([1], [False], [0], "")], 0)
    assert batch.row_labels is not None
    assert batch.row_labels.tolist() == [3, 0]
    assert batch.n_targets == 2
    assert (batch.labels_BT == IGNORE).all()


def test_rows_end_to_end_keep_their_own_positions_and_first_tokens_are_no_targets():
    rows = [
        Encoded([5, 6, 7], [True, True, True], None, "a"),
        Encoded([8], [True], None, "b"),
        Encoded([9, 4], [False, True], None, "c"),
    ]
    batch = collate(rows, pad_id=0, flat=True)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 4]]
    # Row b's only token stands behind row a's last: were it a target, a row would be learned from its neighbour.
    assert batch.labels_BT.tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE, 4]]
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.row_lengths == (3, 1, 2)
    assert batch.attention_BT is None
    assert batch.n_targets == 3 == collate(rows, pad_id=0).n_targets


def test_a_line_is_filled_up_to_a_multiple_by_one_more_row_without_targets():
    rows = [Encoded([5, 6, 7], [True] * 3, None, "a"), Encoded([8, 9], [True] * 2, None, "b")]
    batch = collate(rows, pad_id=3, flat=True, multiple=4)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 3, 3, 3]]
    assert batch.row_lengths == (3, 2, 3)
    assert batch.labels_BT[0, 5:].tolist() == [IGNORE] * 3
    assert batch.n_targets == 3
    assert collate([*rows[:1], Encoded([1], [True], None, "")], 3, flat=True, multiple=4).row_lengths == (3, 1)


def test_classes_end_to_end_are_one_a_row():
    batch = collate([Encoded([1, 2], [False] * 2, [3], ""), Encoded([1], [False], [0], "")], 0, flat=True)
    assert batch.row_labels is not None
    assert batch.row_labels.tolist() == [3, 0]
    assert batch.n_targets == 2
