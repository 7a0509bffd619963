"""Packing changes the loss at the start, lowers accuracy, or drives the loss to 0.

axolotl#3301 (Olmo-3, whose layers have windows), ms-swift#5832, #4581 (to 0 with sequence parallel; ranks that share
lines are in tests/distributed/test_matrix.py).
"""

import pytest
import torch

from ingot.data.loader import batches_of, collate
from ingot.data.plan import Cursor, Divisor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.objectives import OBJECTIVES

WINDOWED = {"kind": "olmo3", "sliding_window": 6}
# Rotary positions are relative, so only learned ones show whether they start again with every row.
LEARNED = {"kind": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def mean_loss(cells, layout, model, **train):
    """Over all rows, before training, as the loop would lay them out; and the size of the gradient."""
    recipe = cells.recipe_of({"data": {"batches": layout}, "train": {"max_steps": None, "epochs": 1, **train}})
    sharded = parallelize(cells.small_model(**model), Ranks(), recipe, torch.device("cpu"), torch.float32)
    feed = PlannedFeed(ListRows(cells.random_rows(60, 1)), recipe.data, recipe.train)
    total, rows, n_targets = 0.0, 0, sum(portion.n_targets for portion in feed.start(Cursor()))
    for portion in feed.start(Cursor()):
        flat = layout != "padded"
        for part in batches_of(portion, 0, 1, recipe.train.tokens_per_microbatch, flat=flat, even=False):
            rows += len(part)
            batch = collate(part, 0, flat=flat)
            loss = OBJECTIVES["language-modeling"](sharded, batch, Divisor(n_targets, 1), recipe.objective)
            loss.backward()
            total += float(loss.detach())
    assert rows == 60
    norm = torch.stack([p.grad.norm() for p in sharded.plain.parameters() if p.grad is not None]).norm()
    return total, float(norm)


@pytest.mark.parametrize("model", [{"kind": "llama"}, WINDOWED, LEARNED], ids=["llama", "olmo3", "gpt2"])
@pytest.mark.parametrize("budget", [32, 120])
def test_the_first_loss_does_not_depend_on_the_layout(cells, model, budget):
    padded = mean_loss(cells, "padded", model, tokens_per_microbatch=budget)
    for layout in ("padding-free", "packed"):
        assert mean_loss(cells, layout, model, tokens_per_microbatch=budget) == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("model", [{"kind": "llama"}, WINDOWED], ids=["llama", "olmo3"])
def test_padding_free_training_is_padded_training(cells, model, tmp_path):
    """Loss and gradient norm of every step, the watched loss, and the final weights."""
    for layout in ("padded", "padding-free"):
        cells.train({"name": layout, "model": model, "sections": {"data": {"batches": layout}}}, tmp_path)
    (padded, weights), (free, others) = (cells.results(tmp_path, name) for name in ("padded", "padding-free"))
    for curve in ("losses", "norms", "watched"):
        assert free[curve] == pytest.approx(padded[curve], rel=1e-5)
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4


def test_packing_trains_on_every_row_once_an_epoch(cells):
    recipe = cells.recipe_of({"data": {"batches": "packed"}, "train": {"max_steps": None, "epochs": 2}})
    feed = PlannedFeed(ListRows(cells.random_rows(60, 1)), recipe.data, recipe.train)
    seen = [index for portion in feed.start(Cursor()) for index in portion.indices]
    assert sorted(seen) == sorted([*range(60)] * 2)
