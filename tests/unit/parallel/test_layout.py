"""Who does what: numbers of ranks to groups, lines to parts."""

import pytest
import torch

from ingot.errors import RecipeError
from ingot.parallel.layout import Layout, like, local
from ingot.ranks import Ranks


def layouts(world: int, context: int, tensor: int) -> list[Layout]:
    return [Layout(Ranks(rank, world), context=context, tensor=tensor) for rank in range(world)]


def test_every_rank_has_a_place_of_its_own() -> None:
    places = [(each.data_rank, each.context_rank, each.tensor_rank) for each in layouts(12, context=3, tensor=2)]
    assert places == [(data, context, tensor) for data in range(2) for context in range(3) for tensor in range(2)]
    assert {(each.data, each.loss_parts) for each in layouts(12, context=3, tensor=2)} == {(2, 6)}


def test_one_rank_does_everything() -> None:
    layout = Layout()
    assert (layout.data, layout.data_rank, layout.context_rank, layout.tensor_rank, layout.loss_parts) == (
        1,
        0,
        0,
        0,
        1,
    )
    line = torch.arange(6).view(1, 6)
    assert layout.cut(line) is line


def test_a_line_is_cut_in_order_and_the_same_for_a_tensor_group() -> None:
    line = torch.arange(12).view(1, 12)
    parts = [each.cut(line) for each in layouts(8, context=4, tensor=2)]
    assert torch.equal(torch.cat(parts[::2], dim=1), line)
    assert all(torch.equal(*parts[number : number + 2]) for number in range(0, 8, 2))


@pytest.mark.parametrize(
    ("context", "tensor", "field"), [(3, 1, "context = 3"), (1, 3, "tensor = 3"), (2, 3, "tensor = 3")]
)
def test_groups_must_part_the_ranks(context: int, tensor: int, field: str) -> None:
    with pytest.raises(RecipeError, match=rf"parallel.{field}.*4 ranks cannot be parted.*{context * tensor}"):
        layouts(4, context, tensor)


def test_plain_tensors_lie_as_they_are() -> None:
    tensor = torch.ones(3)
    assert Layout().spread(tensor) is tensor
    assert local(tensor) is tensor
    assert like(tensor, tensor) is tensor
