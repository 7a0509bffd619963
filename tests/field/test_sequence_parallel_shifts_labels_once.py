"""Under sequence parallel labels were shifted twice, weights of the loss not cut, metrics read in the wrong layout.

modelscope/ms-swift PR #10185, #10035, #9977 (2026): the loss was computed again outside of its owner. Here one function
shifts, before ranks take their parts, so the parts of a loss add up to that of the whole line.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingot.data.loader import IGNORE, collate
from ingot.data.plan import Divisor
from ingot.data.template import Encoded
from ingot.parallel.layout import Layout
from ingot.ranks import Ranks
from ingot.recipe import Objective
from ingot.train.forward import inputs_of
from ingot.train.objectives import next_token

WORDS = 11


class Bigram(nn.Module):
    """Logits of the next word by this one alone: what a token predicts does not depend on who holds the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(WORDS, WORDS))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.table[input_ids]


def sharded(model: Bigram, rank: int, world: int) -> Any:
    """What the objective asks of a rank; nothing is sent."""
    layout = Layout(Ranks(rank, world), context=world)
    return SimpleNamespace(plain=model, layout=layout, device=torch.device("cpu"), forward=model)


def row(ids: list[int], prompt: int) -> Encoded:
    return Encoded(ids, [place >= prompt for place in range(len(ids))], None, "row")


# The cut of two ranks lies in a row, between rows, and in the filling; a target is the first token of a part.
LINES = [
    [row([1, 2, 3, 4, 5, 6, 7, 8], 2)],
    [row([1, 2, 3, 4], 1), row([5, 6, 7, 8], 3)],
    [row([1, 2, 3], 1)],
    [row([1, 2, 3, 4, 5], 4), row([6, 7], 1)],
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rows", LINES, ids=lambda rows: "+".join(str(len(row.ids)) for row in rows))
def test_parts_of_a_line_lose_what_the_line_loses(rows: list[Encoded], world: int) -> None:
    model = Bigram()
    batch = collate(rows, 0, flat=True, multiple=world)
    whole = next_token(sharded(model, 0, 1), batch, Divisor(batch.n_targets, 1), Objective())
    # By hand: the logits of each token against the word behind it, over what is trained.
    terms = [
        torch.log_softmax(model.table[row.ids[place]], 0)[row.ids[place + 1]]
        for row in rows
        for place in range(len(row.ids) - 1)
        if row.trainable[place + 1]
    ]
    assert whole.item() == pytest.approx(-sum(terms).item() / len(terms), abs=1e-6)
    parts = [
        next_token(sharded(model, rank, world), batch, Divisor(batch.n_targets, 1), Objective())
        for rank in range(world)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(whole, model.table)
    summed = sum(torch.autograd.grad(part, model.table)[0] for part in parts)
    torch.testing.assert_close(summed, gradient)


def test_every_token_and_its_position_go_to_one_rank() -> None:
    batch = collate([row([1, 2, 3, 4, 5], 1), row([6, 7], 1)], 0, flat=True, multiple=4)
    parts = [inputs_of(batch, sharded(Bigram(), rank, 4)) for rank in range(4)]
    assert torch.cat([part["input_ids"] for part in parts], dim=1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert torch.cat([part["position_ids"] for part in parts], dim=1).tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert {part["documents"].lengths for part in parts} == {(5, 2, 1)}
    assert batch.labels_BT[0, -1] == IGNORE
