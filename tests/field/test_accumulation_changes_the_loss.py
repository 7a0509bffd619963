"""The same global batch trained in other portions has another loss or gradient.

trl#2175, transformers#34191, #34263, #35438 (means of microbatch means); LlamaFactory#7443, axolotl#2262, #3196 (the
first loss is n times too large); unsloth#8261, unsloth-zoo#1023 (three owners of the divisor: the gradient is 1/n or
n times); torchtitan#1842, transformers#34242 (means of rank means).
"""

import pytest
import torch
import torch.nn.functional as F

from ingot.data.loader import IGNORE, batches_of, collate
from ingot.data.plan import Cursor, Divisor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.objectives import OBJECTIVES

BUDGETS = (24, 60, 10_000)
WORLDS = (1, 2, 5)


@pytest.fixture
def step(cells):
    """(recipe, model on one rank, one step of 400 tokens)."""
    recipe = cells.recipe_of({"train": {"tokens_per_step": 400}})
    sharded = parallelize(cells.small_model("llama"), Ranks(), recipe, torch.device("cpu"), torch.float32)
    feed = PlannedFeed(ListRows(cells.random_rows(60, 1)), recipe.data, recipe.train)
    return recipe, sharded, next(iter(feed.start(Cursor())))


def learned(step, world, budget):
    """Loss and gradient of the step, summed over its microbatches on all ranks."""
    recipe, sharded, portion = step
    sharded.plain.zero_grad()
    loss = 0.0
    for rank in range(world):
        for part in batches_of(portion, rank, world, budget, flat=True, even=False):
            batch = collate(part, 0, flat=True)
            value = OBJECTIVES["language-modeling"](sharded, batch, portion.divisor, recipe.objective)
            sharded.backward(value)
            loss += value.item()
    return loss, torch.cat([p.grad.flatten() for p in sharded.plain.parameters()])


def textbook(step):
    """Mean cross-entropy over every target of the step, in one forward pass and torch's own words."""
    _, sharded, portion = step
    sharded.plain.zero_grad()
    batch = collate([portion.rows[index] for index in portion.indices], 0)
    logits = sharded.plain(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in sharded.plain.parameters()])


def test_loss_and_gradient_are_the_textbooks_in_any_portions(step):
    loss, gradient = textbook(step)
    for world in WORLDS:
        for budget in BUDGETS:
            found, other = learned(step, world, budget)
            assert found == pytest.approx(loss, abs=1e-5), (world, budget)
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-6)


def test_means_of_means_would_be_seen(step):
    """The rows are uneven enough that the wrong way gives another loss: the test above can fail."""
    recipe, sharded, portion = step
    parts = batches_of(portion, 0, 1, 60, flat=True, even=False)
    means = []
    for part in parts:
        batch = collate(part, 0, flat=True)
        means.append(
            OBJECTIVES["language-modeling"](sharded, batch, Divisor(batch.n_targets, 1), recipe.objective).item()
        )
    assert abs(sum(means) / len(means) - textbook(step)[0]) > 1e-3
