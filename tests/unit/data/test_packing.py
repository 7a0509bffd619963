import random

import pytest

from ingot.data.packing import best_fit


def fill(bins: list[list[int]], lengths: list[int], capacity: int) -> float:
    return sum(lengths) / (len(bins) * capacity)


def quadratic_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The method as the textbook has it: tokens in each bin, sorted."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, used in enumerate(bins) if used + length <= capacity]
        if fitting:
            bins[max(fitting, key=bins.__getitem__)] += length
        else:
            bins.append(length)
    return sorted(bins)


@pytest.mark.parametrize("seed", range(300))
def test_any_lengths_are_packed_once_and_never_over_capacity(seed):
    draw = random.Random(seed)
    capacity = draw.choice([1, 2, 7, 64, 1000])
    lengths = [draw.randint(1, draw.choice([capacity, 2 * capacity])) for _ in range(draw.choice([0, 1, 3, 50, 200]))]
    bins = best_fit(lengths, capacity)
    assert sorted(index for found in bins for index in found) == list(range(len(lengths)))
    assert all(found for found in bins)
    sums = [sum(lengths[index] for index in found) for found in bins]
    assert all(total <= capacity or len(found) == 1 for total, found in zip(sums, bins, strict=True))
    assert sorted(sums) == quadratic_best_fit(lengths, capacity)
    if (
        max(lengths, default=0) <= capacity
    ):  # Johnson 1973: at most 11/9 OPT + 1; OPT is at least the tokens over capacity
        assert len(bins) <= 11 / 9 * max(-(-sum(lengths) // capacity), sum(2 * n > capacity for n in lengths)) + 1


def test_the_perfect_fit_is_found():
    assert best_fit([6, 4, 5, 5, 10], 10) == [[4], [0, 1], [2, 3]]
    assert best_fit([7, 3, 2, 1], 10) == [[0, 1], [2, 3]]  # 3 goes to the fullest bin that holds it


def test_equal_lengths_keep_their_order_and_the_same_input_gives_the_same_bins():
    assert best_fit([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("capacity", [1024, 4096])
def test_rows_of_realistic_lengths_fill_the_packs(capacity):
    draw = random.Random(0)  # log-normal around 150 tokens with a long tail, as instruction data is
    lengths = [min(capacity, max(4, round(draw.lognormvariate(5, 0.9)))) for _ in range(16_384)]
    assert fill(best_fit(lengths, capacity), lengths, capacity) > 0.995
