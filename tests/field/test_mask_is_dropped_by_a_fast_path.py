"""An option that makes training faster loses the mask, and the prompt is learned too (trl#3781, #3484)."""

from dataclasses import replace

import pytest
import torch

from ingot.data.loader import collate
from ingot.data.plan import Divisor
from ingot.parallel.recompute import recompute_blocks
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.objectives import OBJECTIVES

PATHS = {
    "padded": {"flat": False},
    "padding-free": {"flat": True},
    "shared line": {"flat": True, "multiple": 8},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradient_come_from_the_answer_alone(cells, path, recompute):
    recipe = cells.recipe_of({})
    model = cells.small_model("llama")
    if recompute:
        recompute_blocks(model)
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    rows = cells.random_rows(3, 5)
    n_targets = sum(sum(row.trainable[1:]) for row in rows)
    batch = collate(rows, 0, **PATHS[path])
    assert batch.n_targets == n_targets
    loss = OBJECTIVES["language-modeling"](sharded, batch, Divisor(n_targets, 1), recipe.objective)

    logits = [model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in rows]
    by_hand = -sum(
        logits[i][t - 1, row.ids[t]] for i, row in enumerate(rows) for t in range(1, len(row.ids)) if row.trainable[t]
    )
    torch.testing.assert_close(loss, by_hand / n_targets, rtol=0, atol=1e-5)
    everything = [replace(row, trainable=[True] * len(row.ids)) for row in rows]
    learned_all = OBJECTIVES["language-modeling"](
        sharded, collate(everything, 0, **PATHS[path]), Divisor(n_targets, 1), recipe.objective
    )
    assert abs(learned_all.item() - loss.item()) > 0.1, "learning the prompt too would be seen"
